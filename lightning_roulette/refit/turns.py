"""Whether calibration batches may run by turns, and how many of them may wait."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lightning_roulette.large.digests import digests_of
from lightning_roulette.large.limits import limits
from lightning_roulette.network.containers import tensors_of
from lightning_roulette.refit.interleaved import Interleaved
from lightning_roulette.refit.traversal import CallLoop, Step, Traversal

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


def turns_of(module: nn.Module, traversal: Traversal, memory: int) -> Turns:
    """Let the batches run by turns, without a change of weights, and compare all calls bit by bit with the first run.

    A network that keeps something on its modules between two layers gives other inputs then. Its batches must run one
    after the other.

    Args:
        module: The network, as in the first run.
        traversal: Its first run.
        memory: Bytes that runs may hold together while they wait.
    """
    if traversal.batches < 2 or len(traversal.order) < 2:
        return Turns(False)
    if memory < 1:
        return Turns(False, note=f"{_ANEW}, because cache_bytes is too small.")
    trial = _Trial(module, traversal, memory)
    try:
        return trial.turns()
    except Exception as error:
        why = str(error) if isinstance(error, _Differs) else f"{type(error).__name__}: {error}"
        return Turns(False, note=f"{_ANEW}, because they cannot run by turns ({why}).")


class _Trial:
    """A pass by turns that solves nothing."""

    def __init__(self, module: nn.Module, traversal: Traversal, memory: int) -> None:
        self._order, self._traversal, self._memory = traversal.order, traversal, memory
        self._threads = max(1, limits().waiting_threads // torch.get_num_threads())
        # nothing comes after the last step
        self._ends = {(self._order[-1], batch) for batch in range(traversal.batches)}
        seconds = _LEAST_SECONDS + _PATIENCE * traversal.longest
        self._runs = Interleaved(module, traversal, self._ends, watched=True, seconds=seconds)
        self._held: dict[int, int] = {}  # bytes, by batch
        self._most = 0  # bytes of all batches

    def turns(self) -> Turns:
        """Make the pass, and return how batches run in the next one."""
        self._runs.follow(self._compared())
        all_calls = {(step, batch) for step in self._order for batch in self._traversal.batches_of(step)}
        # a run that ends at the last step does not begin anew
        anew = len(self._ends & all_calls) - len(self._traversal.batches_of(self._order[-1]))
        if self._ends >= all_calls:
            return Turns(False, note=f"{_ANEW}{self._why}")
        place = {step: number for number, step in enumerate(self._order)}
        note = f"a calibration batch runs anew {anew} times in a refit{self._why}" if anew else ""
        return Turns(True, frozenset((place[step], batch) for step, batch in self._ends), note)

    @property
    def _why(self) -> str:
        if self._most <= self._memory:
            return f", because at most {self._threads} batches may wait, each in a thread of its own."
        # outputs of the dense network take up to a quarter
        return (
            f", because all batches together would hold {self._most:,} bytes while they wait, of {self._memory:,} that "
            f"are left. Pass cache_bytes={-(-self._most * 4 // 3)} to the refit to let all wait."
        )

    def _compared(self) -> CallLoop[None]:
        for step in self._order:
            together = 0
            for batch in self._traversal.batches_of(step):
                for call in self._traversal.calls_of(step, batch):
                    given = yield call
                    if given is None or digests_of(tensors_of(given)) != self._traversal.digests[call]:
                        raise _Differs(f"the inputs of {_name(step)} change then")
                together += self._fit_into_memory(step, batch)
            self._most = max(self._most, together if step is not self._order[-1] else 0)

    def _fit_into_memory(self, step: Step, batch: int) -> int:
        """Let a batch end at a step if all that wait together hold too much. Return what it holds."""
        live = self._runs.open[batch]
        assert live is not None
        held = {one: size for one, size in self._held.items() if one in self._runs.open}
        held[batch] = live.total()
        if sum(held.values()) > self._memory or len(held) > self._threads:
            self._ends.add((step, batch))
        self._held = held
        return held[batch]


def _name(step: Step) -> str:
    return step.layers[0].names[0] if step.layers else f"{step.prefix}running_mean"
