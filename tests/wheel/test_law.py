"""The law: exactly Plackett-Luce, at any sharpness, scale and size.

Seeds are fixed, so no test is flaky. FALSE_ALARM is the probability that a statistical test would fail on an exact
wheel if its seeds were not fixed.
"""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_roulette import spin
from lightning_roulette.wheel.chance import log_clocks, stream
from lightning_roulette.wheel.law import draw, layer_shares
from tests.support.wheels import by_law, partly

FALSE_ALARM = 1e-5
EVERYTHING = torch.ones(3, dtype=torch.bool)


def drawn(importance, draws, *, sharpness=1.0, seed=0) -> list[int]:
    """Indices of the weights drawn, by definition."""
    tensor = torch.as_tensor(importance, dtype=torch.float32)
    streams = {} if math.isinf(sharpness) else {"": stream(seed, 0, 0, "")}
    found = draw({"": tensor}, {"": tensor >= 0}, draws, sharpness=sharpness, streams=streams)[""]
    assert torch.equal(found, spin(tensor, tensor >= 0, draws, sharpness=sharpness, seed=seed))
    return found.nonzero().flatten().tolist()


def order_of(importance, *, sharpness: float, seed: int) -> tuple[int, ...]:
    """The order in which one seed draws all weights: each spin draws one weight more."""
    order: list[int] = []
    for draws in range(1, len(importance) + 1):
        (new,) = set(drawn(importance, draws, sharpness=sharpness, seed=seed)) - set(order)
        order.append(new)
    return tuple(order)


def plackett_luce(odds: list[float], order: tuple[int, ...]) -> float:
    """The probability of an order, by definition: each draw in proportion to the odds that are left."""
    left, product = sum(odds), 1.0
    for weight in order:
        product *= odds[weight] / left
        left -= odds[weight]
    return product


@pytest.mark.parametrize(
    ("importance", "sharpness", "trials"),
    [
        ([1.0, 3.0], 1.0, 1000),
        ([1.0, 2.0, 4.0], 1.0, 1000),
        ([0.5, 2.0, 1.0], 2.5, 1000),
        ([5.0, 1.0, 2.0, 3.0], 1.0, 1000),
        ([4.0, 1.0, 9.0, 2.0], 0.0, 1000),
        ([3.0, 1.0, 2.0, 1.5, 2.5], 0.5, 1200),
    ],
)
def test_orders_of_draws_follow_plackett_luce(importance, sharpness, trials):
    found = Counter(order_of(importance, sharpness=sharpness, seed=seed) for seed in range(trials))
    odds = [value**-sharpness for value in importance]
    exact = {order: plackett_luce(odds, order) * trials for order in permutations(range(len(odds)))}
    assert sum(exact.values()) == pytest.approx(trials)
    cells = [(found[order], expected) for order, expected in exact.items() if expected >= 5]
    seen, expected = np.array([*cells, (trials, trials) - np.sum(cells, axis=0) + 1e-9]).T  # the rare ones together
    chi = float(((seen - expected) ** 2 / expected).sum())
    assert chi < stats.chi2.isf(FALSE_ALARM, int((expected > 1).sum()) - 1)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    layers=st.lists(
        st.lists(st.sampled_from([0.0, 1e-38, 0.5, 1.0, 1.0, 1.0000001, 2.0, 3e38]), max_size=20),
        min_size=1,
        max_size=3,
    ).filter(any),
    share=st.floats(0, 1),
    alive=st.sampled_from([0.5, 1.0]),
    sharpness=st.sampled_from([0.0, 0.5, 7.0, math.inf]),
    candidate=st.integers(0, 2**31),
)
def test_a_draw_takes_the_first_of_all_sorted_keys(layers, share, alive, sharpness, candidate):
    """Zeros come first, then small keys; equal keys are in order of parameter and index."""
    weights = {str(number): torch.tensor(values) for number, values in enumerate(layers)}
    parent, order = partly(weights, alive), []
    for name, values in weights.items():
        clocks = log_clocks(stream(0, 1, candidate, name), torch.arange(len(values))).tolist()
        for index in parent[name].nonzero().flatten().tolist():
            value = float(values[index])
            key = clocks[index] + (sharpness * math.log(value) if value and sharpness else 0.0)
            order.append((value > 0 or sharpness == 0, value if math.isinf(sharpness) else key, name, index))
    draws = round(share * len(order))
    mask = by_law(weights, parent, draws, sharpness=sharpness, candidate=candidate)
    drawn = {(name, i) for name in weights for i in (parent[name] & ~mask[name]).nonzero().flatten().tolist()}
    assert drawn == {place[2:] for place in sorted(order)[:draws]}


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0, 20.0, math.inf])
@pytest.mark.parametrize("power", [-60, -3, 1, 40])
def test_scale_of_importance_does_not_matter(sharpness, power):
    importance = torch.from_numpy(np.random.default_rng(1).random(1000, dtype=np.float32))
    assert drawn(importance, 300, sharpness=sharpness) == drawn(importance * 2.0**power, 300, sharpness=sharpness)


@pytest.mark.parametrize("sharpness", [1e-9, 0.5, 1.0, 4.0, 50.0, 1e18, 1e300, math.inf])
def test_zeros_are_drawn_before_everything_else(sharpness):
    importance = torch.tensor([3.0, 0.0, 1e-30, 0.0, 1e30, 0.0, 1.0])
    for seed in range(20):
        assert drawn(importance, 3, sharpness=sharpness, seed=seed) == [1, 3, 5]
        assert set(drawn(importance, 2, sharpness=sharpness, seed=seed)) < {1, 3, 5}
        assert set(drawn(importance, 4, sharpness=sharpness, seed=seed)) > {1, 3, 5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("pair", "sharpness"),
    [((1e-30, 1e30), 1.0), ((1e-30, 1e30), 50.0), ((1e-30, 1e30), 1000.0), ((1.0e-30, 3.0e-30), 50.0)],
)
def test_odds_that_no_float_can_hold_order_the_weights(pair, sharpness, dtype):
    importance = torch.tensor(pair * 500, dtype=dtype)
    found = spin(importance, importance > 0, 500, sharpness=sharpness, seed=0)
    assert found.tolist() == [True, False] * 500
    assert int(spin(importance, importance > 0, 700, sharpness=sharpness, seed=0).sum()) == 700


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_importance_may_be_of_any_number_type(dtype):
    importance = torch.arange(1, 101)
    expected = spin(importance.float(), importance > 0, 40, sharpness=1.0, seed=0)
    assert torch.equal(spin(importance.to(dtype), importance > 0, 40, sharpness=1.0, seed=0), expected)


@pytest.mark.parametrize("sharpness", [0.0, 1.0, math.inf])
def test_a_spin_changes_nothing_that_it_is_given(sharpness):
    importance, survivors = torch.linspace(0, 1, 50, dtype=torch.float64), torch.arange(50) % 3 > 0
    before = importance.clone(), survivors.clone()
    drawn = spin(importance, survivors, 20, sharpness=sharpness, seed=0)
    assert (drawn.dtype, drawn.shape, int((drawn & survivors).sum())) == (torch.bool, (50,), int(drawn.sum()))
    assert torch.equal(importance, before[0])
    assert torch.equal(survivors, before[1])


def test_equal_seeds_draw_equally_and_other_seeds_do_not():
    importance = torch.linspace(0.1, 1, 400)
    assert drawn(importance, 100, seed=7) == drawn(importance, 100, seed=7)
    assert len({tuple(drawn(importance, 100, seed=seed)) for seed in (-8, -7, 0, 7, 8, 2**62)}) == 6


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"draws": 4}, "draws is 4, but must lie between 0 and the 3 survivors"),
        ({"draws": -1}, "draws is -1, but must lie between 0"),
        ({"survivors": torch.tensor([True, False, False])}, "draws is 2, .* the 1 survivors"),
        ({"sharpness": -0.5}, "sharpness is -0.5, but must be at least 0"),
        ({"sharpness": math.nan}, "sharpness is nan, but must be at least 0"),
        ({"importance": torch.tensor([1.0, -1e-9, 1.0])}, "importance of the weights has negative, infinite or NaN"),
        ({"importance": torch.tensor([1.0, math.inf, 1.0])}, "negative, infinite or NaN entries"),
        ({"importance": torch.tensor([1.0, math.nan, 1.0])}, "Do the weights hold NaN or infinity"),
        ({"importance": torch.ones(1, 3)}, r"importance has shape \(1, 3\) .* Flatten them first"),
        ({"survivors": torch.ones(4, dtype=torch.bool)}, r"survivors shape \(4,\)"),
        ({"survivors": torch.ones(3)}, "torch.float32, but .* survivors of bool"),
        ({"seed": 2**63}, "signed 64-bit number"),
        ({"seed": -(2**63) - 1}, "signed 64-bit number"),
    ],
)
@pytest.mark.parametrize("sharpness", [1.0, math.inf])
def test_spin_refuses(changed, message, sharpness):
    valid = {"importance": torch.ones(3), "survivors": EVERYTHING, "draws": 2, "sharpness": sharpness, "seed": 0}
    assert int(spin(**valid).sum()) == 2
    with pytest.raises(ValueError, match=message):
        spin(**valid | changed)


@pytest.mark.parametrize(
    ("draws", "survivors", "shares"),
    [
        (5, [10, 10, 1], [3, 2, 0]),
        (0, [4, 4], [0, 0]),
        (3, [1, 1, 1], [0, 0, 0]),
        (10, [10, 20, 70], [1, 2, 7]),
        (1, [3, 5, 5], [0, 1, 0]),  # equal remainders: the earlier
        (2, [3, 3, 3, 3], [1, 1, 0, 0]),
        (4, [2, 2, 9], [1, 0, 3]),
        (9, [1, 1, 10], [0, 0, 9]),
        (7, [0, 4, 0, 5], [0, 3, 0, 4]),
    ],
)
def test_shares_by_largest_remainder(draws, survivors, shares):
    assert layer_shares(draws, survivors) == shares


@settings(max_examples=300, deadline=None, derandomize=True)
@given(survivors=st.lists(st.integers(0, 200), min_size=1, max_size=12), share=st.floats(0, 1.2))
def test_shares_add_up_and_leave_one_weight_in_each_layer(survivors, share):
    draws = int(share * sum(survivors))
    shares = layer_shares(draws, survivors)
    assert sum(shares) == min(draws, sum(max(0, count - 1) for count in survivors))
    assert all(0 <= given <= max(0, count - 1) for given, count in zip(shares, survivors, strict=True))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(survivors=st.lists(st.integers(3, 200), min_size=1, max_size=12), share=st.floats(0, 0.6))
def test_shares_are_within_one_weight_of_proportion(survivors, share):
    # up to a share of 0.6, each layer of three or more has room for its rounded-up share
    draws, total = int(share * sum(survivors)), sum(survivors)
    shares = layer_shares(draws, survivors)
    exact = [Fraction(draws * count, total) for count in survivors]
    assert all(abs(given - part) < 1 for given, part in zip(shares, exact, strict=True))
    up, down = (
        [part % 1 for given, part in zip(shares, exact, strict=True) if (given > part) == up] for up in (True, False)
    )
    assert min(up, default=1) >= max(down, default=0)
