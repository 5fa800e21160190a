"""A mask -> its scores, through isolated validation on folds of the validation data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric as TorchMetric

from lightning_roulette.judge.certificate import Outcomes, too_few
from lightning_roulette.judge.evaluator import divided
from lightning_roulette.large.limits import limits
from lightning_roulette.mask.mask import Mask, fill_pruned
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.network.lending import applied, copy_into, lent, named_tensors
from lightning_roulette.report.report import Scores
from lightning_roulette.trainer.data import FOLDS, FoldedData, KeptData, StreamedData, dealt
from lightning_roulette.trainer.isolation import IsolatedValidation, Logged
from lightning_roulette.trainer.metric import LOADER, Metric
from lightning_roulette.trainer.outcomes import Call, batches_of, calls_of, is_mean, outcomes_of


class OwnLoop:
    """Validation data that only the Trainer's own loop can read: one fold."""

    folds = at_once = at_least = 1
    whole = "validation_step takes the iterator over the loaders, so that its batches cannot be dealt"

    def of(self, folds: Sequence[int]) -> Iterator[tuple[Any, int]]:
        """Nothing: a validation reads it itself."""
        raise NotImplementedError

    def counts(self, folds: Sequence[int]) -> list[int]:
        """Nothing: a validation counts them itself."""
        raise NotImplementedError

    def altered(self) -> bool:
        """Never: nothing is kept."""
        return False


def folded(
    validation: IsolatedValidation, seed: int, cache_bytes: int, by_rows: bool = False
) -> tuple[FoldedData, Logged]:
    """The validation data of a Trainer, read within an entered `IsolatedValidation`, and what the module logs on it.

    Args:
        validation: Reads it; the processes of its Trainer deal alike.
        seed: See `dealt`.
        cache_bytes: See `dealt`.
        by_rows: See `dealt`.

    Raises:
        RuntimeError: If there is none.
    """
    lengths = validation.lengths()
    if validation.hands_over_iterator:
        return OwnLoop(), validation.run()
    data, logged = _seen_to_work(validation, dealt(validation.read, lengths, seed, cache_bytes, by_rows=by_rows))
    if _anywhere(validation.trainer, data.altered()):  # the module writes into its batches
        data = dealt(validation.read, lengths, seed, cache_bytes, copies=True, by_rows=by_rows, whole=data.whole)
        logged = validate(validation, data, _tried(data))
    return _in_step(validation.trainer, data), logged


def undivided(validation: IsolatedValidation, seed: int, cache_bytes: int, why: str) -> FoldedData:
    """The validation data of a Trainer in one fold, read within an entered `IsolatedValidation`, not yet validated on.

    Args:
        validation: See `folded`.
        seed: See `dealt`.
        cache_bytes: See `dealt`.
        why: Why it is not divided.

    Raises:
        RuntimeError: If there is none.
    """
    lengths = validation.lengths()
    if validation.hands_over_iterator:
        return OwnLoop()
    # whether the module writes into its batches is not known yet
    return dealt(validation.read, lengths, seed, cache_bytes, copies=True, whole=why)


def _seen_to_work(
    validation: IsolatedValidation, data: KeptData | StreamedData
) -> tuple[KeptData | StreamedData, Logged]:
    """The data, and what the module logs on it; in one fold if the module takes no batches that are cut anew."""
    if not isinstance(data, KeptData) or data.uncut is None or validation.trainer.world_size > 1:
        return data, validate(validation, data, _tried(data))
    try:
        validate(validation, data, [0])  # as small as a batch may be
        return data, validate(validation, data, _tried(data))
    except Exception as error:
        uncut = data.undivided(f"validation fails on batches that are cut anew ({type(error).__name__}: {error})")
    return uncut, validate(validation, uncut, _tried(uncut))


def _tried(data: KeptData | StreamedData) -> range:
    """The folds on which it is seen what a validation does to its batches: all that are kept."""
    return range(data.folds) if isinstance(data, KeptData) else range(1)


def _in_step(trainer: Trainer, data: KeptData | StreamedData) -> FoldedData:
    """The data dealt as all processes can: each has batches of its own, and all must validate as often."""
    if trainer.world_size == 1:
        return data
    cut = isinstance(data, KeptData) and data.uncut is not None
    ours = torch.tensor([data.folds, int(cut), data.at_once, data.at_least], device=trainer.strategy.root_device)
    least, most = (trainer.strategy.reduce(ours.clone(), reduce_op=how).tolist() for how in ("min", "max"))
    if least[:2] != most[:2]:
        data = data.undivided("the processes cannot deal their batches alike")
        least = [1] * 4
    data.at_once, data.at_least = least[2:]
    return data


def _anywhere(trainer: Trainer, here: bool) -> bool:
    """Whether it is so in any process."""
    return mean_over_processes(trainer, torch.tensor(float(here), device=trainer.strategy.root_device)) > 0


def uncut_if_it_matters(validation: IsolatedValidation, data: FoldedData, logged: Logged, metric: Metric) -> FoldedData:
    """The data; in one fold if the module logs something else on batches cut anew than on those of its loaders.

    It does where the first dimension is not that of samples, or where a value is no mean over them.

    Args:
        validation: Entered; the processes of its Trainer decide alike.
        data: As `folded` dealt it.
        logged: On all of it.
        metric: What is looked at.
    """
    if not isinstance(data, KeptData) or data.uncut is None:
        return data
    uncut = data.undivided("the module logs something else on batches that are cut anew")
    names, rtol = {metric.monitor, metric.rank_by}, rounding(validation.trainer)
    before = validate(validation, uncut, range(1))
    apart = any(not _close(logged.value(name), before.value(name), rtol) for name in names)
    data.uncut = None
    return uncut if _anywhere(validation.trainer, apart) else data


def _close(one: Tensor, other: Tensor, rtol: float) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=rtol, atol=1e-6, equal_nan=True)


def rounding(trainer: Trainer) -> float:
    """How far, relatively, what a network gives may be off as batches of other sizes are summed in another order."""
    numbers = {one.dtype for one in trainer.lightning_module.parameters() if one.is_floating_point()}
    if "bf16" in str(trainer.precision):
        numbers.add(torch.bfloat16)
    return max([1e-3, *(2 * torch.finfo(one).eps for one in numbers)])


def validate(validation: IsolatedValidation, data: FoldedData, folds: Sequence[int]) -> Logged:
    """What the module logs on some folds."""
    if isinstance(data, OwnLoop):
        return validation.run()
    return validation.run_on(data.of(folds), counts=data.counts(folds))


class TrainerEvaluator:
    """Scores of pruned networks by isolated validation, larger is better.

    Args:
        trainer: The Trainer of the validation.
        module: Its LightningModule.
        validation: An entered `IsolatedValidation`.
        data: What it reads.
        weights: The module's own prunable parameters.
        metric: What ranks, judges, and breaks ties.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        validation: IsolatedValidation,
        data: FoldedData,
        weights: Mapping[str, nn.Parameter],
        metric: Metric,
    ) -> None:
        self._trainer, self._module, self._validation = trainer, module, validation
        self._data, self._weights, self._metric = data, weights, metric
        self.folds, self.undivided_because = data.folds, data.whole
        self.at_once, self.at_least = data.at_once, data.at_least
        self._warned = not trainer.is_global_zero

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        """Lend the network to the validation with the candidate's weights."""
        with self._as(candidate):
            return self._scores(validate(self._validation, self._data, folds))

    @contextmanager
    def _as(self, candidate: PrunedWeights) -> Iterator[None]:
        """Inside the block, which holds one validation, the network has the candidate's weights."""
        if not candidate.refitted:
            with applied(candidate.mask, self._weights):
                yield
            return
        tensors = {name: one for name, one in named_tensors(self._module).items() if name in candidate.refitted}
        with lent(tensors):
            copy_into(tensors, candidate.refitted)
            fill_pruned(self._weights, candidate.mask)
            yield

    def _scores(self, logged: Logged) -> Scores:
        metric = self._metric
        rank = metric.rank_sign * self._agreed(logged.value(metric.rank_by))
        floor = metric.sign * self._agreed(logged.value(metric.monitor))
        tiebreak = floor if metric.tiebreak is None else -self._agreed(logged.value(metric.tiebreak))
        return Scores(rank, floor, tiebreak)

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
    """The same, which tells the outcomes behind the scores too."""

    _probed = False
    _object: TorchMetric | None = None

    def recorded(self, candidate: PrunedWeights, folds: Sequence[int]) -> tuple[Scores, Outcomes | None]:
        """The same, with what is known of single samples, or else of single batches."""
        if self._trainer.world_size > 1:  # a process sees its own samples alone
            return self(candidate, folds), None
        judged_by = self._judged_by()
        with self._as(candidate), ExitStack() as stack:
            heard = [] if judged_by is None else stack.enter_context(calls_of(judged_by, self._module, self._loader))
            logged = self._validate(folds, recorded=judged_by is None)
        return self._scores(logged), self._outcomes(judged_by, heard, logged)

    def _outcomes(self, judged_by: TorchMetric | None, heard: Sequence[Call], logged: Logged) -> Outcomes | None:
        name, sign = self._metric.monitor, self._metric.sign
        value = float(logged.value(name))
        if judged_by is not None:
            _, mark, number = name.partition(LOADER)
            ours = [call for call in heard if not mark or call.loader == int(number)]
            return outcomes_of(judged_by, ours, sign, value)
        updates = logged.updates.get(name, ())
        if not updates:
            return None
        values, weights = (torch.tensor([float(pair[i]) for pair in updates], dtype=torch.float64) for i in (0, 1))
        return batches_of(values, weights, sign, value)

    def _judged_by(self) -> TorchMetric | None:
        """The torchmetrics object that was logged as the monitored metric; None if that is a plain number."""
        if not self._probed:
            logged = validate(self._validation, self._data, [0])
            self._object = logged.metrics.get(self._metric.monitor)
            self._probed = True
        return self._object

    def _loader(self) -> int | None:
        """The number of the loader that validates now, if there are several."""
        return self._validation.loader

    def _validate(self, folds: Sequence[int], recorded: bool = False) -> Logged:
        if recorded and not isinstance(self._data, OwnLoop):
            batches = self._by_fold(folds) if isinstance(self._data, KeptData) else self._data.of(folds)
            counts = [sum(ours) for ours in zip(*(self._data.counts([fold]) for fold in folds), strict=True)]
            return self._validation.run_on(batches, recorded=True, counts=counts)
        return validate(self._validation, self._data, folds)

    def _by_fold(self, folds: Sequence[int]) -> list[tuple[Any, int]]:
        """Batches that hold samples of one fold each, so that there are at least as many as folds."""
        return sorted((one for fold in folds for one in self._data.of([fold])), key=lambda one: one[1])


def refuse_if_blind(validation: IsolatedValidation, data: FoldedData, weights: Mapping[str, nn.Parameter]) -> None:
    """Raise where validation does not see the weights that are pruned: a module may swap in averaged ones of its own.

    Every candidate would score the same, and the search would prune all there is. To see it, what is logged with all
    prunable weights at zero is compared with what is logged as they are: on one fold, and if that is equal on all.

    Args:
        validation: An entered `IsolatedValidation`.
        data: Of which the folds are.
        weights: The prunable parameters, after training: an untrained network may well be as good as none.

    Raises:
        RuntimeError: If all of it is equal.
    """
    if all(_logs_the_same_without(weights, validation, data, folds) for folds in (range(1), range(data.folds))):
        raise RuntimeError(
            "RouletteWheelPruning: validation logs the same with all prunable weights at zero, so that it cannot judge "
            "pruned candidates. Does the module validate other weights than these, averaged ones for example? Leave "
            "averaging to a callback such as lightning's WeightAveraging, or name the weights with include."
        )


def _logs_the_same_without(
    weights: Mapping[str, nn.Parameter], validation: IsolatedValidation, data: FoldedData, folds: range
) -> bool:
    seen = validate(validation, data, folds).values
    some: list[Mapping[str, nn.Parameter]] = []
    if (
        sum(weight.numel() for weight in weights.values()) > limits().held_weights
    ):  # all values of all would have to be set aside
        some = [{name: weight} for name, weight in weights.items()]
    return all(_logs(seen, ours, validation, data, folds) for ours in (*some, weights))


def _logs(
    seen: Mapping[str, Tensor],
    weights: Mapping[str, nn.Parameter],
    validation: IsolatedValidation,
    data: FoldedData,
    folds: range,
) -> bool:
    """Whether that is logged with some weights at zero too."""
    try:
        with warnings.catch_warnings(), applied(Mask.nothing(weights), weights):
            warnings.simplefilter("ignore")
            unseen = validate(validation, data, folds).values
    except Exception:  # a validation that fails on a network of zeros does see them
        return False
    # a metric that is not finite is for the search to complain of
    return all(bool(value.isfinite().all()) for value in seen.values()) and _same(seen, unseen)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refuse_too_few_samples(
    samples: int | None, judged_by: TorchMetric | None, confidence: float, tolerance: float, confirm: float
) -> None:
    """Raise, before training begins, where it can be told that nothing could be certified after it.

    Args:
        samples: Of all the validation data; None if unknown.
        judged_by: The torchmetrics object that is monitored; None if it is a plain number.
        confidence: Asked for.
        tolerance: Asked for.
        confirm: Share of the samples that confirms.

    Raises:
        RuntimeError: If there are too few samples.
    """
    if samples is None or judged_by is None or not is_mean(judged_by):  # a bootstrap has no such bound
        return
    share = len(divided(FOLDS, confirm)[1]) / FOLDS
    if why := too_few(math.ceil(samples * share), 1.0, confidence, tolerance, share):
        raise RuntimeError(f"RouletteWheelPruning: {why}")


def mean_over_processes(trainer: Trainer, value: Tensor) -> float:
    """The mean of what the processes logged, the same on all of them; a synchronised metric is equal already."""
    if trainer.world_size == 1:
        return float(value)
    return float(trainer.strategy.reduce(torch.as_tensor(value, dtype=torch.float64).clone(), reduce_op="mean"))
