"""Scores of pruned networks: their weights are lent to the module, which validates them on folds of the data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_roulette.judge.evaluator import Evaluator
from lightning_roulette.judge.outcomes import Outcomes
from lightning_roulette.mask.mask import fill_pruned
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.network.lending import applied, copy_into, lent, named_tensors
from lightning_roulette.report.records import Scores
from lightning_roulette.trainer.data.folded_data import FoldedData
from lightning_roulette.trainer.processes import in_any_process, mean_over_processes
from lightning_roulette.trainer.scores.metric_calls import Call, batches_of, calls_of, outcomes_of, times
from lightning_roulette.trainer.scores.monitored_metric import LOADER, MonitoredMetric
from lightning_roulette.trainer.scores.trial import Trial
from lightning_roulette.trainer.validation.guard import Unmoved
from lightning_roulette.trainer.validation.isolation import IsolatedValidation
from lightning_roulette.trainer.validation.logged import Logged


class TrainerEvaluator(Evaluator):
    """Scores pruned networks by isolated validation. Larger scores are better.

    Args:
        trainer: A Trainer in `fit`.
        module: Its LightningModule.
        validation: Entered whenever the evaluator is called.
        data: The validation data.
        weights: The prunable parameters of the module, by name.
        metric: The metrics that rank, judge, and break ties.
        shares: The share of the data in each fold. Needed if the metric has sums.

    Attributes:
        unmoved: Checks that the weights keep their values.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        validation: IsolatedValidation,
        data: FoldedData,
        weights: Mapping[str, nn.Parameter],
        metric: MonitoredMetric,
        shares: Sequence[float] = (),
    ) -> None:
        self._trainer, self._module, self._validation = trainer, module, validation
        self._data, self._weights, self._metric, self._shares = data, weights, metric, shares
        self.folds, self.undivided_because = data.folds, data.undivided_because
        self.at_once, self.at_least = data.at_once, data.at_least
        self.unmoved = Unmoved(weights, by_time=trainer.world_size == 1)
        self._warned = not trainer.is_global_zero

    def know(self, trial: Trial) -> None:
        """Set `gain` from what a trial on the first folds logged."""
        if in_any_process(self._trainer, trial.at_zero is None or self._metric.monitor not in trial.at_zero.values):
            return
        assert trial.at_zero is not None
        dense, at_zero = (self._scores(one, self._data.first_folds).score for one in (trial.dense, trial.at_zero))
        self.gain = dense - at_zero if math.isfinite(dense - at_zero) else None

    def in_any_process(self, here: bool) -> bool:
        """See `Evaluator`."""
        return in_any_process(self._trainer, here)

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        """Return the scores of a candidate on the union of some folds."""
        self.unmoved.check_if_due()
        self._data.fetch(folds)  # reading restores the module, and must not see lent weights or metrics that are heard
        with self._as(candidate):
            return self._scores(self._data.validate(self._validation, folds), folds)

    @contextmanager
    def _as(self, candidate: PrunedWeights) -> Iterator[None]:
        """Inside the block, which holds one validation, the network has the weights of the candidate."""
        if not candidate.refitted:
            with applied(candidate.mask, self._weights):
                yield
            return
        tensors = {name: one for name, one in named_tensors(self._module).items() if name in candidate.refitted}
        with lent(tensors):
            copy_into(tensors, candidate.refitted)
            fill_pruned(self._weights, candidate.mask)
            yield

    def _scores(self, logged: Logged, folds: Sequence[int]) -> Scores:
        metric = self._metric
        rank = metric.rank_sign * self._scaled(metric.rank_by, logged, folds)
        score = metric.sign * self._scaled(metric.monitor, logged, folds)
        tiebreak = score if metric.tiebreak is None else -self._scaled(metric.tiebreak, logged, folds)
        return Scores(rank, score, tiebreak)

    def _scaled(self, name: str, logged: Logged, folds: Sequence[int]) -> float:
        """Return a value that all processes agree on. A sum over some folds is scaled to all the data."""
        value = self._agreed(logged.value(name))
        return value * self._scale(folds) if name in self._metric.sums else value

    def _scale(self, folds: Sequence[int]) -> float:
        return 1 / sum(self._shares[fold] for fold in folds)

    def _agreed(self, value: Tensor) -> float:
        mean = mean_over_processes(self._trainer, value)
        if not self._warned and abs(mean - float(value)) > 1e-6 * abs(mean):
            self._warned = True
            warnings.warn(
                "RouletteWheelPruning: the processes logged different values of the metric; their mean is used. "
                "Log it with sync_dist=True.",
                stacklevel=2,
            )
        return mean


class RecordingEvaluator(TrainerEvaluator):
    """A `TrainerEvaluator` that also returns the outcomes behind the scores.

    The arguments are those of `TrainerEvaluator`.
    """

    def recorded(self, candidate: PrunedWeights, folds: Sequence[int]) -> tuple[Scores, Outcomes | None]:
        """Return the scores of a candidate, and the outcomes of single samples or of single batches, if known."""
        if self._trainer.world_size > 1:  # a process sees only its own samples
            return self(candidate, folds), None
        self._data.fetch(folds)
        if (judged_by := self._judged_by) is None:
            with self._as(candidate):
                logged = self._data.record(self._validation, folds)
            return self._scores(logged, folds), self._outcomes_of_batches(logged, folds)
        with (
            self._as(candidate),
            calls_of(judged_by, self._module, lambda: self._validation.loader) as calls,
        ):
            logged = self._data.validate(self._validation, folds)
        return self._scores(logged, folds), self._outcomes_of_calls(judged_by, calls, logged, folds)

    def _outcomes_of_calls(
        self, judged_by: Metric, calls: Sequence[Call], logged: Logged, folds: Sequence[int]
    ) -> Outcomes | None:
        name = self._metric.monitor
        _, mark, number = name.partition(LOADER)
        ours = [call for call in calls if not mark or call.loader == int(number)]
        found = outcomes_of(judged_by, ours, self._metric.sign, float(logged.value(name)))
        return times(found, self._scale(folds)) if name in self._metric.sums else found

    def _outcomes_of_batches(self, logged: Logged, folds: Sequence[int]) -> Outcomes | None:
        name = self._metric.monitor
        value, updates = float(logged.value(name)), logged.updates.get(name, ())
        if not updates:
            return None
        values, weights = (torch.tensor([float(pair[i]) for pair in updates], dtype=torch.float64) for i in (0, 1))
        reduction, is_sum = logged.reductions.get(name), name in self._metric.sums
        if is_sum != (reduction == "sum"):
            return None
        if is_sum:  # the sum over all the data is the mean of what each batch would give on all the data
            values, value = values / weights * (weights.sum() * self._scale(folds)), value * self._scale(folds)
        return batches_of(values, weights, self._metric.sign, value)

    @cached_property
    def _judged_by(self) -> Metric | None:
        """The torchmetrics object that is logged as the monitored metric; None if a plain number is logged."""
        return self._data.validate(self._validation, [0]).metrics.get(self._metric.monitor)
