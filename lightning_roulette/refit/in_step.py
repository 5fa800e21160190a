"""Runs of a network that FSDP2 shards: all processes make as many, at the same time, and none ends early.

In each run the network gathers its weights from all processes. A process that leaves a run, or makes one more than
the others, would let them wait for ever. So batches run anew for each layer, and nothing else communicates in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_roulette.large.processes import OutOfStep, Processes
from lightning_roulette.large.shards import reshard
from lightning_roulette.network.hooks import BeforeCall, run_with_hooks
from lightning_roulette.refit.runs import Runs
from lightning_roulette.refit.traversal import Call, CallLoop, Given, Seen, Traversal


@dataclass(frozen=True, kw_only=True)
class RunsInStep(Runs):
    """Runs that all processes make in step.

    A process that has no batch left runs the network on batch number `batches`, and nobody looks at that run.

    Attributes:
        module: The network.
        total: Number of batches of all processes.
        processes: All of them call the same methods.
    """

    module: nn.Module
    total: int
    processes: Processes

    @property
    def rounds(self) -> int:
        """See `Runs`."""
        return -(-self.total // self.processes.ranks)

    def fewer(self, batches: int, processes: Processes) -> RunsInStep:
        """See `Runs`."""
        own = super().fewer(batches, processes)
        return replace(self, batches=own.batches, total=batches)

    def alone(self, batch: int) -> None:
        """See `Runs`. The weights are sharded again afterwards.

        Raises:
            OutOfStep: If the network fails.
        """
        try:
            super().alone(batch)
        except Exception as error:
            raise OutOfStep(
                f"the network failed in a run that all processes make together ({type(error).__name__}: {error})."
            ) from error
        finally:
            reshard(self.module)

    def heard(self, batch: int, modules: Iterable[nn.Module], before: BeforeCall) -> None:
        """See `Runs`. The run goes on to its end if `before` fails, and its error is raised then."""
        errors: list[Exception] = []

        def careful(module: nn.Module, arguments: tuple[Any, ...], named: Any) -> None:
            try:
                if not errors:
                    before(module, arguments, named)
            except Exception as error:
                errors.append(error)

        super().heard(batch, modules, careful)
        if errors:
            raise errors[0]

    def each(self, rounds: Iterable[int], visit: Callable[[int], None]) -> None:
        """See `Runs`. If a visit fails, this process makes the other runs, too, and raises the error then.

        Raises:
            FailedElsewhere: If another process failed before.
        """
        self.processes.go_on()
        errors: list[Exception] = []
        for number in rounds:
            try:
                self.idle() if errors or number >= self.batches else visit(number)
            except OutOfStep:
                raise
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def idle(self) -> None:
        """Run the network for the sake of the other processes."""
        run_with_hooks(lambda: self.alone(self.batches), ())


def in_step(runs: Runs, module: nn.Module, total: int, processes: Processes) -> RunsInStep:
    """Return runs that all processes make in step.

    Args:
        runs: Runs on the batches of this process.
        module: The network.
        total: Number of batches of all processes.
        processes: Those that hold the shards of the network.

    Raises:
        FailedElsewhere: If another process failed.
    """
    return RunsInStep(runs.batches, runs.run, runs.around, module=module, total=total, processes=processes)


def follow_in_step(traversal: Traversal, runs: RunsInStep, loop: CallLoop[None]) -> None:
    """Send a loop over calls the arguments of its calls. For each step, all batches of all processes run once.

    The loop may change the weights of a step, and communicate with other processes, after it has yielded `Seen`.
    """
    reader = _Reader(loop)

    def visit(_: int) -> None:
        if not isinstance(wanted := reader.wanted, Call):
            runs.idle()
            return
        traversal.listen(wanted.batch, reader.meet)
        if reader.wanted is wanted:
            reader.send(None)

    while reader.wanted is not None:
        runs.each(range(runs.rounds), visit)
        reader.send(None)


class _Reader:
    """A loop over calls and what it waits for.

    Args:
        loop: The loop.

    Attributes:
        wanted: A call, or what it has seen of a step; None if the loop is over.
    """

    def __init__(self, loop: CallLoop[None]) -> None:
        self._loop = loop
        self.wanted: Call | Seen | None = None
        self.send(None)

    def send(self, given: Given | None) -> None:
        """Send the loop what it waits for."""
        self.wanted = None
        try:
            self.wanted = self._loop.send(given)
        except StopIteration:
            return

    def meet(self, call: Call, given: Given) -> None:
        """Serve the loop if it waits for this call."""
        if call == self.wanted:
            self.send(given)
