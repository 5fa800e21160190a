"""`measure`: bytes, multiply-adds and times."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn

from lightning_roulette import export, measure
from lightning_roulette.network.multiply_adds import multiply_adds
from lightning_roulette.slim.measuring.bounds import bound_of, bytes_of
from lightning_roulette.slim.measuring.timing import Latency, latencies
from lightning_roulette.slim.sparse import converting
from lightning_roulette.slim.sparse.layers import Sparse


def half_pruned(module: nn.Module) -> nn.Module:
    """The module with every second entry of its matrices at zero."""
    with torch.no_grad():
        for one in module.parameters():
            if one.dim() > 1:
                one.view(-1)[::2] = 0
    return module


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Linear(10, 4), (3, 7, 10), 3 * 7 * 40),
        (nn.Conv2d(6, 4, 3, padding=1), (2, 6, 8, 5), 2 * 8 * 5 * 6 * 4 * 9),
        (nn.Conv2d(6, 4, 3, groups=2, stride=2), (2, 6, 9, 9), 2 * 4 * 4 * 3 * 4 * 9),
        (nn.Conv1d(4, 4, 5, groups=4), (1, 4, 9), 5 * 4 * 5),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 3, 3), 2 * 9 * 4 * 6 * 4),
        (nn.LSTM(4, 6, 2, bidirectional=True), (5, 3, 4), 15 * 2 * 24 * (4 + 6 + 12 + 6)),
        (nn.GRU(4, 6, batch_first=True), (5, 3, 4), 15 * 18 * 10),
        (nn.RNNCell(4, 6), (5, 4), 5 * 60),
    ],
    ids=str,
)
def test_multiply_adds_of_layers(module, shape, expected):
    half_pruned(module)
    found = multiply_adds(module, lambda: module(torch.randn(shape)))
    assert (found.dense, found.effective) == (expected, expected // 2)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_layers_without_inputs_or_outputs_multiply_nothing():
    net = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2))
    assert multiply_adds(net, lambda: net(torch.ones(4, 3))).dense == 0
    cell = nn.RNNCell(0, 6)
    assert multiply_adds(cell, lambda: cell(torch.ones(5, 0))).dense == 0


@pytest.mark.parametrize("inner", [None, 4])
def test_multiply_adds_of_attention_are_those_of_its_projections(inner):
    attention = half_pruned(nn.MultiheadAttention(8, 2, kdim=inner, vdim=inner, batch_first=True)).eval()
    query, key = torch.randn(3, 5, 8), torch.randn(3, 6, inner or 8)
    found = multiply_adds(attention, lambda: attention(query, value=key, key=key))
    expected = 15 * 64 + 2 * 18 * 8 * (inner or 8) + 15 * 64
    assert (found.dense, found.effective) == (expected, expected // 2)


def test_multiply_adds_of_a_transformer_count_every_call():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(3, 5, 8)
    assert multiply_adds(layer, lambda: layer(layer(x))).dense == 2 * 15 * (4 * 64 + 2 * 128)


def test_a_network_is_measured_and_left_as_it_was():
    net = half_pruned(nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Dropout(), nn.Linear(30, 5)))
    net[1].eval()
    before = {name: one.clone() for name, one in net.state_dict().items()}
    found = measure(net, torch.randn(4, 20))
    assert (found.weights, found.survivors, found.parameters) == (750, 375, 845)
    assert (found.multiply_adds.dense, found.multiply_adds.effective) == (750, 375)
    assert found.bytes.dense == 4 * (845 + 60) + 8
    assert set(found.latency) == {1, 64}
    assert all(one.seconds > 0 and one.runs >= 5 for one in found.latency.values())
    assert [one.training for one in net] == [True, False, True, True]
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())
    lines = str(found).splitlines()
    assert lines[2].split() == ["survivors", "375", "(50.00%)"]
    assert "bytes, compressed" in str(found)


def test_the_time_with_sparse_layers_is_measured_in_the_same_places(monkeypatch):
    net = half_pruned(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    before, seen = list(net), []

    def clock(calls, *_, prepare=lambda name: None):
        """Sparse layers take half of the time, and the network with one sample all of it."""
        found = {name: Latency(1.0 if "dense" in name else 0.5, 0.0, 5) for name in calls}
        for name in found:
            prepare(name)
            seen.append((name, [type(one) for one in net if isinstance(one, Sparse)]))
        one_sample = len([name for name, _ in seen if name == "sparse network"]) == 1
        return found | ({"sparse network": Latency(2.0, 0.0, 5)} if one_sample and "sparse network" in found else {})

    monkeypatch.setattr(converting, "latencies", clock)
    found = measure(net, torch.randn(2, 8))
    assert found.sparse_latency == {1: None, 64: Latency(0.5, 0.0, 5)}
    assert [len(kinds) for name, kinds in seen if "network" in name] == [0, 2, 0, 2]
    assert all(one is other for one, other in zip(net, before, strict=True))
    assert "500 ms (spread 0 ms, 5 runs): 2.00 times as fast" in str(found)


def test_flash_and_memory_are_those_of_the_exported_source(tmp_path):
    net = half_pruned(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)))
    x = torch.rand(5, 1, 6, 6)
    found = measure(net, x)
    assert set(found.on_device) == {"int8", "float32"}
    for values, one in found.on_device.items():
        written = export(net, tmp_path / "net", "c", example_input=x, calibration=x, values=values)
        assert (one.flash, one.ram) == (written.flash, written.ram)
    assert found.not_exported == ""
    assert f"as C source, int8         {found.on_device['int8'].flash:,} bytes of flash without code" in str(found)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (lambda: [nn.Linear(3, 4), nn.GELU()], "operations that an export does not know: - "),
        (lambda: [nn.Linear(3, 0)], "model has values without entries"),
        (lambda: [nn.Linear(3, 0), nn.Linear(0, 2)], "model has values without entries"),
    ],
    ids=["gelu", "no outputs", "no inputs"],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_why_a_network_has_no_flash_is_told(layers, reason):
    net = nn.Sequential(*layers())
    found = measure(net, torch.ones(2, 3))
    assert found.on_device == {}
    assert reason in found.not_exported
    assert found.not_exported in str(found)
    assert found.multiply_adds.dense == sum(one.numel() for one in net.parameters() if one.dim() > 1)


@pytest.mark.parametrize("inputs", [(torch.ones(2, 3),) * 2, dict.fromkeys("xy", torch.ones(2, 3))])
def test_inputs_may_be_several(inputs):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, y):
            return self.layer(x) + self.layer(y)

    found = measure(Two(), inputs)
    assert found.multiply_adds.dense == 12
    assert "example_input is a" in found.not_exported


def test_other_inputs_are_refused():
    with pytest.raises(TypeError, match="example_input is of type int, but must be a tensor"):
        measure(nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match="example_input has a tensor without samples"):
        measure(nn.Linear(2, 2), torch.ones(0, 2))
    with pytest.raises(ValueError, match="cannot be called with one sample of example_input .RuntimeError: mat1"):
        measure(nn.Linear(2, 2), torch.ones(4, 3))


def test_the_bound_is_the_entropy_of_positions_and_exponents():
    weights = torch.tensor([[1.0, 0.0, 1.5, 0.0], [0.0, 4.0, 0.0, -5.0]])
    assert bound_of(weights) == pytest.approx(8 + 4 * (24 + 1))
    assert bound_of(torch.zeros(3, 3)) == 0
    assert bound_of(torch.ones(3, dtype=torch.int64)) == 192


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_a_compressed_file_is_smaller_than_archives_and_near_the_bound(sparsity):
    chance = torch.Generator().manual_seed(0)
    weights = torch.randn(400, 300, generator=chance)
    weights[torch.rand(400, 300, generator=chance) < sparsity] = 0
    found = bytes_of({"weight": weights})
    assert found.compressed < min(found.gzip, found.xz) < found.dense
    assert found.compressed < 1.05 * found.bound


def test_tied_weights_are_counted_once():
    weights = torch.randn(50, 50)
    assert bytes_of({"one": weights, "other": weights}).dense == 10_000


def test_times_are_medians_of_runs_by_turns():
    order = []
    found = latencies({"slow": lambda: (time.sleep(0.01), order.append("s")), "fast": lambda: order.append("f")}, 0.05)
    assert found["slow"].seconds > 0.009 > found["fast"].seconds
    assert "".join(order[4:]) == "sf" * found["slow"].runs
    assert math.isfinite(found["slow"].spread)


def test_each_run_is_prepared_outside_of_its_time():
    order = []
    found = latencies({"one": lambda: order.append("1")}, 0.01, lambda name: (time.sleep(0.02), order.append(name)))
    assert order == ["one", "1"] * (found["one"].runs + 2)
    assert found["one"].seconds < 0.01
