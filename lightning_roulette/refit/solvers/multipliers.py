"""Least squares by conjugate gradients on the inverse: the multipliers of the inputs that an output does not keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_roulette.refit.solvers.accuracy import allowed_share
from lightning_roulette.refit.solvers.active import dot, rows_of
from lightning_roulette.refit.solvers.conjugate_gradient import Equations, quotient

_LEAST_PAUSE = 2  # steps between checks of the errors; after many steps half of them


def solved_by_multipliers(equations: Equations, inverse: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Solve equations on all inputs, and correct the solutions so that pruned inputs have the weight zero.

    The solution of `A w = right` with `w = 0` at the pruned inputs is `inverse (right - m)`. The multipliers `m` are
    zero at kept inputs. At pruned inputs they solve a system of the inverse's entries there (the Lagrange conditions of
    optimal brain surgeon). Conjugate gradients solve it for all outputs together. The inverse of a damped matrix is
    close to a multiple of the identity in most directions, so they take few steps where they would take many on the
    matrix.

    A step leaves weights `v` at the pruned inputs, which are then set to zero. The damped squared error of the result
    exceeds the smallest one by at most `v A v`. So the iteration of an output ends with certainty: when its squared
    error exceeds the exact solution's by less than `allowed_share`.

    Args:
        equations: The equations `A w = right`.
        inverse: The inverse of `A`, float64, shape `(inputs, inputs)`.
        steps: Number of steps after which an output that is not solved is given up, shape `(outputs,)`.

    Returns:
        - The solutions, shape `(outputs, inputs)`.
        - Which outputs are solved, shape `(outputs,)`. An output that is not finite counts as solved.
    """
    found = torch.zeros_like(equations.right)
    solved = torch.zeros_like(equations.error, dtype=torch.bool)
    for some, block in equations.blocks():
        found[some], solved[some] = _solution(block, inverse, steps[some])
    return found, solved


def _solution(equations: Equations, inverse: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    iterates, diagonal = _Iterates.at_zero(equations, inverse), inverse.diagonal()
    found, solved, taken = torch.zeros_like(equations.right), torch.zeros_like(steps, dtype=torch.bool), 0
    while len(iterates.outputs):
        pause = max(_LEAST_PAUSE, taken // 2)
        for _ in range(pause):
            iterates.move(inverse, diagonal)
        taken += pause
        done = iterates.are_close(equations)
        ended = done | (steps[iterates.outputs] <= taken)
        found[iterates.outputs[ended]] = torch.where(iterates.kept[ended], iterates.found[ended], 0.0)
        solved[iterates.outputs[done]] = True
        if bool(ended.any()):
            iterates = rows_of(iterates, ~ended)
    return found, solved


@dataclass(eq=False)
class _Iterates:
    """The iteration of outputs that are not solved.

    Attributes:
        outputs: Numbers of the outputs, shape `(active,)`.
        kept: Which inputs they keep, shape `(active, inputs)`.
        found: The solution for the multipliers until now, the same shape. It should be zero where not kept.
        direction: Direction of the next step, the same shape.
        slope: Products of what `found` is where not kept with itself, each divided by the inverse's diagonal, shape
            `(active,)`.
    """

    outputs: Tensor
    kept: Tensor
    found: Tensor
    direction: Tensor
    slope: Tensor

    @classmethod
    def at_zero(cls, equations: Equations, inverse: Tensor) -> _Iterates:
        """Return the iterates before the first step."""
        outputs = torch.arange(len(equations.right), device=equations.right.device)
        found = equations.right @ inverse
        rest = found.masked_fill(equations.kept, 0.0)
        scaled = rest / inverse.diagonal()
        return cls(outputs, equations.kept, found, scaled, dot(rest, scaled))

    def move(self, inverse: Tensor, diagonal: Tensor) -> None:
        """Make one step."""
        moved = self.direction @ inverse
        length = quotient(self.slope, dot(self.direction, moved))
        self.found.addcmul_(length.unsqueeze(1), moved, value=-1)
        rest = self.found.masked_fill(self.kept, 0.0)
        scaled = torch.div(rest, diagonal, out=moved)
        before, self.slope = self.slope, dot(rest, scaled)
        self.direction.mul_(quotient(self.slope, before).unsqueeze(1)).add_(scaled)

    def are_close(self, equations: Equations) -> Tensor:
        """Return which errors are close to the smallest ones, or not finite, once pruned inputs are set to zero."""
        right, power = equations.right[self.outputs], equations.power[self.outputs]
        rest = self.found.masked_fill(self.kept, 0.0)
        lost = torch.addmm(rest, rest, equations.gram, beta=equations.ridge)
        weights = self.found - rest
        gap = dot(rest, lost).clamp(min=0)
        pull = equations.ridge * dot(weights, weights)
        error = equations.error[self.outputs] - dot(weights, right + lost) - pull
        share = allowed_share(self.kept.sum(1), equations.rows)
        allowed = share * torch.maximum(error, equations.rounding * power)
        return (2 * gap + 2 * (pull * gap).sqrt() <= allowed) | ~error.isfinite()
