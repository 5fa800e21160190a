"""Whether calibration batches may run by turns, and how many of them may wait."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lightning_roulette.large.digests import digests_of
from lightning_roulette.large.limits import limits
from lightning_roulette.network.containers import tensors_of
from lightning_roulette.refit.compared import Compared
from lightning_roulette.refit.interleaved import Interleaved
from lightning_roulette.refit.traversal import Call, CallLoop, Given, Step, Traversal

_PATIENCE = 30  # longest forwards that a run may take between two calls before it counts as blocked
_LEAST_SECONDS = 60.0
_ANEW = "the calibration batches run anew for each layer"


@dataclass(frozen=True)
class Turns:
    """How the batches of a calibration run during a refit.

    Attributes:
        by_turns: Whether batches run by turns; otherwise every batch runs anew for each layer.
        ends: Steps, by their number in the order, at which the run of a batch, by its number, ends.
        note: One sentence if some batches run anew; otherwise empty.
    """

    by_turns: bool
    ends: frozenset[tuple[int, int]] = frozenset()
    note: str = ""


class _Differs(Exception):
    """The arguments of a call differ from those of the first run."""


def turns_of(module: nn.Module, traversal: Traversal, compared: Compared, memory: int) -> Turns:
    """Let a few batches run by turns without a change of weights, and compare their calls with those of the first run.

    A network that keeps something on its modules between two layers gives other inputs then, in at least one bit. Its
    batches must run one after the other. Two or three batches show it (see `Compared`), so not all of them run. What
    the others hold while they wait is estimated from the size of their inputs.

    Args:
        module: The network, as in the first run.
        traversal: Its first run.
        compared: The calls of this run that are compared.
        memory: Bytes that runs may hold together while they wait.
    """
    if traversal.batches < 2 or len(traversal.order) < 2:
        return Turns(False)
    if memory < 1:
        return Turns(False, note=f"{_ANEW}, because cache_bytes is too small.")
    trial = _Trial(module, traversal, compared, memory)
    try:
        return trial.turns()
    except Exception as error:
        why = str(error) if isinstance(error, _Differs) else f"{type(error).__name__}: {error}"
        return Turns(False, note=f"{_ANEW}, because they cannot run by turns ({why}).")


class _Room:
    """What the batches hold together while they wait. A batch that does not fit at a step ends there.

    Attributes:
        ends: The steps and batches where this is so. At the last step all end, as nothing comes after it.
        most: Bytes that all batches would hold at the step where they hold most.
        threads: How many batches may wait.
    """

    def __init__(self, traversal: Traversal, memory: int) -> None:
        self.ends = {(traversal.order[-1], batch) for batch in range(traversal.batches)}
        self.most = 0
        self.threads = max(1, limits().waiting_threads // torch.get_num_threads())
        self._traversal, self._memory = traversal, memory
        self._held: dict[int, int] = {}  # bytes, by batch

    def wait(self, step: Step, sizes: Iterable[tuple[int, int]]) -> None:
        """Let batches wait at a step, one after the other. Each is given with the bytes that it holds."""
        together = 0
        for batch, size in sizes:
            self._held[batch] = size
            together += size
            if sum(self._held.values()) > self._memory or len(self._held) > self.threads:
                self.ends.add((step, batch))
                del self._held[batch]
        self.most = max(self.most, together if step is not self._traversal.order[-1] else 0)
        for batch in self._traversal.batches_of(step):
            if self._traversal.calls[step, batch] > 1:  # the run has passed weights that change
                self._held.pop(batch, None)


class _Trial:
    """A pass of a few batches by turns that solves nothing."""

    def __init__(self, module: nn.Module, traversal: Traversal, compared: Compared, memory: int) -> None:
        self._traversal, self._compared, self._memory = traversal, compared, memory
        self._room = _Room(traversal, memory)
        seconds = _LEAST_SECONDS + _PATIENCE * traversal.longest
        self._runs = Interleaved(module, traversal, self._room.ends, watched=True, seconds=seconds)
        self._held: dict[tuple[Step, int], int] = {}  # bytes, by step and batch

    def turns(self) -> Turns:
        """Make the pass, and return how batches run in the next one."""
        self._runs.follow(self._followed())
        order, batches_of = self._traversal.order, self._traversal.batches_of
        room = _Room(self._traversal, self._memory)
        for step in order:
            room.wait(step, [(batch, self._size(step, batch)) for batch in batches_of(step)])
        # a run that ends at the last step does not begin anew
        anew = len(room.ends & self._calls(range(self._traversal.batches))) - len(batches_of(order[-1]))
        if self._room.ends >= self._calls(self._compared.batches):  # none has waited
            return Turns(False, note=f"{_ANEW}{self._why(room)}")
        place = {step: number for number, step in enumerate(order)}
        note = f"a calibration batch runs anew {anew} times in a refit{self._why(room)}" if anew else ""
        return Turns(True, frozenset((place[step], batch) for step, batch in room.ends), note)

    def _calls(self, batches: Iterable[int]) -> set[tuple[Step, int]]:
        calls = self._traversal.calls
        return {(step, batch) for step in self._traversal.order for batch in batches if calls[step, batch]}

    def _why(self, room: _Room) -> str:
        if room.most <= self._memory:
            return f", because at most {room.threads} batches may wait, each in a thread of its own."
        # outputs of the dense network take up to a quarter
        return (
            f", because all batches together would hold {room.most:,} bytes while they wait, of {self._memory:,} that "
            f"are left. Pass cache_bytes={-(-room.most * 4 // 3)} to the refit to let all wait."
        )

    def _followed(self) -> CallLoop[None]:
        for step in self._traversal.order:
            for batch in self._compared.batches:
                for call in self._traversal.calls_of(step, batch):
                    self._check(call, (yield call))
                if self._traversal.calls[step, batch]:
                    live = self._runs.open[batch]
                    assert live is not None
                    self._held[step, batch] = live.total()
                    self._room.wait(step, [(batch, self._held[step, batch])])

    def _check(self, call: Call, given: Given | None) -> None:
        expected = self._compared.digests.get(call)
        if given is None or (expected is not None and digests_of(tensors_of(given)) != expected):
            raise _Differs(f"the inputs of {_name(call.step)} change then")

    def _size(self, step: Step, batch: int) -> int:
        """Return the bytes that a batch holds at a step: as seen, or in proportion to the arguments of the step."""
        if (seen := self._held.get((step, batch))) is not None:
            return seen
        sizes = self._compared.sizes
        seen_there = [(held, sizes[at]) for at, held in self._held.items() if at[0] is step]
        return max(-(-held * sizes[step, batch] // max(1, size)) for held, size in seen_there)


def _name(step: Step) -> str:
    return step.layers[0].names[0] if step.layers else f"{step.prefix}running_mean"
