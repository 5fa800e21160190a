"""Betting: the exact p-value of a mean of samples."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_roulette.judge.betting import log_wealth
from lightning_roulette.judge.certificate import p_value
from lightning_roulette.judge.outcomes import Singles
from tests.support.outcomes import chance, flips, singles


def naive_log_wealth(declines: list[float], tolerance: float, confidence: float) -> float:
    """The game sample by sample, as the documentation states it."""
    goal, wealth, best, squares, bet = 1e-9 - math.log(1 - confidence), 1.0, 1.0, 4.0, 0.0
    block = max(1, math.ceil(len(declines) / 200))
    for i, decline in enumerate(declines):
        if i % block == 0:
            need = goal * (1 + math.floor(math.log(best) / goal)) - (math.log(wealth) if wealth > 0 else -math.inf)
            left = len(declines) - i
            bet = math.sqrt(2 * need * (i + 1) / (left * squares))
            if tolerance > 0:
                bet = max(bet, math.expm1(min(need / left, 700)) / tolerance)
            bet = min(bet, 1 / (1 - tolerance))
        wealth *= max(1 + bet * (tolerance - decline), 0.0)
        best = max(best, wealth)
        squares += decline**2
    return math.log(best)


def assert_rare(found: torch.Tensor, level: float) -> None:
    """The share is not above the level by more than two standard deviations."""
    assert found.double().mean() <= level + 2 * math.sqrt(level * (1 - level) / len(found))


@pytest.mark.parametrize("samples", [1, 7, 199, 200, 201, 1000, 1234])
@pytest.mark.parametrize(("worse", "better"), [(0.01, 0.0), (0.02, 0.05), (0.0, 0.3)])
@pytest.mark.parametrize(("tolerance", "confidence"), [(0.005, 0.95), (0.3, 0.8), (0.0, 0.9), (-0.02, 0.99)])
def test_the_wealth_is_that_of_the_naive_game(samples, worse, better, tolerance, confidence):
    declines = flips((samples,), worse, better, samples)
    expected = naive_log_wealth(declines.tolist(), tolerance, confidence)
    assert float(log_wealth(declines, tolerance, confidence)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_one_sample_by_hand():
    # the goal is out of reach in one step: the largest bet, 1 / (1 - 0.5), and a wealth of 1 + 2 * (0.5 - decline)
    wealth = log_wealth(torch.tensor([[0.0], [0.5], [1.0], [-1.0], [0.25]], dtype=torch.float64), 0.5).exp()
    assert wealth.tolist() == pytest.approx([2.0, 1.0, 1.0, 4.0, 1.5])


def test_the_wealth_of_many_games_is_that_of_each():
    declines = flips((3, 4, 700), 0.01, 0.01, 0)
    together = log_wealth(declines, 0.005)
    assert together.shape == (3, 4)
    torch.testing.assert_close(together[1, 2], log_wealth(declines[1, 2], 0.005))


@pytest.mark.parametrize("samples", [600, 2000])
@pytest.mark.parametrize(("worse", "better"), [(0.005, 0.0), (0.015, 0.01), (0.007, 0.002)])
def test_a_decline_of_exactly_the_tolerance_is_rarely_certified(samples, worse, better):
    assert_rare(log_wealth(flips((1000, samples), worse, better, 1), 0.005) >= math.log(20), 0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("worse", "better", "seed"), [(0.005, 0.0, 0), (0.015, 0.01, 100)])
def test_a_decline_of_exactly_the_tolerance_is_rarely_certified_on_much_data(worse, better, seed):
    parts = [log_wealth(flips((200, 20_000), worse, better, seed + part), 0.005) for part in range(10)]
    assert_rare(torch.cat(parts) >= math.log(20), 0.05)


@pytest.mark.parametrize("aim", [0.5, 0.95, 0.99])
def test_the_p_value_is_valid_at_every_level(aim):
    # skewed declines that no accuracy has: mostly small gains, some large losses
    uniform = torch.rand((4000, 300), generator=chance(2), dtype=torch.float64)
    p = torch.exp(-log_wealth(torch.where(uniform < 0.2, 0.9, -0.1), 0.1, aim))
    for level in (0.5, 0.2, 0.1, 0.05, 0.01):
        assert_rare(p <= level, level)


@pytest.mark.parametrize(("samples", "least"), [(1000, 0.18), (5000, 0.70), (10_000, 0.93)])
def test_networks_that_did_not_decline_are_certified(samples, least):
    certified = log_wealth(flips((400, samples), 0.01, 0.01, 3), 0.005) >= math.log(20)
    assert certified.double().mean() >= least


def test_golden_p_values():
    worse, better = torch.zeros(1000), torch.zeros(1000)
    worse[::200], better[7] = 1.0, -1.0
    found = [p_value(*singles(declines), 0.005) for declines in (torch.zeros(1000), worse, better)]
    assert found == pytest.approx([0.028792625551759262, 0.6754062427943425, 0.01848699771398098], rel=1e-6)


def test_units_do_not_matter():
    declines = flips((2000,), 0.004, 0.006, 5)
    unit = p_value(*singles(declines), 0.005)
    assert unit < 0.9
    assert p_value(*singles(declines, 0, 100), 0.5) == pytest.approx(unit)
    assert p_value(*singles(declines, -3, 1), 0.02) == pytest.approx(unit)


def test_only_the_differences_count():
    declines = flips((1500,), 0.004, 0.006, 5)
    dense, pruned = singles(declines)
    both_right = torch.where(declines == 0, 1.0, dense.values)
    shifted = Singles(both_right, 0, 1), Singles(both_right - declines, 0, 1)
    assert p_value(*shifted, 0.005) == p_value(dense, pruned, 0.005)


def test_data_sorted_by_class_are_shuffled():
    # the last class alone declines: in the order of the data, the game would be won before it comes
    declines = torch.zeros(1000)
    declines[-20:] = 1.0
    assert float(log_wealth(declines.double(), 0.005)) > math.log(20)
    assert p_value(*singles(declines), 0.005) > 0.5


def test_a_tolerance_of_the_whole_range_of_scores_is_always_kept():
    assert p_value(*singles(torch.ones(3)), 1.0) == 2.0**-1022
    assert p_value(*singles(torch.ones(3), 0, 100), 99.9) > 0.01


def test_a_million_samples_underflow_to_the_smallest_number():
    assert p_value(*singles(torch.zeros(1_000_000)), 0.01) == 2.0**-1022


def test_the_confidence_sets_the_goal_of_the_bets_and_is_95_by_default():
    pair = singles(flips((3000,), 0.01, 0.01, 8))
    assert p_value(*pair, 0.005) == p_value(*pair, 0.005, 0.95) != p_value(*pair, 0.005, 0.99)
