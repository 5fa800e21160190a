"""Runs of a network on batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from lightning_roulette.large.processes import Processes
from lightning_roulette.network.hooks import BeforeCall, run_with_hooks


@dataclass(frozen=True)
class Runs:
    """Runs of a network on batches.

    Attributes:
        batches: Number of batches.
        run: Runs the network on the batch of a given number, inside `around`.
        around: Sets up what runs need, and puts it back. It is entered around one run or around several.
    """

    batches: int
    run: Callable[[int], object]
    around: Callable[[], AbstractContextManager[object]] = nullcontext

    def alone(self, batch: int) -> None:
        """Run the network on one batch."""
        torch.clear_autocast_cache()  # it may hold casts of weights that have changed since
        with self.around():
            self.run(batch)

    @property
    def rounds(self) -> int:
        """Number of runs that let every batch of every process run once."""
        return self.batches

    def fewer(self, batches: int, processes: Processes) -> Runs:
        """Return runs on the first of the batches of all processes, of which each has its share.

        Args:
            batches: How many.
            processes: Those that share the batches.
        """
        return replace(self, batches=len(range(processes.rank, batches, processes.ranks)))

    def heard(self, batch: int, modules: Iterable[nn.Module], before: BeforeCall) -> None:
        """Run the network on one batch while `before` is called before each forward of some modules."""
        run_with_hooks(lambda: self.alone(batch), modules, before=before)

    def each(self, rounds: Iterable[int], visit: Callable[[int], None]) -> None:
        """Visit batches of these numbers, of which each lets the network run once."""
        for number in rounds:
            visit(number)
