"""Sets up the validation of pruned networks in a fit: finds the metric, deals the data and makes the evaluator."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ProgressBar
from torch import nn

from lightning_roulette.judge.evaluator import divided
from lightning_roulette.settings import Validation
from lightning_roulette.trainer.data.folded_data import FoldedData
from lightning_roulette.trainer.data.reading import folded, undivided, whole_if_regrouping_matters
from lightning_roulette.trainer.lightning_names import in_both
from lightning_roulette.trainer.processes import mean_over_processes
from lightning_roulette.trainer.scores.bounds import refuse_low_floor, refuse_wide_tolerance
from lightning_roulette.trainer.scores.growth import Growth, shares_of
from lightning_roulette.trainer.scores.monitored_metric import MonitoredMetric, Watched, find_metric, watched_in
from lightning_roulette.trainer.scores.refusals import Suitability
from lightning_roulette.trainer.scores.trainer_evaluator import RecordingEvaluator, TrainerEvaluator
from lightning_roulette.trainer.scores.trial import Trial
from lightning_roulette.trainer.scores.unused import unused_weights
from lightning_roulette.trainer.validation.guard import Guard
from lightning_roulette.trainer.validation.isolation import IsolatedValidation
from lightning_roulette.trainer.validation.logged import Logged
from lightning_roulette.trainer.validation.muting import callbacks_of

_Weights = dict[str, nn.Parameter]


@dataclass(frozen=True, eq=False)
class CandidateValidation:
    """What the validation of candidates needs.

    Attributes:
        validation: Entered while `evaluate` is called.
        data: The validation data.
        metric: The metrics that judge and rank.
        weights: The prunable parameters.
        evaluate: The evaluator.
        size: The number of batches of each loader, and the number of samples if known.
        unused: The prunable parameters that were left out because validation does not use them, with the reason.
        score: The monitored metric of the network as it is, on all validation data; None if it was not measured there.
    """

    validation: IsolatedValidation
    data: FoldedData
    metric: MonitoredMetric
    weights: _Weights
    evaluate: TrainerEvaluator
    size: tuple[object, ...]
    unused: Mapping[str, str] = field(default_factory=dict)
    score: float | None = None


@dataclass(frozen=True, eq=False)
class ValidationSetup:
    """How a fit validates pruned networks.

    Attributes:
        trainer: The Trainer, in `fit`.
        module: Its module.
        choices: How candidates are validated.
        monitor: The `monitor` that the user passed.
        mode: The `mode` that the user passed.
        tolerance: The `tolerance` that the user passed. None: the search finds it, and until then it counts as 0.
        seed: Seed by which the data is dealt.
        caller: The callback that searches. It logs no metric.
        restless: Parameters that are not prunable and that validation changes. They are put back after each validation.
        note: Takes a sentence for the report.
        named: Whether the user named the prunable weights. They are then pruned even if validation does not use them.
    """

    trainer: Trainer
    module: LightningModule
    choices: Validation
    monitor: str | None
    mode: str | None
    tolerance: float | None
    seed: int
    caller: Callback
    restless: list[nn.Parameter] = field(default_factory=list)
    note: Callable[[str], None] = lambda sentence: None
    named: bool = False

    def isolated(self) -> IsolatedValidation:
        """Return a validation to enter. Loggers, callbacks and random state are left untouched."""
        return IsolatedValidation(self.trainer, self.module, self.choices.keep_callbacks, self.restless)

    def metric(self, logged: Logged) -> MonitoredMetric:
        """Find the metric among what a validation logged, outside an isolated validation.

        Raises:
            RuntimeError: If the metric is missing or ambiguous. If a callback logs it, the message says so.
        """
        return self._find(logged, watched_in(self.trainer), contextlib.nullcontext)

    def _find(self, logged: Logged, watched: Sequence[Watched], leave: Callable[[], object]) -> MonitoredMetric:
        """See `metric`. If it is not found, call `leave` to end the isolated validation, and try the callbacks."""
        try:
            found = find_metric(logged, watched, self.monitor, self.mode, self.tolerance or 0.0, self.choices.rank_by)
        except RuntimeError as error:
            leave()
            if (name := self._callback_that_logs_it(logged)) is None:
                raise
            raise RuntimeError(
                f"{error} Your callback {name} logs it, but callbacks do not see candidates unless asked to: "
                f"pass validation=Validation(keep_callbacks=[{name!r}])."
            ) from None
        refuse_wide_tolerance(logged, found, self.tolerance or 0.0)
        return found

    def _callback_that_logs_it(self, logged: Logged) -> str | None:
        """Return the class of a callback that logs the missing metrics; None if no callback logs them."""
        asked = {name for name in (self.monitor, self.choices.rank_by) if name is not None}
        if asked <= logged.values.keys() and (self.monitor is not None or logged.values):
            return None
        unlikely = (type(self.caller), *in_both(Checkpoint, EarlyStopping, ProgressBar))
        others = [one for one in callbacks_of(self.trainer) if not isinstance(one, unlikely)]
        for name in dict.fromkeys(type(one).__name__ for one in others):
            with contextlib.suppress(Exception):  # a callback that fails here does not log the metric
                with IsolatedValidation(self.trainer, self.module, [*self.choices.keep_callbacks, name]) as validation:
                    found = validation.run(1).values
                if asked <= found.keys() and (self.monitor is not None or found):
                    return name
        return None

    def dealt(self, weights: Callable[[], _Weights], by_rows: bool, first: bool) -> CandidateValidation:
        """Deal the validation data to folds, and make an evaluator that also returns outcomes.

        Args:
            weights: Returns the prunable weights. It is called once lazy parameters have their shapes.
            by_rows: Whether to deal single samples.
            first: Whether nothing is pruned yet. It is then checked that validation depends on the weights.

        Raises:
            RuntimeError: If there is no validation data or no metric, or validation does not depend on the weights.
        """
        watched, trial = watched_in(self.trainer), None
        with contextlib.ExitStack() as stack:
            validation = stack.enter_context(self.isolated())
            guard = Guard(self.module) if first else None
            with _guarded(guard):
                data, logged = folded(validation, self.seed, self.choices.cache_bytes, by_rows=by_rows)
            metric, prunable = self._find(logged, watched, leave=stack.close), weights()
            with _guarded(guard):
                names = {metric.monitor, metric.rank_by}
                read, data = data, whole_if_regrouping_matters(validation, data, logged, names)
            on_all = data is read and data.tries_everything
            score = mean_over_processes(self.trainer, logged.value(metric.monitor)) if on_all else None
            if guard is not None:
                trial = self._try(guard, validation, data, prunable, metric)
                refuse_low_floor(logged, metric, self.tolerance or 0.0)
            with _guarded(guard):
                unused = self._unused(validation, data, prunable, metric) if first else {}
                metric = Growth(validation, data, prunable, logged).of(metric)
            shares = shares_of(validation, data) if metric.sums else ()
            size = validation.size()
        used = {name: one for name, one in prunable.items() if name not in unused}
        evaluate = RecordingEvaluator(self.trainer, self.module, validation, data, used, metric, shares)
        if trial is not None:
            evaluate.know(trial)
        return CandidateValidation(validation, data, metric, used, evaluate, size, unused, score)

    def rehearse(self, guard: Guard, metric: MonitoredMetric, weights: _Weights, batches: float) -> None:
        """Try validation on a few batches before training, on the network as it is.

        Args:
            guard: Guards the parameters of the module.
            metric: The metric that judges.
            weights: The prunable weights.
            batches: How many batches of each loader are validated.

        Raises:
            RuntimeError: If validation is not a function of the weights, or changes prunable weights.
        """
        with self.isolated() as validation:
            self._suitability(guard, metric, weights).tried(lambda: validation.run(batches), validation)
        self._keep_restless(guard)

    def _try(
        self,
        guard: Guard,
        validation: IsolatedValidation,
        data: FoldedData,
        weights: _Weights,
        metric: MonitoredMetric,
        between_epochs: bool = False,
    ) -> Trial:
        """Refuse a validation that cannot judge candidates, after training. Return the trial that was made."""
        data.fetch(data.first_folds)
        suitability = self._suitability(guard, metric, weights)
        trial = suitability.tried(lambda: data.validate(validation, data.first_folds), validation)
        self._keep_restless(guard)
        suitability.refuse(trial, validation, data, learned=not between_epochs)
        return trial

    def _suitability(self, guard: Guard, metric: MonitoredMetric, weights: _Weights) -> Suitability:
        return Suitability(self.trainer, guard, weights, metric, self.tolerance or 0.0, self.note)

    def _keep_restless(self, guard: Guard) -> None:
        """Let later validations put back the parameters that validation changes."""
        found, known = dict(self.module.named_parameters()), {id(one) for one in self.restless}
        names = [name for name in guard.changed if id(found[name]) not in known]
        self.restless.extend(found[name] for name in names)
        if names:
            are = "is" if len(names) == 1 else "are"
            self.note(
                f"Validation changes {', '.join(names)}, which {are} not prunable and {are} put back after every "
                "validation."
            )

    def undivided(self, metric: MonitoredMetric, weights: _Weights, first: bool) -> CandidateValidation:
        """Read the validation data into one fold, for networks that are not ranked.

        Args:
            metric: The metric that judges.
            weights: The prunable weights.
            first: See `dealt`.

        Raises:
            RuntimeError: If there is no validation data, or validation does not depend on the weights.
        """
        with self.isolated() as validation:
            why = "a cut has one candidate, so nothing is ranked"
            data = undivided(validation, self.seed, self.choices.cache_bytes, why)
            guard, trial = Guard(self.module) if first else None, None
            if guard is not None:
                trial = self._try(guard, validation, data, weights, metric, between_epochs=True)
            with _guarded(guard):
                unused = self._unused(validation, data, weights, metric) if first else {}
            size = validation.size()
        used = {name: one for name, one in weights.items() if name not in unused}
        kind = RecordingEvaluator if first and self.tolerance is None else TrainerEvaluator
        evaluate = kind(self.trainer, self.module, validation, data, used, metric)
        if trial is not None:
            evaluate.know(trial)
        return CandidateValidation(validation, data, metric, used, evaluate, size, unused)

    def _unused(
        self, validation: IsolatedValidation, data: FoldedData, weights: _Weights, metric: MonitoredMetric
    ) -> dict[str, str]:
        """Return the weights to leave out because validation does not use them, with the reason."""
        if self.named:
            return {}
        unused = unused_weights(validation, data, weights, metric, divided(data.folds, self.choices.confirm)[0])
        if len(unused) == len(weights):
            raise RuntimeError(
                f"RouletteWheelPruning: no prunable weight has an effect on {metric.monitor} or {metric.rank_by}, so "
                "they cannot judge pruned candidates. Pass monitor=... to judge by another metric, or name the weights "
                "with include."
            )
        return unused

    def measured(self, monitor: str, data: FoldedData | None = None) -> float:
        """Return a metric of the network as it is, on all the validation data.

        Args:
            monitor: The metric.
            data: Data that may be in memory. If it is not, the Trainer's loop reads the loaders.
        """
        guard = Guard(self.module)
        with self.isolated() as validation:
            with guard.watching(in_use=False):
                logged = (data or FoldedData()).validate_all(validation)
            score = mean_over_processes(self.trainer, logged.value(monitor))
        if guard.changed and self.trainer.is_global_zero:
            warnings.warn(
                f"RouletteWheelPruning: validation changes {', '.join(guard.changed)}. The old values were put back. "
                "The score is that of the network with the old values.",
                stacklevel=2,
            )
        return score


def _guarded(guard: Guard | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if guard is None else guard.watching(in_use=False)
