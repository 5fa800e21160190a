"""All calibration batches run at once, by turns: each waits at the step that is being solved.

A refit then needs one run of each batch, where runs one after the other need one for each step.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
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
        ends: Steps at which the run of a batch ends instead of waiting until it is asked for the next step. They may
            be added while the step's calls are looked at.
        watched: Whether to count the memory of runs that wait.
        seconds: The longest time between two calls. None: no limit.
    """

    def __init__(
        self,
        module: nn.Module,
        traversal: Traversal,
        ends: Container[tuple[Step, int]] = (),
        watched: bool = False,
        seconds: float | None = None,
    ) -> None:
        self._module, self._traversal = module, traversal
        self._ends, self._watched, self._seconds = ends, watched, seconds
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
                self._left(wanted, reader.wanted)

    @property
    def open(self) -> dict[int, LiveBytes | None]:
        """For each batch that runs, the memory that it holds."""
        return {run.batch: run.live for run in self._open}

    def _given(self, wanted: Call, modes: ThreadModes) -> Given | None:
        """Return the arguments of a call; None if a valid run of the batch does not make it."""
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

    def _left(self, call: Call, wanted: Call | None) -> None:
        """End the run of a batch that may not wait, and runs that have passed weights that may have changed."""
        if wanted is None or wanted.step is not call.step:
            self._close([run for run in self._open if call.step.module in run.passed])
            torch.clear_autocast_cache()
        elif wanted.batch == call.batch:
            return
        if (call.step, call.batch) in self._ends:
            self._close([run for run in self._open if run.batch == call.batch])

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
