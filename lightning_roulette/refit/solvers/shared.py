"""The outputs of a layer in shares: each process solves, or chooses, for some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_roulette.large.processes import Processes
from lightning_roulette.refit.gram import GramSums
from lightning_roulette.refit.solvers.cost import solve_cost, worth_sharing
from lightning_roulette.refit.solvers.solver import Prepared, Solver


def in_shares(processes: Processes, like: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what `part` gives for all outputs, of which each process computes its share.

    Args:
        processes: They all call this.
        like: A tensor of the shape and type of the result, shape `(groups, outputs, inputs)`.
        part: Takes indices of outputs. Returns the result for them.
    """
    found = torch.zeros_like(like, dtype=torch.uint8 if like.dtype == torch.bool else like.dtype)
    own = _own(processes, like.shape[1]).to(like.device)
    if len(own):
        found[:, own] = part(own).to(found.dtype)
    return processes.add(found)[0].to(like.dtype)


def _own(processes: Processes, outputs: int) -> Tensor:
    return torch.arange(processes.rank, outputs, processes.ranks)


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
        if not worth_sharing(solve_cost(kept, self.sums.rows), kept.numel(), self.how.processes.ranks):
            return self._all.solve(kept, start)
        return in_shares(self.how.processes, start, lambda own: self._part.solve(kept[:, own], start[:, own]))

    @cached_property
    def _all(self) -> Prepared:
        return self.how.solver.init(self.sums)

    @cached_property
    def _part(self) -> Prepared:
        own = _own(self.how.processes, self.sums.cross.shape[2]).to(self.sums.cross.device)
        return self.how.solver.init(self.sums.of_outputs(own))
