"""Exact least squares: one Cholesky factor for all outputs of a layer that keep the same inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_roulette.large.limits import limits
from lightning_roulette.refit.gram import GramSums
from lightning_roulette.refit.solvers.cost import worth_correcting
from lightning_roulette.refit.solvers.solver import Prepared, Solver
from lightning_roulette.refit.solvers.supports import supports_of

_SIMILAR_SIZE = 0.8  # systems with at least this share of the largest one's size are padded to it
_ZERO_INPUTS_RIDGE = 1e-12
_SAFE_DAMPING = 1e-6  # from this damping on, an inverse in float64 is exact enough to be corrected


@dataclass(frozen=True)
class Cholesky(Solver):
    """Exact solver.

    - Outputs that keep the same inputs share one Cholesky factor. Where the factorisation fails, the pseudo-inverse is
      used.
    - For outputs with few pruned inputs, the solution over all inputs is corrected (the Lagrange conditions of `w = 0`
      at these inputs). This is as exact, and the system is only as large as the number of pruned inputs.

    Weights that the rows do not determine (equal or zero inputs) stay as close to `start` as the rows allow.

    Attributes:
        damping: At least 0. The ridge is `damping` times the mean square of the group's inputs, summed over the rows.
    """

    damping: float

    def init(self, sums: GramSums) -> CholeskyPrepared:
        """See `Solver.init`."""
        return CholeskyPrepared(sums, DampedGram(sums.gram, self.damping))


def ridges_of(squares: Tensor, damping: float) -> Tensor:
    """Return what is added to the diagonal of each group, shape `(groups,)`. It is tiny where all inputs are zero.

    Args:
        squares: Sum of squares of each input, shape `(groups, inputs)`.
        damping: See `Cholesky`.
    """
    ridge = damping * squares.mean(1)
    return torch.where(ridge > 0, ridge, _ZERO_INPUTS_RIDGE if damping > 0 else 0.0)


@dataclass(frozen=True, eq=False)
class DampedGram:
    """Gram matrices with a ridge on their diagonals.

    Attributes:
        gram: Gram matrices, shape `(groups, inputs, inputs)`.
        damping: See `Cholesky`.
    """

    gram: Tensor
    damping: float

    @property
    def ridges(self) -> Tensor:
        """What is added to the diagonal of each group, shape `(groups,)`."""
        return ridges_of(self.gram.diagonal(dim1=1, dim2=2), self.damping)

    @cached_property
    def damped(self) -> Tensor:
        """The damped Gram matrices."""
        damped = self.gram.clone()
        damped.diagonal(dim1=1, dim2=2).add_(self.ridges.unsqueeze(1))
        return damped

    @cached_property
    def inverse(self) -> Tensor | None:
        """Their inverses; None if the damping is too small for them to be exact."""
        if self.damping < _SAFE_DAMPING:
            return None
        factor, info = torch.linalg.cholesky_ex(self.damped)
        return None if bool((info > 0).any()) else torch.cholesky_inverse(factor)

    def corrected(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return for which outputs the inverse is corrected, shape `(groups, outputs, 1)`, and the inverse if any is.

        The inverse is computed only if this saves work.
        """
        few = worth_correcting(kept).unsqueeze(2)
        if self.damping < _SAFE_DAMPING or not bool(few.any()) or self.inverse is None:
            return torch.zeros_like(few), None
        return few, self.inverse


@dataclass(frozen=True, eq=False)
class CholeskyPrepared(Prepared):
    """Gram sums with their damped Gram matrices.

    Attributes:
        sums: The Gram sums.
        matrix: Their damped Gram matrices.
    """

    sums: GramSums
    matrix: DampedGram

    def solve(self, kept: Tensor, start: Tensor) -> Tensor:
        """See `Prepared.solve`."""
        begin = torch.where(kept, start, 0.0)
        right = self.sums.cross.mT - begin @ self.sums.gram  # solve for the change, which the ridge draws to zero
        few, inverse = self.matrix.corrected(kept)
        change = _solved_on(self.matrix.damped, kept & ~few, right)
        if inverse is not None:
            free = right @ inverse
            multipliers = _solved_on(inverse, ~kept & few, free)
            change = torch.where(kept & few, free - multipliers @ inverse, change)
        return torch.where(kept, begin + change, 0.0)


def inverse_diagonals(gram: Tensor, kept: Tensor, damping: float) -> Tensor:
    """For each output, return the diagonal of the inverse of the damped Gram matrix of the inputs it keeps.

    Its reciprocal is the growth of the output's squared error if an input with a weight of 1 is removed and the other
    weights are solved again (Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon",
    1992).

    Args:
        gram: Float64, shape `(groups, inputs, inputs)`.
        kept: Bool, shape `(groups, outputs, inputs)`.
        damping: See `Cholesky`.

    Returns:
        Float64, the shape of `kept`; infinite where not kept.
    """
    matrix = DampedGram(gram, damping)
    few, inverse = matrix.corrected(kept)
    found = torch.full(kept.shape, math.inf, dtype=gram.dtype, device=gram.device).view(-1, gram.shape[-1])
    for block in blocks_of(matrix.damped, kept & ~few):
        eye = torch.eye(block.system.shape[-1]).to(block.system).expand_as(block.system)
        diagonals = _solved(block.system, eye).diagonal(dim1=1, dim2=2)
        block.write(found, diagonals.unsqueeze(2).expand(-1, -1, block.real.shape[2]))
    found = found.view(kept.shape)
    return found if inverse is None else torch.where(kept & few, _corrected_diagonals(inverse, ~kept & few), found)


def _corrected_diagonals(inverse: Tensor, pruned: Tensor) -> Tensor:
    """Return the diagonals of the inverse after some inputs were removed, shape of `pruned`."""
    whole = inverse.diagonal(dim1=1, dim2=2).unsqueeze(1).expand_as(pruned)
    removed = torch.zeros(pruned.shape, dtype=inverse.dtype, device=inverse.device).view(-1, inverse.shape[-1])
    for block in blocks_of(inverse, pruned):
        columns = inverse[block.group.unsqueeze(1), block.where.clamp(min=0)]  # (supports, most, inputs)
        columns = columns.masked_fill((block.where < 0).unsqueeze(2), 0.0)
        factor, _ = torch.linalg.cholesky_ex(block.system)
        taken = torch.linalg.solve_triangular(factor, columns, upper=False).square().sum(1)
        real = block.real[:, 0]
        removed[block.outs[:, 0][real]] = taken.unsqueeze(1).expand(-1, real.shape[1], -1)[real]
    return whole - removed.view(pruned.shape)


@dataclass(frozen=True, eq=False)
class Block:
    """Supports of similar size that are solved together. A support is the set of inputs of one or more outputs.

    Attributes:
        group: Group of each support, shape `(supports,)`.
        where: Indices of its inputs, padded with -1; shape `(supports, most)`.
        outs: Indices of the outputs that share it, counted over all groups; shape `(supports, 1, most sharing)`.
        real: Which pairs of an input and an output are not padding, shape `(supports, most, most sharing)`.
        system: The matrix of these inputs, shape `(supports, most, most)`; the padding has ones on its diagonal.
    """

    group: Tensor
    where: Tensor
    outs: Tensor
    real: Tensor
    system: Tensor

    def at(self) -> tuple[Tensor, Tensor]:
        """Return the output and the input of each pair."""
        return self.outs.expand_as(self.real), self.where.clamp(min=0).unsqueeze(2).expand_as(self.real)

    def write(self, found: Tensor, values: Tensor) -> None:
        """Write the value of each pair into `found`, shape `(outputs of all groups, inputs)`."""
        out, place = self.at()
        found[out[self.real], place[self.real]] = values[self.real]


def _solved_on(matrix: Tensor, members: Tensor, right: Tensor) -> Tensor:
    """For each output, return the solution of the system of its members; zero elsewhere.

    Args:
        matrix: Positive semidefinite, shape `(groups, inputs, inputs)`.
        members: Bool, shape `(groups, outputs, inputs)`.
        right: Right-hand sides, shape `(groups, outputs, inputs)`.
    """
    flat = right.reshape(-1, right.shape[-1])
    found = torch.zeros_like(flat)
    for block in blocks_of(matrix, members):
        block.write(found, _solved(block.system, torch.where(block.real, flat[block.at()], 0.0)))
    return found.view(right.shape)


def blocks_of(matrix: Tensor, members: Tensor) -> Iterator[Block]:
    """Yield the distinct supports that are not empty, each with the outputs that share it."""
    _, outputs, inputs = members.shape
    rows = members.reshape(-1, inputs)
    support_of, sharing = supports_of(members)
    by_support, first = support_of.argsort(), sharing.cumsum(0) - sharing
    one_of = by_support[first]  # an output of each support
    for some in _similar_sized(rows[one_of].sum(1), sharing):
        where = _places(rows[one_of[some]])
        turn = torch.arange(int(sharing[some].max()), device=members.device)
        outs = by_support[(first[some].unsqueeze(1) + turn).clamp(max=len(by_support) - 1)]
        real = (where >= 0).unsqueeze(2) & (turn < sharing[some].unsqueeze(1)).unsqueeze(1)
        group = one_of[some] // outputs
        yield Block(group, where, outs.unsqueeze(1), real, _systems(matrix, group, where))


def _places(kept: Tensor) -> Tensor:
    """For each row, return the indices of the entries that are not zero, padded with -1."""
    counts, order = kept.sum(1), kept.argsort(dim=1, descending=True, stable=True)
    most = max(1, int(counts.max()))
    turn = torch.arange(most, device=kept.device)
    return torch.where(turn < counts.unsqueeze(1), order[:, :most], -1)


def _similar_sized(sizes: Tensor, sharing: Tensor) -> Iterator[Tensor]:
    """Yield indices of supports of similar size that are not empty, at most `limits().system_bytes` at a time."""
    order = sizes.argsort(descending=True)
    order = order[sizes[order] > 0]
    known, shared = sizes[order].tolist(), sharing[order].tolist()
    begin = 0
    while begin < len(known):
        end, most = begin + 1, shared[begin]
        while end < len(known) and known[end] >= _SIMILAR_SIZE * known[begin]:
            most = max(most, shared[end])
            if (end + 1 - begin) * known[begin] * (known[begin] + most) * 8 > limits().system_bytes:
                break
            end += 1
        yield order[begin:end]
        begin = end


def _systems(matrix: Tensor, group: Tensor, where: Tensor) -> Tensor:
    """Return each support's part of its group's matrix; the padding has ones on its diagonal."""
    at, real = where.clamp(min=0), where >= 0
    system = matrix[group.view(-1, 1, 1), at.unsqueeze(2), at.unsqueeze(1)]
    system = system.masked_fill_(~(real.unsqueeze(2) & real.unsqueeze(1)), 0.0)
    system.diagonal(dim1=1, dim2=2).add_((~real).to(system))
    return system


def _solved(system: Tensor, right: Tensor) -> Tensor:
    """Solve positive semidefinite systems: least norm if a solution is not unique, NaN if a system is not finite."""
    factor, info = torch.linalg.cholesky_ex(system)
    solved = torch.cholesky_solve(right, factor)
    finite = system.isfinite().flatten(1).all(1) & right.isfinite().flatten(1).all(1)
    solved[~finite] = math.nan
    poor = (finite & ((info > 0) | ~solved.isfinite().flatten(1).all(1))).nonzero().flatten()
    if len(poor):
        solved[poor] = torch.linalg.pinv(system[poor], hermitian=True) @ right[poor]
    return solved
