"""What is refused once the module can be validated: a validation that cannot judge candidates, and too few samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_roulette.judge.certificate import too_few
from lightning_roulette.judge.evaluator import divided
from lightning_roulette.large.limits import are_few
from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.lending import applied
from lightning_roulette.trainer.data.dealing import FOLDS
from lightning_roulette.trainer.data.folded_data import FoldedData
from lightning_roulette.trainer.data.reading import rounding
from lightning_roulette.trainer.processes import in_any_process, mean_over_processes
from lightning_roulette.trainer.scores.metric_calls import is_mean
from lightning_roulette.trainer.scores.monitored_metric import MonitoredMetric
from lightning_roulette.trainer.scores.trial import Trial, refuse_changed, tried
from lightning_roulette.trainer.validation.guard import Guard
from lightning_roulette.trainer.validation.isolation import IsolatedValidation
from lightning_roulette.trainer.validation.logged import Logged

_Weights = Mapping[str, nn.Parameter]
_DOUBTFUL = 0.5  # scores of few samples are tried on all data if zeros lose less than this share of the score
_LEARNED = 0.1  # a network that has learned something is better than zeros by more than this share of the score
_AGREE = 0.01  # two validations of one network agree if they differ by at most this share of the tolerance


@dataclass(frozen=True, eq=False)
class Suitability:
    """Tells whether a validation can judge pruned candidates.

    Attributes:
        trainer: The Trainer.
        guard: Guards the parameters of its module.
        weights: The prunable parameters.
        metric: The metrics that judge, rank, and break ties.
        tolerance: The tolerance of the search.
        note: Takes a sentence for the report.
    """

    trainer: Trainer
    guard: Guard
    weights: _Weights
    metric: MonitoredMetric
    tolerance: float
    note: Callable[[str], None]

    def tried(self, run: Callable[[], Logged], validation: IsolatedValidation) -> Trial:
        """Return a trial of the validation, see `scores.trial.tried`.

        Args:
            run: Validates the network as it is, always on the same data.
            validation: Entered.

        Raises:
            RuntimeError: If equal weights do not give equal results, or if validation changes prunable weights.
        """
        refuse_changed(self.guard.changed, self.weights)
        trial = tried(self.guard, self.weights, run, validation.carrying())
        names = dict.fromkeys(name for name in (self.metric.monitor, self.metric.rank_by, self.metric.tiebreak) if name)
        for name in names:
            self._refuse_unequal(name, trial.dense.value(name), trial.again.value(name))
        return trial

    def refuse(self, trial: Trial, validation: IsolatedValidation, data: FoldedData, learned: bool) -> None:
        """Raise if validation cannot tell the network from one with all prunable weights at zero.

        A search would then prune everything. What was seen in a trial on some data is confirmed on all data.

        Args:
            trial: A trial on the first folds, after training. Before training, a network may be no better than zeros.
            validation: Entered.
            data: The validation data.
            learned: Whether the network must be better than zeros by more than the tolerance. If it is hardly better
                at all, this is a warning, as in a run that only tries out a script.

        Raises:
            RuntimeError: If it cannot.
        """
        with self.guard.watching(in_use=False):
            self._refuse(trial, validation, data, learned)

    def _refuse(self, trial: Trial, validation: IsolatedValidation, data: FoldedData, learned: bool) -> None:
        every = range(data.folds)
        if self._is_blind(trial.dense, trial.at_zero, validation, data) and self._is_blind(
            data.validate(validation, every), None, validation, data, every
        ):
            raise RuntimeError(f"RouletteWheelPruning: {_BLIND} {_UNTRAINED if trial.called else _AVERAGED}")
        if learned and self._keeps_floor_at_zero(trial.dense, trial.at_zero, _DOUBTFUL):
            self._refuse_no_better_than_zero(validation, data, every)

    def _refuse_unequal(self, name: str, first: Tensor, again: Tensor) -> None:
        one, other = (mean_over_processes(self.trainer, value) for value in (first, again))
        allowed = _AGREE * self.tolerance if name == self.metric.monitor and math.isfinite(self.tolerance) else 0.0
        exact = name == self.metric.monitor and self.trainer.strategy.root_device.type == "cpu"
        relative = 1e-6 if exact else rounding(self.trainer)
        if not math.isfinite(one) or abs(one - other) <= max(allowed, relative * max(abs(one), abs(other))):
            return
        raise RuntimeError(
            "RouletteWheelPruning: validation is not a function of the weights. The same network was validated twice "
            f"on the same batches, with other weights in between, and {name!r} was {one:.6g} the first time and "
            f"{other:.6g} the second time. Candidates cannot be compared in this way. Likely causes: (1) Something "
            "carries over from one validation to the next, such as a smoothed metric, or a list that only a training "
            "hook clears. Reset it in on_validation_epoch_start. (2) Validation writes into its batches or "
            "into other tensors. Let it work on copies. (3) Validation draws random numbers from a generator of its "
            "own. Seed it in on_validation_epoch_start. (4) A data set goes on where it stopped. Let it start "
            "from the beginning at each __iter__, or give it state_dict and load_state_dict."
        )

    def _is_blind(
        self,
        dense: Logged,
        at_zero: Logged | None,
        validation: IsolatedValidation,
        data: FoldedData,
        folds: range | None = None,
    ) -> bool:
        """Whether all processes log the same with all prunable weights at zero."""
        folds = data.first_folds if folds is None else folds
        if at_zero is not None:
            same = _equal_and_finite(dense.values, at_zero.values)
        else:
            some: list[_Weights] = []
            if not are_few(self.weights.values()):
                # one by one first, as otherwise copies of all weights would be held at once
                some = [{name: weight} for name, weight in self.weights.items()]
            same = all(_logs_at_zero(dense.values, ours, validation, data, folds) for ours in (*some, self.weights))
        return not in_any_process(self.trainer, not same)

    def _keeps_floor_at_zero(self, dense: Logged, at_zero: Logged | None, margin: float = 0.0) -> bool:
        """Whether the network with all prunable weights at zero keeps the floor, less a share of the dense score."""
        if at_zero is None or not math.isfinite(self.tolerance) or self.metric.monitor not in at_zero.values:
            return False
        score, zero = (self._score(logged) for logged in (dense, at_zero))
        return math.isfinite(score) and math.isfinite(zero) and zero >= score - self.tolerance - margin * abs(score)

    def _score(self, logged: Logged) -> float:
        return self.metric.sign * mean_over_processes(self.trainer, logged.value(self.metric.monitor))

    def _refuse_no_better_than_zero(self, validation: IsolatedValidation, data: FoldedData, folds: range) -> None:
        dense = data.validate(validation, folds)
        with applied(Mask.nothing(self.weights), self.weights):
            at_zero = data.validate(validation, folds)
        if not self._keeps_floor_at_zero(dense, at_zero):
            return
        name, sign = self.metric.monitor, self.metric.sign
        score, zero = (sign * self._score(logged) for logged in (dense, at_zero))
        numbers = f"{name} is {score:.6g}, and {zero:.6g} with all prunable weights at zero"
        if sign * (score - zero) <= _LEARNED * max(abs(score), abs(zero)):
            self.note(f"Without the prunable weights the network is as good: {numbers}.")
            if self.trainer.is_global_zero:
                worse = f" Or is mode={self.metric.mode!r} wrong?" if sign * score < sign * zero else ""
                warnings.warn(f"RouletteWheelPruning: {numbers}. {_UNTRAINED}{worse}", stacklevel=2)
            return
        raise RuntimeError(
            f"RouletteWheelPruning: tolerance is {self.tolerance:g}, in units of the metric, but {numbers}. The floor "
            f"is {score - sign * self.tolerance:.6g}, so a search would prune everything. Pass a tolerance below "
            f"{_below(abs(score - zero))}: for a score in [0, 1], 0.005 is half a point. Infinity disables the floor."
        )


def _below(number: float) -> str:
    """Return a positive number rounded down to two digits."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return f"{math.floor(number / unit) * unit:.2g}"


_BLIND = "validation logs the same with all prunable weights at zero, so it cannot judge pruned candidates."
_UNTRAINED = (
    "By this validation, the network has not learned anything yet. Train it longer, or validate on more data. "
    "To try out a script, pass fast_dev_run=True to the Trainer: the search then has no floor."
)
_AVERAGED = (
    "Does the module validate other weights than these, for example averaged ones? Leave averaging to a callback such "
    "as lightning's WeightAveraging, or name the weights with include."
)


def refuse_too_few_samples(
    samples: int | None, judged_by: Metric | None, confidence: float, tolerance: float, confirm: float
) -> None:
    """Raise before training begins if the validation data is too small to certify anything after it.

    Args:
        samples: The number of samples of all the validation data; None if unknown.
        judged_by: The torchmetrics object that is monitored; None if a plain number is monitored.
        confidence: The confidence asked for.
        tolerance: The tolerance asked for.
        confirm: Share of the samples that is held out.

    Raises:
        RuntimeError: If there are too few samples.
    """
    if samples is None or judged_by is None or not is_mean(judged_by):  # a bootstrap has no such bound
        return
    share = len(divided(FOLDS, confirm)[1]) / FOLDS
    if why := too_few(math.ceil(samples * share), 1.0, confidence, tolerance, share):
        raise RuntimeError(f"RouletteWheelPruning: {why}")


def _logs_at_zero(
    seen: Mapping[str, Tensor], weights: _Weights, validation: IsolatedValidation, data: FoldedData, folds: range
) -> bool:
    """Whether the same is logged with some weights at zero."""
    try:
        with warnings.catch_warnings(), applied(Mask.nothing(weights), weights):
            warnings.simplefilter("ignore")
            unseen = data.validate(validation, folds).values
    except Exception:  # a validation that fails on zeros depends on the weights
        return False
    return _equal_and_finite(seen, unseen)


def _equal_and_finite(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether values are equal. The search itself reports values that are not finite."""
    finite = all(bool(value.isfinite().all()) for value in one.values())
    return finite and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
