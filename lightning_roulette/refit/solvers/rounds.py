"""Rounding of a layer in rounds: its weights for given grids, and its grids for given weights, by turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_roulette.large.processes import ONE_PROCESS, Processes
from lightning_roulette.refit.solvers.cost import rounding_cost, worth_sharing
from lightning_roulette.refit.solvers.grid import Grid, rounded_to
from lightning_roulette.refit.solvers.grid_fit import fitted, resized
from lightning_roulette.refit.solvers.rounding import Problem, one_after_another, swept
from lightning_roulette.refit.solvers.shared import in_shares

_SWEEPS = 2


def rounded(problem: Problem, grids: Sequence[Grid], processes: Processes = ONE_PROCESS) -> Tensor:
    """Return the matrix of a layer with its entries rounded to grids, which are fitted to it.

    Args:
        problem: The layer.
        grids: The grids to begin with, of all inputs with entries that are rounded, in the order of their inputs.
        processes: Those that share the outputs. All must have the same layer.
    """
    rounds = _Rounds(problem, processes)
    found, grids = rounds.begun(grids)
    if any(grid.scaled for grid in grids):
        found, grids = rounds.begun([resized(problem, grid, found) for grid in grids])
    for _ in range(_SWEEPS):
        found, grids = rounds.again(found, grids)
    return found


@dataclass(frozen=True, eq=False)
class _Rounds:
    """Rounds on the outputs of a layer, of which each process takes a share where this is worth it."""

    problem: Problem
    processes: Processes

    def begun(self, grids: Sequence[Grid]) -> tuple[Tensor, Sequence[Grid]]:
        """Return the matrix rounded one weight after another, and its grids."""
        grids = self._counted(grids, rounded_to(grids, self.problem.target, self.problem.rounded))
        return self._shared(lambda some: one_after_another(*self._part(some, grids))), grids

    def again(self, matrix: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, Sequence[Grid]]:
        """Return the matrix after its grids were fitted to it, and each entry chosen once more; and the grids."""
        moved = matrix.clone()
        new = [fitted(self.problem, grid, matrix) for grid in grids]
        for grid, other in zip(grids, new, strict=True):
            moved[..., grid.columns] = other.values(grid.codes_in(matrix))
        moved = torch.where(self.problem.rounded, moved, matrix)
        known = self._counted([grid if grid.scaled else grid.in_order() for grid in new], moved)
        return self._shared(lambda some: swept(*self._part(some, known), moved[:, some])), known

    def _counted(self, grids: Sequence[Grid], matrix: Tensor) -> Sequence[Grid]:
        """Return grids with the bits of the codes of a matrix, the same in all processes."""
        return [self._of_first(grid.counted(matrix, self.problem.rounded)) for grid in grids]

    def _of_first(self, grid: Grid) -> Grid:
        levels, bits, scales = (self._numbers_of_first(one) for one in (grid.levels, grid.bits, grid.scales))
        return replace(grid, levels=levels, bits=bits, scales=scales.view(grid.scales.shape))

    def _numbers_of_first(self, numbers: Tensor) -> Tensor:
        if self.processes.ranks == 1:
            return numbers
        own = numbers.flatten() if self.processes.rank == 0 else numbers.new_zeros(0)
        (size,) = self.processes.add(torch.tensor(len(own)))
        return self.processes.add(own.clone() if len(own) else numbers.new_zeros(int(size)))[0]

    def _part(self, some: Tensor, grids: Sequence[Grid]) -> tuple[Problem, list[Grid]]:
        return self.problem.of_outputs(some), [grid.of_outputs(some) for grid in grids]

    def _shared(self, part: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what `part` gives for the indices of all outputs."""
        target = self.problem.target
        cost = rounding_cost(self.problem.rounded)
        if worth_sharing(cost, target.numel(), self.processes.ranks):
            return in_shares(self.processes, target, part)
        return part(torch.arange(target.shape[1], device=target.device))
