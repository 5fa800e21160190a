"""A fit without training: the loop of a Trainer that searches where it would train.

Private names of lightning 2.6 are used, because a Trainer has no public way to run another loop with everything set up
as in a fit: `_FitLoop`, `_data_source` (where the loaders come from), and `_ckpt_path` and `_user_managed` of the
checkpoint connector (the file of an earlier run).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_roulette.trainer.choices import Choices
from lightning_roulette.trainer.hold_zeros import HoldZeros
from lightning_roulette.trainer.lightning_names import built_for, in_both, in_package_of
from lightning_roulette.trainer.show.log import log
from lightning_roulette.trainer.validation.muting import callbacks_of, muted_callbacks
from lightning_roulette.trainer.with_result import WithResult

if TYPE_CHECKING:
    _Base = _FitLoop
else:
    _Base = object


class Searches(Protocol):
    """A callback whose hooks find the metric and search."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the metric."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search."""


class SearchLoop(_Base):
    """Searches the network once, where a Trainer would train it.

    A class with the base of a Trainer's package is made by `search_loop`.

    Args:
        trainer: The Trainer.
        callback: The callback that searches.
        ckpt_path: The file whose weights are pruned; None if the module has them.
        weights_only: How this file is read, see `torch.load`.
    """

    def __init__(self, trainer: Trainer, callback: Searches, ckpt_path: str | None, weights_only: bool | None) -> None:
        super().__init__(trainer, max_epochs=-1)
        self.ckpt_path, self.weights_only, self._callback = ckpt_path, weights_only, callback

    @property
    def has_training_data(self) -> bool:
        """Whether there are training loaders."""
        return self._data_source.is_defined() and self.trainer.limit_train_batches != 0

    def run(self) -> None:
        """Read the training loaders, and search."""
        trainer, module = self.trainer, self.trainer.lightning_module
        trainer.ckpt_path = self.ckpt_path  # now, as Lightning would load its training state at the start
        if self.has_training_data:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The number of training batches", UserWarning)
                self.setup_data()
        if isinstance(bar := trainer.progress_bar_callback, in_both(RichProgressBar)):
            bar.on_train_start(trainer, module)  # it makes the display, which our line is a part of
        self._callback.on_train_start(trainer, module)
        self._callback.on_train_end(trainer, module)


def search_loop(trainer: Trainer, callback: Searches, ckpt_path: str | None, weights_only: bool | None) -> SearchLoop:
    """Return a `SearchLoop` for a Trainer."""
    return built_for(trainer, SearchLoop, _FitLoop)(trainer, callback, ckpt_path, weights_only)


def search_loop_of(trainer: Trainer) -> SearchLoop | None:
    """Return the loop of a Trainer that searches without training; None if the Trainer trains."""
    loop = trainer.fit_loop
    return loop if isinstance(loop, SearchLoop) else None


def as_data_allows(choices: Choices, loop: SearchLoop) -> Choices:
    """Return the choices without what needs training data, if there is none. A log line says so."""
    if loop.has_training_data or not choices.needs_inputs:
        return choices
    if loop.trainer.is_global_zero:
        log.info(
            "RouletteWheelPruning: there is no training data, so the weights are not refitted, and their importance is "
            "their magnitude (refit=None). With training data, many more weights can be pruned; labels are not needed."
        )
    return replace(choices, refit=None)


@contextmanager
def only_searching(
    trainer: Trainer, module: LightningModule, loop: SearchLoop, callback: Callback, keep: Sequence[str]
) -> Iterator[None]:
    """Inside the block, `trainer.fit(module, ...)` runs `loop`. After it, the Trainer is as it was.

    Inside the block

    - no other callbacks of the Trainer and the module are called than progress bars, `HoldZeros` and those in `keep`;
    - the module configures no optimizer, and needs no `training_step`;
    - there is no sanity check.

    Args:
        trainer: The Trainer.
        module: Its module.
        loop: What is run.
        callback: The callback that searches.
        keep: Names of callback classes that stay active.
    """
    profiler = trainer.profiler  # type: ignore[attr-defined]
    owners = (trainer, trainer.state, profiler, trainer._checkpoint_connector, trainer._data_connector)
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())  # a loader of training data draws from the global generator
        stack.callback(_restore_optimizers, trainer, list(trainer.optimizers), list(trainer.lr_scheduler_configs))
        for owner in owners:
            stack.enter_context(_kept(owner))
        for name, shadow in _shadows(trainer, module, keep).items():
            stack.enter_context(_shadowed(module, name, shadow))
        for name in ("validate_loop", "test_loop", "predict_loop"):
            setattr(trainer, name, _with_own_source(getattr(trainer, name)))
        trainer.fit_loop, trainer.num_sanity_val_steps = loop, 0
        trainer.val_check_interval = 1.0  # a larger one than the training data would be refused
        trainer._logger_connector = in_package_of(trainer, _LoggerConnector)(trainer)
        trainer.ckpt_path = None
        trainer.callbacks = [*_active(callbacks_of(trainer), callback, keep), callback]  # type: ignore[attr-defined]
        yield


def _active(callbacks: Sequence[Callback], callback: Callback, keep: Sequence[str]) -> list[Callback]:
    """Return callbacks of which only progress bars, `HoldZeros` and those in `keep` are called.

    Others that search are left out.
    """
    others = [one for one in callbacks if one is not callback and not isinstance(one, WithResult)]
    called = [type(one).__name__ for one in others if isinstance(one, (*in_both(ProgressBar), HoldZeros))]
    active = muted_callbacks(others, {*keep, *called})
    for one in active:
        if one not in others:
            one.__dict__ = dict(vars(one))  # Lightning sets attributes of every callback
    return active


def _shadows(trainer: Trainer, module: LightningModule, keep: Sequence[str]) -> dict[str, Any]:
    """Return what the module has instead of some of its methods."""
    found: dict[str, Any] = {
        "configure_optimizers": partial(_no_optimizers),
        "configure_callbacks": partial(_named, module.configure_callbacks, tuple(keep)),
    }
    if not is_overridden("training_step", module, in_package_of(trainer, LightningModule)):
        found["training_step"] = partial(_no_step)
    return found


def _no_optimizers() -> list[Any]:
    return []


def _named(configure_callbacks: Callable[[], Sequence[Callback] | Callback], names: Sequence[str]) -> list[Callback]:
    found = configure_callbacks() or ()
    return [one for one in (found if isinstance(found, Sequence) else [found]) if type(one).__name__ in names]


def _no_step(*_: Any) -> None:
    """Stand for a `training_step`, which a fit must have."""


def _with_own_source(loop: Any) -> Any:
    """Return a copy of an evaluation loop. Where its loaders come from can be changed in the copy alone."""
    twin = copy.copy(loop)
    twin._data_source = copy.copy(loop._data_source)
    return twin


@contextmanager
def _kept(owner: Any) -> Iterator[None]:
    """After the block, the object has the attributes that it has now."""
    before = dict(vars(owner))
    try:
        yield
    finally:
        vars(owner).clear()
        vars(owner).update(before)


@contextmanager
def _shadowed(module: LightningModule, name: str, shadow: Any) -> Iterator[None]:
    """Inside the block, an attribute of the module's instance stands before the method of its class."""
    own = {name: vars(module)[name]} if name in vars(module) else {}
    vars(module)[name] = shadow
    try:
        yield
    finally:
        vars(module).pop(name, None)
        vars(module).update(own)


def _restore_optimizers(trainer: Trainer, optimizers: list[Any], schedulers: list[Any]) -> None:
    trainer.strategy.optimizers, trainer.strategy.lr_scheduler_configs = optimizers, schedulers
