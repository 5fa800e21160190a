"""Finds prunable weights that validation does not use, or only to log something that does not judge candidates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_roulette.large.limits import are_few
from lightning_roulette.large.shards import any_sharded
from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.hooks import every_call_seen
from lightning_roulette.network.lending import applied, lent
from lightning_roulette.trainer.data.folded_data import FoldedData
from lightning_roulette.trainer.processes import in_any_process, least_and_most
from lightning_roulette.trainer.scores.monitored_metric import MonitoredMetric
from lightning_roulette.trainer.validation.isolation import IsolatedValidation
from lightning_roulette.trainer.validation.logged import Logged

_Weights = Mapping[str, nn.Parameter]

_FEW = 16  # this many trials of a batch are cheap for any network


def unused_weights(
    validation: IsolatedValidation, data: FoldedData, weights: _Weights, metric: MonitoredMetric, folds: Sequence[int]
) -> dict[str, str]:
    """Find the weights on which no score of a candidate depends.

    A weight is unused if the values that judge and rank stay bit for bit the same

    - with all its entries at zero,
    - with other, larger entries. A layer that matters little may leave an accuracy as it is at zero, but not here.

    Each weight is tried on one batch first, then on one fold. What is left is tried on all folds, together. A
    validation under a `TorchDispatchMode` tells which weights no operation takes; these are tried on all folds only.
    In a network of many weights and few batches, whole submodules are tried on the first batch.

    A value that is not finite decides nothing. Sharded weights are gathered into other memory, and are not tried.

    Args:
        validation: Entered.
        data: The validation data.
        weights: The prunable parameters.
        metric: The metrics that judge and rank.
        folds: The folds that rank candidates.

    Returns:
        Name to reason, the same in all processes.
    """
    if any_sharded(weights.values()):
        return {}
    data.fetch(folds[:1])

    def on_a_batch() -> Logged:
        return _first_batches(validation, data)

    def on_a_fold() -> Logged:
        return data.validate(validation, folds[:1])

    untouched = _untouched(validation.trainer, on_a_fold if len(folds) > 1 else on_a_batch, weights)
    trials = _Trials(validation.trainer, weights, metric)
    suspects = [name for name in weights if name not in untouched]
    batch = trials.on(on_a_batch)
    if batch.known:
        groups = _grouped(suspects, max(_FEW, 2 * _batches(validation, data)))
        suspects = [name for group in groups if batch.ignores(group) for name in group]
    if suspects and len(folds) > 1 and (fold := trials.on(on_a_fold)).known:
        suspects = [name for name in suspects if fold.ignores([name])]
    if not (suspects := [*untouched, *suspects]):
        return {}
    everything = trials.on(lambda: _validated(validation, data, folds))
    named = " or ".join(dict.fromkeys((metric.monitor, metric.rank_by)))
    return {
        name: "unused by validation" if name in untouched else f"no effect on {named}"
        for name in (everything.ignored_among(suspects) if everything.known else ())
    }


@dataclass(frozen=True, eq=False)
class _Trials:
    """What all trials have in common."""

    trainer: Trainer
    weights: _Weights
    metric: MonitoredMetric

    def on(self, validate: Callable[[], Logged]) -> _Trial:
        """Return a trial on some data. The network is validated once as it is."""
        found = _values(validate, self.metric)
        unknown = not found or not all(bool(value.isfinite().all()) for value in found.values())
        return _Trial(self, validate, found, not in_any_process(self.trainer, unknown))


@dataclass(frozen=True, eq=False)
class _Trial:
    """Validations of altered networks on some data.

    Attributes:
        trials: What it has in common with others.
        validate: Validates the network.
        values: The values that judge and rank the network as it is.
        known: Whether there are values and all are finite.
    """

    trials: _Trials
    validate: Callable[[], Logged]
    values: Mapping[str, Tensor]
    known: bool

    def ignores(self, names: Sequence[str]) -> bool:
        """Return whether the values are the same with some weights altered, one by one if they are large."""
        weights = {name: self.trials.weights[name] for name in names}
        if len(names) > 1 and not are_few(weights.values()):
            return all(self.ignores([name]) for name in names)
        return not any(self._changes(alter(weights)) for alter in (_zeroed, _replaced))

    def ignored_among(self, names: Sequence[str]) -> list[str]:
        """Return those of some weights that are ignored, found by halving."""
        if self.ignores(names):
            return list(names)
        if len(names) < 2:
            return []
        middle = len(names) // 2
        return self.ignored_among(names[:middle]) + self.ignored_among(names[middle:])

    def _changes(self, altered: AbstractContextManager[None]) -> bool:
        with altered:
            found = _values(self.validate, self.trials.metric)
        same = found.keys() == self.values.keys() and all(torch.equal(found[name], self.values[name]) for name in found)
        return in_any_process(self.trials.trainer, not same)


def _values(validate: Callable[[], Logged], metric: MonitoredMetric) -> dict[str, Tensor]:
    """Return the logged values that judge or rank; none if the validation fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logged = validate().values
    except Exception:  # altered weights may fail, and so may a metric on a single batch
        return {}
    names = (metric.monitor, metric.rank_by, metric.tiebreak)
    return {name: torch.as_tensor(logged[name]) for name in names if name is not None and name in logged}


def _zeroed(weights: _Weights) -> AbstractContextManager[None]:
    return applied(Mask.nothing(weights), weights)


@contextmanager
def _replaced(weights: _Weights) -> Iterator[None]:
    """Inside the block the entries are between -s and s, where s is 8 times the largest magnitude, and at least 1.

    The entries have no order that a layer could ignore: a softmax, for example, ignores equal rows.
    """
    with lent(dict(weights)), torch.no_grad():
        for weight in weights.values():
            size = max(8 * float(weight.abs().max()), 1.0)
            weight.copy_(torch.arange(float(weight.numel()), device=weight.device).cos_().mul_(size).view(weight.shape))
        yield


def _first_batches(validation: IsolatedValidation, data: FoldedData) -> Logged:
    """Validate on the first batch of each loader."""
    if validation.hands_over_iterator:
        return validation.run(1)
    found: dict[int, Any] = {}
    for batch, loader in data.of([0]):
        found.setdefault(loader, batch)
    counts = [int(loader in found) for loader in range(len(data.counts([0])))]
    return validation.run_on([(batch, loader) for loader, batch in found.items()], counts=counts)


def _validated(validation: IsolatedValidation, data: FoldedData, folds: Sequence[int]) -> Logged:
    data.fetch(folds)
    return data.validate(validation, folds)


def _batches(validation: IsolatedValidation, data: FoldedData) -> int:
    """Return the number of batches of a validation; the same in all processes."""
    lengths = [data.folds if length == float("inf") else int(length) for length in validation.lengths()]
    trainer, most = validation.trainer, max(lengths, default=1)
    return most if trainer.world_size == 1 else least_and_most(trainer, [most])[0][0]


def _grouped(names: Sequence[str], most: int) -> list[list[str]]:
    """Return names in at most `most` groups if possible: single names, or names with the same beginning."""
    for depth in range(max((name.count(".") for name in names), default=0) + 1, 0, -1):
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            groups.setdefault(tuple(name.split(".")[:depth]), []).append(name)
        if len(groups) <= most or depth == 1:
            return list(groups.values())
    return []


def _untouched(trainer: Trainer, validate: Callable[[], Logged], weights: _Weights) -> dict[str, None]:
    """Return the weights that no operation of a validation takes, in any process.

    Operations in other threads and kernels outside of torch's dispatcher are not seen.
    """
    used = _Storages()
    try:
        with warnings.catch_warnings(), every_call_seen(), used:
            warnings.simplefilter("ignore")
            validate()
        here = [int(_storage(weight) in used.found) for weight in weights.values()]
    except Exception:  # a network that does not work in the mode
        here = [1] * len(weights)
    anywhere = here if trainer.world_size == 1 else least_and_most(trainer, here)[1]
    return {name: None for name, taken in zip(weights, anywhere, strict=True) if not taken}


class _Storages(TorchDispatchMode):
    """Notes the storages of all tensors that operations take.

    Attributes:
        found: Addresses of the storages.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._note(args)
        if kwargs:
            self._note(list(kwargs.values()))
        return func(*args, **(kwargs or {}))

    def _note(self, values: Collection[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self.found.add(_storage(value))
            elif isinstance(value, tuple | list):
                self._note(value)


def _storage(tensor: Tensor) -> int:
    """Return the address of a tensor's storage; 0 if it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0
