"""Validation of a borrowed network so that nobody else notices: by the Trainer's own loop, or by a leaner one.

This is the only file that touches what a Trainer keeps private: the loop and the connector that a validation writes to
(`val_loop`, `_logger_connector`, `_loggers`, `_last_val_time`, `_current_fx_name`) are swapped, and the fresh loop is
given the user's data (`_data_source`, `_combined_loader`, `_max_batches`, `_last_val_dl_reload_epoch`), read
(`_results`) and let go (`_data_fetcher`). All of them have these names in lightning 2.6.
"""

from __future__ import annotations

import copy
import math
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import Any, TypeGuard

import numpy
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states  # isolate_rng restores no exception
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop  # a fresh one: the user's keeps its progress
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher  # of a step that takes batches itself
from lightning.pytorch.loops.utilities import _select_data_fetcher  # tells which
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer import call  # runs hooks and steps as the Trainer does
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import (
    _LoggerConnector,  # a fresh one: the user's keeps its metrics
)
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _ResultCollection,  # a fresh one: the user's keeps its results
    _ResultMetric,  # what it holds
)
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer
from torchmetrics import Metric, MetricCollection, MetricTracker

from lightning_roulette.large.shards import reshard
from lightning_roulette.network.lending import surely, write

_ABSENT = object()


@dataclass(frozen=True)
class Logged:
    """What one validation logged.

    Attributes:
        values: Name to value, as in `trainer.callback_metrics`.
        higher_is_better: What each logged torchmetrics object says of itself, by the name it was logged under.
        metrics: The torchmetrics objects themselves, by the names of their values.
        updates: Where they were recorded, each value that was logged for a batch, with its weight in their mean.
    """

    values: Mapping[str, Tensor]
    higher_is_better: Mapping[str, bool | None]
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    updates: Mapping[str, Sequence[tuple[Tensor, int]]] = field(default_factory=dict)

    def value(self, name: str, argument: str = "monitor") -> Tensor:
        """The value of a metric.

        Raises:
            RuntimeError: If it was not logged; the message lists what was.
        """
        if name not in self.values:
            raise RuntimeError(
                f"RouletteWheelPruning watches {name!r}, which validation did not log. {self.listing} "
                f"Pass {argument}=..."
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

    Attributes:
        trainer: See above.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, keep_callbacks: Collection[str] = ()) -> None:
        self.trainer, self._module, self._keep = trainer, module, frozenset(keep_callbacks)
        self._stack = ExitStack()
        self._steps: _Steps | None = None
        self._running = False

    def __enter__(self) -> IsolatedValidation:
        trainer = self.trainer
        reshard(self._module)
        self._loop = _borrowing_loop(trainer)
        self._snapshot = _Snapshot(trainer, self._module, self._loop)
        self._users = trainer._logger_connector
        self._results, self._steps = _Results(), None
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
        self.trainer._logger_connector = self._connector()
        self._loop._results.clear()
        self._set_up()
        all_batches = self._loop._max_batches
        try:
            self._loop._max_batches = [min(count, max_batches) for count in all_batches]
            self._loop.run()
            values = _logged(self.trainer.callback_metrics)
            return Logged(values, _directions(self._loop._results), _metrics(self._loop._results))
        finally:
            self._loop._max_batches = all_batches
            surely(self._snapshot.restore)

    def lengths(self) -> list[float]:
        """How many batches each loader gives, or all at once if they are read side by side; infinity if unknown."""
        self._set_up()
        counts = list(self._loop._max_batches)
        if self._loop._is_sequential:
            return counts
        assert self._loop._combined_loader is not None
        return [min(counts) if self._loop._combined_loader._mode == "min_size" else max(counts)]

    def samples(self) -> int | None:
        """How many samples the loaders give in all; None where one does not tell."""
        self._set_up()
        loaders = self._loop._combined_loader.flattened if self._loop._combined_loader is not None else []
        counts = [_samples(loader, most) for loader, most in zip(loaders, self._loop._max_batches, strict=True)]
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def loader(self) -> int | None:
        """The number of the loader whose batch is being validated, if there are several."""
        return self._loop._results.dataloader_idx

    @property
    def hands_over_iterator(self) -> bool:
        """Whether `validation_step` takes the iterator over the loaders, and so gets its batches itself."""
        return isinstance(_select_data_fetcher(self.trainer, RunningStage.VALIDATING), _DataLoaderIterDataFetcher)

    @torch.no_grad()
    def read(self) -> Iterator[tuple[Any, int]]:
        """The batches as `validation_step` gets them, each with the number of its loader; the same at each call."""
        if self._running:
            yield from self._batches()
            return
        self._snapshot.rewind()
        self._set_up()
        self._loop._on_evaluation_model_eval()  # a transfer hook may augment batches of training
        try:
            yield from self._batches()
        finally:
            surely(self._snapshot.restore)

    def _set_up(self) -> None:
        """Have the loaders ready."""
        self._loop.setup_data()
        self._snapshot.watch(self._loop)
        if not sum(self._loop._max_batches):
            raise RuntimeError(
                "RouletteWheelPruning: the validation data is empty, so that candidates cannot be judged on it. Pass "
                "val_dataloaders with some batches."
            )

    def _batches(self) -> Iterator[tuple[Any, int]]:
        trainer, loop = self.trainer, self._loop
        loop.reset()  # which makes the iterator: another would start workers and draw chance once more
        fetcher = loop._data_fetcher
        assert fetcher is not None
        while (found := next(fetcher, None)) is not None:
            batch, _, loader = found
            batch = self._module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), loader)
            yield call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=loader), loader

    @torch.no_grad()
    def run_on(
        self, batches: Iterable[tuple[Any, int]], recorded: bool = False, counts: Sequence[int] | None = None
    ) -> Logged:
        """Validate the module as it is now on batches that `read` gave, through all its own hooks.

        What the Trainer's loop does besides is left out: progress, and what bars and loggers get after each batch.

        Args:
            batches: Each with the number of its loader, in the order of the loaders.
            recorded: Whether to note what is logged for each batch.
            counts: How many batches of each loader these are, for a module that asks; None: as many as it gives.

        Returns:
            What was logged.
        """
        trainer, loop, steps = self.trainer, self._loop, self._prepared()
        self._snapshot.rewind()
        connector = trainer._logger_connector = self._connector()
        results = loop._results = _Recording() if recorded else self._results
        self._running = True
        try:
            loop._on_evaluation_model_eval()
            steps.run(batches, counts)
            values = _logged(connector._callback_metrics)
            logged = Logged(values, _directions(results), _metrics(results), getattr(results, "updates", {}))
            steps.end()
            loop._on_evaluation_model_train()
            return logged
        finally:
            self._running, results.batch = False, None
            surely(self._snapshot.restore_module)

    @torch.no_grad()
    def see(self, batch: Any, spared: Collection[Tensor] = ()) -> None:
        """Let the module take one step on a batch of any data, of which nothing is logged or kept.

        What it writes into plain attributes, such as a list of outputs, is put back.

        The step is its `calibration_step(batch)` if it has one, else its `validation_step`, after the module hooks that
        come before that.

        Args:
            batch: As `read_training` gives it.
            spared: Buffers that are left as the caller or the step makes them.
        """
        trainer, loop, steps = self.trainer, self._loop, self._prepared()
        self._snapshot.rewind()
        trainer._logger_connector = self._connector()
        results = loop._results = _Results()
        self._running, gathered = True, _Attributes([vars(part) for part in self._module.modules()])
        try:
            loop._on_evaluation_model_eval()
            if (step := getattr(self._module, "calibration_step", None)) is None:
                steps.alone(batch)
            else:
                self._module._current_fx_name = "validation_step"  # it may log as that does
                trainer._logger_connector.on_batch_start(batch)
                with trainer.precision_plugin.val_step_context():
                    step(batch)
        finally:
            self._running, results.batch = False, None
            surely(gathered.restore)
            surely(lambda: self._snapshot.restore_module(spared))

    @torch.no_grad()
    def read_training(self, loader: Iterable[Any], most: int, seed: int) -> Iterator[Any]:
        """Batches of training data, as `see` takes them; chance is that of `seed` while they are read.

        Args:
            loader: Which nobody else reads.
            most: So many at most.
            seed: Of the global random generators, which are given back.
        """
        trainer = self.trainer
        self._prepared()
        self._snapshot.rewind()
        try:
            _seed_chance(seed)
            self._loop._on_evaluation_model_eval()
            for batch in islice(loader, most):
                ours = self._module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), 0)
                yield call._call_strategy_hook(trainer, "batch_to_device", ours, dataloader_idx=0)
        finally:
            surely(self._snapshot.restore)

    def _connector(self) -> _LoggerConnector:
        """One that knows what was logged before, as a module may read it."""
        fresh = _LoggerConnector(self.trainer)
        fresh._callback_metrics = _Metrics(self._users._callback_metrics)
        fresh._logged_metrics = dict(self._users._logged_metrics)
        fresh._progress_bar_metrics = dict(self._users._progress_bar_metrics)
        return fresh

    def _prepared(self) -> _Steps:
        if self._steps is None:
            self._set_up()
            self._loop._verify_dataloader_idx_requirement()
            self._steps = _Steps(self.trainer, self._loop)
        return self._steps

    def _let_go_of_data(self, users_loop: _EvaluationLoop) -> None:
        # a loader that the user's loop shares is left alone: tearing it down would end its persistent workers
        fetcher = self._loop._data_fetcher
        if fetcher is not None and self._loop._combined_loader is not users_loop._combined_loader:
            fetcher.teardown()


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks, of which Lightning declares no type."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


class _Steps:
    """The steps of a validation, as the Trainer's loop takes them, with nothing else between: no hook of nobody.

    Args:
        trainer: Its strategy and its callbacks' hooks.
        loop: Its loop at this time.
    """

    def __init__(self, trainer: Trainer, loop: _EvaluationLoop) -> None:
        self._trainer, self._loop, module = trainer, loop, trainer.lightning_module
        self._several = loop._is_sequential and loop.num_dataloaders > 1
        self._takes_index = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)
        self._hooks = frozenset(hook for hook in _HOOKS if _is_somebodys(hook, trainer))

    def run(self, batches: Iterable[tuple[Any, int]], counts: Sequence[int] | None = None) -> None:
        """Validate batches, each with the number of its loader, and note what they came to.

        Args:
            batches: In the order of the loaders.
            counts: How many of each loader a step is told that there are.
        """
        connector = self._trainer._logger_connector
        if "on_validation_start" in self._hooks:
            self._loop._on_evaluation_start()
        if "on_validation_epoch_start" in self._hooks:
            self._loop._on_evaluation_epoch_start()
        self._each(batches, counts)
        connector.epoch_end_reached()
        if self._several:  # what the last loader's batches came to
            connector.update_eval_epoch_metrics()
        connector._evaluation_epoch_end()
        if "on_validation_epoch_end" in self._hooks:
            self._loop._on_evaluation_epoch_end()
        else:
            connector.on_epoch_end()

    def alone(self, batch: Any) -> None:
        """One step, on the first batch of the first loader as it were."""
        if "on_validation_start" in self._hooks:
            self._loop._on_evaluation_start()
        if "on_validation_epoch_start" in self._hooks:
            self._loop._on_evaluation_epoch_start()
        self._step(batch, 0, 0)

    def end(self) -> None:
        """What follows when the results were read."""
        if "on_validation_end" in self._hooks:
            self._loop._on_evaluation_end()
        else:
            self._trainer._logger_connector.reset_results()

    def _each(self, batches: Iterable[tuple[Any, int]], counts: Sequence[int] | None) -> None:
        connector, last, index = self._trainer._logger_connector, None, -1
        every = self._loop._max_batches  # of which batches may be read between steps
        told = every
        if counts is not None:
            told = [*counts] if self._loop._is_sequential else [*counts] * len(every)
        for batch, loader in batches:
            if last is not None and loader != last:
                connector.epoch_end_reached()
                connector.update_eval_epoch_metrics()
            index = index + 1 if loader == last else 0
            last = loader
            self._loop._max_batches = told
            try:
                self._step(batch, index, loader)
            finally:
                self._loop._max_batches = every

    def _step(self, batch: Any, index: int, loader: int) -> None:
        trainer = self._trainer
        rest = (index, loader) if self._several else (index,)
        trainer._logger_connector.on_batch_start(batch, loader if self._several else None)
        if "on_validation_batch_start" in self._hooks:
            self._call("on_validation_batch_start", batch, *rest)
        output = call._call_strategy_hook(trainer, "validation_step", batch, *(rest if self._takes_index else rest[1:]))
        if "on_validation_batch_end" in self._hooks:
            self._call("on_validation_batch_end", output, batch, *rest)
        if trainer.received_sigterm:
            raise SIGTERMException

    def _call(self, hook: str, *arguments: Any) -> None:
        call._call_callback_hooks(self._trainer, hook, *arguments)
        call._call_lightning_module_hook(self._trainer, hook, *arguments)


_HOOKS: tuple[str, ...] = ("on_validation_start", "on_validation_epoch_start", "on_validation_batch_start")
_HOOKS += ("on_validation_batch_end", "on_validation_epoch_end", "on_validation_end")


def _is_somebodys(hook: str, trainer: Trainer) -> bool:
    """Whether the module, the strategy or a callback that is not muted has something of its own to do in a hook."""
    owners = [(trainer.lightning_module, LightningModule), (trainer.strategy, Strategy)]
    owners += [(one, Callback) for one in callbacks_of(trainer) if getattr(one, hook, None) is not None]
    return any(is_overridden(hook, owner, parent) for owner, parent in owners if hasattr(parent, hook))


class _Metrics(dict[str, Any]):
    """Callback metrics: those of before, and those that a validation logs, which are told apart.

    Where there are none of before, training has not begun, and what it will log is NaN.

    Args:
        before: Those of before.
    """

    def __init__(self, before: Mapping[str, Any]) -> None:
        super().__init__(before)
        self._begun = bool(before)
        self.logged: dict[str, None] = {}

    def __missing__(self, name: str) -> Tensor:
        if self._begun:
            raise KeyError(name)
        return torch.tensor(math.nan)

    def __setitem__(self, name: str, value: Any) -> None:
        self.logged[name] = None
        super().__setitem__(name, value)

    def update(self, metrics: Mapping[str, Any]) -> None:  # type: ignore[override]  # as a connector calls it
        """Note what is logged."""
        self.logged |= dict.fromkeys(metrics)
        super().update(metrics)


def _logged(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a validation logged."""
    assert isinstance(metrics, _Metrics)
    return {name: _own(metrics[name]) for name in metrics.logged}


class _Results(_ResultCollection):
    """Results that do not look through all they hold, at every `self.log`, for what to move to a device."""

    def __init__(self) -> None:
        super().__init__(training=False)

    def __setitem__(self, key: str, result: _ResultMetric) -> None:
        move = result.to

        def move_if_elsewhere(device: torch.device) -> _ResultMetric:
            held = vars(result).get("value")  # that of a torchmetrics object comes with its first update
            return result if held is None or held.device == device else move(device)

        vars(result)["to"] = move_if_elsewhere
        super().__setitem__(key, result)

    def reset(self, metrics: bool | None = None, fx: str | None = None) -> None:
        """Forget what was logged; the torchmetrics objects among it are put back by others."""
        for result in self.values():
            if (metrics is None or metrics ^ result.is_tensor) and fx in (None, result.meta.fx):
                if result.is_tensor:
                    result.reset()
                result.has_reset = True


class _Recording(_Results):
    """Results that note what was logged for each batch, by the name of its value."""

    def __init__(self) -> None:
        super().__init__()
        self.updates: dict[str, list[tuple[Tensor, int]]] = {}

    def update_metrics(self, key: str, value: Any, batch_size: int) -> None:
        """Note a value, and count it in."""
        super().update_metrics(key, value, batch_size)
        if isinstance(value, Tensor) and self[key].meta.is_mean_reduction:
            for name in set(self._forked_name(self[key], False)):
                self.updates.setdefault(name, []).append((value.detach().clone(), batch_size))


class _Snapshot:
    """What a validation may change in the module, its learning rates, its loaders and the world's chance; and back."""

    def __init__(self, trainer: Trainer, module: LightningModule, loop: _EvaluationLoop) -> None:
        self._module = module
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        schedulers = _with_inner([config.scheduler for config in trainer.lr_scheduler_configs])
        self._schedules = _Attributes([*groups, *(vars(one) for one in schedulers)])
        rates = [one for group in groups for one in group.values() if isinstance(one, Tensor)]
        parts = list(module.modules())
        self._modes = {part: part.training for part in parts}
        # a validation may make buffers and, with a MetricTracker, modules
        holders: list[dict[str, Any]] = [one for part in parts for one in (part._buffers, part._modules)]
        self._made = [(holder, dict(holder)) for holder in holders]
        buffers = {id(one): one for part in parts for one in part._buffers.values() if _has_values(one)}
        self._values = [(one, one.detach().clone()) for one in (*buffers.values(), *rates)]
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
                metric.reset()  # also one that is empty: an update may write into the tensors it finds

    def restore(self) -> None:
        """Everything as at first."""
        self.restore_module()
        for holder, epoch in self._epochs.items():
            holder.epoch = epoch
        self._restore_chance()

    def restore_module(self, but: Collection[Tensor] = ()) -> None:
        """The module as at first, but for some buffers; what else changed, each validation begins anew."""
        spared = {id(buffer) for buffer in but}
        reshard(self._module)  # else the next validation would see these weights again
        for contents, members in self._made:
            contents.clear()
            contents.update(members)
        for buffer, values in self._values:
            if id(buffer) not in spared:
                write(buffer, values)
        for metric, state in self._metrics:
            vars(metric).update({name: _shallow(value) for name, value in state.items()})
        for part, training in self._modes.items():
            vars(part)["training"] = training  # what assigning does, without the checks of a Module
        self._schedules.restore()
        torch.set_grad_enabled(self._grad)

    def _restore_chance(self) -> None:
        _set_rng_states(self._rng)
        for generator, state in self._generators.items():
            generator.set_state(state)


_MODULE_PARTS = frozenset(vars(nn.Module()))


class _Attributes:
    """The plain attributes of some objects, with what is in their lists, dicts and sets.

    Args:
        holders: The `vars` of each; those of a module's own machinery are left alone.
    """

    def __init__(self, holders: Sequence[dict[str, Any]]) -> None:
        self._before = [
            (holder, {name: one for name, one in holder.items() if name not in _MODULE_PARTS}) for holder in holders
        ]
        self._contents: dict[int, tuple[Any, Any]] = {}  # of each container: itself, and a copy
        for _, before in self._before:
            self._note(list(before.values()))

    def restore(self) -> None:
        """Everything as it was, in the same containers."""
        for attributes, before in self._before:
            for name in attributes.keys() - before.keys() - _MODULE_PARTS:
                del attributes[name]
            attributes.update(before)
        for container, contents in self._contents.values():
            container.clear()
            if isinstance(container, list | deque):
                container.extend(contents)
            else:
                container.update(contents)

    def _note(self, waiting: list[Any]) -> None:
        while waiting:
            one = waiting.pop()
            if isinstance(one, tuple):
                waiting += one
            elif type(one) in _CONTAINERS and id(one) not in self._contents:
                self._contents[id(one)] = one, copy.copy(one)
                waiting += one.values() if isinstance(one, dict) else one


def _with_inner(schedulers: Sequence[Any]) -> list[Any]:
    """Learning rate schedulers, and those that they are made of."""
    inner = [one for outer in schedulers for one in getattr(outer, "_schedulers", ())]
    return [*schedulers, *(_with_inner(inner) if inner else [])]


_CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict)


def _rng_states() -> dict[str, Any]:
    return _collect_rng_states(include_cuda=torch.cuda.is_available() and torch.cuda.is_initialized())


def _seed_chance(seed: int) -> None:
    torch.manual_seed(int(seed))
    numpy.random.seed(int(seed) % 2**32)  # noqa: NPY002  # what transforms draw from
    random.seed(int(seed))


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


def _directions(results: _ResultCollection) -> dict[str, bool | None]:
    """`higher_is_better` of logged torchmetrics objects: Lightning shows their values alone."""
    logged = [result for result in results.values() if not result.is_tensor]
    return {result.meta.name: getattr(result.value, "higher_is_better", None) for result in logged}


def _metrics(results: _ResultCollection) -> dict[str, Metric]:
    """The torchmetrics objects that were logged, by the names of their values."""
    objects = [one for one in results.values() if not one.is_tensor]
    return {name: one.value for one in objects for name in results._forked_name(one, False)}


def _samples(loader: Any, batches: float) -> int | None:
    """The samples in so many batches of a loader, if it is a plain one."""
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if not isinstance(size, int) or not isinstance(sampler, Sized) or math.isinf(batches):
        return None
    return min(len(sampler), int(batches) * size)


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
