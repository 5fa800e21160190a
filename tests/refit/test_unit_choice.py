"""Which neurons and blocks stay in a refit: whole units, their numbers, the error, and layers that are not known."""

from __future__ import annotations

from statistics import mean

import pytest
import torch
from torch import nn

from lightning_roulette import Block, Calibration, LeastSquares, Mask, units_of
from lightning_roulette.network.parameters import prunable_parameters
from lightning_roulette.refit.solvers.pieces import Blocks
from lightning_roulette.wheel.units.blocks import blocks_of
from lightning_roulette.wheel.units.units import Cost, Part, Units
from tests.support.networks import known, numbers, related
from tests.support.shares import assert_close, in_processes
from tests.support.units import hidden_units, labels, perceptron

CHOOSE = LeastSquares(choose=True)


def net_of() -> nn.Sequential:
    return known(perceptron((5, 12, 10, 4))).eval()


def batches(count: int = 3) -> list[torch.Tensor]:
    return [related(60, 5, seed=seed) for seed in range(count)]


def full(net: nn.Module) -> Mask:
    return Mask.full(prunable_parameters(net))


def without(net: nn.Module, units: Units, share: float, seed: int = 0, parent: Mask | None = None) -> Mask:
    """A mask without some units of each group, by chance."""
    gone, parent = torch.zeros(units.count, dtype=torch.bool), parent or full(net)
    alive = units.alive(parent)
    for _, start, stop in units.ranges():
        some = alive[start:stop].nonzero().flatten() + start
        order = torch.randperm(len(some), generator=torch.Generator().manual_seed(seed))
        gone[some[order[: round(share * len(some))]]] = True
    return units.without(parent, gone)


def numbers_of(units: Units, mask: Mask) -> list[int]:
    alive = units.alive(mask)
    return [int(alive[start:stop].sum()) for _, start, stop in units.ranges()]


def error(net: nn.Module, values, inputs: torch.Tensor) -> float:
    with torch.no_grad():
        return float((torch.func.functional_call(net, dict(values), (inputs,)) - net(inputs)).square().mean())


def is_whole(net: nn.Module, units: Units, mask: Mask) -> bool:
    return units.without(full(net), ~units.alive(mask)) == mask


def test_as_many_whole_neurons_of_each_layer_stay_and_the_network_comes_closer():
    net, inputs = net_of(), batches(4)
    units = hidden_units(net)
    ratios = []
    for seed in range(4):
        mask = without(net, units, 0.5, seed)
        found, given = (Calibration(net, inputs[:3]).refit(mask, how, units=units) for how in (CHOOSE, LeastSquares()))
        assert found.mask is not None
        assert is_whole(net, units, found.mask)
        assert numbers_of(units, found.mask) == numbers_of(units, mask)
        assert found.mask.counts == mask.counts
        assert all(not found.values[name][~kept].any() for name, kept in found.mask.items())
        ratios.append(error(net, found.values, inputs[3]) / error(net, given.values, inputs[3]))
    assert mean(ratios) < 0.5


class Residual(nn.Module):
    """Channels that several convolutions read, some of them by groups, and a linear layer after a flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.wide, self.back = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1, groups=2)
        self.alone, self.last = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(128, 5)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = x + self.back(self.wide(x).relu())
        return self.last(self.alone(x).relu().flatten(1))


def test_channels_with_several_readers_stay_whole():
    pytest.importorskip("torch_pruning")
    net = known(Residual()).eval()
    inputs = [related(40, 3, 6, 6, seed=seed) for seed in range(3)]
    units = units_of(net, inputs[0][:2])
    ratios = []
    for seed in range(3):
        mask = without(net, units, 0.5, seed)
        found, given = (Calibration(net, inputs[:2]).refit(mask, how, units=units) for how in (CHOOSE, LeastSquares()))
        assert found.mask is not None
        assert is_whole(net, units, found.mask)
        assert found.mask.counts == mask.counts
        assert units.left(found.mask) == units.left(mask)
        ratios.append(error(net, found.values, inputs[2]) / error(net, given.values, inputs[2]))
    assert mean(ratios) < 0.9


class Joined(nn.Module):
    """A layer that reads two groups of neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([self.first(x).relu(), self.second(x).relu()], 1))


def least_error(net: Joined, mask: Mask, inputs: torch.Tensor) -> float:
    """The smallest squared error of the last layer on the inputs that a mask leaves, as a share of the power."""
    with torch.no_grad():
        rows = torch.cat([net.first(inputs).relu(), net.second(inputs).relu(), torch.ones(len(inputs), 1)], 1).double()
        wanted = net(inputs).double()
    rows = rows[:, torch.cat([mask["last.weight"].any(0), torch.ones(1, dtype=torch.bool)])]
    solved = torch.linalg.lstsq(rows, wanted).solution
    return float((rows @ solved - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("seed", range(3))
def test_a_layer_that_reads_two_groups_loses_no_more_than_with_the_units_that_were_drawn(seed):
    net = known(Joined()).eval()
    with torch.no_grad():  # each neuron has a twin in the other group, so that it is missed only if both are gone
        net.second.weight.copy_(net.first.weight + 0.05 * numbers(6, 8, seed=seed))
        net.second.bias.copy_(net.first.bias)
    inputs = numbers(256, 8, seed=seed)
    units = units_of(net, inputs[:4])
    for draw in range(4):
        order = [torch.randperm(6, generator=torch.Generator().manual_seed(8 * seed + 2 * draw + n)) for n in (0, 1)]
        mask = units.without(full(net), torch.cat([one < 3 for one in order]))
        found = Calibration(net, [inputs]).refit(mask, LeastSquares(choose=True, damping=1e-6), units=units)
        chosen = mask if found.mask is None else found.mask
        assert numbers_of(units, chosen) == numbers_of(units, mask)
        assert least_error(net, chosen, inputs) <= least_error(net, mask, inputs) * (1 + 1e-6)


def test_units_that_cost_more_are_not_exchanged_for_those_that_cost_less():
    net, own = net_of(), 1.0 + torch.arange(22.0, dtype=torch.float64) % 2
    units = hidden_units(net, Cost("parameters", dict.fromkeys(prunable_parameters(net), 1.0), own))
    for seed in range(3):
        mask = without(net, units, 0.6, seed)
        found = Calibration(net, batches()).refit(mask, CHOOSE, units=units)
        assert found.mask is not None
        assert units.left(found.mask) == units.left(mask)


class Attentive(nn.Module):
    """An attention of four heads between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 4, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.attention(x, x, x, need_weights=False)[0])


def test_whole_heads_stay():
    pytest.importorskip("torch_pruning")
    net = known(Attentive()).eval()
    inputs = [related(60, 4, 5, seed=seed) for seed in range(3)]
    units = units_of(net, inputs[0][:2], unit="head")
    ratios, others = [], 0
    for seed in range(4):
        mask = without(net, units, 0.5, seed)
        found, given = (Calibration(net, inputs[:2]).refit(mask, how, units=units) for how in (CHOOSE, LeastSquares()))
        kept = found.mask_from(mask)
        assert is_whole(net, units, kept)
        assert int(units.alive(kept).sum()) == 2
        others += kept != mask
        ratios.append(error(net, found.values, inputs[2]) / error(net, given.values, inputs[2]))
    assert others > 0
    assert mean(ratios) < 0.9


def test_only_allowed_units_stay_and_without_a_parent_units_may_come_back():
    net, calibration = net_of(), Calibration(net_of(), batches())
    units = hidden_units(net)
    parent = without(net, units, 0.4)
    mask = without(net, units, 0.3, seed=1, parent=parent)
    anywhere, within = (calibration.refit(mask, CHOOSE, one, units=units) for one in (None, parent))
    assert within.mask_from(mask) <= parent
    assert not anywhere.mask_from(mask) <= parent
    assert calibration.refit(mask, CHOOSE, mask, units=units).mask is None


class Twice(nn.Linear):
    """A linear layer that no refit knows."""

    def forward(self, x):
        return 2 * super().forward(x)


class Heads(nn.Module):
    """Neurons that two layers read."""

    def __init__(self, second: type[nn.Linear]) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(5, 12), nn.Linear(12, 3), second(12, 3)

    def forward(self, x):
        x = self.first(x).relu()
        return self.one(x) + self.two(x)


@pytest.mark.parametrize(("second", "keeps"), [(nn.Linear, False), (Twice, True)])
def test_a_group_keeps_its_units_if_one_layer_that_reads_it_is_not_refitted(second, keeps):
    net = known(Heads(second)).eval()
    parts = [Part("first.weight", labels(0, 12, 0, 2), reads=False)]
    parts += [Part(f"{name}.weight", labels(0, 12, 1, 2)) for name in ("one", "two")]
    units = Units("neuron", {"first": 12}, tuple(parts), Cost.of_weights([part.name for part in parts]))
    mask = without(net, units, 0.5)
    assert (Calibration(net, batches()).refit(mask, CHOOSE, units=units).mask is None) is keeps


def test_a_mask_that_breaks_units_up_stays():
    net = net_of()
    units = hidden_units(net)
    kept = {name: one.clone() for name, one in without(net, units, 0.5).items()}
    kept["0.weight"][int(kept["0.weight"].any(1).nonzero()[0]), 2] = False
    assert Calibration(net, batches()).refit(Mask(kept), CHOOSE, units=units).mask is None


def test_inputs_that_are_not_finite_change_no_units():
    net, inputs = net_of(), batches()
    inputs[0][0, 0] = torch.inf
    mask = without(net, units := hidden_units(net), 0.5)
    assert Calibration(net, inputs).refit(mask, CHOOSE, units=units).mask is None


def test_the_sums_of_the_dense_network_are_computed_once(monkeypatch):
    net = net_of()
    units, calibration = hidden_units(net), Calibration(net, batches())
    masks = [without(net, units, share) for share in (0.3, 0.6)]
    expected = [Calibration(net, batches()).refit(mask, CHOOSE, units=units).mask for mask in masks]
    runs = []
    net.register_forward_hook(lambda *_: runs.append(1))
    calibration.refit(masks[0], CHOOSE, units=units)
    first = len(runs)
    assert calibration.refit(masks[1], CHOOSE, units=units).mask == expected[1]
    assert len(runs) - first < first
    assert calibration.refit(masks[0], CHOOSE, units=units).mask == expected[0]


@pytest.mark.parametrize("kind", ["neuron", "block"])
def test_processes_choose_what_one_chooses(kind):
    net = net_of()
    units = hidden_units(net) if kind == "neuron" else blocks_of(net, list(prunable_parameters(net)), Block(2, 2))
    mask, inputs = without(net, units, 0.5), batches()
    expected = Calibration(net, inputs).refit(mask, CHOOSE, units=units)
    for found in in_processes(2, net, inputs, lambda one: one.refit(mask, CHOOSE, units=units)):
        assert found.mask is not None
        assert found.mask == expected.mask
        assert_close(found.values, expected.values)


def test_a_convolution_keeps_whole_blocks_and_each_row_of_blocks_as_many():
    net = known(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))).eval()
    inputs = [related(60, 4, 6, 6, seed=seed) for seed in range(3)]
    units = blocks_of(net, list(prunable_parameters(net)), Block(2, 2))
    mask = without(net, units, 0.6)
    found, given = (Calibration(net, inputs[:2]).refit(mask, how, units=units) for how in (CHOOSE, LeastSquares()))
    assert found.mask is not None
    assert found.mask != mask
    assert is_whole(net, units, found.mask)
    assert all(torch.equal(kept.flatten(1).sum(1), mask[name].flatten(1).sum(1)) for name, kept in found.mask.items())
    assert error(net, found.values, inputs[2]) < error(net, given.values, inputs[2])


def test_only_blocks_of_one_size_compete():
    pieces = Blocks.of(torch.tensor([[[3, 3, 5, -1], [3, 3, 5, -1], [7, 7, 8, 8], [9, 9, 8, 8]]]))
    assert pieces.sets.tolist() == [[1], [0], [2], [3], [4]]
    pieces = Blocks.of(torch.tensor([[[0, 0, 1, 2, 2, -1], [3, 3, 3, 4, 5, 6]]]))
    assert pieces.sets.tolist() == [[1, -1, -1], [0, 2, -1], [4, 5, 6], [3, -1, -1]]
    values = torch.tensor([[[3.0, 4.0, 1.0, 0.0, 2.0, 9.0], [1.0, 2.0, 2.0, 7.0, 8.0, 9.0]]])
    sizes, real = pieces.sizes(values), pieces.sets >= 0
    assert sizes[real].tolist() == [1.0, 5.0, 2.0, 7.0, 8.0, 9.0, 3.0]
    assert not pieces.whole(torch.ones_like(values, dtype=torch.bool))[~real].any()
    some = values > 2
    assert pieces.whole(some)[real].tolist() == [False, True, False, True, True, True, False]
    assert torch.equal(
        pieces.entries(pieces.whole(some), values),
        torch.tensor([[[True, True, False, False, False, False], [False, False, False, True, True, True]]]),
    )


def test_blocks_at_the_end_of_a_matrix_keep_their_places():
    net = known(nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))).eval()
    units = blocks_of(net, ["0.weight"], Block(4, 2))
    mask = without(net, units, 0.5, seed=3)
    mask = Mask({"0.weight": mask["0.weight"]})
    found = Calibration(net, [numbers(90, 7, seed=1)]).refit(mask, CHOOSE, units=units)
    assert found.mask is not None
    assert torch.equal(found.mask["0.weight"][:, 6], mask["0.weight"][:, 6])
    assert found.mask.counts == mask.counts


def test_each_weight_of_a_recurrent_layer_keeps_as_many_blocks():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(x)[0]

    net = known(Last()).eval()
    units = blocks_of(net, ["lstm.weight_ih_l0", "lstm.weight_hh_l0"], Block(2, 2))
    inputs, chosen = [related(60, 3, 6, seed=seed) for seed in range(2)], 0
    for seed in range(3):
        mask = without(net, units, 0.5, seed)
        found = Calibration(net, inputs).refit(mask, CHOOSE, units=units).mask or mask
        assert found.counts == mask.counts
        assert all(torch.equal(kept.sum(1), mask[name].sum(1)) for name, kept in found.items())
        chosen += found != mask
    assert chosen
