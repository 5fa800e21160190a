"""Least squares by whichever way takes less work: factors, or conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_roulette.refit.gram import GramSums
from lightning_roulette.refit.solvers.cholesky import Cholesky, CholeskyPrepared
from lightning_roulette.refit.solvers.conjugate_gradient import Equations, conjugate_gradient
from lightning_roulette.refit.solvers.cost import most_steps
from lightning_roulette.refit.solvers.solver import Prepared, Solver

_LEAST_DAMPING = 1e-6  # from this damping on, conjugate gradients need few enough steps


@dataclass(frozen=True)
class Fastest(Solver):
    """Solver that takes, for each output, the way with less work.

    - A Cholesky factor is exact (see `Cholesky`). Its work grows with `kept ** 3` for each set of kept inputs.
    - Conjugate gradients take `inputs ** 2` for each step and output. They end when the squared error of an output
      exceeds the exact solution's by less than a thousandth, or by more if there are few rows (see `allowed_share`).
      An output that is not solved when its steps took as much work as a factor is solved by a factor.

    Attributes:
        damping: See `Cholesky`. Below 1e-6 all outputs are solved by factors.
    """

    damping: float

    def init(self, sums: GramSums) -> Prepared:
        """See `Solver.init`."""
        exact = Cholesky(self.damping).init(sums)
        return exact if self.damping < _LEAST_DAMPING else FastestPrepared(sums, exact)


@dataclass(frozen=True, eq=False)
class FastestPrepared(Prepared):
    """Gram sums that are prepared for both ways.

    Attributes:
        sums: The Gram sums.
        exact: The sums, prepared for factors.
    """

    sums: GramSums
    exact: CholeskyPrepared

    def solve(self, kept: Tensor, start: Tensor) -> Tensor:
        """See `Prepared.solve`."""
        found, solved = torch.zeros_like(start), torch.zeros_like(kept[..., 0])
        steps = most_steps(kept, self.sums.rows)
        for group in steps.any(1).nonzero().flatten().tolist():
            outputs = steps[group].nonzero().flatten()
            begin = torch.where(kept[group, outputs], start[group, outputs], 0.0)
            change, done = self._changed(group, outputs, kept[group, outputs], begin, steps[group, outputs])
            found[group, outputs], solved[group, outputs] = begin + change, done
        left = ~solved.unsqueeze(2)
        return torch.where(left, self.exact.solve(kept & left, start), found) if bool(left.any()) else found

    def _changed(
        self, group: int, outputs: Tensor, kept: Tensor, begin: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the changes of some outputs of a group, and which of them are solved."""
        gram, cross = self.sums.gram[group], self.sums.cross[group, :, outputs].mT
        right = cross - begin @ gram  # solve for the change, which the ridge draws to zero
        power = self.sums.power[group, outputs]
        error = power - (begin * (cross + right)).sum(1)
        used = kept.any(0).nonzero().flatten()
        whole = len(used) == len(gram)
        equations = Equations(
            gram if whole else gram[used.unsqueeze(1), used],
            float(self.exact.matrix.ridges[group]),
            right[:, used],
            kept[:, used],
            error,
            power,
            self.sums.rounding,
            self.sums.rows,
        )
        found, solved = conjugate_gradient(equations, steps)
        change = torch.zeros_like(begin)
        change[:, used] = found
        return change, solved
