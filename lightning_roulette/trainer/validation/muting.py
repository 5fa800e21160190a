"""Muted twins of callbacks and loggers: the same class and attributes, but nothing is called or written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger

_WRITING = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a Trainer. Lightning declares no type for them."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def muted_callbacks(callbacks: Sequence[Callback], keep: Collection[str] = ()) -> list[Callback]:
    """Return twins of callbacks whose hooks do nothing.

    `isinstance` and `trainer.progress_bar_callback` still work. Without its bar among the callbacks, the thread
    of RichProgressBar would end.

    Args:
        callbacks: The callbacks of a Trainer.
        keep: Names of classes whose callbacks are returned as they are.

    Returns:
        The twins in the same order. A callback is left out if no twin can be made.
    """
    twins = [one if type(one).__name__ in keep else _muted_callback(one) for one in callbacks]
    return [one for one in twins if one is not None]


def muted_logger(logger: Logger) -> Logger:
    """Return a twin of a logger that has the same directories and writes nothing."""
    silent = dict.fromkeys(_WRITING, _do_nothing) | {"experiment": property(lambda self: DummyLogger().experiment)}
    twin = twin_with(logger, silent)
    return DummyLogger() if twin is None else twin


def _muted_callback(callback: Callback) -> Callback | None:
    # a property takes precedence over a hook in the instance's own dict, where LambdaCallback keeps its hooks
    names = (name for name in dir(callback) if name.startswith("on_") or name in ("setup", "teardown"))
    hooks = dict.fromkeys(names, property(lambda self: _do_nothing))
    twin: Callback | None = twin_with(callback, {**hooks, "__reduce__": _reduced})
    return twin


def _reduced(twin: Callback) -> tuple[Any, ...]:
    """Return how a twin is pickled for a worker process. Its own class has no place there from which it is imported."""
    state = twin.__getstate__() if hasattr(twin, "__getstate__") else vars(twin)
    return _new_twin, (type(twin).__base__,), state


def _new_twin(kind: type[Callback]) -> Callback | None:
    """Return a muted callback of a class, without its attributes."""
    return _muted_callback(object.__new__(kind))


def twin_with(original: Any, overrides: Mapping[str, Any]) -> Any:
    """Return an instance of a subclass that shares the attributes of `original`; None if that is not possible."""
    kind = type(original)
    try:
        # a `__del__` of the class would act on what the twin shares with the original
        names = {**overrides, "__del__": _do_nothing, "__module__": kind.__module__}
        twin: Any = object.__new__(type(kind)(kind.__name__, (kind,), names))  # type: ignore[misc]
        twin.__dict__ = original.__dict__
    except Exception:  # for example a class with __slots__, or with an __init_subclass__ that raises
        return None
    return twin


def _do_nothing(*_: Any, **__: Any) -> None:
    pass
