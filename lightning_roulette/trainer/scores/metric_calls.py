"""Records the calls of a torchmetrics object, and computes from them the scores of single samples or batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
    MultilabelAccuracy,
)

from lightning_roulette.judge.outcomes import Batches, Outcomes, Resamples, Singles
from lightning_roulette.large.limits import limits
from lightning_roulette.network.samples import bytes_of, joined, rows_of, taken

_CLOSE = 1e-5  # relative error between a score logged in float32 and the same score computed in another way

# Metrics that are a mean over samples if they average "micro" (or have no average), and the arguments to copy one.
_SAMPLEWISE: dict[type[Metric], tuple[str, ...]] = {
    **dict.fromkeys(
        (MulticlassAccuracy, MulticlassPrecision, MulticlassRecall, MulticlassF1Score),
        ("num_classes", "top_k", "average", "ignore_index"),
    ),
    BinaryAccuracy: ("threshold", "ignore_index"),
    MultilabelAccuracy: ("num_labels", "threshold", "average", "ignore_index"),
}


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a metric.

    Attributes:
        arguments: By position or by name.
        loader: The number of the loader that was validated, if there are several.
    """

    arguments: Mapping[int | str, Any]
    loader: int | None


@contextmanager
def calls_of(metric: Metric, module: nn.Module, loader: Callable[[], int | None]) -> Iterator[list[Call]]:
    """Record the calls that update a metric inside the block.

    The metrics of a collection may share their states. Once torchmetrics knows that, it calls only the first of them.
    Its calls then count for all of them.

    Args:
        metric: The metric.
        module: The module that holds it, alone or in a collection.
        loader: Returns the number of the loader that is being validated.

    Yields:
        A list that holds the calls after the block.
    """
    group = _sharing(metric, module)
    found: dict[int, list[Call]] = {id(one): [] for one in group}
    calls: list[Call] = []
    with ExitStack() as stack:
        for one in group:
            stack.enter_context(_recording(one, found[id(one)], loader))
        yield calls
        most = max(group, key=lambda one: len(found[id(one)]))  # the first of them is the metric itself
        calls += found[id(most)]


def outcomes_of(metric: Metric, calls: Sequence[Call], sign: int, value: float) -> Outcomes | None:
    """Compute the outcomes of single samples from calls of a metric. Larger outcomes are better.

    Args:
        metric: The metric that was called. It is not changed.
        calls: Its calls in one validation.
        sign: 1 if larger values of the metric are better, else -1.
        value: The value of the metric after these calls.

    Returns:
        - `Singles` for a metric that is a mean over samples, such as a micro accuracy;
        - `Batches` for a `MeanMetric` that was given one number for each batch;
        - `Resamples` for any other metric, to compute it on samples drawn with replacement;
        - None if `value` does not follow from the calls.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if isinstance(metric, MeanMetric) and (found := _means(calls, sign, value)) is not None:
            return found
        countable = bool(calls) and all(rows_of(call.arguments) is not None for call in calls)
        whole = joined([call.arguments for call in calls]) if countable else None
        if whole is None:
            return None
        kind = _singles if is_mean(metric) else _resamples  # decided by the kind of metric, not by its value
        return kind(metric, whole, sign, value)


def close(one: float, other: float) -> bool:
    """Return whether two numbers are equal up to rounding in float32."""
    return math.isclose(one, other, rel_tol=_CLOSE, abs_tol=_CLOSE)


def _sharing(metric: Metric, module: nn.Module) -> list[Metric]:
    """Return the metric and the other metrics of its collection."""
    for part in module.modules():
        if isinstance(part, MetricCollection) and any(one is metric for one in part.values(copy_state=False)):
            return [metric, *(one for one in part.values(copy_state=False) if one is not metric)]
    return [metric]


@contextmanager
def _recording(metric: Metric, calls: list[Call], loader: Callable[[], int | None]) -> Iterator[None]:
    forward, update = metric.forward, metric.update
    size = 0
    inside = False  # forward itself calls update, once or twice

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*arguments: Any, **named: Any) -> Any:
            nonlocal inside, size
            if inside:
                return original(*arguments, **named)
            inside = True
            try:
                given: dict[int | str, Any] = {**dict(enumerate(arguments))}
                given.update(named.items())
                size += bytes_of(given)
                calls.append(Call(given, loader()))
                if size > limits().recorded_bytes:
                    calls.clear()
                return original(*arguments, **named)
            finally:
                inside = False

        return recorded

    attributes: dict[str, Any] = vars(metric)
    before: dict[str, Any] = {name: attributes[name] for name in ("forward", "update") if name in attributes}
    attributes |= {"forward": recording(forward), "update": recording(update)}
    try:
        yield
    finally:
        for name in ("forward", "update"):
            attributes.pop(name, None)
        attributes.update(before)


def _means(calls: Sequence[Call], sign: int, value: float) -> Outcomes | None:
    """Return the outcomes of a mean over numbers that were given batch by batch."""
    numbers = [[torch.as_tensor(one, dtype=torch.float64).cpu() for one in call.arguments.values()] for call in calls]
    if not numbers or any(one.dim() for call in numbers for one in call):
        return None
    values = torch.stack([call[0] for call in numbers])
    weights = torch.stack([call[1] if len(call) > 1 else torch.ones((), dtype=torch.float64) for call in numbers])
    return batches_of(values, weights, sign, value)


def batches_of(values: Tensor, weights: Tensor, sign: int, value: float) -> Batches | None:
    """Return the scores of batches, or None if their weighted mean is not `value`."""
    fit = bool((weights > 0).all()) and close(float((values * weights).sum() / weights.sum()), value)
    return Batches(sign * values, weights) if fit else None


def times(outcomes: Outcomes | None, factor: float) -> Outcomes | None:
    """Return the outcomes of a sum over a part of the data, scaled to all of it; None if it has none."""
    match outcomes:
        case Resamples(score, size):
            return Resamples(lambda index: factor * score(index), size)
        case Batches(values, weights):
            return Batches(factor * values, weights)
    return None


def _singles(metric: Metric, whole: Any, sign: int, value: float) -> Singles | None:
    """Return the score of each sample, for a metric that is their mean; None if their mean is not `value`."""
    scores = _samplewise(metric, whole)
    if scores is None or not close(float(scores.mean()), value):
        return None
    low, high = sorted((0.0, float(sign)))
    return Singles(sign * scores.double().cpu(), low, high)


def is_mean(metric: Metric) -> bool:
    """Return whether the metric is a mean over samples with scores in [0, 1], for any data."""
    whole = getattr(metric, "multidim_average", None) == "global" and getattr(metric, "ignore_index", None) is None
    single = isinstance(metric, MulticlassAccuracy) or getattr(metric, "top_k", 1) == 1
    return type(metric) in _SAMPLEWISE and whole and single and getattr(metric, "average", "micro") == "micro"


def _samplewise(metric: Metric, whole: Any) -> Tensor | None:
    options = {name: getattr(metric, name) for name in _SAMPLEWISE[type(metric)]}
    twin = type(metric)(**options, multidim_average="samplewise").to(metric.device)
    positional, named = _split(whole)
    given = {**dict(zip(("preds", "target"), positional, strict=False)), **named}
    if given["target"].dim() == (2 if isinstance(metric, MultilabelAccuracy) else 1):
        given = {name: one.unsqueeze(-1) for name, one in given.items()}
    found = twin(**given)
    return found if isinstance(found, Tensor) and found.dim() == 1 else None


def _resamples(metric: Metric, whole: Any, sign: int, value: float) -> Resamples | None:
    try:
        if not close(_score(metric, whole), value):
            return None
    except Exception:  # for example a metric that needs more than its recorded arguments
        return None
    return Resamples(lambda index: sign * _score(metric, taken(whole, index)), rows_of(whole) or 0)


def _score(metric: Metric, whole: Any) -> float:
    twin, (positional, named) = _emptied(metric), _split(whole)
    twin.update(*positional, **named)
    return float(twin.compute())


def _split(whole: Mapping[int | str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments by position, and those by name."""
    positional = [one for name, one in whole.items() if isinstance(name, int)]
    return positional, {name: one for name, one in whole.items() if isinstance(name, str)}


def _emptied(metric: Metric) -> Metric:
    twin = metric.clone()
    twin.reset()
    twin.sync_on_compute = False
    return twin
