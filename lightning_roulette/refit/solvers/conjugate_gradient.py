"""Least squares by conjugate gradients: all outputs of a layer at once, each on the inputs that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_roulette.large.limits import limits
from lightning_roulette.large.precision import full_precision
from lightning_roulette.large.products import products_with
from lightning_roulette.refit.solvers.accuracy import allowed_share, is_loose
from lightning_roulette.refit.solvers.active import dot, rows_of

_PAUSE = 8  # steps between checks of the errors, half of them in float32; after many steps a third of them
# How much further steps would lower an error is extrapolated, so only half of what is allowed may be left. The
# extrapolation fails if the error pauses, so there is a certain bound, too. It is far too large, so more is allowed:
# fifty times as much where a thousandth is allowed, and more where exactness matters less.
_EXPECTED, _CERTAIN = 0.5, 5e4  # in units of what is allowed; the latter for each unit of the allowed share
_LEAST_FALL = 0.25  # share of the last fall of an error that is expected to follow at least
_SCALED_ROWS = 256  # rows of a matrix that are scaled together
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
        by_rows: Whether `gram` holds the rows instead, float32, shape `(rows, inputs)`. Their products are the matrix.
    """

    gram: Tensor
    ridge: float
    right: Tensor
    kept: Tensor
    error: Tensor
    power: Tensor
    rounding: float
    rows: int
    by_rows: bool = False

    def of_inputs(self, used: Tensor) -> Equations:
        """Return the equations without the inputs that no output keeps.

        Args:
            used: Indices of the others.
        """
        if len(used) == self.kept.shape[1]:
            return self
        gram = self.gram[:, used] if self.by_rows else self.gram[used.unsqueeze(1), used]
        return replace(self, gram=gram, right=self.right[:, used], kept=self.kept[:, used])

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
    matrix = _Matrix.of(equations)
    with full_precision(equations.gram.device):
        for some, block in equations.blocks():
            scaled, size = matrix.scaled(block)
            values, solved[some] = _solution(scaled, matrix, steps[some])
            found[some] = values * matrix.scale * size
    return found, solved


def _solution(equations: Equations, matrix: _Matrix, steps: Tensor) -> tuple[Tensor, Tensor]:
    iterates, errors = _Iterates.at_zero(equations, matrix), _Errors.at_zero(equations, matrix)
    found, solved, taken = torch.zeros_like(equations.right), torch.zeros_like(steps, dtype=torch.bool), 0
    while len(iterates.outputs):
        pause = max(matrix.pause, taken // 3)
        for _ in range(pause):
            errors.follow(*iterates.move(matrix))
        taken += pause
        weights = iterates.found * matrix.scale
        done = errors.are_small(equations.ridge * dot(weights, weights), iterates.slope.double())
        ended = done | (steps[iterates.outputs] <= taken)
        found[iterates.outputs[ended]] = iterates.found[ended]
        solved[iterates.outputs[done]] = True
        if bool(ended.any()):
            iterates, errors = rows_of(iterates, ~ended), rows_of(errors, ~ended)
    return found, solved


@dataclass(frozen=True, eq=False)
class _Matrix:
    """The Gram matrix with its ridge, scaled to ones on the diagonal: this is the preconditioner.

    Attributes:
        times: Returns the products of rows with the scaled matrix.
        scale: Reciprocal root of each entry of the diagonal, float64, shape `(inputs,)`.
        kind: Type in which the iteration is computed.
        pause: Least number of steps between checks of the errors.
    """

    times: Callable[[Tensor], Tensor]
    scale: Tensor
    kind: torch.dtype
    pause: int

    @classmethod
    def of(cls, equations: Equations) -> _Matrix:
        """Return the matrix of equations: float32 if their solutions may be far from exact."""
        if equations.by_rows:
            return cls._of_rows(equations)
        scale = (equations.gram.diagonal() + equations.ridge).rsqrt()
        loose = is_loose(equations.kept.sum(1), equations.rows)
        kind = torch.float32 if loose else torch.float64
        entries = torch.empty_like(equations.gram, dtype=kind)
        for begin in range(0, len(scale), _SCALED_ROWS):
            some = slice(begin, begin + _SCALED_ROWS)
            entries[some] = (equations.gram[some] * scale * scale[some].unsqueeze(1)).to(kind)
        entries.diagonal().fill_(1.0)
        return cls(products_with(entries), scale, kind, _PAUSE // 2 if loose else _PAUSE)

    @classmethod
    def _of_rows(cls, equations: Equations) -> _Matrix:
        """Return the matrix as two products with its rows."""
        scale = (equations.gram.square().sum(0, dtype=torch.float64) + equations.ridge).rsqrt()
        rows = equations.gram * scale.to(equations.gram.dtype)
        there, back = products_with(rows), products_with(rows.mT.contiguous())
        ridges = (equations.ridge * scale.square()).to(rows.dtype)
        return cls(lambda some: back(there(some)).addcmul_(some, ridges), scale, rows.dtype, _PAUSE // 2)

    def scaled(self, equations: Equations) -> tuple[Equations, Tensor]:
        """Return the equations for this matrix, with right-hand sides of length one, and the lengths that they had."""
        right = equations.right * self.scale
        size = right.masked_fill(~equations.kept, 0.0).norm(dim=1, keepdim=True)
        size = size.masked_fill(size == 0, 1.0)
        squares = size.flatten().square()
        error, power = equations.error / squares, equations.power / squares
        return replace(equations, right=(right / size).to(self.kind), error=error, power=power), size


@dataclass(eq=False)
class _Iterates:
    """The iteration of outputs that are not solved.

    Attributes:
        outputs: Numbers of the outputs, shape `(active,)`.
        kept: Which inputs they keep, shape `(active, inputs)`.
        found: What is found so far, the same shape.
        rest: What the equations leave of the right-hand sides, the same shape.
        direction: Direction of the next step, the same shape.
        slope: Sum of squares of `rest`, shape `(active,)`.
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
        return cls(outputs, equations.kept, torch.zeros_like(rest), rest, rest.clone(), dot(rest, rest))

    def move(self, matrix: _Matrix) -> tuple[Tensor, Tensor, Tensor]:
        """Make one step. Return its length, how much it lowered the damped error, and the ratio of slopes."""
        moved = matrix.times(self.direction).mul_(self.kept)
        length = quotient(self.slope, dot(self.direction, moved))
        self.found.addcmul_(length.unsqueeze(1), self.direction)
        self.rest.addcmul_(length.unsqueeze(1), moved, value=-1)
        before, self.slope = self.slope, dot(self.rest, self.rest)
        ratio = quotient(self.slope, before)
        self.direction.mul_(ratio.unsqueeze(1)).add_(self.rest)
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
        least = equations.ridge * torch.where(equations.kept, matrix.scale, equations.ridge**-0.5).square().amin(1)
        error = equations.error
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


def quotient(above: Tensor, below: Tensor) -> Tensor:
    """Return quotients; zero where the denominator is zero, as for an output that is solved exactly."""
    return torch.where(below == 0, 0.0, above / below)
