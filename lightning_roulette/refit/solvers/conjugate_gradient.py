"""Least squares by conjugate gradients: all outputs of a layer at once, each on the inputs that it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from lightning_roulette.large.limits import limits
from lightning_roulette.refit.solvers.accuracy import allowed_share

_PAUSE = 8  # steps between checks of the errors; after many steps a third of them
# How much further steps would lower an error is extrapolated, so only half of what is allowed may be left. The
# extrapolation fails if the error pauses, so there is a certain bound, too. It is far too large, so more is allowed:
# fifty times as much where a thousandth is allowed, and more where exactness matters less.
_EXPECTED, _CERTAIN = 0.5, 5e4  # in units of what is allowed; the latter for each unit of the allowed share
_LEAST_FALL = 0.25  # share of the last fall of an error that is expected to follow at least
_NUMBERS_PER_ENTRY = 8  # float64 numbers that the iteration holds for each output and input


@dataclass(frozen=True, eq=False)
class Equations:
    """The equations `(G + ridge) w = right` of the outputs of a group, each on the inputs that the output keeps.

    Attributes:
        gram: The Gram matrix `G`, float64, shape `(inputs, inputs)`.
        ridge: The positive number that is added to its diagonal.
        right: Right-hand sides, shape `(outputs, inputs)`.
        kept: Bool, shape `(outputs, inputs)`.
        error: Squared error of each output at `w = 0`, summed over rows, shape `(outputs,)`.
        power: Sum of squares of each wanted output, shape `(outputs,)`.
        rounding: Share of the power to which errors need not be known.
        rows: Number of rows of the Gram matrix.
    """

    gram: Tensor
    ridge: float
    right: Tensor
    kept: Tensor
    error: Tensor
    power: Tensor
    rounding: float
    rows: int

    def blocks(self) -> Iterator[tuple[slice, Equations]]:
        """Yield blocks of outputs. The iteration of a block takes at most `limits().system_bytes`."""
        outputs, inputs = self.kept.shape
        size = max(1, limits().system_bytes // max(1, 8 * _NUMBERS_PER_ENTRY * inputs))
        for begin in range(0, outputs, size):
            some = slice(begin, begin + size)
            right, kept, error, power = self.right[some], self.kept[some], self.error[some], self.power[some]
            yield some, replace(self, right=right, kept=kept, error=error, power=power)


def conjugate_gradient(equations: Equations, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Solve the equations by conjugate gradients with a diagonal preconditioner (Hestenes and Stiefel, 1952).

    Each step multiplies the directions of all outputs with the same Gram matrix, and sets them to zero where inputs are
    not kept. ALPS ends so, too (Meng et al., "ALPS: Improved optimization for highly sparse one-shot pruning for large
    language models", 2024). The iteration of an output ends when its squared error exceeds the exact solution's by less
    than `allowed_share`. It then leaves the product.

    Args:
        equations: The equations.
        steps: Number of steps after which an output that is not solved is given up, shape `(outputs,)`.

    Returns:
        - The solutions, shape `(outputs, inputs)`.
        - Which outputs are solved, shape `(outputs,)`. An output that is not finite counts as solved.
    """
    found = torch.zeros_like(equations.right)
    solved = torch.zeros_like(equations.error, dtype=torch.bool)
    if equations.gram.numel() == 0:  # no output keeps an input
        return found, ~solved
    for some, block in equations.blocks():
        found[some], solved[some] = _solution(block, steps[some])
    return found, solved


def _solution(equations: Equations, steps: Tensor) -> tuple[Tensor, Tensor]:
    matrix = _Matrix(equations.gram, equations.ridge, equations.gram.diagonal() + equations.ridge)
    iterates, errors = _Iterates.at_zero(equations, matrix), _Errors.at_zero(equations, matrix)
    found, solved, taken = torch.zeros_like(equations.right), torch.zeros_like(steps, dtype=torch.bool), 0
    while len(iterates.outputs):
        pause = max(_PAUSE, taken // 3)
        for _ in range(pause):
            errors.follow(*iterates.move(matrix))
        taken += pause
        done = errors.are_small(equations.ridge * _dot(iterates.found, iterates.found), iterates.slope)
        ended = done | (steps[iterates.outputs] <= taken)
        found[iterates.outputs[ended]] = iterates.found[ended]
        solved[iterates.outputs[done]] = True
        if bool(ended.any()):
            iterates, errors = _rows(iterates, ~ended), _rows(errors, ~ended)
    return found, solved


@dataclass(frozen=True, eq=False)
class _Matrix:
    gram: Tensor
    ridge: float
    diagonal: Tensor  # of the Gram matrix with its ridge


@dataclass(eq=False)
class _Iterates:
    """The iteration of outputs that are not solved.

    Attributes:
        outputs: Numbers of the outputs, shape `(active,)`.
        kept: Which inputs they keep, shape `(active, inputs)`.
        found: What is found so far, the same shape.
        rest: What the equations leave of the right-hand sides, the same shape.
        direction: Direction of the next step, the same shape.
        slope: Products of `rest` with `rest / diagonal`, shape `(active,)`.
    """

    outputs: Tensor
    kept: Tensor
    found: Tensor
    rest: Tensor
    direction: Tensor
    slope: Tensor

    @classmethod
    def at_zero(cls, equations: Equations, matrix: _Matrix) -> _Iterates:
        """Return the iterates before the first step."""
        outputs = torch.arange(len(equations.right), device=equations.right.device)
        rest = torch.where(equations.kept, equations.right, 0.0)
        scaled = rest / matrix.diagonal
        return cls(outputs, equations.kept, torch.zeros_like(rest), rest, scaled, _dot(rest, scaled))

    def move(self, matrix: _Matrix) -> tuple[Tensor, Tensor, Tensor]:
        """Make one step. Return its length, how much it lowered the damped error, and the ratio of slopes."""
        moved = torch.addmm(self.direction, self.direction, matrix.gram, beta=matrix.ridge).mul_(self.kept)
        length = quotient(self.slope, _dot(self.direction, moved))
        self.found.addcmul_(length.unsqueeze(1), self.direction)
        self.rest.addcmul_(length.unsqueeze(1), moved, value=-1)
        scaled = torch.div(self.rest, matrix.diagonal, out=moved)
        before, self.slope = self.slope, _dot(self.rest, scaled)
        ratio = quotient(self.slope, before)
        self.direction.mul_(ratio.unsqueeze(1)).add_(scaled)
        return length, length * before, ratio


@dataclass(eq=False)
class _Errors:
    """Squared errors of outputs that are not solved, each of shape `(active,)`.

    Attributes:
        unknown: Error that need not be known.
        allowed: See `allowed_share`.
        damped: The error with the ridge's part, which the iteration lowers.
        last: The error without it, at the last check.
        fall: How much it changed before that check.
        least: A number below all eigenvalues of the preconditioned matrix on the kept inputs.
        longest: The damped error exceeds the smallest one by at most `longest * slope` (Meurant and Tichý, "On
            computing quadrature-based bounds for the A-norm of the error in conjugate gradients", 2013).
    """

    unknown: Tensor
    allowed: Tensor
    damped: Tensor
    last: Tensor
    fall: Tensor
    least: Tensor
    longest: Tensor

    @classmethod
    def at_zero(cls, equations: Equations, matrix: _Matrix) -> _Errors:
        """Return the errors before the first step."""
        largest = torch.where(equations.kept, matrix.diagonal, matrix.ridge).amax(1)
        error, least = equations.error, matrix.ridge / largest
        unknown, allowed = equations.rounding * equations.power, allowed_share(equations.kept.sum(1), equations.rows)
        return cls(unknown, allowed, error, error, torch.zeros_like(error), least, 1 / least)

    def follow(self, length: Tensor, lowered: Tensor, ratio: Tensor) -> None:
        """Follow a step."""
        self.damped = self.damped - lowered
        longer = (self.longest - length).clamp(min=0)
        self.longest = quotient(longer, self.least * longer + ratio)

    def are_small(self, pull: Tensor, slope: Tensor) -> Tensor:
        """Return which errors are close to the smallest ones, or not finite.

        Args:
            pull: The part of the damped errors that is the ridge's.
            slope: See `_Iterates`.
        """
        last, fall_before = self.last, self.fall
        self.last = self.damped - pull
        self.fall = (last - self.last).abs()
        # an error falls by about the same factor in equal numbers of steps
        factor = quotient(self.fall, fall_before)
        expected = self.fall * (factor / (1 - factor)).clamp(min=_LEAST_FALL)
        falls_less = (self.fall < fall_before) | (self.fall == 0)
        gap = self.longest * slope
        certain = 2 * gap + 2 * (pull * gap).sqrt()
        allowed = self.allowed * torch.maximum(self.last, self.unknown)
        small = falls_less & (expected <= _EXPECTED * allowed) & (certain <= _CERTAIN * self.allowed * allowed)
        return small | ~self.last.isfinite()


_Active = TypeVar("_Active", _Iterates, _Errors)


def _rows(of: _Active, left: Tensor) -> _Active:
    """Return some outputs of iterates or errors."""
    return replace(of, **{one.name: getattr(of, one.name)[left] for one in fields(of)})


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the products of rows, shape `(rows,)`."""
    return (one.unsqueeze(1) @ other.unsqueeze(2)).flatten()


def quotient(above: Tensor, below: Tensor) -> Tensor:
    """Return quotients; zero where the denominator is zero, as for an output that is solved exactly."""
    return torch.where(below == 0, 0.0, above / below)
