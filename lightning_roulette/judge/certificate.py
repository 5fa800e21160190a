"""Whether independent data certify that a pruned network declined by no more than the tolerance.

- The *decline* of a network is the dense score minus its own score. Larger scores are better.
- The *null hypothesis* says that the true decline exceeds the tolerance. The true decline is the decline on the
  population, from which the recorded samples were drawn independently.
- A p-value of at most `1 - confidence` certifies the network.
- Networks that were chosen on other data may be tested in a fixed order, here the densest first, up to the first that
  is not certified. No correction for their number is needed: the last certified one truly exceeds the tolerance with
  probability at most `1 - confidence` (fixed-sequence testing; Angelopoulos et al., "Learn then Test", 2021,
  arXiv:2110.01052).

How the p-value is computed depends on what a validation recorded. `Method` names the three ways.
"""

from __future__ import annotations

import math

import torch

from lightning_roulette.judge.betting import betting_p
from lightning_roulette.judge.outcomes import Batches, Outcomes, Resamples, Singles, alike, differences, float64, unlike
from lightning_roulette.judge.student import batches_p, bootstrap_error, bootstrap_p, mean_and_error
from lightning_roulette.report.records import Method

_SMALLEST = 2.0**-1022  # no p-value is smaller: the smallest normal float64
_FEW_RESAMPLES = 50


def method_of(outcomes: Outcomes) -> Method:
    """Return how the p-value of such outcomes is computed."""
    return {Singles: Method.BETTING, Resamples: Method.BOOTSTRAP, Batches: Method.STUDENT}[type(outcomes)]


def paired_error(dense: Outcomes, pruned: Outcomes) -> float:
    """Return the standard error of the pruned score minus the dense score, both on the same samples.

    - `Singles`: from the differences of samples.
    - `Batches`: from the differences of batches. The variance of a batch is inverse to its weight.
    - `Resamples`: over 50 paired resamples.

    No random generator is read: equal arguments give an equal result.

    Returns:
        The error in units of the score; NaN for fewer than two samples or batches and for values that are not finite.

    Raises:
        ValueError: If the two do not have the same kind, bounds, weights and size.
    """
    _check_pair(dense, pruned)
    match dense, pruned:
        case Singles() as one, Singles() as other:
            ones = torch.ones(len(one.values), dtype=torch.float64)
            return mean_and_error(differences(one, other), ones)[1]
        case Resamples() as one, Resamples() as other:
            return bootstrap_error(one, other, _FEW_RESAMPLES)
        case Batches() as one, Batches() as other:
            return mean_and_error(differences(one, other), float64(one.weights))[1]
    raise unlike(dense, pruned)


def p_value(dense: Outcomes, pruned: Outcomes, tolerance: float, confidence: float = 0.95) -> float:
    """Return the p-value of the null hypothesis that the pruned network's true decline exceeds the tolerance.

    - `Singles`: exact for any number of samples, by the betting bound of `log_wealth`.
    - `Resamples` and `Batches`: approximate, one tail of Student's t for `(tolerance - decline) / error`. The error
      includes the *reach*: how much single samples (or batches) differ in their effect on a score. It protects against
      rare changes that the recorded samples do not show.

    In simulations of the approximate ways at a true decline of exactly the tolerance (accuracy in batches, F1 of common
    and rare classes, 200 to 5,000 samples, confidence 0.95), 0 to 5 % of networks are certified. Without the reach up
    to 39 % are certified in batches, and up to 84 % by the bootstrap (with quantiles of 2,000 resamples, or with the
    error of 200 resamples).

    Args:
        dense: Outcomes of the network before pruning.
        pruned: Outcomes of the pruned network on the same samples.
        tolerance: Largest allowed decline, in units of the score; may be infinite.
        confidence: In (0, 1). The bets aim at a p-value of `1 - confidence`. The p-value is valid at any other level.

    Returns:
        A number in (0, 1]. It is 1 if an outcome is not finite or if nothing shows how much scores vary. It is the
        smallest normal float64, 2**-1022, if the null hypothesis cannot be true.

    Raises:
        ValueError: If the two do not have the same kind, bounds, weights and size, if the tolerance is NaN, or if the
            confidence is not in (0, 1).
    """
    _check_pair(dense, pruned)
    _check_confidence(confidence)
    if math.isnan(tolerance):
        raise ValueError("tolerance is NaN, but must be a number. Pass the largest decline that is acceptable.")
    match dense, pruned:
        case Singles() as one, Singles() as other:
            p = betting_p(one, other, tolerance, confidence)
        case Resamples() as one, Resamples() as other:
            p = bootstrap_p(one, other, tolerance)
        case Batches() as one, Batches() as other:
            p = batches_p(one, other, tolerance)
        case _:
            raise unlike(dense, pruned)
    return min(max(p, _SMALLEST), 1.0)


def standard_error(outcomes: Outcomes) -> float:
    """Return the standard error of a score, which is the mean of outcomes or a function of samples.

    - `Singles` and `Batches`: from their values. The variance of a batch is inverse to its weight.
    - `Resamples`: the standard deviation over 50 resamples, without those on which the metric is not finite.

    No random generator is read: equal arguments give an equal result.

    Returns:
        The error in units of the score. NaN for fewer than two samples or batches, for values that are not finite, and
        if the metric is finite on less than half of the resamples.
    """
    match outcomes:
        case Singles(values):
            return mean_and_error(float64(values), torch.ones(len(values), dtype=torch.float64))[1]
        case Batches(values, weights):
            return mean_and_error(float64(values), float64(weights))[1]
        case Resamples():
            return _spread(outcomes)


def _spread(outcomes: Resamples) -> float:
    if outcomes.size < 2:
        return math.nan
    scores = torch.tensor(outcomes.resampled(_FEW_RESAMPLES), dtype=torch.float64)
    finite = scores[scores.isfinite()]
    return float(finite.std()) if 2 * len(finite) >= len(scores) else math.nan


def samples_needed(confidence: float, tolerance: float, width: float = 1.0) -> int:
    """Return the smallest number of samples that can certify a network, if no sample differs between the two networks.

    It is the smallest `n` with `(1 - tolerance / width) ** n <= 1 - confidence`. Half a point of accuracy at 0.95 needs
    598 samples. It applies to `Singles`.

    Args:
        confidence: In (0, 1).
        tolerance: Largest allowed decline, positive, in units of the score.
        width: Range of a sample's score, `high - low`.

    Raises:
        ValueError: If an argument is not in its range.
    """
    _check_confidence(confidence)
    if not (tolerance > 0 and 0 < width < math.inf):
        raise ValueError(
            f"tolerance is {tolerance} and width {width}, but both must be positive, and the width finite. Without a "
            "tolerance no number of equal samples certifies a network."
        )
    if tolerance >= width:
        return 1
    return math.ceil(math.log(1 - confidence) / math.log1p(-tolerance / width))


def too_few(samples: int, width: float | None, confidence: float, tolerance: float, share: float) -> str:
    """Return why this number of samples can certify no network, and what to do about it; empty if it can.

    Args:
        samples: Number of held-out samples.
        width: Range of a sample's score; None if samples are not scored one by one.
        confidence: In (0, 1).
        tolerance: Largest allowed decline, positive, in units of the score.
        share: Share of the validation samples that is held out, in (0, 1].
    """
    needed = 2 if width is None else samples_needed(confidence, tolerance, width)
    if samples >= needed:
        return ""
    if width is None:
        return (
            f"confidence is {confidence}, but the held-out data shows the metric as {samples} numbers, which must "
            "be at least 2. Log the torchmetrics object itself, or a number for each batch, in validation_step; or "
            "leave out confidence."
        )
    return (
        f"confidence is {confidence} and tolerance {tolerance}, but {samples} held-out samples can certify no network, "
        f"not even one with the same errors as the dense one. At least {needed} are needed, which is "
        f"{math.ceil(needed / share)} validation samples in all. Use more, allow a larger tolerance or a lower "
        "confidence, or leave out confidence."
    )


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, but must lie in (0, 1). Pass a share such as 0.95.")


def _check_pair(dense: Outcomes, pruned: Outcomes) -> None:
    if not alike(dense, pruned):
        raise unlike(dense, pruned)
