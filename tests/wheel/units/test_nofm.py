"""Some of each few neighbours stay: the law against enumeration, the budget, and the pattern that hardware takes."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from lightning_roulette import Mask
from lightning_roulette.network.parameters import prunable_parameters
from lightning_roulette.unit import NofM
from lightning_roulette.wheel.units.nofm import NofMWheel, neighbours_of
from lightning_roulette.wheel.units.units import Cost
from tests.support.networks import numbers

FALSE_ALARM = 1e-5


def wheel_of(net: nn.Module, importance: dict[str, torch.Tensor], sharpness=1.0, rule=None, **more) -> NofMWheel:
    units = neighbours_of(net, list(importance), rule or NofM(2, 4), more.pop("cost", None))
    return NofMWheel(units, importance, Mask.full(importance), sharpness=sharpness, **more)


def magnitudes(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach().abs() for name, one in prunable_parameters(net).items()}


def patterns(mask: torch.Tensor) -> torch.Tensor:
    """The groups of four along the inputs, or the channels, of a weight."""
    return mask.movedim(1, -1).reshape(len(mask), -1, 4)


def leaves_first(odds: list[float], count: int) -> dict[frozenset[int], float]:
    """The probability of each set of the first draws, by enumeration of all orders."""
    found: dict[frozenset[int], float] = {}
    for order in permutations(range(len(odds)), count):
        left, chance = sum(odds), 1.0
        for place in order:
            chance *= odds[place] / left
            left -= odds[place]
        found[frozenset(order)] = found.get(frozenset(order), 0.0) + chance
    return found


@pytest.mark.parametrize(("kept", "sharpness"), [(2, 1.0), (1, 2.0), (3, 0.0)])
def test_what_leaves_a_group_follows_the_law(kept, sharpness):
    sizes, rows = torch.tensor([1.0, 2.0, 4.0, 3.0]), 3000
    net = nn.Linear(4, rows, bias=False)
    mask = wheel_of(net, {"weight": sizes.expand(rows, 4)}, sharpness, NofM(kept, 4)).spin(
        1.0, seed=7, level=1, candidate=0
    )["weight"]
    gone = [frozenset((~row).nonzero().flatten().tolist()) for row in mask]
    law = leaves_first([float(size) ** -sharpness for size in sizes], 4 - kept)
    counts = [gone.count(some) for some in law]
    assert sum(counts) == rows
    assert stats.chisquare(counts, [rows * chance for chance in law.values()]).pvalue > FALSE_ALARM


def test_which_layer_is_taken_first_follows_the_law_per_cost():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    sizes, each = (
        {"0.weight": 1.0, "1.weight": 2.0, "2.weight": 4.0},
        {"0.weight": 1.0, "1.weight": 4.0, "2.weight": 1.0},
    )
    importance = {name: torch.full((4, 4), size) for name, size in sizes.items()}
    wheel = wheel_of(net, importance, 1.5, cost=Cost("weights", each))
    names, spins = list(sizes), 600
    found = []
    for seed in range(spins):
        mask = wheel.spin(0.1, seed=seed, level=1, candidate=0)
        (taken,) = [name for name in names if not bool(mask[name].all())]
        found.append(taken)
    odds = [(sizes[name] / math.sqrt(each[name])) ** -1.5 for name in names]
    expected = [spins * one / sum(odds) for one in odds]
    assert stats.chisquare([found.count(name) for name in names], expected).pvalue > FALSE_ALARM


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    shapes=st.lists(st.tuples(st.sampled_from([4, 8]), st.integers(1, 3)), min_size=1, max_size=4),
    share=st.floats(0.01, 1.5),
    kept=st.integers(1, 3),
    sharpness=st.sampled_from([0.0, 1.0, 16.0, math.inf]),
)
def test_the_budget_is_met_and_exceeded_by_one_layer_at_most(seed, shapes, share, kept, sharpness):
    net = nn.ModuleList(nn.Linear(*shape) for shape in shapes)
    importance = {f"{place}.weight": numbers(out, ins, seed=seed).abs() for place, (ins, out) in enumerate(shapes)}
    wheel = wheel_of(net, importance, sharpness, NofM(kept, 4))
    sizes = {name: (4 - kept) * one.numel() // 4 for name, one in importance.items()}
    mask = wheel.spin(budget := share * sum(sizes.values()), seed=seed, level=2, candidate=1)
    gone = {name: int((~mask[name]).sum()) for name in mask}
    taken = {name: size for name, size in gone.items() if size}
    assert taken == {name: sizes[name] for name in taken}
    assert sum(taken.values()) >= min(budget, sum(sizes.values()))
    assert sum(taken.values()) - max(taken.values()) < budget
    for name in taken:
        assert bool((patterns(mask[name]).sum(-1) == kept).all())
    assert mask == wheel.spin(budget, seed=seed, level=2, candidate=1)


def test_without_chance_the_largest_of_each_four_channels_stay():
    net = nn.Conv2d(8, 3, (3, 2))
    importance = magnitudes(net)
    mask = wheel_of(net, importance, math.inf).spin(1.0, seed=0, level=1, candidate=0)["weight"]
    largest = patterns(importance["weight"]).topk(2).indices
    assert torch.equal(patterns(mask), torch.zeros(3, 12, 4, dtype=torch.bool).scatter_(-1, largest, True))


def test_a_layer_that_is_taken_is_not_taken_again():
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    importance = magnitudes(net)
    units = neighbours_of(net, list(importance), NofM(2, 4))
    full = Mask.full(importance)
    first = NofMWheel(units, importance, full, sharpness=1.0).spin(1.0, seed=0, level=1, candidate=0)
    assert units.alive(full).tolist() == [True, True]
    assert units.removable(first) == 1
    second = NofMWheel(units, importance, first, sharpness=1.0).spin(99.0, seed=0, level=2, candidate=0)
    assert second <= first
    assert second.survivors == 24
    assert units.removable(second) == 0
    with pytest.raises(ValueError, match="no layer can be taken"):
        NofMWheel(units, importance, second, sharpness=1.0).spin(1.0, seed=0, level=3, candidate=0)


def test_factors_decide_between_layers():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    importance = {name: torch.ones(4, 4) for name in ("0.weight", "1.weight")}
    for first, factors in (("0.weight", {"1.weight": 1e6}), ("1.weight", {"0.weight": 1e6})):
        mask = wheel_of(net, importance, 16.0, factors=factors).spin(1.0, seed=3, level=1, candidate=0)
        assert [name for name in mask if not bool(mask[name].all())] == [first]


def test_layers_without_such_groups_are_left_and_named():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(8, 2))
    units = neighbours_of(net, list(prunable_parameters(net)), NofM(2, 4))
    assert list(units.groups) == ["3.weight"]
    assert units.kept_whole == dict.fromkeys(("0.weight", "1.weight"), "its number of inputs is no multiple of 4")
    with pytest.raises(ValueError, match="no layer has a number of inputs that is a multiple of 5"):
        neighbours_of(net, list(prunable_parameters(net)), NofM(2, 5))


def test_the_projections_of_attention_are_taken_one_by_one():
    net = nn.MultiheadAttention(8, 2)
    importance = magnitudes(net)
    units = neighbours_of(net, list(importance), NofM(2, 4))
    assert len(units.groups) == 4
    mask = NofMWheel(units, importance, Mask.full(importance), sharpness=1.0).spin(1.0, seed=0, level=1, candidate=0)
    kept = [one for part in (*mask["in_proj_weight"].split(8), mask["out_proj.weight"]) for one in [int(part.sum())]]
    assert sorted(kept) == [32, 64, 64, 64]


@pytest.mark.parametrize("layer", [nn.Linear(128, 64), nn.Conv2d(64, 32, 3)])
def test_the_pattern_is_one_that_sparse_tensor_cores_take(layer):
    """The packed form of torch's kernels has room for two of four: unpacked, it is the matrix as it was."""
    from torch.sparse import _semi_structured_conversions as packing

    importance = magnitudes(layer)
    mask = wheel_of(layer, importance, 4.0).spin(1.0, seed=1, level=1, candidate=0)["weight"]
    matrix = (layer.weight.detach() * mask).movedim(1, -1).flatten(1).half().contiguous()
    assert bool((patterns(mask).sum(-1) == 2).all())
    packed = packing.sparse_semi_structured_from_dense_cutlass(matrix)
    assert packed[0].shape == (len(matrix), matrix.shape[1] // 2)
    assert torch.equal(packing.sparse_semi_structured_to_dense_cutlass(*packed), matrix)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_torch_multiplies_by_the_pattern():
    layer = nn.Linear(128, 64)
    mask = wheel_of(layer, magnitudes(layer), 4.0).spin(1.0, seed=1, level=1, candidate=0)["weight"]
    matrix = (layer.weight.detach() * mask).half().cuda().contiguous()
    inputs = numbers(32, 128, seed=2).half().cuda()
    found = nn.functional.linear(inputs, torch.sparse.to_sparse_semi_structured(matrix))
    assert torch.allclose(found, inputs @ matrix.T, atol=1e-2)
