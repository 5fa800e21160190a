"""Least squares by whichever way takes least work: factors, or conjugate gradients on the matrix or on its inverse."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_roulette.large.precision import full_precision
from lightning_roulette.large.products import products_with
from lightning_roulette.refit.gram import GramSums
from lightning_roulette.refit.solvers.accuracy import is_loose
from lightning_roulette.refit.solvers.cholesky import Cholesky, CholeskyPrepared, ridges_of
from lightning_roulette.refit.solvers.conjugate_gradient import Equations, conjugate_gradient
from lightning_roulette.refit.solvers.cost import most_steps, most_steps_on_inverse
from lightning_roulette.refit.solvers.multipliers import solved_by_multipliers
from lightning_roulette.refit.solvers.solver import Prepared, Solver

_LEAST_DAMPING = 1e-6  # from this damping on, conjugate gradients need few enough steps


@dataclass(frozen=True)
class Fastest(Solver):
    """Solver that takes, for each output, the way with least work.

    - A Cholesky factor is exact (see `Cholesky`). Its work grows with `kept ** 3` for each set of kept inputs.
    - Conjugate gradients take `inputs ** 2` for each step and output. They end when the squared error of an output
      exceeds the exact solution's by less than a thousandth, or by more if there are few rows (see `allowed_share`).
    - Conjugate gradients on the inverse (see `solved_by_multipliers`) take an inverse for all outputs, but few steps
      where most inputs are kept. They end in the same way, but with a certain bound.

    An output that is not solved when its steps took as much work as a factor is solved by a factor.

    If there are fewer rows than half of the inputs, steps multiply with the rows, and no matrix is summed for them.

    Attributes:
        damping: See `Cholesky`. Below 1e-6 all outputs are solved by factors.
    """

    damping: float

    def init(self, sums: GramSums) -> Prepared:
        """See `Solver.init`."""
        if self.damping < _LEAST_DAMPING:
            return Cholesky(self.damping).init(sums)
        return FastestPrepared(sums, self.damping)


@dataclass(frozen=True, eq=False)
class FastestPrepared(Prepared):
    """Gram sums that are prepared for all ways.

    Attributes:
        sums: The Gram sums.
        damping: See `Cholesky`.
    """

    sums: GramSums
    damping: float

    @cached_property
    def exact(self) -> CholeskyPrepared:
        """The sums, prepared for factors."""
        return Cholesky(self.damping).init(self.sums)

    def solve(self, kept: Tensor, start: Tensor) -> Tensor:
        """See `Prepared.solve`."""
        found, left = torch.zeros_like(start), torch.ones_like(kept[..., 0])
        on_inverse, on_matrix = most_steps_on_inverse(kept, self.sums.rows), most_steps(kept, self.sums.rows)
        ways = (self._by_multipliers, on_inverse), (self._by_steps, on_matrix * (on_inverse == 0))
        for way, steps in ways:
            for group in steps.any(1).nonzero().flatten().tolist():
                outputs = steps[group].nonzero().flatten()
                its, begin = kept[group, outputs], torch.where(kept[group, outputs], start[group, outputs], 0.0)
                change, done = way(group, outputs, its, begin, steps[group, outputs])
                found[group, outputs], left[group, outputs] = begin + change, ~done
        left = left.unsqueeze(2)
        return torch.where(left, self.exact.solve(kept & left, start), found) if bool(left.any()) else found

    def _by_multipliers(
        self, group: int, outputs: Tensor, kept: Tensor, begin: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the changes, and which outputs are solved: none if the inverse is not exact enough."""
        if self.exact.matrix.inverse is None:
            return torch.zeros_like(begin), torch.zeros_like(steps, dtype=torch.bool)
        equations = self._equations(group, outputs, kept, begin)
        return solved_by_multipliers(equations, self.exact.matrix.inverse[group], steps)

    def _by_steps(
        self, group: int, outputs: Tensor, kept: Tensor, begin: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the changes, and which outputs are solved. Inputs that no output keeps are left out."""
        few = self.sums.few if is_loose(kept.sum(1), self.sums.rows) else None
        if few is None:
            equations = self._equations(group, outputs, kept, begin)
        else:
            equations = self._equations_by_rows(few[0][group], few[1][group, :, outputs], kept, begin)
        used = kept.any(0).nonzero().flatten()
        found, solved = conjugate_gradient(equations.of_inputs(used), steps)
        change = torch.zeros_like(begin)
        change[:, used] = found
        return change, solved

    def _equations(self, group: int, outputs: Tensor, kept: Tensor, begin: Tensor) -> Equations:
        """Return the equations of the changes of some outputs of a group."""
        gram, cross = self.sums.gram[group], self.sums.cross[group, :, outputs].mT
        right = cross - begin @ gram  # solve for the change, which the ridge draws to zero
        power = self.sums.power[group, outputs]
        error = power - (begin * (cross + right)).sum(1)
        ridge = float(self.exact.matrix.ridges[group])
        return Equations(gram, ridge, right, kept, error, power, self.sums.rounding, self.sums.rows)

    def _equations_by_rows(self, x: Tensor, y: Tensor, kept: Tensor, begin: Tensor) -> Equations:
        """Return the same, if there are few rows `x` of inputs and `y` of wanted outputs."""
        with full_precision(x.device):
            rest = y - products_with(begin.to(x.dtype))(x)
            right = products_with(x.mT.contiguous())(rest.mT.contiguous()).to(begin.dtype)
        error, power = (rows.square().sum(0, dtype=begin.dtype) for rows in (rest, y))
        ridge = float(ridges_of(x.square().sum(0, keepdim=True, dtype=begin.dtype), self.damping)[0])
        return Equations(x, ridge, right, kept, error, power, self.sums.rounding, self.sums.rows, by_rows=True)
