"""The benchmark of whole units: the peers meet their goals, training goes on where it stopped, and the table."""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.networks import numbers

sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import units
import units_cases
import units_ours
import units_peers
from finished_runs import Runs


@pytest.fixture
def case() -> units_cases.Case:
    """A small network with batch normalisation, on two classes of noise with a mean of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)]
        net = nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.BatchNorm2d(16), nn.ReLU(), *pool)
    y = torch.arange(600) % 2
    x = numbers(600, 4, 6, 6, seed=0).float() + y.view(-1, 1, 1, 1)
    parts = [(x[some], y[some]) for some in (slice(400), slice(400, 500), slice(500, 600))]
    found = units_cases.Case(
        net.eval(), "8", *parts, lambda x, chance: x + torch.rand(len(x), 1, 1, 1, generator=chance)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    units_cases.learn(net, found, optimizer, 2, Path("nowhere"))
    return found


@pytest.mark.parametrize("name", units_peers.PEERS)
def test_peers_save_as_much_as_they_must_and_what_the_floor_allows(case, name):
    peer = units_peers.PEERS[name]
    dense = units_peers.adds_of(case.network, case.example)
    before = deepcopy(case.network.state_dict())
    found = units_peers.to_adds(case, peer, 0.4, seed=0)
    left = units_peers.adds_of(found, case.example) / dense
    assert 0.35 < left <= 0.6
    assert found(case.example).shape == (64, 2)
    held = units_peers.to_floor(case, peer, 2.0, seed=0)
    assert case.score(held, case.choosing) >= case.score(case.network, case.choosing) - 2
    assert all(torch.equal(one, before[name]) for name, one in case.network.state_dict().items())


def test_interrupted_training_goes_on_as_if_it_had_not_stopped(case, tmp_path, monkeypatch):
    monkeypatch.setattr(units_cases, "EVERY", 2)

    def trained(given: units_cases.Case) -> nn.Module:
        net = deepcopy(case.network)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        units_cases.learn(net, given, optimizer, 2, tmp_path / "state")
        return net

    steps = 0

    def stops(x: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt
        return case.augmented(x, chance)

    whole = trained(case)
    with pytest.raises(KeyboardInterrupt):
        trained(replace(case, augmented=stops))
    assert (tmp_path / "state").exists()
    again = trained(case)
    assert not (tmp_path / "state").exists()
    for one, other in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_statistics_become_those_of_all_batches(case):
    units_cases.recalibrate(case.network, inputs := case.calibration(0)[0])
    with torch.no_grad():
        outputs = case.network[0](inputs)
    assert torch.allclose(case.network[1].running_mean, outputs.mean((0, 2, 3)), atol=1e-4)
    assert not case.network[1].training


def test_two_of_four_are_kept_and_refits_come_closer(case):
    def error(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(case.choosing[0]) - case.network(case.choosing[0])).square().mean())

    largest, refitted = (units_ours.largest_of_four(case, 0, refitted) for refitted in (False, True))
    ours = units_ours.with_pattern(case, 0)
    for net in (largest, refitted, ours):
        assert int((net[3].weight != 0).sum()) == net[3].weight.numel() // 2
        assert bool(((net[0].weight != 0).sum(1) == 2).all())
    assert max(error(refitted), error(ours)) < error(largest)


def test_the_table_has_a_line_for_each_way_and_no_run_is_repeated(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(units, "RUNS", 2)
    monkeypatch.setattr(units, "CASES", {"LeNet-5": lambda _: case})
    monkeypatch.setattr(units, "PLAN", {"LeNet-5": ("40 %", "2 of 4")})
    monkeypatch.setattr(units, "UNIT_WAYS", {name: way for name, way in units.UNIT_WAYS.items() if "Taylor" in name})
    files = ["--data", str(tmp_path), "--stored", str(tmp_path), "--results", str(tmp_path / "units.jsonl")]
    monkeypatch.setattr(sys, "argv", ["", *files, "--seeds", "1"])
    units.main()
    rows = Runs(tmp_path / "units.jsonl").rows
    assert [row["goal"] for row in rows] == ["40 %"] * 4 + ["2 of 4"] * 3
    units.main()
    assert Runs(tmp_path / "units.jsonl").rows == rows
    table = (tmp_path / "units.md").read_text()
    assert table in capsys.readouterr().out
    line = next(line for line in table.splitlines() if line.startswith("| Torch-Pruning, Taylor, recalibrated |"))
    assert f"| {100 * rows[2]['adds']:.1f}% |" in line


def test_a_line_says_why_a_peer_cannot(case, tmp_path, monkeypatch, capsys):
    def fails(*_: object) -> nn.Module:
        net = deepcopy(case.network)
        net[3] = nn.Conv2d(7, 16, 3, padding=1)
        return net

    monkeypatch.setattr(units, "RUNS", 2)
    monkeypatch.setattr(units, "CASES", {"LeNet-5": lambda _: case})
    monkeypatch.setattr(units, "PLAN", {"LeNet-5": ("40 %", "half a point")})
    monkeypatch.setattr(units_peers, "removed", fails)
    files = ["--data", str(tmp_path), "--stored", str(tmp_path), "--results", str(tmp_path / "units.jsonl")]
    monkeypatch.setattr(sys, "argv", ["", *files, "--seeds", "1", "--ways", "Torch-Pruning, magnitude"])
    units.main()
    rows = Runs(tmp_path / "units.jsonl").rows
    assert [row["cannot"][:44] for row in rows] == ["RuntimeError, Given groups=1, weight of size"] * 2
    assert capsys.readouterr().out.count("| Torch-Pruning, magnitude | cannot: RuntimeError, Given groups=1") == 2


def test_a_peer_that_leaves_too_much_cannot(case, monkeypatch):
    monkeypatch.setattr(units_peers, "removed", lambda *_: case.network)
    peer = units_peers.PEERS["Torch-Pruning, magnitude"]
    with pytest.raises(units_peers.CannotError, match="more than 60% of the multiply-adds stay"):
        units_peers.to_adds(case, peer, 0.4, seed=0)


def test_a_peer_that_fails_at_large_shares_is_asked_for_smaller_ones(case, monkeypatch):
    removed = units_peers.removed

    def fails(case: units_cases.Case, peer: units_peers.Peer, share: float, gradients: dict) -> nn.Module:
        if share > 0.45:
            raise ValueError("too much")
        return removed(case, peer, share, gradients)

    monkeypatch.setattr(units_peers, "removed", fails)
    peer = units_peers.PEERS["Torch-Pruning, magnitude"]
    found = units_peers.to_adds(case, peer, 0.4, seed=0)
    assert 0.35 < units_peers.adds_of(found, case.example) / units_peers.adds_of(case.network, case.example) <= 0.6


def test_stored_networks_are_timed_again_and_trained_on(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(units, "RUNS", 2)
    monkeypatch.setattr(units, "CASES", {"ResNet-20": lambda _: case})
    monkeypatch.setattr(units, "PLAN", {"ResNet-20": ("50 %", "50 %, then an epoch")})
    files = ["--data", str(tmp_path), "--stored", str(tmp_path), "--results", str(tmp_path / "units.jsonl")]
    argv = ["", *files, "--seeds", "1", "--ways", "Torch-Pruning, magnitude"]
    monkeypatch.setattr(sys, "argv", argv)
    units.main()
    first, trained = Runs(tmp_path / "units.jsonl").rows
    assert first["seconds"] == trained["seconds"]  # the network is pruned once
    assert first["adds"] == trained["adds"]
    scores = trained["choosing_by_rate"]
    assert {float(rate) for rate in scores} == {*units.RATES}
    assert scores[str(trained["rate"])] == max(scores.values())
    monkeypatch.setattr(units, "faster", lambda *_: 7.0)
    monkeypatch.setattr(sys, "argv", [*argv, "--time-again"])
    units.main()
    assert Runs(tmp_path / "units.jsonl").rows[:2] == [first, trained]
    assert capsys.readouterr().out.count("| 7.00x |") == 2


def test_rows_of_another_network_are_refused(case, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "CASES", {"ResNet-20": lambda _: case})
    results = Runs(tmp_path / "units.jsonl")
    results.add(network="ResNet-20", goal="50 %", way="Torch-Pruning, Taylor", seed=0, dense=12.0, cannot="")
    files = ["--data", str(tmp_path), "--stored", str(tmp_path), "--results", str(tmp_path / "units.jsonl")]
    monkeypatch.setattr(sys, "argv", ["", *files, "--seeds", "1", "--networks", "ResNet-20"])
    with pytest.raises(SystemExit, match="finished runs .* pruned one that scores 12.00"):
        units.main()


class Conv1D(nn.Module):
    """The layer of transformers of this name: the weight has a row for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.nx, self.nf = 3, 5
        self.weight, self.bias = (nn.Parameter(numbers(*shape, seed=1).float()) for shape in ((3, 5), (5,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


def test_layers_that_the_peer_does_not_know_become_linear_with_their_gradients():
    net, x = nn.Sequential(Conv1D(), nn.ReLU()), numbers(4, 3, seed=2).float()
    expected = net(x)
    expected.square().sum().backward()
    gradients = [one.grad for one in net.parameters()]
    units_peers.make_linear(net)
    assert type(net[0]) is nn.Linear
    assert torch.allclose(net(x), expected)
    assert torch.equal(net[0].weight.grad, gradients[0].T)
    assert torch.equal(net[0].bias.grad, gradients[1])
