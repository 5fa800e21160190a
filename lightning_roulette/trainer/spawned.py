"""What a callback found in a worker process, handed over by file to the one in the process that started it.

With `strategy="ddp_spawn"` or in a notebook, `fit` runs in other processes, on copies of the Trainer and its callbacks;
Lightning brings back weights and metrics alone, and calls no hook where it was called. So the copy writes what it
found, and the original reads that when it is asked.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import uuid
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar, overload

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher  # nothing public tells spawning apart

_Value = TypeVar("_Value")


class Handover:
    """One end of the way from a worker process to the process that started it.

    A pickled copy writes where its original reads, and reads elsewhere itself. A process that was forked has no copy,
    and writes where its own would read in the process that forked it.
    """

    def __init__(self) -> None:
        self._inbox = os.path.join(tempfile.gettempdir(), f"lightning_roulette-{uuid.uuid4().hex}.pt")
        self._outbox, self._process = self._inbox, os.getpid()
        weakref.finalize(self, _remove, self._inbox, self._process)

    def is_due(self, trainer: Trainer) -> bool:
        """Whether this process was started for the fit of `trainer`, as the first on its machine."""
        spawns = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
        started = multiprocessing.parent_process() is not None
        original = self._outbox == self._inbox and os.getpid() == self._process
        return spawns and started and not original and trainer.local_rank == 0

    def send(self, found: Mapping[str, Any]) -> None:
        """Write what was found: plain tensors and Python values."""
        path = self._outbox if os.getpid() == self._process else self._inbox
        torch.save(dict(found), f"{path}.part")
        os.replace(f"{path}.part", path)

    def received(self) -> dict[str, Any] | None:
        """What a worker process has written since this was asked last; None if nothing."""
        if os.getpid() != self._process or not os.path.exists(self._inbox):
            return None
        found: dict[str, Any] = torch.load(self._inbox, map_location="cpu", weights_only=True)
        os.remove(self._inbox)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"outbox": self._inbox}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self._outbox = state["outbox"]


def _remove(path: str, process: int) -> None:
    if os.getpid() == process:
        with suppress(OSError):
            os.remove(path)


class Receiver(Protocol):
    """What has attributes that come from a worker process."""

    def receive(self) -> None:
        """Take over what has come, if anything has."""
        ...


class FromWorker(Generic[_Value]):
    """An attribute that may have been found in a worker process; for the rest a plain one."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, one: None, owner: type) -> FromWorker[_Value]: ...

    @overload
    def __get__(self, one: Receiver, owner: type) -> _Value: ...

    def __get__(self, one: Receiver | None, owner: type) -> FromWorker[_Value] | _Value:
        if one is None:
            return self
        one.receive()
        value: _Value = vars(one)[self._name]
        return value

    def __set__(self, one: Receiver, value: _Value) -> None:
        vars(one)[self._name] = value
