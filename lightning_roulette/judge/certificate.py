"""Whether independent data certify that a pruned network has not declined by more than the tolerance.

The decline of a network is the dense score minus its own; larger scores are better. Its null hypothesis says that the
true decline, over all data of which the recorded samples are an independent draw, exceeds the tolerance. A p-value of
at most `1 - confidence` certifies the network. Nested networks that were chosen on other data may be tested in order,
the densest first, up to the first that is not certified: no correction for their number is due, and the last certified
one truly exceeds the tolerance with probability at most `1 - confidence` (fixed-sequence testing; Angelopoulos et al.,
"Learn then Test", 2021, arXiv:2110.01052).

How the p-value arises depends on what a validation recorded: `Method` names the three ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_roulette.report.records import Method
from lightning_roulette.wheel.chance import random_bits, stream

_LEAST = 2.0**-1022  # no p-value is smaller: the smallest normal float64
_RESAMPLES, _FEW_RESAMPLES = 200, 50
_BLOCKS = 200
_PRIOR_SQUARES = 4.0


@dataclass(frozen=True, eq=False)
class Singles:
    """Scores of one network, sample by sample; the metric is their mean.

    Attributes:
        values: Shape `(samples,)`, in the order of the data.
        low: The least score that any sample could get, known without looking at the data.
        high: The largest score that any sample could get.

    Raises:
        ValueError: If `values` is not of one dimension, a finite value lies outside the bounds, or these are not finite
            and in order. The p-value is exact within the bounds only.
    """

    values: Tensor
    low: float
    high: float

    def __post_init__(self) -> None:
        _check_line("values", self.values)
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"low and high are {self.low} and {self.high}; allowed are finite numbers, the smaller one first: "
                "give the range of a sample's score, or record the metric as Resamples if it has none."
            )
        outside = torch.isfinite(self.values) & ((self.values < self.low) | (self.values > self.high))
        if bool(outside.any()):
            raise ValueError(
                f"values hold {float(self.values[outside][0])}; allowed is [{self.low}, {self.high}]: "
                "widen low and high to every score that a sample could get."
            )


@dataclass(frozen=True, eq=False)
class Resamples:
    """A metric of one network that is not a mean over samples, such as F1, AUROC or a correlation.

    Attributes:
        score: The metric on the recorded samples of these indices: int64, shape `(any,)`, with repetition.
        size: How many samples were recorded.
    """

    score: Callable[[Tensor], float]
    size: int
    _scores: list[float] = field(default_factory=list, init=False, repr=False)

    def resampled(self, count: int) -> list[float]:
        """The scores on so many resamples, the same for all networks; each is scored once."""
        counter = torch.arange(self.size)
        for i in range(len(self._scores), count):
            self._scores.append(float(self.score(random_bits(stream(0, 0, i, "resample"), counter) % self.size)))
        return self._scores[:count]


@dataclass(frozen=True, eq=False)
class Batches:
    """Scores of one network, batch by batch; the metric is their weighted mean.

    Attributes:
        values: Shape `(batches,)`.
        weights: Shape `(batches,)`, positive: the samples of each batch.

    Raises:
        ValueError: If the two are not of one dimension and of equal size, or a weight is not positive and finite.
    """

    values: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        _check_line("values", self.values)
        if self.weights.shape != self.values.shape:
            raise ValueError(
                f"weights have shape {tuple(self.weights.shape)}; allowed is that of values, "
                f"{tuple(self.values.shape)}: give the size of every batch."
            )
        unfit = ~(torch.isfinite(self.weights) & (self.weights > 0))
        if bool(unfit.any()):
            raise ValueError(
                f"weights hold {float(self.weights[unfit][0])}; allowed are positive, finite numbers: "
                "leave batches without samples out."
            )


Outcomes = Singles | Resamples | Batches


def method_of(outcomes: Outcomes) -> Method:
    """How the p-value of such outcomes arises."""
    return {Singles: Method.BETTING, Resamples: Method.BOOTSTRAP, Batches: Method.STUDENT}[type(outcomes)]


def paired_error(dense: Outcomes, pruned: Outcomes) -> float:
    """The standard error of the pruned score minus the dense score, both taken on the same samples.

    From the differences of samples for `Singles`, of batches for `Batches` (the variance of a batch being inverse to
    its weight), and over 50 paired resamples for `Resamples`. Equal arguments, equal result; no generator is read.

    Returns:
        In units of the score; NaN for fewer than two samples or batches and for values that are not finite.

    Raises:
        ValueError: If the two are not outcomes of the same kind, bounds, weights and size.
    """
    _check_pair(dense, pruned)
    match dense, pruned:
        case Singles() as one, Singles() as other:
            return _mean_and_error(_differences(one, other), torch.ones(len(one.values), dtype=torch.float64))[1]
        case Resamples() as one, Resamples() as other:
            return _bootstrap_error(one, other, _FEW_RESAMPLES)
        case Batches() as one, Batches() as other:
            return _mean_and_error(_differences(one, other), _plain(one.weights))[1]
    raise _unlike(dense, pruned)


def p_value(dense: Outcomes, pruned: Outcomes, tolerance: float, confidence: float = 0.95) -> float:
    """The p-value of the null hypothesis that the pruned network's true decline exceeds the tolerance.

    For `Singles` it is exact, whatever the number of samples: `1 / wealth` by the betting bound of `log_wealth`, the
    samples taken in a shuffled order that does not depend on them.

    For `Resamples` and `Batches` it is approximate: one tail of Student's t for `(tolerance - decline) / error`. Rare
    changes are a trap to both: a network that fails once in many samples often shows no difference at all, and would
    have an error of zero. Hence the *reach*, by how much single samples (or batches) differ in their effect on a score,
    counts as one further difference: it is added in quadrature to the error, and for `Resamples` to the decline, too.
    In simulations at a true decline of exactly the tolerance (accuracy in batches, F1 of common and rare classes, 200
    to 5,000 samples, confidence 0.95) 0 to 5 % of networks are certified; without the reach it is up to 39 % in batches
    and 84 % by the bootstrap, whether by quantiles of 2,000 resamples or by the error of 200.

    Args:
        dense: What the network recorded before pruning.
        pruned: What it recorded afterwards, on the same samples.
        tolerance: The largest decline that is allowed, in units of the score; may be infinite.
        confidence: In (0, 1). The bets aim at a p-value of `1 - confidence`; it is valid at any other level as well.

    Returns:
        In (0, 1]; 1 if an outcome is not finite or nothing shows how much scores vary, and the least normal float64,
        2**-1022, where the null hypothesis cannot hold.

    Raises:
        ValueError: If the two are not outcomes of the same kind, bounds, weights and size, the tolerance is NaN or the
            confidence is not in (0, 1).
    """
    _check_pair(dense, pruned)
    _check_confidence(confidence)
    if math.isnan(tolerance):
        raise ValueError("tolerance is NaN; allowed is any other number: give the largest decline that is acceptable.")
    match dense, pruned:
        case Singles() as one, Singles() as other:
            p = _betting(_differences(one, other), one.high - one.low, tolerance, confidence)
        case Resamples() as one, Resamples() as other:
            p = _bootstrap(one, other, tolerance)
        case Batches() as one, Batches() as other:
            p = _student(one, other, tolerance)
        case _:
            raise _unlike(dense, pruned)
    return min(max(p, _LEAST), 1.0)


def samples_needed(confidence: float, tolerance: float, width: float = 1.0) -> int:
    """The fewest samples with which `Singles` can be certified if no sample differs between the two networks.

    It is the least `n` with `(1 - tolerance / width) ** n <= 1 - confidence`: 598 for half a point of accuracy at 0.95.

    Args:
        confidence: In (0, 1).
        tolerance: The largest decline that is allowed, positive, in units of the score.
        width: The range of a sample's score, `high - low`.

    Raises:
        ValueError: If an argument is not in its range.
    """
    _check_confidence(confidence)
    if not (tolerance > 0 and 0 < width < math.inf):
        raise ValueError(
            f"tolerance and width are {tolerance} and {width}; allowed are positive numbers, the width finite: "
            "without a tolerance no number of equal samples certifies a network."
        )
    if tolerance >= width:
        return 1
    return math.ceil(math.log(1 - confidence) / math.log1p(-tolerance / width))


def too_few(samples: int, width: float | None, confidence: float, tolerance: float, share: float) -> str:
    """Why so many samples could certify no network at all, and what to do about it; empty if they could.

    Args:
        samples: Independent of the search.
        width: The range of a sample's score; None where samples are not scored one by one.
        confidence: In (0, 1).
        tolerance: The largest decline that is allowed, positive, in units of the score.
        share: Of all validation samples those that are independent of the search, in (0, 1].
    """
    needed = 2 if width is None else samples_needed(confidence, tolerance, width)
    if samples >= needed:
        return ""
    if width is None:
        return (
            f"confidence is {confidence}, but the confirmation data shows the metric as {samples} numbers, which must "
            "be at least 2. Log the torchmetrics object itself, or a number for each batch, in validation_step; or "
            "leave confidence out."
        )
    return (
        f"confidence is {confidence} and tolerance {tolerance}, which {samples} confirmation samples can certify of no "
        f"network, not even of one that errs just as the dense one does. They must be at least {needed}, which is "
        f"{math.ceil(needed / share)} validation samples in all. Use more, allow a larger tolerance or a lower "
        "confidence, or leave confidence out."
    )


def size_of(outcomes: Outcomes) -> int:
    """How many samples, or batches, there are."""
    return outcomes.size if isinstance(outcomes, Resamples) else len(outcomes.values)


def log_wealth(declines: Tensor, tolerance: float, confidence: float = 0.95) -> Tensor:
    """The logarithm of the largest wealth in a game that the null hypothesis makes unfavourable.

    A wealth of 1 is multiplied by `1 + bet * (tolerance - decline)` at every sample, with `bet` in
    `[0, 1 / (1 - tolerance)]` chosen before it is seen. If the mean decline is at least the tolerance, this is a
    non-negative supermartingale: the wealth ever reaches `x` with probability at most `1 / x` (Ville), so that its
    inverse is a p-value (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS-B
    2024).

    Which bets are made only decides the power. These aim at a wealth of `1 / (1 - confidence)` at the last sample:

        bet = sqrt(2 * need / (left * square)), at least expm1(need / left) / tolerance, at most 1 / (1 - tolerance)

    where `need` is the logarithm of what is missing, `left` the number of samples to come and `square` the mean squared
    decline so far, which begins at 4 (Voracek and Orabona, "STaR-Bets", 2025, arXiv:2505.22422). The lower limit
    reaches the aim if nothing differs from here on. An aim that is reached gives way to its next power. Bets change at
    most 200 times.

    Share of networks certified at a tolerance of 0.005 and a confidence of 0.95, flips (worse + better) in percent,
    next to the best of four fixed bets in hindsight, bets by the rate of growth (aGRAPA, up to half of the largest bet)
    and a mixture of 8 bets on a geometric grid, all by their largest wealth:

        samples  flips      these  hindsight  growth  mixture
          1,000  1 + 1       0.22       0.18    0.12     0.05
          5,000  1 + 1       0.75       0.64    0.43     0.40
         10,000  1 + 1       0.96       0.90    0.74     0.79
          1,000  0.2 + 0.2   0.57       0.46    0.19     0.20
          5,000  0.25 + 0    0.86       0.78    0.72     0.51

    Args:
        declines: Shape `(..., samples)`, float64, in [-1, 1]: the dense minus the pruned score of every sample, in
            units of the width of a score.
        tolerance: Less than 1, in the same units.
        confidence: In (0, 1): what the bets aim at.

    Returns:
        Shape `(...)`, non-negative.
    """
    samples, seen = declines.shape[-1], 0
    # a little more than the goal, lest rounding miss it
    goal, most = 1e-9 - math.log(1 - confidence), 1 / (1 - tolerance)
    wealth, squares = declines.new_zeros(declines.shape[:-1]), declines.new_full(declines.shape[:-1], _PRIOR_SQUARES)
    best = wealth
    for block in declines.split(max(1, math.ceil(samples / _BLOCKS)), dim=-1):
        need = (goal * (torch.floor(best / goal) + 1) - wealth).clamp(min=0)  # below 0 by rounding only
        pace = need / (samples - seen)
        bet = _bet(pace, squares / (1 + seen), tolerance).clamp(max=most)
        # the clamp only undoes rounding: a factor is never negative
        gains = (bet.unsqueeze(-1) * (tolerance - block)).clamp_(min=-1).log1p_().cumsum(-1).add_(wealth.unsqueeze(-1))
        best, wealth = torch.maximum(best, gains.amax(-1)), gains[..., -1]
        squares, seen = squares + block.square().sum(-1), seen + block.shape[-1]
    return best


def t_tail(t: float, degrees: int) -> float:
    """The probability that Student's t with so many degrees of freedom exceeds `t`."""
    if t < 0:
        return 1 - t_tail(-t, degrees)
    x = degrees / (degrees + t * t)
    if x < (degrees + 2) / (degrees + 5):
        return _incomplete_beta(x, degrees / 2, 0.5) / 2
    return 0.5 - _incomplete_beta(t * t / (degrees + t * t), 0.5, degrees / 2) / 2


def _bet(pace: Tensor, square: Tensor, tolerance: float) -> Tensor:
    """The bet for a growth of log wealth by `pace` a sample, not yet limited to what is allowed."""
    bold = (2 * pace / square).sqrt()
    return torch.maximum(bold, pace.expm1() / tolerance) if tolerance > 0 else bold


def _betting(declines: Tensor, width: float, tolerance: float, confidence: float) -> float:
    if not len(declines) or not bool(torch.isfinite(declines).all()) or tolerance <= -width:
        return 1.0
    if tolerance >= width:
        return 0.0
    # data may lie in an order, say by class; the bound needs one that says nothing about a sample
    order = random_bits(stream(0, 0, 0, "order of bets"), torch.arange(len(declines))).argsort(stable=True)
    return math.exp(-float(log_wealth(declines[order] / width, tolerance / width, confidence)))


def _bootstrap(dense: Resamples, pruned: Resamples, tolerance: float) -> float:
    everything = torch.arange(dense.size)
    decline, error = dense.score(everything) - pruned.score(everything), _bootstrap_error(dense, pruned)
    if not math.isfinite(decline + error):
        return 1.0
    reach = max(_reach(dense), _reach(pruned))
    return _tail(decline + reach, math.hypot(error, reach), _RESAMPLES - 1, tolerance)


def _student(dense: Batches, pruned: Batches, tolerance: float) -> float:
    weights = _plain(dense.weights)
    decline, error = _mean_and_error(_differences(dense, pruned), weights)
    reach = max(_batch_reach(_plain(one.values), weights) for one in (dense, pruned))
    return _tail(decline, math.hypot(error, reach), len(weights) - 1, tolerance)


def _tail(decline: float, error: float, degrees: int, tolerance: float) -> float:
    if not math.isfinite(decline + error):
        return 1.0
    if math.isinf(tolerance):
        return float(tolerance < 0)
    return t_tail((tolerance - decline) / error, degrees) if error > 0 else 1.0


def _bootstrap_error(dense: Resamples, pruned: Resamples, count: int = _RESAMPLES) -> float:
    """The standard deviation of the difference over resamples; NaN for fewer than two samples."""
    if dense.size < 2:
        return math.nan
    scores = (torch.tensor(one.resampled(count), dtype=torch.float64) for one in (pruned, dense))
    return float(torch.sub(*scores).std())


def _reach(outcomes: Resamples) -> float:
    """The range of the scores with one sample left out, over at most 200 samples."""
    everything, size = torch.arange(outcomes.size), outcomes.size
    chance = random_bits(stream(0, 0, 0, "left out"), torch.arange(_RESAMPLES)) % size
    left_out = everything if size <= _RESAMPLES else chance
    scores = [float(outcomes.score(everything[everything != one])) for one in left_out]
    return max(scores) - min(scores)


def _batch_reach(values: Tensor, weights: Tensor) -> float:
    """The range of what single batches add to the weighted mean."""
    effects = weights * (values - _mean_and_error(values, weights)[0]) / weights.sum()
    return float(effects.amax() - effects.amin()) if len(values) else math.nan


def _mean_and_error(values: Tensor, weights: Tensor) -> tuple[float, float]:
    """The weighted mean and its standard error, the variance of a value being inverse to its weight."""
    mean = (weights * values).sum() / weights.sum()
    squares = (weights * (values - mean).square()).sum() / weights.sum()
    return float(mean), math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else math.nan


def _differences(dense: Singles | Batches, pruned: Singles | Batches) -> Tensor:
    return _plain(dense.values) - _plain(pruned.values)


def _plain(values: Tensor) -> Tensor:
    return values.detach().cpu().to(torch.float64)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, for `x` of about `(a + 1) / (a + b + 2)` at most.

    By its continued fraction (Abramowitz and Stegun 26.5.8), evaluated after Lentz.
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


def _check_line(name: str, values: Tensor) -> None:
    if values.ndim != 1:
        raise ValueError(
            f"{name} have shape {tuple(values.shape)}; allowed is one dimension: give one number per sample or batch."
        )


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; allowed is (0, 1): give a share such as 0.95.")


def _check_pair(dense: Outcomes, pruned: Outcomes) -> None:
    if not alike(dense, pruned):
        raise _unlike(dense, pruned)


def _unlike(dense: Outcomes, pruned: Outcomes) -> ValueError:
    return ValueError(
        f"pruned is {_words(pruned)}, dense is {_words(dense)}; allowed are outcomes of one kind on the same samples, "
        "with equal bounds or weights: validate both networks in the same way."
    )


def alike(dense: Outcomes, pruned: Outcomes) -> bool:
    """Whether two networks recorded outcomes of one kind on the same samples, so that they can be compared."""
    return _kind(dense) == _kind(pruned)


def _kind(outcomes: Outcomes) -> tuple[object, ...]:
    """What the outcomes of two networks must share."""
    match outcomes:
        case Singles(values, low, high):
            return (Singles, len(values), low, high)
        case Resamples(_, size):
            return (Resamples, size)
        case Batches(_, weights):
            return (Batches, *weights.tolist())


def _words(outcomes: Outcomes) -> str:
    size = outcomes.size if isinstance(outcomes, Resamples) else len(outcomes.values)
    return f"{type(outcomes).__name__} of {size}"
