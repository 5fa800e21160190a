"""The calls of a network's layers and batch normalisations while it runs on batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from lightning_roulette.network.hooks import Enough, run_with_hooks
from lightning_roulette.network.layers import Layer


@dataclass(frozen=True, eq=False)
class Step:
    """A module whose input a refit looks at: one or more layers, or a batch normalisation.

    Attributes:
        module: The module that is called.
        layers: The layers whose weights it holds; empty for a batch normalisation.
        prefix: Prefix of the names of a batch normalisation's buffers.
    """

    module: nn.Module
    layers: tuple[Layer, ...] = ()
    prefix: str = ""


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


# The arguments of a call: positional and keyword arguments of the module's forward.
Given = tuple[tuple[Any, ...], Mapping[str, Any]]

# Called with every call of a step, before the step's forward.
Meet = Callable[[Call, Given], None]

Result = TypeVar("Result")

# A loop over calls. It yields the call that it needs next and is sent the arguments of that call; None if the network
# does not make the call. If it yields None, it continues when the network is not running.
CallLoop = Generator[Call | None, Given | None, Result]


class Traversal:
    """Runs a network on batches and hands out the calls of its steps.

    Args:
        steps: The steps.
        run: Runs the network on the batch of a given number.
        batches: Number of batches.
        meet: Called with every call of the first run, in which the order of steps is found.

    Attributes:
        batches: Number of batches.
        order: The steps in the order of their first calls. Steps that are never called are left out.
        calls: For each step and batch, the number of calls.
        leading: The steps that are called first on some batch.
    """

    def __init__(self, steps: Sequence[Step], run: Callable[[int], object], batches: int, meet: Meet) -> None:
        self._steps = {step.module: step for step in steps}
        self._run = run
        self.batches = batches
        self.calls: Counter[tuple[Step, int]] = Counter()
        self.leading: set[Step] = set()
        self.order = self._first_run(meet)

    def batches_of(self, step: Step) -> list[int]:
        """Numbers of the batches on which the network called a step in the first run."""
        return [batch for batch in range(self.batches) if self.calls[step, batch]]

    def listen(self, batch: int, meet: Meet) -> None:
        """Run the network on a batch and pass each call of a step to `meet`, before the step's forward."""
        met: Counter[Step] = Counter()

        def hook(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            step = self._steps[module]
            met[step] += 1
            meet(Call(step, batch, met[step] - 1), (arguments, named))

        run_with_hooks(lambda: self._run(batch), self._steps, before=hook)

    def calls_of(self, step: Step, batch: int, meet: Meet) -> None:
        """Run the network on a batch until the last call of a step, and pass the step's calls to `meet`."""

        def meet_step(call: Call, given: Given) -> None:
            if call.step is step:
                meet(call, given)
                if call.number + 1 == self.calls[step, batch]:
                    raise Enough

        self.listen(batch, meet_step)

    def follow(self, loop: CallLoop[None]) -> None:
        """Run the network as often as a loop over calls needs, and send the loop the arguments of its calls.

        The loop may change the weights of a step after it has seen the step's calls. A run goes on as long as it is
        valid: if a network calls each step once, a loop over its steps takes a single run on a single batch.
        """
        reader = _Reader(loop)
        while not reader.finished:
            wanted = reader.wanted
            if wanted is not None:
                self.listen(wanted.batch, reader.meet)
            if reader.wanted is wanted:
                reader.send(None)

    def _first_run(self, meet: Meet) -> tuple[Step, ...]:
        order: dict[Step, None] = {}

        def note(call: Call, given: Given) -> None:
            order.setdefault(call.step)
            if not any(self.calls[step, call.batch] for step in order):
                self.leading.add(call.step)
            self.calls[call.step, call.batch] += 1
            meet(call, given)

        for batch in range(self.batches):
            self.listen(batch, note)
        return tuple(order)


class _Reader:
    """A loop over calls and the call that it waits for.

    Attributes:
        wanted: That call; None if the loop waits for the end of the run.
        finished: Whether the loop is over.
    """

    def __init__(self, loop: CallLoop[None]) -> None:
        self._loop = loop
        self.wanted: Call | None = None
        self.finished = False
        self.send(None)

    def send(self, given: Given | None) -> None:
        """Send the loop the arguments of its call, and let it go on to the next call that it needs."""
        try:
            self.wanted = self._loop.send(given)
        except StopIteration:
            self.wanted, self.finished = None, True

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
