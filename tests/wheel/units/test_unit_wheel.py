"""The wheel of units follows its law: Plackett-Luce in the order of leaving, until a budget is met."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette import Mask, prunable_parameters
from lightning_roulette.wheel.units.unit_wheel import UnitWheel, importance_of_units
from lightning_roulette.wheel.units.units import Cost, Part, Units
from tests.support.units import hidden_units, labels, perceptron

NET = perceptron((3, 3, 2, 2))
WEIGHTS = {name: one.detach() for name, one in NET.named_parameters() if name.endswith("weight")}
UNITS = hidden_units(NET)
FULL = Mask.full(WEIGHTS)
IMPORTANCE = torch.tensor([0.5, 1.0, 2.0, 0.7, 1.4], dtype=torch.float64)


def left_by(order: tuple[int, ...], budget: float, units: Units = UNITS, parent: Mask = FULL) -> bytes:
    """The mask when units come up in this order. They leave when a multiple of the step of their group would stay."""
    group = {one: (name, stop - start) for name, start, stop in units.ranges() for one in range(start, stop)}
    come, gone, mask = Counter(), torch.zeros(units.count, dtype=torch.bool), parent
    for place, one in enumerate(order):
        if units.left(parent) - units.left(mask) >= budget:
            break
        name, size = group[one]
        come[name] += 1
        stay = size - come[name]
        if stay and stay % units.step(name) == 0:
            gone[[other for other in order[: place + 1] if group[other][0] == name]] = True
            mask = units.without(parent, gone)
    return mask.digest


def plackett_luce(odds: list[float], order: tuple[int, ...]) -> float:
    rest, probability = sum(odds), 1.0
    for one in order:
        probability *= odds[one] / rest
        rest -= odds[one]
    return probability


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("budget", [1, 9, 12])
@pytest.mark.parametrize(
    ("hidden", "steps"), [((3, 2), {}), ((3, 2), {"0": 2, "2": 2}), ((4, 2), {"0": 2}), ((5, 1), {"0": 2})]
)
def test_spins_follow_the_law(sharpness, budget, hidden, steps):
    net = perceptron((3, *hidden, 2))
    units, parent = replace(hidden_units(net), steps=steps), Mask.full(prunable_parameters(net))
    importance = torch.tensor([0.5, 1.0, 2.0, 0.7, 1.4, 0.8], dtype=torch.float64)[: units.count]
    odds = [float(one) ** -sharpness for one in importance]
    expected: Counter[bytes] = Counter()
    for order in permutations(range(units.count)):
        expected[left_by(order, budget, units, parent)] += plackett_luce(odds, order)
    wheel, spins = UnitWheel(units, importance, parent, sharpness=sharpness), 500
    found = Counter(wheel.spin(budget, seed=3, level=1, candidate=one).digest for one in range(spins))
    assert found.keys() <= expected.keys()
    chi = sum((found[mask] - spins * share) ** 2 / (spins * share) for mask, share in expected.items())
    degrees = len(expected) - 1
    assert chi < degrees + 4 * math.sqrt(2 * degrees) + 4


def test_the_golden_number_holds_for_units_of_one_group():
    """Of the importances 1, 2 and 4 two units leave: the 4 stays with probability 0.6095."""
    units = Units("neuron", {"a": 3}, (Part("w", labels(0, 3, 0, 2)),), Cost.of_weights(["w"]))
    parent = Mask({"w": torch.ones(3, 2, dtype=torch.bool)})
    wheel = UnitWheel(units, torch.tensor([1.0, 2, 4]), parent, sharpness=1.0)
    stays = [bool(wheel.spin(4, seed=0, level=1, candidate=one)["w"][2, 0]) for one in range(2000)]
    assert sum(stays) / 2000 == pytest.approx(128 / 210, abs=0.035)


def test_infinite_sharpness_removes_the_least_important_and_keeps_one_of_each_group():
    wheel = UnitWheel(UNITS, IMPORTANCE, FULL, sharpness=math.inf)
    masks = [wheel.spin(budget, seed=one, level=1, candidate=one) for one, budget in enumerate((1, 6, 10, 1000))]
    alive = [UNITS.alive(mask).tolist() for mask in masks]
    assert alive == [
        [False, True, True, True, True],
        [False, True, True, False, True],
        [False, False, True, False, True],
        [False, False, True, False, True],
    ]


def test_units_without_importance_leave_first():
    importance = torch.tensor([1e-30, 0.0, 1.0, 1e-200, 1.0], dtype=torch.float64)
    wheel = UnitWheel(UNITS, importance, FULL, sharpness=0.1)
    for one in range(20):
        assert not UNITS.alive(wheel.spin(1, seed=one, level=1, candidate=0))[1]


def test_a_spin_depends_on_seed_level_and_candidate_alone():
    wheel = UnitWheel(UNITS, IMPORTANCE, FULL, sharpness=1.0)
    same = [UnitWheel(UNITS, IMPORTANCE, FULL, sharpness=1.0).spin(6, seed=1, level=2, candidate=3) for _ in range(2)]
    assert same[0] == same[1] == wheel.spin(6, seed=1, level=2, candidate=3)
    others = [wheel.spin(6, seed=1, level=2, candidate=one).digest for one in range(30)]
    assert len(set(others)) > 4


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**20),
    st.tuples(*(st.integers(1, 9) for _ in range(3))),
    st.floats(0.01, 1.3),
    st.sampled_from([0.0, 1.0, 16.0, math.inf]),
    st.tuples(*(st.integers(1, 4) for _ in range(3))),
)
def test_a_budget_is_met_and_exceeded_by_at_most_what_leaves_together(seed, sizes, share, sharpness, steps):
    net = perceptron((3, *sizes, 2), seed)
    weights = {name: one.detach() for name, one in net.named_parameters() if name.endswith("weight")}
    chance = torch.Generator().manual_seed(seed)
    each = {name: float(torch.rand((), generator=chance)) + 0.1 for name in weights}
    units = hidden_units(net, Cost("latency", each, torch.rand(sum(sizes), generator=chance).double()))
    units = replace(units, steps=dict(zip(units.groups, steps, strict=True)))
    parent = units.without(Mask.full(weights), torch.rand(units.count, generator=chance) < 0.2)
    if not units.removable(parent):
        return
    importance = importance_of_units(units, {name: one.abs() for name, one in weights.items()}, parent, False)
    budget = share * units.left(parent)
    child = UnitWheel(units, importance, parent, sharpness=sharpness).spin(budget, seed=seed, level=1, candidate=0)
    removed, before, after = units.left(parent) - units.left(child), units.alive(parent), units.alive(child)
    assert child <= parent
    gone = (before & ~after).nonzero().flatten()
    together = []
    for name, start, stop in units.ranges():
        step, alive, stay = units.step(name), int(before[start:stop].sum()), int(after[start:stop].sum())
        assert stay == alive or (stay >= step and stay % step == 0)
        ours = [one for one in gone.tolist() if start <= one < stop]
        together += combinations(ours, min(step, len(ours))) if ours else []
    if removed < budget * (1 - 1e-9):
        assert not units.removable(child)
    else:
        fewer = [torch.isin(torch.arange(units.count), gone[~torch.isin(gone, torch.tensor(one))]) for one in together]
        assert min(units.left(parent) - units.left(units.without(parent, one)) for one in fewer) < budget


def test_importance_is_the_root_of_the_sum_of_squares_for_what_leaves():
    importance = {name: one.abs() for name, one in WEIGHTS.items()}
    first, second, third = (one.double().square() for one in WEIGHTS.values())
    found = importance_of_units(UNITS, importance, FULL, readers_alone=False)
    whole = [(first[one].sum() + second[:, one].sum()) / (3 + 2) for one in range(3)]
    whole += [(second[one].sum() + third[:, one].sum()) / (3 + 2) for one in range(2)]
    assert found.tolist() == pytest.approx([math.sqrt(one) for one in whole])
    read = importance_of_units(UNITS, importance, FULL, readers_alone=True)
    assert read[:3].tolist() == pytest.approx([math.sqrt(second[:, one].sum() / 5) for one in range(3)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UnitWheel(UNITS, -IMPORTANCE, FULL, sharpness=1.0), "importance of the units has negative"),
        (lambda: UnitWheel(UNITS, IMPORTANCE * math.nan, FULL, sharpness=1.0), "importance of the units has negative"),
        (lambda: UnitWheel(UNITS, IMPORTANCE, FULL, sharpness=-1), "sharpness is -1"),
        (lambda: _spin(0), "budget is 0, but must be more than 0"),
        (lambda: _spin(1, 0, 1, 3), "no unit may leave: of each group one unit is left"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _spin(budget: float, *without: int) -> Mask:
    gone = torch.isin(torch.arange(5), torch.tensor(without, dtype=torch.int64))
    wheel = UnitWheel(UNITS, IMPORTANCE, UNITS.without(FULL, gone), sharpness=1.0)
    return wheel.spin(budget, seed=0, level=1, candidate=0)
