"""By which metric a Trainer's network is judged, on which data, and with which evaluator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ProgressBar
from torch import nn

from lightning_roulette.settings import Validation
from lightning_roulette.trainer.data import FoldedData, KeptData
from lightning_roulette.trainer.evaluator import (
    RecordingEvaluator,
    TrainerEvaluator,
    folded,
    mean_over_processes,
    refuse_if_blind,
    uncut_if_it_matters,
    undivided,
    validate,
)
from lightning_roulette.trainer.isolation import IsolatedValidation, Logged, callbacks_of
from lightning_roulette.trainer.metric import Metric, find_metric

_Weights = dict[str, nn.Parameter]


@dataclass(frozen=True, eq=False)
class Ready:
    """What judges pruned networks, and what it looks at."""

    validation: IsolatedValidation
    data: FoldedData
    metric: Metric
    weights: _Weights
    evaluate: TrainerEvaluator


@dataclass(frozen=True, eq=False)
class Judging:
    """How the network of a module is judged in a fit.

    Attributes:
        trainer: Of the fit.
        module: What it trains.
        choices: How candidates are judged.
        monitor: The metric that was asked for.
        mode: The mode that was asked for.
        tolerance: What was asked for.
        seed: Deals the data.
        caller: The callback that asks, which logs no metric.
    """

    trainer: Trainer
    module: LightningModule
    choices: Validation
    monitor: str | None
    mode: str | None
    tolerance: float
    seed: int
    caller: Callback

    def validating(self) -> IsolatedValidation:
        """A validation that nobody else notices, to be entered."""
        return IsolatedValidation(self.trainer, self.module, self.choices.keep_callbacks)

    def metric(self, logged: Logged) -> Metric:
        """The metric among what candidates log.

        Args:
            logged: In a validation.

        Raises:
            RuntimeError: If it is not there, or cannot be told; a callback that logs it is named.
        """
        try:
            return find_metric(logged, self.trainer, self.monitor, self.mode, self.tolerance, self.choices.rank_by)
        except RuntimeError as error:
            if (name := self._who_logs(logged)) is None:
                raise
            raise RuntimeError(
                f"{error} Your callback {name} logs it, but callbacks do not see candidates unless asked to: "
                f"pass validation=Validation(keep_callbacks=[{name!r}])."
            ) from None

    def _who_logs(self, logged: Logged) -> str | None:
        """The class of a callback that logs the metric, if it is missing and one does."""
        if self.monitor in logged.values or (self.monitor is None and logged.values):
            return None
        unlikely = (type(self.caller), Checkpoint, EarlyStopping, ProgressBar)
        others = [one for one in callbacks_of(self.trainer) if not isinstance(one, unlikely)]
        for name in dict.fromkeys(type(one).__name__ for one in others):
            with contextlib.suppress(Exception):  # what a callback alone may stumble over is not what is asked
                with IsolatedValidation(self.trainer, self.module, [*self.choices.keep_callbacks, name]) as validation:
                    found = validation.run(1).values
                if self.monitor in found or (self.monitor is None and found):
                    return name
        return None

    def dealt(self, weights: Callable[[], _Weights], by_rows: bool, first: bool) -> Ready:
        """The validation data dealt to folds, and an evaluator that tells outcomes.

        Args:
            weights: Finds the prunable weights; asked once lazy parameters have their shape.
            by_rows: Whether to deal single samples.
            first: Whether nothing is pruned yet: then it is seen to it that validation sees the weights.

        Raises:
            RuntimeError: If there is no validation data, no metric, or it does not see the weights.
        """
        with self.validating() as validation:
            data, logged = folded(validation, self.seed, self.choices.cache_bytes, by_rows=by_rows)
        judged_by, prunable = self.metric(logged), weights()
        with validation:
            data = uncut_if_it_matters(validation, data, logged, judged_by)
            if first:
                refuse_if_blind(validation, data, prunable)
        evaluate = RecordingEvaluator(self.trainer, self.module, validation, data, prunable, judged_by)
        return Ready(validation, data, judged_by, prunable, evaluate)

    def whole(self, metric: Metric, weights: _Weights, first: bool) -> Ready:
        """All the validation data in one fold, for networks that nothing ranks.

        Args:
            metric: What judges.
            weights: The prunable weights.
            first: See `dealt`.

        Raises:
            RuntimeError: If there is no validation data, or it does not see the weights.
        """
        with self.validating() as validation:
            why = "a cut has one candidate, so that nothing ranks"
            data = undivided(validation, self.seed, self.choices.cache_bytes, why)
            if first:
                refuse_if_blind(validation, data, weights)
        evaluate = TrainerEvaluator(self.trainer, self.module, validation, data, weights, metric)
        return Ready(validation, data, metric, weights, evaluate)

    def measured(self, monitor: str, data: FoldedData | None = None) -> float:
        """A metric of the network as it is, on all the data: that which is kept, or as the Trainer's loop reads it.

        Args:
            monitor: The metric.
            data: What may be kept.
        """
        with self.validating() as validation:
            kept = data if isinstance(data, KeptData) else None
            logged = validate(validation, kept, range(kept.folds)) if kept else validation.run()
            return mean_over_processes(self.trainer, logged.value(monitor))
