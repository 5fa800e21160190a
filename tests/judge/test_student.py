"""Student's t over batches, and the bootstrap over samples."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from lightning_roulette.judge.certificate import p_value, paired_error
from lightning_roulette.judge.outcomes import Batches, Resamples, Singles
from lightning_roulette.judge.student import t_tail
from tests.support.outcomes import batches, chance, flips, mean_of


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 29, 199, 5000])
def test_the_tail_of_t(degrees):
    for t in (-30.0, -1.5, -0.01, 0.0, 1e-9, 0.3, 1.0, 1.7, 2.5, 8.0, 60.0):
        assert t_tail(t, degrees) == pytest.approx(stats.t.sf(t, degrees), rel=1e-9)
    assert (t_tail(math.inf, degrees), t_tail(-math.inf, degrees)) == (0.0, 1.0)


def test_the_p_value_of_batches_by_hand():
    dense, pruned = batches([0.9, 0.8, 1.0, 0.9]), batches([0.88, 0.79, 0.97, 0.88])
    # differences 0.02, 0.01, 0.03, 0.02: mean 0.02, error sqrt(2e-4 / 3 / 4); reach: the wider range, 0.2 / 4
    error = math.sqrt(2e-4 / 12)
    assert paired_error(dense, pruned) == pytest.approx(error, rel=1e-4)
    t = (0.3 - 0.02) / math.hypot(error, 0.05)
    assert p_value(dense, pruned, 0.3) == pytest.approx(stats.t.sf(t, 3), rel=1e-4)


def test_batches_are_weighted_by_their_sizes():
    dense, pruned = batches([0.9, 0.8, 0.0], [100, 100, 10]), batches([0.89, 0.83, 0.5], [100, 100, 10])
    differences, weights = torch.tensor([-0.01, 0.03, 0.5]), torch.tensor([100.0, 100.0, 10.0])
    mean = (weights * differences).sum() / 210
    error = ((weights * (differences - mean) ** 2).sum() / 210 / 2).sqrt()
    assert paired_error(dense, pruned) == pytest.approx(float(error), rel=1e-4)
    effects = weights * (torch.tensor([0.9, 0.8, 0.0]) - 170 / 210) / 210
    t = (0.4 + mean) / torch.hypot(error, effects.max() - effects.min())
    assert p_value(dense, pruned, 0.4) == pytest.approx(stats.t.sf(float(t), 2), rel=1e-4)


@pytest.mark.parametrize(("worse", "better"), [(0.005, 0.0), (0.015, 0.01)])
@pytest.mark.parametrize(("number", "size"), [(10, 20), (10, 100), (50, 100)])
def test_batches_that_declined_by_exactly_the_tolerance_are_rarely_certified(worse, better, number, size):
    declines = flips((400, number, size), worse, better, 9).mean(2)
    right = (torch.rand((400, number, size), generator=chance(10)) < 0.95).double().mean(2)
    weights = torch.full((number,), size)
    certified = [
        p_value(Batches(one, weights), Batches(one - decline, weights), 0.005) <= 0.05
        for one, decline in zip(right, declines, strict=True)
    ]
    assert sum(certified) / 400 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)


def test_batches_without_any_variation_are_not_certified():
    assert p_value(batches([1.0] * 9), batches([1.0] * 9), 0.005) == 1.0


@pytest.mark.parametrize("samples", [200, 3000])
def test_the_error_of_a_mean_is_the_analytic_one(samples):
    dense = torch.randn(samples, generator=chance(11), dtype=torch.float64)
    pruned = dense + 0.1 * torch.randn(samples, generator=chance(12), dtype=torch.float64)
    analytic = float((pruned - dense).std()) / math.sqrt(samples)
    # the deviation of 50 numbers is known to 10 %
    assert paired_error(mean_of(dense), mean_of(pruned)) == pytest.approx(analytic, rel=0.25)
    low, high = float(torch.min(dense.min(), pruned.min())), float(torch.max(dense.max(), pruned.max()))
    assert paired_error(Singles(dense, low, high), Singles(pruned, low, high)) == pytest.approx(analytic)


def test_the_bootstrap_p_value_of_a_mean_by_hand():
    values = torch.randn(100, generator=chance(13), dtype=torch.float64)
    dense, pruned = mean_of(values), mean_of(values + 0.1 * torch.randn(100, generator=chance(14), dtype=torch.float64))
    every = torch.arange(100)
    # a mean without sample i is off by (mean - value[i]) / 99
    ranges = [max(s) - min(s) for s in ([one.score(every[every != i]) for i in range(100)] for one in (dense, pruned))]
    apart = torch.tensor(pruned.resampled(200)) - torch.tensor(dense.resampled(200))
    reach, error = max(ranges), float(apart.double().std())
    decline = dense.score(every) - pruned.score(every)
    expected = stats.t.sf((0.2 - decline - reach) / math.hypot(error, reach), 199)
    assert p_value(dense, pruned, 0.2) == pytest.approx(expected)


def f1(outcomes: Tensor) -> Resamples:
    """F1 of rows (true, predicted), both 0 or 1."""

    def score(index: Tensor) -> float:
        true, predicted = outcomes[index].unbind(1)
        return float(2 * (true * predicted).sum() / (true.sum() + predicted.sum()).clamp(min=1))

    return Resamples(score, len(outcomes))


def test_a_rare_class_without_any_change_is_not_certified():
    true = (torch.arange(400) % 10 == 0).double()
    dense = true.clone()
    dense[::100] = 1 - dense[::100]
    outcomes = f1(torch.stack([true, dense], 1))
    assert paired_error(outcomes, outcomes) == 0.0
    assert p_value(outcomes, outcomes, 0.005) > 0.05
    assert p_value(outcomes, outcomes, 0.2) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("prevalence", "lost"), [(0.5, 0.01), (0.1, 0.05)])
def test_an_f1_that_declined_by_exactly_the_tolerance_is_rarely_certified(prevalence, lost):
    def drawn(samples: int, seed: int) -> Tensor:
        uniform = torch.rand((3, samples), generator=chance(seed))
        true = uniform[0] < prevalence
        dense = torch.where(true, uniform[1] < 0.9, uniform[1] < 0.02)
        pruned = dense & ~(true & (uniform[2] < lost))
        return torch.stack([true, dense, pruned], 1).double()

    everything = torch.arange(4_000_000)
    population = drawn(4_000_000, 0)
    tolerance = f1(population[:, :2]).score(everything) - f1(population[:, ::2]).score(everything)
    draws = [drawn(300, seed) for seed in range(1, 101)]
    certified = [p_value(f1(one[:, :2]), f1(one[:, ::2]), tolerance) <= 0.05 for one in draws]
    assert sum(certified) / 100 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 100)
