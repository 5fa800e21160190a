"""What an isolated validation replaces in a Trainer, and puts back.

The private attributes are those of lightning 2.6: `val_loop`, `_logger_connector`, `_loggers` and `_last_val_time` of
the Trainer, `_limits` of the loaders, and the module's `_current_fx_name`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.states import RunningStage, TrainerFn

from lightning_roulette.network.lending import surely
from lightning_roulette.trainer.lightning_names import in_package_of
from lightning_roulette.trainer.validation.logged import CallbackMetrics
from lightning_roulette.trainer.validation.loop import BorrowedLoop
from lightning_roulette.trainer.validation.muting import callbacks_of, muted_callbacks, muted_logger
from lightning_roulette.trainer.validation.writers import muted_writers

_ABSENT = object()


@contextmanager
def replaced(trainer: Trainer, module: LightningModule, loop: BorrowedLoop, keep: Collection[str]) -> Iterator[None]:
    """Inside the block, attributes of the Trainer and the module are replaced, so that a validation stays unnoticed.

    Args:
        trainer: A Trainer in `fit`.
        module: Its module.
        loop: The loop that validates.
        keep: Names of callback classes that stay active.
    """
    with ExitStack() as stack:
        for owner, name, replacement in _replacements(trainer, module, loop, keep):
            stack.enter_context(_swapped(owner, name, replacement))
        yield


@contextmanager
def buffers_not_sent(trainer: Trainer) -> Iterator[None]:
    """Inside the block, DDP does not send buffers before a step. Processes may then take different steps."""
    model = trainer.strategy.model
    held = hasattr(model, "require_forward_param_sync")
    with _swapped(model, "require_forward_param_sync", False) if held else nullcontext():
        yield


def connector_after(before: _LoggerConnector, trainer: Trainer) -> _LoggerConnector:
    """Return a logger connector without results, from which the module can read what was logged before.

    Args:
        before: The connector that collected it.
        trainer: Its Trainer.
    """
    fresh = in_package_of(trainer, _LoggerConnector)(trainer)
    fresh._callback_metrics = CallbackMetrics(before._callback_metrics)
    fresh._logged_metrics = dict(before._logged_metrics)
    fresh._progress_bar_metrics = dict(before._progress_bar_metrics)
    return fresh


def _replacements(
    trainer: Trainer, module: LightningModule, loop: BorrowedLoop, keep: Collection[str]
) -> list[tuple[Any, str, Any]]:
    """Return what is replaced: the owner, the name of its attribute, and the replacement."""
    limits = [] if loop.combined is None else [(loop.combined, "_limits", loop.combined.limits)]
    validating = in_package_of(trainer, RunningStage).VALIDATING  # otherwise results are added to those of training
    return [
        (trainer, "callbacks", muted_callbacks(callbacks_of(trainer), keep)),
        (trainer, "_loggers", [muted_logger(one) for one in trainer.loggers]),  # the public setter copies the list
        (trainer, "profiler", in_package_of(trainer, PassThroughProfiler)()),
        (trainer, "_logger_connector", in_package_of(trainer, _LoggerConnector)(trainer)),
        (trainer, "should_stop", trainer.should_stop),
        (trainer, "_last_val_time", getattr(trainer, "_last_val_time", _ABSENT)),  # for intervals in time
        (trainer.state, "fn", in_package_of(trainer, TrainerFn).FITTING),
        (trainer.state, "stage", validating),
        (trainer.state, "status", trainer.state.status),
        (trainer.fit_loop.epoch_loop, "val_loop", loop),
        (module, "_current_fx_name", module._current_fx_name),  # `self.log` files values under it
        *muted_writers(module, trainer.loggers),
        *limits,  # the public setter does not accept None
    ]


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
