"""Approximate p-values of paired scores: Student's t over batches, and a bootstrap over samples.

Both are one tail of Student's t for `(tolerance - decline) / error`, where the error includes the *reach*: how much
single samples (or batches) differ in their effect on a score. A network that fails once in many samples often shows no
difference at all on a small sample. Its error would be zero, and it would be certified. The reach counts as one further
difference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_roulette.judge.outcomes import Batches, Resamples, differences, float64
from lightning_roulette.wheel.chance import random_bits, stream

_RESAMPLES = 200


def batches_p(dense: Batches, pruned: Batches, tolerance: float) -> float:
    """Return the p-value by a t-test over batches. The reach is added in quadrature to the error."""
    weights = float64(dense.weights)
    decline, error = mean_and_error(differences(dense, pruned), weights)
    reach = max(_batch_reach(float64(one.values), weights) for one in (dense, pruned))
    return _tail(decline, math.hypot(error, reach), len(weights) - 1, tolerance)


def bootstrap_p(dense: Resamples, pruned: Resamples, tolerance: float) -> float:
    """Return the p-value by a paired bootstrap. The reach is added to the decline, and in quadrature to the error."""
    everything = torch.arange(dense.size)
    decline, error = dense.score(everything) - pruned.score(everything), bootstrap_error(dense, pruned)
    if not math.isfinite(decline + error):
        return 1.0
    reach = max(_sample_reach(dense), _sample_reach(pruned))
    return _tail(decline + reach, math.hypot(error, reach), _RESAMPLES - 1, tolerance)


def mean_and_error(values: Tensor, weights: Tensor) -> tuple[float, float]:
    """Return the weighted mean and its standard error. The variance of a value is inverse to its weight."""
    mean = (weights * values).sum() / weights.sum()
    squares = (weights * (values - mean).square()).sum() / weights.sum()
    return float(mean), math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else math.nan


def bootstrap_error(dense: Resamples, pruned: Resamples, count: int = _RESAMPLES) -> float:
    """Return the standard deviation of the difference over `count` resamples; NaN for fewer than two samples."""
    if dense.size < 2:
        return math.nan
    scores = (torch.tensor(one.resampled(count), dtype=torch.float64) for one in (pruned, dense))
    return float(torch.sub(*scores).std())


def t_tail(t: float, degrees: int) -> float:
    """Return the probability that Student's t with this number of degrees of freedom exceeds `t`."""
    if t < 0:
        return 1 - t_tail(-t, degrees)
    x = degrees / (degrees + t * t)
    if x < (degrees + 2) / (degrees + 5):
        return _incomplete_beta(x, degrees / 2, 0.5) / 2
    return 0.5 - _incomplete_beta(t * t / (degrees + t * t), 0.5, degrees / 2) / 2


def _tail(decline: float, error: float, degrees: int, tolerance: float) -> float:
    if not math.isfinite(decline + error):
        return 1.0
    if math.isinf(tolerance):
        return float(tolerance < 0)
    return t_tail((tolerance - decline) / error, degrees) if error > 0 else 1.0


def _sample_reach(outcomes: Resamples) -> float:
    """Return the range of the scores with one sample left out, over at most 200 samples."""
    everything, size = torch.arange(outcomes.size), outcomes.size
    chance = random_bits(stream(0, 0, 0, "left out"), torch.arange(_RESAMPLES)) % size
    left_out = everything if size <= _RESAMPLES else chance
    scores = [float(outcomes.score(everything[everything != one])) for one in left_out]
    return max(scores) - min(scores)


def _batch_reach(values: Tensor, weights: Tensor) -> float:
    """Return the range of the contributions of single batches to the weighted mean."""
    effects = weights * (values - mean_and_error(values, weights)[0]) / weights.sum()
    return float(effects.amax() - effects.amin()) if len(values) else math.nan


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Return the regularised incomplete beta function, for `x` of at most about `(a + 1) / (a + b + 2)`.

    It is computed by its continued fraction (Abramowitz and Stegun 26.5.8) with Lentz's method.
    """
    if x == 0:
        return 0.0
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            c, d = 1 + term / c, 1 / (1 + term * d)
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(front) * fraction / a
