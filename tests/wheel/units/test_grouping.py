"""The units of real networks, and what they cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_roulette import Mask, NofM, Reduction, prunable_parameters, units_of
from lightning_roulette.network.multiply_adds import multiply_adds, positions_of
from lightning_roulette.unit import Neuron, Unit
from tests.network.coupling.networks import NETWORKS
from tests.support.networks import known

pytest.importorskip("torch_pruning")


def small(unused: bool = False) -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    network = nn.Sequential(*parts, nn.Linear(4 * 9, 5), nn.ReLU(), nn.Linear(5, 3))
    if unused:
        network.add_module("extra", nn.Identity())
        network.extra.inner = nn.MultiheadAttention(4, 2)
    return network


X = torch.randn(4, 2, 6, 6)


@pytest.mark.parametrize(
    ("target", "whole", "first", "second"),
    [
        (None, 72 + 180 + 15, 18 + 5 * 9, 36 + 3),
        (Reduction(multiply_adds=0.5), 72 * 36 + 180 + 15, 18 * 36 + 45, 39),
        (Reduction(parameters=0.5), 72 + 4 + 8 + 180 + 5 + 15 + 3, 18 + 3 + 45, 36 + 1 + 3),
    ],
)
def test_costs_are_those_of_what_leaves(target, whole, first, second):
    network = small()
    units = units_of(network, X, target=target)
    full = Mask.full(prunable_parameters(network))
    assert units.groups == {"0": 4, "5": 5}
    assert units.whole(full) == units.left(full) == whole
    assert units.costs(full).tolist() == [first] * 4 + [second] * 5
    assert units.whole(full, units.multiply_adds) == 72 * 36 + 180 + 15
    assert list(units.kept_whole) == ["7"]
    one = units.without(full, torch.arange(9) == 1)
    assert units.left(full) - units.left(one) == first


def test_what_leaves_has_no_effect_on_the_outputs():
    network = small().eval()
    units = units_of(network, X)
    weights = prunable_parameters(network)
    mask = units.without(Mask.full(weights), torch.tensor([1, 0, 1, 0, 0, 1, 0, 0, 1]).bool())
    with torch.no_grad():
        for name, kept in mask.items():
            weights[name].mul_(kept)
        before = network(X)
        network[0].bias += 100 * torch.tensor([1, 0, 1, 0])
        network[1].running_mean -= 100 * torch.tensor([1, 0, 1, 0])
        network[5].bias += 100 * torch.tensor([0, 1, 0, 0, 1])
        torch.testing.assert_close(network(X), before)


def test_seconds_of_layers_are_shared_by_their_entries():
    network = small()
    full = Mask.full(prunable_parameters(network))
    units = units_of(network, X, target=Reduction(latency=0.5))
    assert units.cost.counted == "latency"
    assert all(value > 0 for value in units.cost.each.values())
    assert 0 < units.cost.fixed < units.whole(full) < 5


def test_what_the_network_does_not_use_has_no_units():
    units = units_of(small(unused=True), X)
    assert units.groups == {"0": 4, "5": 5}
    assert units.kept_whole["extra.inner"] == "the network does not use it on the example"


def test_weights_that_may_not_be_pruned_keep_their_units():
    network = small()
    units = units_of(network, X, weights=prunable_parameters(network, exclude=["0.weight"]), target=Reduction(0.5))
    assert units.groups == {"5": 5}
    assert units.kept_whole["0"] == "0.weight is not prunable"
    assert (units.cost.fixed, units.cost.each) == (72 * 36, {"5.weight": 1.0, "7.weight": 1.0})


def test_multiples_are_of_channels_and_small_layers_stay_whole():
    units = units_of(small(), X, unit=Neuron(multiple_of=4))
    assert (units.groups, units.steps) == ({"5": 5}, {"5": 4})
    assert units.kept_whole["0"] == "it has 4 units, of which a multiple of 4 stays"
    assert units.removable(Mask.full(prunable_parameters(small()))) == 1


@pytest.mark.parametrize(
    ("name", "multiple", "steps"),
    [
        ("grouped", 1, {"0": 1, "2": 1}),
        ("grouped", 8, {"2": 2}),  # a unit is a channel of each of four groups
        ("grouped", 4, {"0": 1, "2": 1}),
        ("own attention", 8, {"1": 2, "3": 8}),  # a head has four channels
        ("relative positions", 16, {}),
        ("relative positions", 6, {"3": 6}),
    ],
)
def test_a_unit_may_be_several_channels(name, multiple, steps):
    build, inputs, _ = NETWORKS[name]
    network = known(build()).eval()
    if steps:
        assert units_of(network, inputs, unit=Neuron(multiple)).steps == steps
    else:
        with pytest.raises(ValueError, match="3: it has 16 units, of which a multiple of 16 stays"):
            units_of(network, inputs, unit=Neuron(multiple))


def test_neighbours_and_blocks_need_no_example_unless_they_cost_multiply_adds():
    network = small()
    assert units_of(network, unit=NofM(2, 4)).multiply_adds is None
    units = units_of(network, X, unit={"rows": 1, "columns": 6}, target=Reduction(multiply_adds=0.2))
    assert (units.kind, units.cost.counted) == ("block", "multiply_adds")
    assert units.multiply_adds.each == {"0.weight": 36.0, "5.weight": 1.0, "7.weight": 1.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: units_of(small()), "example_input is None, but Neuron.*Pass a batch of inputs"),
        (lambda: units_of(small(), unit="weight"), "single weights need no units"),
        (lambda: units_of(small(), X, unit="head"), "no head of this network may leave"),
        (lambda: units_of(nn.Sequential(nn.Linear(3, 2)), torch.zeros(2, 3)), "no neuron of this network may leave"),
        (lambda: units_of(small(), unit=NofM(2, 4), target=Reduction(0.5)), "NofM.*with the target Reduction"),
    ],
)
def test_what_has_no_units_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_positions_times_entries_are_the_multiply_adds():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=8, batch_first=True)
    whole = nn.MultiheadAttention(8, 2, batch_first=True)
    x, y, z = torch.randn(2, 3, 8), torch.randn(2, 5, 4), torch.randn(2, 5, 8)
    for network, given in ((attention, (x, y, z)), (whole, (x, z, z)), (small(), (X,)), (nn.LSTM(4, 3), (y,))):
        found = positions_of(network, lambda network=network, given=given: network(*given))
        sizes = {name: one.numel() for name, one in network.named_parameters()}
        dense = multiply_adds(network, lambda network=network, given=given: network(*given)).dense
        assert sum(found[name] * sizes[name] for name in found) == pytest.approx(dense)


def test_weights_that_are_computed_from_others_cost_what_they_multiply():
    inner = nn.utils.parametrizations.weight_norm(nn.Linear(8, 7))
    network = nn.Sequential(nn.Linear(6, 8), inner, nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 3))
    units = units_of(network, torch.ones(2, 6), target=Reduction(multiply_adds=0.5))
    assert units.groups == {"2": 4}
    assert units.whole(Mask.full(prunable_parameters(network))) == 6 * 8 + 8 * 7 + 7 * 4 + 4 * 3


def test_weights_that_share_a_memory_are_told_apart():
    network, memory = nn.LSTM(3, 4), torch.zeros(500)  # cuDNN keeps the weights of a layer side by side
    place = 0
    for one in network.parameters():
        one.data = memory[place : place + one.numel()].view(one.shape)
        place += one.numel()
    found = positions_of(network, lambda: network(torch.ones(5, 2, 3)))
    assert found == {"weight_ih_l0": 10, "weight_hh_l0": 10}


class Unknown(Unit):
    """A unit that nothing finds."""


@pytest.mark.parametrize("example", [None, X])
def test_a_unit_that_nothing_finds_is_refused_with_those_that_are_found(example):
    with pytest.raises(TypeError, match=r"nothing finds such units. Pass 'neuron', 'head' or one of Block.*NofM"):
        units_of(small(), example, unit=Unknown())
