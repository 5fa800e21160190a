"""Least squares by conjugate gradients: all outputs of a layer at once, each on the inputs that it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_roulette.large.limits import limits

_STEPS_BETWEEN_CHECKS = 8
# An output is solved if the steps to come would lower its error by less than this share. It is half of a thousandth,
# as the error to come is an estimate.
_SHARE_LEFT = 5e-4
_SMALLEST_ERROR = 1e-9  # share of an output's power below which its error need not be known
_LEAST_NEXT_FALL = 0.25  # share of the last fall of the error that is assumed to follow at least
_NUMBERS_PER_ENTRY = 8  # float64 numbers that the iteration holds for each output and input


@dataclass(frozen=True, eq=False)
class Equations:
    """The equations `w (G + ridge) = right` for each output `w` of a group, which is zero where not kept.

    Attributes:
        gram: The Gram matrix `G`, float64, shape `(inputs, inputs)`.
        ridge: The positive number `ridge` that is added to its diagonal.
        right: Right-hand sides, shape `(outputs, inputs)`.
        kept: Bool, shape `(outputs, inputs)`.
        error: Squared error of each output at `w = 0`, summed over the rows, shape `(outputs,)`.
        power: Sum of squares of each wanted output, shape `(outputs,)`.
    """

    gram: Tensor
    ridge: float
    right: Tensor
    kept: Tensor
    error: Tensor
    power: Tensor

    def blocks(self) -> Iterator[tuple[slice, Equations]]:
        """Yield blocks of outputs whose iteration needs at most `limits().system_bytes`."""
        outputs, inputs = self.kept.shape
        size = max(1, limits().system_bytes // (8 * _NUMBERS_PER_ENTRY * inputs))
        for begin in range(0, outputs, size):
            part = slice(begin, begin + size)
            yield part, Equations(
                self.gram, self.ridge, self.right[part], self.kept[part], self.error[part], self.power[part]
            )


def conjugate_gradient(equations: Equations, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Solve normal equations by conjugate gradients with a diagonal preconditioner (Hestenes and Stiefel, 1952).

    The iterates of all outputs are multiplied with the same Gram matrix and stay on the kept inputs. The same iteration
    ends ALPS (Meng et al., "ALPS: Improved optimization for highly sparse one-shot pruning for large language models",
    2024). An output is solved when its squared error is estimated to be within a thousandth of that of the exact
    solution. The estimate extrapolates how fast the error falls. Solved outputs leave the iteration.

    Args:
        equations: The equations.
        steps: Largest number of steps of each output, shape `(outputs,)`.

    Returns:
        - The solutions, shape `(outputs, inputs)`.
        - Which outputs are solved, shape `(outputs,)`. The others need another way.
    """
    found = torch.zeros_like(equations.right)
    solved = torch.zeros_like(equations.error, dtype=torch.bool)
    for part, block in equations.blocks():
        _solve(block, steps[part], found[part], solved[part])
    return found, solved


def _solve(equations: Equations, steps: Tensor, found: Tensor, solved: Tensor) -> None:
    """Write the solutions of some outputs, and which of them are solved."""
    iterates, taken = _Iterates(equations), 0
    while len(iterates.outputs):
        for _ in range(_STEPS_BETWEEN_CHECKS):
            iterates.move()
        taken += _STEPS_BETWEEN_CHECKS
        done = iterates.are_solved()
        ended = done | (steps[iterates.outputs] <= taken)
        found[iterates.outputs[ended]] = iterates.found[ended]
        solved[iterates.outputs[done]] = True
        if bool(ended.any()):
            iterates.drop(ended)


class _Iterates:
    """Outputs that are not solved yet.

    Attributes:
        outputs: Their numbers, shape `(active,)`.
        found: What is found so far, shape `(active, inputs)`.
    """

    def __init__(self, equations: Equations) -> None:
        self._gram, self._ridge = equations.gram, equations.ridge
        self._diagonal = equations.gram.diagonal() + equations.ridge
        self.outputs = torch.arange(len(equations.right), device=equations.right.device)
        self.found = torch.zeros_like(equations.right)
        self._kept, self._power = equations.kept, equations.power
        self._damped_error = self._error = equations.error
        self._fall = torch.zeros_like(equations.error)
        self._rest = torch.where(equations.kept, equations.right, 0.0)
        self._direction = self._rest / self._diagonal
        self._slope = _dot(self._rest, self._direction)

    def move(self) -> None:
        """Make one step."""
        moved = torch.addmm(self._direction, self._direction, self._gram, beta=self._ridge).mul_(self._kept)
        length = _ratio(self._slope, _dot(self._direction, moved))
        self.found.addcmul_(length.unsqueeze(1), self._direction)
        self._rest.addcmul_(length.unsqueeze(1), moved, value=-1)
        self._damped_error = self._damped_error - length * self._slope
        scaled = torch.div(self._rest, self._diagonal, out=moved)
        before, self._slope = self._slope, _dot(self._rest, scaled)
        self._direction.mul_(_ratio(self._slope, before).unsqueeze(1)).add_(scaled)

    def are_solved(self) -> Tensor:
        """Return which outputs are solved, or not finite, shape `(active,)`.

        The error of an output falls by about the same factor in equal numbers of steps, so that the next falls are the
        last fall times powers of this factor.
        """
        before, fall_before = self._error, self._fall
        self._error = self._damped_error - self._ridge * _dot(self.found, self.found)
        self._fall = (before - self._error).abs()
        factor = _ratio(self._fall, fall_before)
        still_to_fall = self._fall * (factor / (1 - factor)).clamp(min=_LEAST_NEXT_FALL)
        slows_down = (self._fall < fall_before) | (self._fall == 0)
        floor = self._error.clamp(min=_SMALLEST_ERROR * self._power)
        return slows_down & (still_to_fall <= _SHARE_LEFT * floor) | ~self._error.isfinite()

    def drop(self, ended: Tensor) -> None:
        """Forget some outputs."""
        left = ~ended
        self.outputs, self.found, self._kept = self.outputs[left], self.found[left], self._kept[left]
        self._power, self._slope, self._fall = self._power[left], self._slope[left], self._fall[left]
        self._damped_error, self._error = self._damped_error[left], self._error[left]
        self._rest, self._direction = self._rest[left], self._direction[left]


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the products of rows, shape `(rows,)`."""
    return torch.linalg.vecdot(one, other)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return quotients; zero where the denominator is zero, as for an output that is solved exactly."""
    return torch.where(below == 0, 0.0, above / below)
