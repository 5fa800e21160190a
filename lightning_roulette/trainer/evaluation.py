"""The Trainer's own validation loop, run on a borrowed network so that nobody else notices.

This is the only file that touches what a Trainer keeps private: the loop and the connector that a validation writes to
(`val_loop`, `_logger_connector`, `_loggers`, `_last_val_time`, `_current_fx_name`) are swapped, and the fresh loop is
given the user's data (`_data_source`, `_combined_loader`, `_max_batches`, `_last_val_dl_reload_epoch`), read
(`_results`) and let go (`_data_fetcher`). All of them have these names in lightning 2.6.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeGuard

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states  # isolate_rng restores no exception
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop  # a fresh one: the user's keeps its progress
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import (
    _LoggerConnector,  # a fresh one: the user's keeps its metrics
)
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer
from torchmetrics import Metric, MetricCollection, MetricTracker

from lightning_roulette.core.masks import Mask, applied, surely
from lightning_roulette.core.search import PrunedWeights, Scores

_ABSENT = object()


@dataclass(frozen=True)
class Logged:
    """What one validation logged.

    Attributes:
        values: Name to value, as in `trainer.callback_metrics`.
        higher_is_better: What each logged torchmetrics object says of itself, by the name it was logged under.
    """

    values: Mapping[str, Tensor]
    higher_is_better: Mapping[str, bool | None]

    def value(self, name: str) -> Tensor:
        """The value of a metric.

        Raises:
            RuntimeError: If it was not logged; the message lists what was.
        """
        if name not in self.values:
            raise RuntimeError(
                f"RouletteWheelPruning watches {name!r}, which validation did not log. {self.listing} Pass monitor=..."
            )
        return self.values[name]

    @property
    def listing(self) -> str:
        """What was logged, in a sentence."""
        if not self.values:
            return "Nothing was logged: call self.log(...) in validation_step."
        return f"Logged: {', '.join(repr(name) for name in sorted(self.values))}."


class IsolatedValidation:
    """A `with` block in which validations run that nothing outside it can tell.

    Inside, callbacks (but those in `keep_callbacks`) and loggers are muted copies, the profiler is off, and a fresh
    evaluation loop and logger connector stand in for the user's. After it, also after an exception or Ctrl-C, the
    Trainer's attributes, training modes, metric states, buffers, and the states of the global random generators and of
    the loaders' own are what they were. What the module does to other Python attributes of its own in its validation
    hooks is not undone.

    Args:
        trainer: Within `fit`, but not within a validation batch.
        module: Its LightningModule.
        keep_callbacks: Names of callback classes that stay live.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, keep_callbacks: Collection[str] = ()) -> None:
        self._trainer, self._module, self._keep = trainer, module, frozenset(keep_callbacks)
        self._stack = ExitStack()

    def __enter__(self) -> IsolatedValidation:
        trainer = self._trainer
        self._loop = _borrowing_loop(trainer)
        self._snapshot = _Snapshot(self._module, self._loop)
        callbacks = [one if type(one).__name__ in self._keep else _muted(one) for one in callbacks_of(trainer)]
        replacements: list[tuple[Any, str, Any]] = [
            (trainer, "callbacks", [one for one in callbacks if one is not None]),
            (trainer, "_loggers", [_muted_logger(one) for one in trainer.loggers]),  # the public setter copies the list
            (trainer, "profiler", PassThroughProfiler()),
            (trainer, "_logger_connector", _LoggerConnector(trainer)),
            (trainer, "should_stop", trainer.should_stop),
            (trainer, "_last_val_time", getattr(trainer, "_last_val_time", _ABSENT)),  # times time-based intervals
            (trainer.state, "fn", TrainerFn.FITTING),
            (trainer.state, "stage", RunningStage.VALIDATING),  # else results land among those of training
            (trainer.state, "status", trainer.state.status),
            (trainer.fit_loop.epoch_loop, "val_loop", self._loop),
            (self._module, "_current_fx_name", self._module._current_fx_name),  # what `self.log` files under
        ]
        if (loader := self._loop._combined_loader) is not None:
            replacements.append((loader, "_limits", loader.limits))  # the public setter does not take None back
        with ExitStack() as stack:
            stack.callback(surely, self._snapshot.restore)
            stack.callback(self._let_go_of_data, trainer.fit_loop.epoch_loop.val_loop)
            for owner, name, replacement in replacements:
                stack.enter_context(_swapped(owner, name, replacement))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def run(self, max_batches: float = math.inf) -> Logged:
        """Validate the module as it is now.

        Each run starts from the same random states and from reset metrics, so equal weights give equal results.

        Args:
            max_batches: At most so many batches of each loader.

        Returns:
            What was logged.

        Raises:
            RuntimeError: If the loaders give no batch.
        """
        self._snapshot.rewind()
        self._trainer._logger_connector = _LoggerConnector(self._trainer)
        self._loop._results.clear()
        self._loop.setup_data()
        self._snapshot.watch(self._loop)
        all_batches = self._loop._max_batches
        if not sum(all_batches):
            raise RuntimeError(
                "RouletteWheelPruning: the validation data is empty, so that candidates cannot be judged on it. Pass "
                "val_dataloaders with some batches."
            )
        try:
            self._loop._max_batches = [min(count, max_batches) for count in all_batches]
            self._loop.run()
            values = {name: _own(value) for name, value in self._trainer.callback_metrics.items()}
            return Logged(values, _directions(self._loop))
        finally:
            self._loop._max_batches = all_batches
            surely(self._snapshot.restore)

    def _let_go_of_data(self, users_loop: _EvaluationLoop) -> None:
        # a loader that the user's loop shares is left alone: tearing it down would end its persistent workers
        fetcher = self._loop._data_fetcher
        if fetcher is not None and self._loop._combined_loader is not users_loop._combined_loader:
            fetcher.teardown()


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks, of which Lightning declares no type."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


class TrainerEvaluator:
    """Scores of pruned networks by isolated validation: the monitored metric, larger is better, on all batches.

    Args:
        trainer: The Trainer of the validation.
        validation: An entered `IsolatedValidation`.
        weights: The module's own prunable parameters.
        monitor: The metric.
        sign: 1 if larger values are better, else -1.
        loss: A logged loss that breaks ties, if any.
    """

    folds = 1

    def __init__(
        self,
        trainer: Trainer,
        validation: IsolatedValidation,
        weights: Mapping[str, nn.Parameter],
        monitor: str,
        sign: int,
        loss: str | None,
    ) -> None:
        self._trainer, self._validation, self._weights = trainer, validation, weights
        self._monitor, self._sign, self._loss = monitor, sign, loss
        self._warned = not trainer.is_global_zero

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        """Lend the network to the validation with the candidate's mask applied."""
        with applied(candidate.mask, self._weights):
            logged = self._validation.run()
        score = self._sign * self._agreed(logged.value(self._monitor))
        tiebreak = -self._agreed(logged.value(self._loss)) if self._loss is not None else 0.0
        return Scores(rank=score, floor=score, tiebreak=tiebreak)

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


def refuse_if_blind(validation: IsolatedValidation, weights: Mapping[str, nn.Parameter]) -> None:
    """Raise where validation does not see the weights that are pruned: a module may swap in averaged ones of its own.

    Every candidate would score the same, and the search would prune all there is. To see it, what is logged with all
    prunable weights at zero is compared with what is logged as they are: on one batch, and if that is equal on all.

    Args:
        validation: An entered `IsolatedValidation`.
        weights: The prunable parameters, after training: an untrained network may well be as good as none.

    Raises:
        RuntimeError: If all of it is equal.
    """
    if all(_logs_the_same_without(weights, validation, batches) for batches in (1, math.inf)):
        raise RuntimeError(
            "RouletteWheelPruning: validation logs the same with all prunable weights at zero, so that it cannot judge "
            "pruned candidates. Does the module validate other weights than these, averaged ones for example? Leave "
            "averaging to a callback such as lightning's WeightAveraging, or name the weights with include."
        )


def _logs_the_same_without(weights: Mapping[str, nn.Parameter], validation: IsolatedValidation, batches: float) -> bool:
    seen = validation.run(batches).values
    nothing = Mask({name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()})
    try:
        with warnings.catch_warnings(), applied(nothing, weights):
            warnings.simplefilter("ignore")
            unseen = validation.run(batches).values
    except Exception:  # a validation that fails on a network of zeros does see them
        return False
    # a metric that is not finite is for the search to complain of
    return all(bool(value.isfinite().all()) for value in seen.values()) and _same(seen, unseen)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def mean_over_processes(trainer: Trainer, value: Tensor) -> float:
    """The mean of what the processes logged, the same on all of them; a synchronised metric is equal already."""
    if trainer.world_size == 1:
        return float(value)
    return float(trainer.strategy.reduce(torch.as_tensor(value, dtype=torch.float64).clone(), reduce_op="mean"))


class _Snapshot:
    """What a validation may change in the module, its loaders and the world's chance, and the way back."""

    def __init__(self, module: LightningModule, loop: _EvaluationLoop) -> None:
        parts = list(module.modules())
        self._modes = {part: part.training for part in parts}
        # a validation may make buffers and, with a MetricTracker, modules
        holders: list[dict[str, Any]] = [one for part in parts for one in (part._buffers, part._modules)]
        self._made = [(holder, dict(holder)) for holder in holders]
        buffers = {id(one): one for part in parts for one in part._buffers.values() if _has_values(one)}
        self._values = [(buffer, buffer.detach().clone()) for buffer in buffers.values()]
        self._metrics = [
            (part, {name: _shallow(value) for name, value in vars(part).items() if name not in _MODULE_PARTS})
            for part in parts
            if isinstance(part, Metric | MetricCollection | MetricTracker)
        ]
        self._generators: dict[torch.Generator, Tensor] = {}
        self._epochs: dict[Any, int] = {}
        self.watch(loop)
        self._rng, self._grad = _rng_states(), torch.is_grad_enabled()

    def watch(self, loop: _EvaluationLoop) -> None:
        """Note the chance and the epoch of loaders not seen before."""
        for holder in _loader_parts(loop):
            if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
                self._generators.setdefault(generator, generator.get_state())
            if hasattr(holder, "set_epoch") and isinstance(epoch := getattr(holder, "epoch", None), int):
                self._epochs.setdefault(holder, epoch)

    def rewind(self) -> None:
        """Random states as at first, metrics empty."""
        self._restore_chance()
        for metric, _ in self._metrics:
            if isinstance(metric, Metric):
                metric.reset()

    @torch.no_grad()
    def restore(self) -> None:
        """Everything as at first."""
        for contents, members in self._made:
            contents.clear()
            contents.update(members)
        for buffer, values in self._values:
            buffer.copy_(values)
        for metric, state in self._metrics:
            vars(metric).update({name: _shallow(value) for name, value in state.items()})
        for part, training in self._modes.items():
            part.training = training
        for holder, epoch in self._epochs.items():
            holder.epoch = epoch
        self._restore_chance()
        torch.set_grad_enabled(self._grad)

    def _restore_chance(self) -> None:
        _set_rng_states(self._rng)
        for generator, state in self._generators.items():
            generator.set_state(state)


_MODULE_PARTS = frozenset(vars(nn.Module()))


def _rng_states() -> dict[str, Any]:
    return _collect_rng_states(include_cuda=torch.cuda.is_available() and torch.cuda.is_initialized())


def _shallow(value: Any) -> Any:
    # a metric's reset empties lists in place and binds tensors anew: lists must be copied, tensors need not
    if type(value) is dict:  # of lists, in a MetricCollection
        return {key: _shallow(member) for key, member in value.items()}
    return copy.copy(value) if isinstance(value, list | dict | set) else value


def _has_values(buffer: Tensor | None) -> TypeGuard[Tensor]:
    return buffer is not None and not isinstance(buffer, UninitializedBuffer)


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _borrowing_loop(trainer: Trainer) -> _EvaluationLoop:
    """A fresh loop over the loaders that the user's loop holds, if it holds any yet."""
    users = trainer.fit_loop.epoch_loop.val_loop
    loop = _EvaluationLoop(trainer, TrainerFn.FITTING, RunningStage.VALIDATING, verbose=False, inference_mode=False)
    loop._data_source = users._data_source
    loop._combined_loader, loop._max_batches = users._combined_loader, list(users._max_batches)
    if users._combined_loader is not None:
        loop._last_val_dl_reload_epoch = math.inf  # whether to ask for new loaders is for the user's loop to say
    return loop


def _directions(loop: _EvaluationLoop) -> dict[str, bool | None]:
    """`higher_is_better` of logged torchmetrics objects: Lightning shows their values alone."""
    logged = [result for result in loop._results.values() if not result.is_tensor]
    return {result.meta.name: getattr(result.value, "higher_is_better", None) for result in logged}


def _loader_parts(loop: _EvaluationLoop) -> list[Any]:
    """Every loader of the loop and its samplers: what may hold chance of its own."""
    loaders = loop._combined_loader.flattened if loop._combined_loader is not None else []
    parts = []
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        parts += [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    return [part for part in parts if part is not None]


@contextmanager
def _swapped(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    original = getattr(owner, name, _ABSENT)

    def put_back() -> None:
        if original is not _ABSENT:
            setattr(owner, name, original)
        elif hasattr(owner, name):
            delattr(owner, name)

    try:
        if replacement is not _ABSENT:
            setattr(owner, name, replacement)
        yield
    finally:
        surely(put_back)


def _muted(callback: Callback) -> Callback | None:
    """The same class and the same attributes, but no hook: `isinstance` and `trainer.progress_bar_callback` still work.

    Removing callbacks instead would kill RichProgressBar's thread, which looks for its bar among them.
    """
    # properties go before what LambdaCallback and others keep in the instance
    hooks = dict.fromkeys((name for name in dir(callback) if name.startswith("on_")), property(lambda self: None))
    twin: Callback | None = _twin(callback, hooks)
    return twin


def _muted_logger(logger: Logger) -> Logger:
    """The same class and directories, but nothing is written."""
    silent = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")
    muted = dict.fromkeys(silent, _do_nothing) | {"experiment": property(lambda self: DummyLogger().experiment)}
    twin = _twin(logger, muted)
    return DummyLogger() if twin is None else twin


def _twin(original: Any, overrides: Mapping[str, Any]) -> Any:
    kind = type(original)
    try:
        # an own __del__ would act on what the twin shares with the original
        names = {**overrides, "__del__": _do_nothing, "__module__": kind.__module__}
        twin: Any = object.__new__(type(kind)(kind.__name__, (kind,), names))  # type: ignore[misc]
        twin.__dict__ = original.__dict__
    except Exception:  # a class that resists: with __slots__, or an __init_subclass__ of its own
        return None
    return twin


def _do_nothing(*_: Any, **__: Any) -> None:
    pass
