"""What a torchmetrics object says about its values: which way is better, and between which bounds they lie."""

from __future__ import annotations

import math

from torchmetrics import Metric

from lightning_roulette.trainer.scores.monitored_metric import MonitoredMetric
from lightning_roulette.trainer.validation.logged import Logged

# Words in the names of torchmetrics classes whose values can exceed their `plot_upper_bound`.
_UNBOUNDED = ("Hinge", "Coverage", "SpectralAngle", "EditDistance", "ErrorRate", "CosineSimilarity")


def bounds_of(metric: Metric) -> tuple[float, float]:
    """Return the bounds of a torchmetrics object; infinite where it has none, or none that can be relied on."""
    name = type(metric).__name__
    if not type(metric).__module__.startswith("torchmetrics.") or any(word in name for word in _UNBOUNDED):
        return -math.inf, math.inf
    low, high = metric.plot_lower_bound, metric.plot_upper_bound
    low, high = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return (low, high) if low < high else (-math.inf, math.inf)


def refuse_wide_tolerance(logged: Logged, metric: MonitoredMetric, tolerance: float) -> None:
    """Raise if the tolerance is as large as the whole range of the metric, so that every network keeps the floor.

    Args:
        logged: What a validation logged, before or after training.
        metric: The metric that judges.
        tolerance: The tolerance of the search. Infinity is allowed.

    Raises:
        RuntimeError: If the tolerance is finite, and not below the range of the torchmetrics object.
    """
    if (judged_by := logged.metrics.get(metric.monitor)) is None or math.isinf(tolerance):
        return
    low, high = bounds_of(judged_by)
    if low <= float(logged.value(metric.monitor)) <= high and tolerance >= high - low:
        _refuse(judged_by, metric, tolerance, low, high, "No network can be worse than that.")


def refuse_low_floor(logged: Logged, metric: MonitoredMetric, tolerance: float) -> None:
    """Raise if the floor of a trained network is at or beyond the bound of the metric.

    Args:
        logged: What the trained network logs.
        metric: The metric that judges.
        tolerance: The tolerance of the search. Infinity is allowed.

    Raises:
        RuntimeError: If the tolerance is finite, and the floor is at or beyond the bound of the torchmetrics object.
    """
    if (judged_by := logged.metrics.get(metric.monitor)) is None or not 0 < tolerance < math.inf:
        return
    (low, high), score = bounds_of(judged_by), float(logged.value(metric.monitor))
    floor = score - metric.sign * tolerance
    if low < score < high and not low < floor < high:
        words = f"The dense network has {score:.4g}, so the floor would be {floor:.4g}, which any network keeps. "
        words += "If it has not learned anything yet, train it longer."
        _refuse(judged_by, metric, tolerance, low, high, words)


def _refuse(judged_by: Metric, metric: MonitoredMetric, tolerance: float, low: float, high: float, why: str) -> None:
    kind = type(judged_by).__name__
    raise RuntimeError(
        f"RouletteWheelPruning: tolerance is {tolerance:g}, in units of {metric.monitor!r}, a {kind} with values from "
        f"{low:g} to {high:g}. {why} Pass a smaller tolerance: for a score in [0, 1], 0.005 is half a point. Infinity "
        "disables the floor."
    )
