"""The outputs of a layer solved in shares: each process solves some of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_roulette.large.processes import Processes
from lightning_roulette.refit.gram import GramSums
from lightning_roulette.refit.solvers.cost import worth_sharing
from lightning_roulette.refit.solvers.solver import Prepared, Solver


@dataclass(frozen=True)
class Shared(Solver):
    """Solver that lets each process solve a share of the outputs, where this takes less work than all of them.

    All processes must have the same sums, and ask for the same.

    Attributes:
        solver: Solves each share.
        processes: Those that share the outputs.
    """

    solver: Solver
    processes: Processes

    def init(self, sums: GramSums) -> Prepared:
        """See `Solver.init`."""
        return self.solver.init(sums) if self.processes.ranks == 1 else SharedPrepared(self, sums)


@dataclass(frozen=True, eq=False)
class SharedPrepared(Prepared):
    """Gram sums that are prepared when it is known whether the outputs are shared.

    Attributes:
        how: The solver.
        sums: The Gram sums.
    """

    how: Shared
    sums: GramSums

    def solve(self, kept: Tensor, start: Tensor) -> Tensor:
        """See `Prepared.solve`."""
        processes = self.how.processes
        if not worth_sharing(kept, processes.ranks):
            return self._all.solve(kept, start)
        found, own = torch.zeros_like(start), self._own
        if len(own):
            found[:, own] = self._part.solve(kept[:, own], start[:, own])
        return processes.add(found)[0]

    @property
    def _own(self) -> Tensor:
        processes = self.how.processes
        return torch.arange(processes.rank, self.sums.cross.shape[2], processes.ranks, device=self.sums.cross.device)

    @cached_property
    def _all(self) -> Prepared:
        return self.how.solver.init(self.sums)

    @cached_property
    def _part(self) -> Prepared:
        return self.how.solver.init(self.sums.of_outputs(self._own))
