"""Loggers and writers that a module keeps in its attributes, and what replaces them while nothing may be written."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from lightning_roulette.trainer.lightning_names import in_both
from lightning_roulette.trainer.validation.muting import muted_logger, twin_with

# A class is a writer of summaries if it has these methods: the SummaryWriter of torch and that of tensorboardX.
_OF_A_WRITER = ("add_scalar", "flush", "close")
_ENDINGS = ("flush", "close", "export_scalars_to_json")

# Packages of experiment trackers. An object of theirs is a run or a client, which may write at any call.
_TRACKERS = frozenset({"wandb", "mlflow", "neptune", "comet_ml", "clearml", "aim", "swanlab", "litlogger"})
_PLAIN = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    os.PathLike,
    dict,
    list,
    tuple,
    set,
    Namespace,
    Tensor,
    nn.Module,
)


def muted_writers(module: nn.Module, loggers: Iterable[Logger]) -> list[tuple[Any, str, Any]]:
    """Return what replaces the loggers and writers that a module keeps.

    These are found in the attributes of the module and of its submodules, alone or in a list, tuple or dict:

    - a logger of Lightning,
    - a SummaryWriter,
    - an object that one of `loggers` holds, such as its `experiment`,
    - an object of an experiment tracker.

    Args:
        module: The module.
        loggers: The loggers of its Trainer.

    Returns:
        The owner of each attribute, the name of the attribute, and its replacement. Containers are replaced by copies.
    """
    held = {id(one) for logger in loggers for one in vars(logger).values() if not isinstance(one, _PLAIN)}
    return list(_replacements(module, held))


def _replacements(module: nn.Module, held: set[int]) -> Iterator[tuple[Any, str, Any]]:
    for part in module.modules():
        for name, value in vars(part).items():
            if name not in _OF_MODULES and (muted := _muted(value, held)) is not value:
                yield part, name, muted


def _muted(value: Any, held: set[int]) -> Any:
    """Return a muted copy of a writer, or of a container with a writer in it; anything else as it is."""
    if isinstance(value, in_both(Logger)):  # type: ignore[type-abstract]
        return muted_logger(value)
    if isinstance(value, dict):
        return _container(value, {key: _muted(one, held) for key, one in value.items()})
    if type(value) in (list, tuple):
        return _container(value, type(value)(_muted(one, held) for one in value))
    if isinstance(value, _PLAIN):
        return value
    if all(callable(getattr(type(value), name, None)) for name in _OF_A_WRITER):
        return _muted_summary_writer(value)
    return DummyLogger().experiment if id(value) in held or _is_of_a_tracker(value) else value


def _container(value: Any, muted: Any) -> Any:
    """Return the copy with muted parts if a part was muted, else the container itself."""
    pairs = (
        zip(value.values(), muted.values(), strict=True) if isinstance(value, dict) else zip(value, muted, strict=True)
    )
    return muted if any(one is not other for one, other in pairs) else value


def _muted_summary_writer(writer: Any) -> Any:
    writing = [name for name in dir(type(writer)) if name.startswith("add_") or name in _ENDINGS]
    twin = twin_with(writer, dict.fromkeys(writing, _do_nothing))
    return DummyLogger().experiment if twin is None else twin


def _is_of_a_tracker(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in _TRACKERS and not isinstance(value, type)


def _do_nothing(*_: Any, **__: Any) -> None:
    pass


# what every module has, and never a writer
_OF_MODULES = frozenset(vars(nn.Module()))
