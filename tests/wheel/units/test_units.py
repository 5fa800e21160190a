"""Units: what leaves with each, counted entry by entry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette import Mask
from lightning_roulette.wheel.units.units import Cost, Part, Units
from tests.support.units import hidden_units, labels, perceptron

NET = perceptron()  # 4 -> 3 -> 5 -> 2
WEIGHTS = {name: one.detach() for name, one in NET.named_parameters() if name.endswith("weight")}
UNITS = hidden_units(NET)
FULL = Mask.full(WEIGHTS)


def gone(*numbers: int, of: int = 8) -> torch.Tensor:
    return torch.isin(torch.arange(of), torch.tensor(numbers, dtype=torch.int64))


def test_a_unit_takes_its_row_and_its_column_and_a_shared_entry_counts_once():
    mask = UNITS.without(FULL, gone(1, 3))  # the second neuron of the first layer, the first of the second
    first, second, third = mask.values()
    assert first.tolist() == [[True] * 4, [False] * 4, [True] * 4]
    assert second.tolist() == [[False] * 3, *([[True, False, True]] * 4)]
    assert third.tolist() == [[False, True, True, True, True]] * 2
    assert UNITS.left(mask) == mask.survivors == 37 - 4 - 2 - (5 + 3 - 1)
    assert UNITS.alive(mask).tolist() == [True, False, True, False, True, True, True, True]
    assert UNITS.removable(mask) == 1 + 3


def test_costs_are_what_leaves_with_a_unit_alone():
    assert UNITS.costs(FULL).tolist() == [4 + 5] * 3 + [3 + 2] * 5
    assert UNITS.costs(UNITS.without(FULL, gone(0, 1))).tolist() == [0, 0, 9] + [1 + 2] * 5


def test_own_and_fixed_costs_count_once_for_each_unit_that_is_left():
    own = torch.arange(8, dtype=torch.float64)
    units = hidden_units(NET, Cost("parameters", {"0.weight": 2.0, "4.weight": 3.0}, own, 100.0))
    assert units.whole(FULL) == units.left(FULL) == 100 + 28 + 2 * 12 + 3 * 10
    assert units.left(units.without(FULL, gone(1, 7))) == 100 + 28 - 8 + 2 * 8 + 3 * 8
    assert units.costs(FULL).tolist() == [8, 9, 10, 9, 10, 11, 12, 13]
    assert units.left(FULL, UNITS.cost) == 37


def test_an_entry_that_leaves_with_one_unit_by_row_and_by_column_counts_once():
    square = Units("neuron", {"a": 3}, tuple(Part("w", labels(0, 3, dim, 2)) for dim in (0, 1)), Cost.of_weights(["w"]))
    weights = {"w": torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])}
    assert square.totals(weights).tolist() == [1 + 2 + 3 + 4 + 7, 2 + 4 + 5 + 6 + 8, 3 + 6 + 7 + 8 + 9]


def test_entries_that_only_compute_a_unit_may_be_left_out():
    values = {name: torch.ones_like(one) for name, one in WEIGHTS.items()}
    assert UNITS.totals(values, readers_alone=True).tolist() == [5] * 3 + [2] * 5


def test_several_units_of_a_flattened_map_and_entries_of_no_unit():
    lines = torch.tensor([0, 0, -1, 1, 1, -1])[None]
    units = Units("neuron", {"a": 2}, (Part("w", lines),), Cost.of_weights(["w"]))
    full = Mask({"w": torch.ones(2, 6, dtype=torch.bool)})
    assert units.without(full, gone(1, of=2))["w"].tolist() == [[True, True, True, False, False, True]] * 2
    assert units.costs(full).tolist() == [4, 4]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 7), max_size=8, unique=True),
    st.integers(0, 2**20),
    st.tuples(st.integers(1, 4), st.integers(1, 3)),
)
def test_what_is_left_is_what_a_dense_count_finds(numbers, seed, kernel):
    """Convolutions whose groups share entries, in an unstructured parent."""
    chance = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 2, *kernel), "b": (5, 3, *kernel), "c": (2, 5)}
    parent = Mask({name: torch.rand(shape, generator=chance) < 0.7 for name, shape in shapes.items()})
    parts = (
        Part("a", labels(0, 3, 0, 4), reads=False),
        Part("b", labels(0, 3, 1, 4)),
        Part("b", labels(3, 5, 0, 4), reads=False),
        Part("c", labels(3, 5, 1, 2)),
    )
    cost = Cost("multiply_adds", {"a": 9.0, "b": 4.0, "c": 1.0})
    units = Units("neuron", {"a": 3, "b": 5}, parts, cost)
    mask = units.without(parent, gone(*numbers))
    expected = {name: kept.clone() for name, kept in parent.items()}
    for number in numbers:
        if number < 3:
            expected["a"][number] = expected["b"][:, number] = False
        else:
            expected["b"][number - 3] = expected["c"][:, number - 3] = False
    assert mask == Mask(expected)
    assert units.left(mask) == sum(cost.each[name] * int(kept.sum()) for name, kept in expected.items())
    assert mask <= parent
    alone = torch.tensor([units.left(parent) - units.left(units.without(parent, gone(one))) for one in range(8)])
    assert units.costs(parent) == pytest.approx(alone.double())
