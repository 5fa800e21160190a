"""Brings the result of a callback from a worker process back to the process that started it, through a file.

With `strategy="ddp_spawn"` or in a notebook, `fit` runs in other processes, on copies of the Trainer and its callbacks.
Lightning brings back only weights and metrics, and calls no hook in the process that called `fit`. So the copy writes
its result into a file, and the original reads the file when the result is asked for.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher  # nothing public tells spawning apart

from lightning_roulette.trainer.lightning_names import in_both


class Handover:
    """Sends a result from a worker process to the process that started it.

    - A spawned process has a pickled copy. The copy writes the file that its original reads, and reads another file.
    - A forked process has no copy. It writes the file that its own object reads in the process that forked it.
    """

    def __init__(self) -> None:
        self._inbox = os.path.join(tempfile.gettempdir(), f"lightning_roulette-{uuid.uuid4().hex}.pt")
        self._outbox, self._process = self._inbox, os.getpid()
        weakref.finalize(self, _remove, self._inbox, self._process)

    def is_due(self, trainer: Trainer) -> bool:
        """Return whether this process was started for the fit of `trainer`, and is the first on its machine."""
        spawns = isinstance(trainer.strategy.launcher, in_both(_MultiProcessingLauncher))
        started = multiprocessing.parent_process() is not None
        original = self._outbox == self._inbox and os.getpid() == self._process
        return spawns and started and not original and trainer.local_rank == 0

    def send(self, found: Mapping[str, Any]) -> None:
        """Write a result: plain tensors and Python values."""
        path = self._outbox if os.getpid() == self._process else self._inbox
        torch.save(dict(found), f"{path}.part")
        os.replace(f"{path}.part", path)

    def received(self) -> dict[str, Any] | None:
        """Return what a worker process has written since the last call; None if nothing."""
        if os.getpid() != self._process or not os.path.exists(self._inbox):
            return None
        found: dict[str, Any] = torch.load(self._inbox, map_location="cpu", weights_only=True)
        os.remove(self._inbox)
        return found

    @contextmanager
    def if_it_fails(self, trainer: Trainer, result: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """Send the result if the block fails in a worker process, where Lightning calls no hook after an error."""
        try:
            yield
        except BaseException:
            self.send_if_due(trainer, result)
            raise

    def send_if_due(self, trainer: Trainer, result: Callable[[], Mapping[str, Any]]) -> None:
        """Send the result if this is a worker process."""
        if self.is_due(trainer):
            self.send(result())

    def __getstate__(self) -> dict[str, Any]:
        return {"outbox": self._inbox}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self._outbox = state["outbox"]


def _remove(path: str, process: int) -> None:
    if os.getpid() == process:
        with suppress(OSError):
            os.remove(path)
