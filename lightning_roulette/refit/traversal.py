"""The calls of a network's layers and batch normalisations while it runs on batches."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_roulette.large.processes import ONE_PROCESS, Processes
from lightning_roulette.network.hooks import Enough
from lightning_roulette.network.layers import Layer
from lightning_roulette.refit.runs import Runs
from lightning_roulette.wheel.chance import stream

_NEVER = 1 << 60


@dataclass(frozen=True, eq=False)
class Step:
    """A module whose input a refit looks at: one or more layers, or a batch normalisation.

    Several steps may belong to one module. They are solved in their order, each with the module's arguments.

    Attributes:
        module: The module that is called.
        layers: The layers whose weights it holds; empty for a batch normalisation.
        prefix: Prefix of the names of a batch normalisation's buffers.
        followed: Whether the next step solves the same layers once more, because their inputs depend on their own
            outputs. In this step, these inputs are computed with the dense weights of the layers.
    """

    module: nn.Module
    layers: tuple[Layer, ...] = ()
    prefix: str = ""
    followed: bool = False


@dataclass(frozen=True)
class Call:
    """One call of a step.

    Attributes:
        step: The step.
        batch: Number of the batch that the network runs on.
        number: Number of the step's call on that batch, from 0.
    """

    step: Step
    batch: int
    number: int


@dataclass(frozen=True)
class Seen:
    """This process needs no further call of a step. What follows may communicate with the other processes.

    Attributes:
        step: The step.
    """

    step: Step


# The arguments of a call: positional and keyword arguments of the module's forward.
Given = tuple[tuple[Any, ...], Mapping[str, Any]]

# Called with every call of a step, before the step's forward.
Meet = Callable[[Call, Given], None]

Result = TypeVar("Result")

# A loop over calls. It yields the call that it needs next and is sent the arguments of that call; None if the network
# does not make the call. After the last call of a step it yields `Seen`, also if there was no call.
CallLoop = Generator[Call | Seen, Given | None, Result]


class Traversal:
    """Runs a network on batches and hands out the calls of its steps.

    Args:
        steps: The steps.
        runs: Runs of the network.
        meet: Called with every call of the first run, in which the order of steps is found.
        fewer: Called after the first batch. If it returns other runs, the first run begins anew with them.
        processes: Those that share the batches. All of them have the same steps.

    Attributes:
        runs: See above.
        batches: Number of batches.
        steps: The steps of each module, in their order.
        order: The steps in the order of their first calls on the batches of all processes. Steps that are never called
            are left out.
        calls: For each step and batch, the number of calls.
        leading: The steps that are called first on some batch of any process.
        scattered: Modules that were called several times on a batch, partly in other threads than the rest. The numbers
            of these calls may differ between runs.
        longest: Seconds that the slowest batch took.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        runs: Runs,
        meet: Meet,
        fewer: Callable[[], Runs | None] = lambda: None,
        processes: Processes = ONE_PROCESS,
    ) -> None:
        self.steps: dict[nn.Module, list[Step]] = {}
        for step in steps:
            self.steps.setdefault(step.module, []).append(step)
        self.runs, self.batches = runs, runs.batches
        self.calls: Counter[tuple[Step, int]] = Counter()
        self.scattered: set[nn.Module] = set()
        self.longest = 0.0
        self.order, self.leading = _agreed(steps, self._first_run(meet, fewer), processes)

    def batches_of(self, step: Step) -> list[int]:
        """Numbers of the batches on which the network called a step in the first run."""
        return [batch for batch in range(self.batches) if self.calls[step, batch]]

    def calls_of(self, step: Step, batch: int) -> list[Call]:
        """Calls of a step on a batch in the first run."""
        return [Call(step, batch, number) for number in range(self.calls[step, batch])]

    def listen(self, batch: int, meet: Meet) -> None:
        """Run the network on a batch and pass each call of a step to `meet`, before the step's forward."""
        met: Counter[nn.Module] = Counter()

        def hook(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            met[module] += 1
            for step in self.steps[module]:
                meet(Call(step, batch, met[module] - 1), (arguments, named))

        self.runs.heard(batch, self.steps, hook)

    def follow(self, loop: CallLoop[None]) -> None:
        """Run the network as often as a loop over calls needs, and send the loop the arguments of its calls.

        The loop may change the weights of a step after it has seen the step's calls. A run goes on as long as it is
        valid: if a network calls each step once, a loop over its steps takes a single run on a single batch. On several
        batches it takes one for each step and batch.
        """
        reader = Reader(loop)
        while (wanted := reader.wanted) is not None:
            self.listen(wanted.batch, reader.meet)
            if reader.wanted is wanted:
                reader.send(None)

    def _first_run(self, meet: Meet, fewer: Callable[[], Runs | None]) -> _FirstCalls:
        found = self._seen(_FirstCalls(), meet, range(min(1, self.runs.rounds)))
        if (runs := fewer()) is not None:
            self.runs, self.batches = runs, runs.batches
            self.calls.clear()
            self.scattered.clear()
            found = self._seen(_FirstCalls(), meet, range(min(1, self.runs.rounds)))
        return self._seen(found, meet, range(1, self.runs.rounds))

    def _seen(self, found: _FirstCalls, meet: Meet, batches: Iterable[int]) -> _FirstCalls:
        """Run the network on batches, and note what it calls."""
        threads: dict[int, set[Step]] = {}

        def note(call: Call, given: Given) -> None:
            threads.setdefault(get_ident(), set()).add(call.step)
            found.batches.setdefault(call.step, call.batch)
            if not any(self.calls[step, call.batch] for step in found.batches):
                found.leading.add(call.step)
            self.calls[call.step, call.batch] += 1
            meet(call, given)

        def see(batch: int) -> None:
            began = time.monotonic()
            threads.clear()
            self.listen(batch, note)
            self._note_scattered(batch, threads)
            self.longest = max(self.longest, time.monotonic() - began)

        self.runs.each(batches if self.steps else (), see)
        return found

    def _note_scattered(self, batch: int, threads: Mapping[int, Set[Step]]) -> None:
        """Note the modules whose calls have no certain order, from the steps that each thread called on a batch."""
        elsewhere = [steps for ident, steps in threads.items() if len(threads) > 1 and ident != get_ident()]
        self.scattered |= {step.module for steps in elsewhere for step in steps if self.calls[step, batch] > 1}


@dataclass(frozen=True, eq=False)
class _FirstCalls:
    """What a process has seen in its first run.

    Attributes:
        batches: For each step that was called, in the order of first calls, the batch of that call.
        leading: The steps that are called first on some batch.
    """

    batches: dict[Step, int] = field(default_factory=dict)
    leading: set[Step] = field(default_factory=set)


def _agreed(steps: Sequence[Step], seen: _FirstCalls, processes: Processes) -> tuple[tuple[Step, ...], set[Step]]:
    """Return the order of steps and the leading ones that one process would see on the batches of all processes."""
    if processes.ranks == 1:
        return tuple(seen.batches), seen.leading
    _check_alike(steps, processes)
    own = torch.full((len(steps),), _NEVER)
    for place, (step, batch) in enumerate(seen.batches.items()):
        own[steps.index(step)] = processes.number(batch) * len(steps) + place
    first = processes.each(own).amin(0)
    order = [steps[number] for number in first.argsort().tolist() if first[number] < _NEVER]
    return tuple(order), processes.any_of(steps, seen.leading)


def _check_alike(steps: Sequence[Step], processes: Processes) -> None:
    """Raise a `ValueError` if processes have other steps."""
    names = [name for step in steps for name in (step.prefix, *(name for layer in step.layers for name in layer.names))]
    keys = processes.each(torch.tensor(stream(0, 0, 0, "\n".join(names))))
    if bool((keys != keys[0]).any()):
        raise ValueError(
            "the layers of the network differ between processes, but a refit sums over all of them. Build the same "
            "network in each process, and give the same include and exclude."
        )


class Reader:
    """A loop over calls and the call that it waits for.

    Args:
        loop: The loop.

    Attributes:
        wanted: That call; None if the loop is over.
    """

    def __init__(self, loop: CallLoop[None]) -> None:
        self._loop = loop
        self.wanted: Call | None = None
        self.send(None)

    def send(self, given: Given | None) -> None:
        """Send the loop the arguments of its call, and let it go on to the next call that it needs."""
        try:
            found = self._loop.send(given)
            while isinstance(found, Seen):
                found = self._loop.send(None)
            self.wanted = found
        except StopIteration:
            self.wanted = None

    def meet(self, call: Call, given: Given) -> None:
        """Serve the loop if it waits for this call; end the run if the next call needs another run."""
        if call != self.wanted:
            return
        self.send(given)
        if self.wanted is None or not _may_go_on(call, self.wanted):
            raise Enough


def _may_go_on(call: Call, wanted: Call) -> bool:
    """Whether the run that made a call can make the next wanted one.

    When the loop asks for another step, it may have changed the weights of this step. The run is then still valid if
    this was the step's first call, because the hook runs before the step's forward.
    """
    return wanted.batch == call.batch and (wanted.step is call.step or call.number == 0)
