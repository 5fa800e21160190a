"""All calibration batches run at once, by turns: each waits at the step that is being solved.

A refit then needs one run of each batch, where runs one after the other need one for each step.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from lightning_roulette.large.live import LiveBytes
from lightning_roulette.network.hooks import hooked
from lightning_roulette.network.modes import ThreadModes, switches_put_back
from lightning_roulette.network.waiting import WaitingRun
from lightning_roulette.refit.traversal import Call, CallLoop, Given, Reader, Step, Traversal


class Interleaved:
    """Runs a network on batches by turns, and hands out the calls of its steps.

    A run waits before the forward of the step that it was asked for. It goes on with the weights that the network has
    then. A run is valid for a call if it has passed no step that was changed since. Otherwise the batch begins anew.

    Args:
        module: The network.
        traversal: Its first run.
        waiting: How many batches may wait, from the first one on. A run of another batch ends when the next batch is
            asked for.
        watched: Whether to count the memory of runs that wait.
        seconds: The longest time between two calls. None: no limit.

    Attributes:
        waiting: See above. It may be lowered between calls.
    """

    def __init__(
        self,
        module: nn.Module,
        traversal: Traversal,
        waiting: int,
        watched: bool = False,
        seconds: float | None = None,
    ) -> None:
        self._module, self._traversal = module, traversal
        self.waiting, self._watched, self._seconds = waiting, watched, seconds
        self._here = threading.local()
        self._open: list[_Run] = []  # in the order of their beginning

    def follow(self, loop: CallLoop[None]) -> None:
        """Send a loop over calls the arguments of its calls. All threads have ended when this returns or raises.

        The loop may change the weights of a step after it has seen the step's calls.
        """
        reader = Reader(loop)
        with self._listening(), self._all_closed() as modes:
            while (wanted := reader.wanted) is not None:
                reader.send(self._given(wanted, modes))
                if reader.wanted is None or reader.wanted.step is not wanted.step:
                    self._changed(wanted.step.module)

    def live_bytes(self) -> dict[int, int]:
        """Return the bytes of memory that the run of each batch holds, if they are counted."""
        return {run.batch: run.live.total() for run in self._open if run.live is not None}

    def _given(self, wanted: Call, modes: ThreadModes) -> Given | None:
        """Return the arguments of a call; None if a valid run of the batch does not make it."""
        self._close([run for run in self._open if run.batch >= self.waiting and run.batch != wanted.batch])
        run = next((one for one in self._open if one.batch == wanted.batch), None)
        if run is not None and (given := run.until(wanted, self._seconds)) is not None:
            return given
        self._close([] if run is None else [run])  # it had passed the call, or makes no such call
        return self._begun(wanted.batch, modes).until(wanted, self._seconds)

    def _begun(self, batch: int, modes: ThreadModes) -> _Run:
        torch.clear_autocast_cache()

        def work() -> None:
            self._here.run = run
            with nullcontext() if run.live is None else run.live:
                self._traversal.runs.run(batch)

        run = _Run(batch, WaitingRun(work, modes), LiveBytes() if self._watched else None)
        self._open.append(run)
        return run

    def _changed(self, module: nn.Module) -> None:
        """End the runs that have passed a module whose weights may have changed."""
        self._close([run for run in self._open if module in run.passed])
        torch.clear_autocast_cache()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        steps = self._traversal.steps

        def before(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            run: _Run | None = getattr(self._here, "run", None)  # None in threads that are not ours
            if run is not None:
                run.meet(module, steps[module], (arguments, named))

        with switches_put_back(self._module), self._traversal.runs.around(), hooked(steps, before=before):
            yield

    @contextmanager
    def _all_closed(self) -> Iterator[ThreadModes]:
        """Yield the modes of this thread, and end all runs after the block."""
        try:
            yield ThreadModes.current()
        except BaseException as error:
            # after a timeout, the run that does not wait may need a lock of one that waits
            waits_first = isinstance(error, TimeoutError)
            for other in self._ended(sorted(self._open, key=lambda run: run.thread.waits == waits_first)):
                if isinstance(other, KeyboardInterrupt):
                    raise other from error
            raise
        self._close(self._open)

    def _close(self, runs: Sequence[_Run]) -> None:
        """End runs, and raise what one of them raises."""
        for error in self._ended(runs):
            raise error

    def _ended(self, runs: Sequence[_Run]) -> list[BaseException]:
        """End runs one after the other, the last one first as for nested blocks, also if Ctrl-C is pressed.

        Returns:
            What was raised.
        """
        errors: list[BaseException] = []
        waiting = list(runs)
        while waiting:
            try:
                waiting[-1].thread.close()
            except KeyboardInterrupt as error:
                errors.insert(0, error)
                continue
            except BaseException as error:
                errors.append(error)
            self._open.remove(waiting.pop())
        return errors


class _Run:
    """A run of the network on one batch.

    Args:
        batch: Number of the batch.
        thread: Runs the network.
        live: Counts memory; None if it is not counted.

    Attributes:
        passed: Modules whose forward has begun.
    """

    def __init__(self, batch: int, thread: WaitingRun, live: LiveBytes | None) -> None:
        self.batch, self.thread, self.live = batch, thread, live
        self.passed: Counter[nn.Module] = Counter()
        self._wanted: Call | None = None
        self._given: Given | None = None

    def until(self, wanted: Call, seconds: float | None) -> Given | None:
        """Go on to a call and return its arguments; None if the run ends without it."""
        self._wanted = wanted
        if not self.thread.ended:
            self.thread.go_on(seconds)
        given, self._given = self._given, None
        return given

    def meet(self, module: nn.Module, steps: Sequence[Step], given: Given) -> None:
        """Wait before a module's forward while a call of one of its steps is wanted."""
        self.thread.check()
        for step in steps:
            if self._wanted == Call(step, self.batch, self.passed[module]):
                self._given = given
                self.thread.wait()
        self.passed[module] += 1
