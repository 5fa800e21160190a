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


@dataclass(frozen=True)
class Turns:
    """How the batches of a calibration run during a refit.

    Attributes:
        waiting: How many batches may wait at a layer. 0: every batch runs anew for each layer.
        note: One sentence if not all batches may wait; otherwise empty.
    """

    waiting: int
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
        return Turns(0)
    if memory < 1:
        return Turns(0, "the calibration batches run anew for each layer, because cache_bytes is too small.")
    threads = max(1, limits().waiting_threads // torch.get_num_threads())
    trial = _Trial(module, traversal, memory, min(traversal.batches, threads))
    try:
        trial.run()
    except Exception as error:
        why = str(error) if isinstance(error, _Differs) else f"{type(error).__name__}: {error}"
        return Turns(0, f"the calibration batches run anew for each layer, because they cannot run by turns ({why}).")
    return Turns(trial.waiting, trial.note)


class _Trial:
    """A pass by turns that solves nothing."""

    def __init__(self, module: nn.Module, traversal: Traversal, memory: int, waiting: int) -> None:
        seconds = _LEAST_SECONDS + _PATIENCE * traversal.longest
        self._traversal, self._memory = traversal, memory
        self._runs = Interleaved(module, traversal, waiting, watched=True, seconds=seconds)
        self._most = 0  # bytes of one run

    def run(self) -> None:
        self._runs.follow(self._compared())

    @property
    def waiting(self) -> int:
        return self._runs.waiting

    @property
    def note(self) -> str:
        batches = self._traversal.batches
        if self.waiting == batches:
            return ""
        said = (
            f"{self.waiting} of {batches} calibration batches wait while a layer is refitted. The others run anew for "
        )
        if (need := self._most * batches) <= self._memory:
            return f"{said}each layer, because so many threads are allowed."
        # outputs of the dense network take up to a quarter
        return (
            f"{said}each layer, because all would hold about {need:,} bytes, of {self._memory:,} that are left. "
            f"Pass cache_bytes={-(-need * 4 // 3)} to the refit to let all wait."
        )

    def _compared(self) -> CallLoop[None]:
        for step in self._traversal.order:
            for call in self._traversal.calls_of(step):
                given = yield call
                if given is None or digests_of(tensors_of(given)) != self._traversal.digests[call]:
                    raise _Differs(f"the inputs of {_name(step)} change then")
                self._fit_into_memory()
                if not self.waiting:
                    return

    def _fit_into_memory(self) -> None:
        """Let fewer batches wait if all together hold too much. Those ends are at the next call of another batch."""
        held = self._runs.live_bytes()
        self._most = max(self._most, *held.values())
        while sum(size for batch, size in held.items() if batch < self.waiting) > self._memory:
            self._runs.waiting -= 1


def _name(step: Step) -> str:
    return step.layers[0].names[0] if step.layers else f"{step.prefix}running_mean"
