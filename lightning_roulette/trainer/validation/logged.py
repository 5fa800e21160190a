"""What a validation logs, and the collections of a Trainer that receive it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer

# Private in lightning 2.6. Each validation needs fresh results: the user's loop keeps its own.
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric
from torch import Tensor
from torchmetrics import MaxMetric, MeanMetric, Metric, MinMetric, SumMetric

from lightning_roulette.trainer.lightning_names import built_for

# Their `higher_is_better` is wrong in torchmetrics 1.9.
_MISTAKEN = frozenset({"DaviesBouldinScore", "SpectralDistortionIndex", "WordInfoPreserved"})
_AGGREGATIONS: dict[type[Metric], str] = {MeanMetric: "mean", SumMetric: "sum", MaxMetric: "max", MinMetric: "min"}

if TYPE_CHECKING:
    _Base = _ResultCollection
else:
    _Base = object


@dataclass(frozen=True)
class Logged:
    """What one validation logged.

    Attributes:
        values: Name to value, as in `trainer.callback_metrics`.
        higher_is_better: The `higher_is_better` of each logged torchmetrics object, by the name given to `self.log`.
        metrics: The torchmetrics objects, by the names of their values.
        updates: For each value that was logged batch by batch, the value and the weight of each batch. Empty unless
            the validation recorded them.
        reductions: How each value is made of those of the batches: "mean", "sum", "max" or "min". Empty where this
            cannot be told, as for most torchmetrics objects.
    """

    values: Mapping[str, Tensor]
    higher_is_better: Mapping[str, bool | None]
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    updates: Mapping[str, Sequence[tuple[Tensor, int]]] = field(default_factory=dict)
    reductions: Mapping[str, str] = field(default_factory=dict)

    def value(self, name: str, argument: str = "monitor") -> Tensor:
        """Return the value of a metric.

        Args:
            name: The name of the metric.
            argument: The argument that asked for it, for the error message.

        Raises:
            RuntimeError: If the metric was not logged. The message lists what was.
        """
        if name not in self.values:
            watched = argument == "monitor"
            what = "RouletteWheelPruning watches" if watched else f"RouletteWheelPruning: {argument} is"
            remedy = f"{argument}=..." if watched else f"validation=Validation({argument}=...)"
            raise RuntimeError(
                f"{what} {name!r}, which validation did not log. {self.listing} {self._meant(name)}Pass {remedy}"
            )
        return self.values[name]

    def _meant(self, name: str) -> str:
        close = get_close_matches(name, self.values, n=1)
        return f"Did you mean {close[0]!r}? " if close else ""

    @property
    def listing(self) -> str:
        """One sentence that lists what was logged."""
        if not self.values:
            return "Nothing was logged: call self.log(...) in validation_step."
        return f"Logged: {', '.join(repr(name) for name in sorted(self.values))}."


class CallbackMetrics(dict[str, Any]):
    """The callback metrics from before a validation, and a record of which ones the validation logs.

    If there are no metrics from before, training has not begun. A metric that only training logs is then NaN, so that
    a validation hook that reads it does not fail.

    Args:
        before: The metrics from before the validation.

    Attributes:
        names: What the validation logged, in order.
    """

    def __init__(self, before: Mapping[str, Any]) -> None:
        super().__init__(before)
        self._begun = bool(before)
        self.names: dict[str, None] = {}

    def __missing__(self, name: str) -> Tensor:
        if self._begun:
            raise KeyError(name)
        return torch.tensor(math.nan)

    def __setitem__(self, name: str, value: Any) -> None:
        self.names[name] = None
        super().__setitem__(name, value)

    def update(self, metrics: Mapping[str, Any]) -> None:  # type: ignore[override]  # called with one mapping only
        """Add what a validation logs."""
        self.names |= dict.fromkeys(metrics)
        super().update(metrics)


class Results(_Base):
    """The results of a validation.

    Lightning moves every result to the device of the module at every `self.log`. Here a result is moved only if it is
    on another device.

    A class with the base of a Trainer's package is made by `results_for`.

    Attributes:
        updates: See `Logged`.
    """

    def __init__(self) -> None:
        super().__init__(training=False)
        self.updates: dict[str, list[tuple[Tensor, int]]] = {}

    def __setitem__(self, key: str, result: _ResultMetric) -> None:
        move = result.to

        def move_if_elsewhere(device: torch.device) -> _ResultMetric:
            held = vars(result).get("value")  # a torchmetrics object has none before its first update
            return result if held is None or held.device == device else move(device)

        vars(result)["to"] = move_if_elsewhere
        super().__setitem__(key, result)

    def reset(self, metrics: bool | None = None, fx: str | None = None) -> None:
        """Forget what was logged. The snapshot of the module resets the torchmetrics objects."""
        for result in self.values():
            if (metrics is None or metrics ^ result.is_tensor) and fx in (None, result.meta.fx):
                if result.is_tensor:
                    result.reset()
                result.has_reset = True


class RecordedResults(Results):
    """Results that also record the value and the weight of each batch, for means and sums."""

    def update_metrics(self, key: str, value: Any, batch_size: int) -> None:
        """Record a value, and add it to its mean or sum."""
        super().update_metrics(key, value, batch_size)
        meta = self[key].meta
        if isinstance(value, Tensor) and (meta.is_mean_reduction or meta.is_sum_reduction):
            for name in set(self._forked_name(self[key], False)):
                self.updates.setdefault(name, []).append((value.detach().clone(), batch_size))


def results_for(trainer: Trainer, recorded: bool = False) -> Results:
    """Return empty results for a validation with a Trainer.

    Args:
        trainer: The Trainer.
        recorded: Whether the value and the weight of each batch are recorded.
    """
    return built_for(trainer, RecordedResults if recorded else Results, _ResultCollection)()


def logged_in(callback_metrics: Mapping[str, Any], results: _ResultCollection) -> Logged:
    """Return what a validation logged.

    Args:
        callback_metrics: The `CallbackMetrics` that the validation wrote to.
        results: The results of the validation's loop.
    """
    assert isinstance(callback_metrics, CallbackMetrics)
    values = {name: _copied(callback_metrics[name]) for name in callback_metrics.names}
    objects = [one for one in results.values() if not one.is_tensor]
    # the connector passes on only the values of torchmetrics objects
    directions = {one.meta.name: _rises(one.value) for one in objects}
    metrics = {name: one.value for one in objects for name in results._forked_name(one, False)}
    reductions = {name: _reduction(one) for one in results.values() for name in results._forked_name(one, False)}
    return Logged(values, directions, metrics, getattr(results, "updates", {}), reductions)


def _rises(metric: Metric) -> bool | None:
    rises = getattr(metric, "higher_is_better", None)
    return rises if isinstance(rises, bool) and type(metric).__name__ not in _MISTAKEN else None


def _reduction(result: _ResultMetric) -> str:
    """Return how a value is made of those of the batches; empty if it is unknown, as for what is logged once."""
    if not result.is_tensor:
        return next((kind for base, kind in _AGGREGATIONS.items() if isinstance(result.value, base)), "")
    if "epoch" in result.meta.fx:
        return ""
    kinds = ("mean", "sum", "max", "min")
    return next((kind for kind in kinds if getattr(result.meta, f"is_{kind}_reduction")), "")


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
