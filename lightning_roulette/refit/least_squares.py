"""Linear maps fitted to outputs, each on inputs of its own, from sums of products alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_roulette.large.limits import limits

_LIKE = 0.8  # in size, as a share of the largest: smaller systems are padded to it
_FEW = 0.7  # pruned inputs, as a share of those kept
_TRACE = 1e-12
_SAFE_DAMPING = 1e-6  # from which on an inverse in float64 is exact enough to be corrected


class Moments:
    """Sums of products over rows `x` of inputs and rows `y` of wanted outputs, in float64, for each of some groups.

    Memory does not grow with the rows: `inputs ** 2 + inputs * outputs` numbers a group.

    Attributes:
        gram: Sum of `x x^T`, shape `(groups, inputs, inputs)`.
        cross: Sum of `x y^T`, shape `(groups, inputs, outputs)`.
        power: Sum of `y ** 2`, shape `(groups, outputs)`.
        rows: How many there were.
    """

    def __init__(self) -> None:
        self.gram = self.cross = self.power = torch.zeros(())
        self.rows = 0

    @property
    def finite(self) -> bool:
        """Whether all sums are."""
        return all(bool(sums.isfinite().all()) for sums in (self.gram, self.cross, self.power))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count rows in.

        Args:
            x: Float64, shape `(groups, rows, inputs)`.
            y: Float64, shape `(groups, rows, outputs)`.
        """
        if self.rows == 0:
            groups, inputs, outputs = x.shape[0], x.shape[2], y.shape[2]
            self.gram, self.cross = x.new_zeros(groups, inputs, inputs), x.new_zeros(groups, inputs, outputs)
            self.power = x.new_zeros(groups, outputs)
        for xs, ys in zip(x.split(limits().gram_rows, 1), y.split(limits().gram_rows, 1), strict=True):
            self.gram.baddbmm_(xs.mT, xs)
            self.cross.baddbmm_(xs.mT, ys)
            self.power += ys.square().sum(1)
        self.rows += x.shape[1]

    def spread(self, centred: bool) -> Tensor:
        """The variance of the outputs, summed over them, of all groups; their mean square unless `centred`.

        Where it is centred, the last input is one in every row.
        """
        mean = self.cross[:, -1] / self.rows if centred else torch.zeros_like(self.power)
        return (self.power / self.rows - mean.square()).sum().clamp(min=torch.finfo(torch.float64).tiny)

    @property
    def size(self) -> float:
        """Mean over rows of the summed square of the wanted outputs."""
        return float(self.power.sum() / max(1, self.rows))

    def error(self, maps: Tensor) -> float:
        """Mean over rows of the summed squared error of `maps`, shape `(groups, outputs, inputs)`."""
        explained = (maps * (maps @ self.gram - 2 * self.cross.mT)).sum()
        return float((explained + self.power.sum()) / max(1, self.rows))


class Spread:
    """Mean and variance of some numbers each, from sums over rows."""

    def __init__(self) -> None:
        self._total = self._squares = torch.zeros(())
        self._rows = 0

    def add(self, x: Tensor) -> None:
        """Count rows in, float64, shape `(rows, numbers)`."""
        if self._rows == 0:
            self._shift = x.mean(0)  # without which the squares of far numbers would drown their differences
        x = x - self._shift
        self._total, self._squares = self._total + x.sum(0), self._squares + x.square().sum(0)
        self._rows += len(x)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of each number; NaN without rows, or with a single one."""
        if self._rows < 2:
            return (torch.full((), math.nan),) * 2
        mean = self._total / self._rows
        variance = (self._squares - self._rows * mean.square()).clamp(min=0) / (self._rows - 1)
        return mean + self._shift, variance


def fitted(moments: Moments, start: Tensor, kept: Tensor, damping: float) -> Tensor:
    """For each output the map `w` over the inputs it keeps that minimises a damped squared error.

    `w` minimises `sum((w . x - y) ** 2) + ridge * |w - start| ** 2` over the rows that were counted in, where `ridge`
    is `damping` times the mean square of the group's inputs, summed over the rows. Inputs that no row tells apart, or
    that are always zero, keep what `start` gives them as far as the rows allow.

    Outputs that keep the same inputs share one Cholesky factor; where that fails, the pseudo-inverse takes its place.
    Where few inputs are pruned, the solution over all inputs is corrected for these few instead (the Lagrange
    conditions of `w = 0` there), which is as exact and takes a system of their number.

    Args:
        moments: Of the rows.
        start: Float64, shape `(groups, outputs, inputs)`.
        kept: Bool, the same shape.
        damping: At least 0.

    Returns:
        Float64, the same shape; zero where not kept.
    """
    damped, inverse = _damped(moments.gram, damping)
    begin = torch.where(kept, start, 0.0)
    right = moments.cross.mT - begin @ moments.gram  # for the change, of which the ridge draws to nothing
    few = _few(kept, inverse)
    found = _solved_on(damped, kept & ~few, right)
    if inverse is not None and bool(few.any()):
        free = right @ inverse
        pulls = _solved_on(inverse, ~kept & few, free)
        found = torch.where(kept & few, free - pulls @ inverse, found)
    return torch.where(kept, begin + found, 0.0)


def inverse_diagonals(gram: Tensor, kept: Tensor, damping: float) -> Tensor:
    """For each output the diagonal of the inverse of the damped Gram matrix of the inputs it keeps.

    One over it is how much the squared error of the output grows, for a weight of 1, if an input is left out and the
    weights of the others are chosen anew (Hassibi and Stork, "Second order derivatives for network pruning: optimal
    brain surgeon", 1992).

    Args:
        gram: Float64, shape `(groups, inputs, inputs)`.
        kept: Bool, shape `(groups, outputs, inputs)`.
        damping: See `fitted`.

    Returns:
        Float64, shape of `kept`; infinite where not kept.
    """
    damped, inverse = _damped(gram, damping)
    few = _few(kept, inverse)
    found = torch.full(kept.shape, math.inf, dtype=gram.dtype, device=gram.device).view(-1, gram.shape[-1])
    for block in _blocks_of(damped, kept & ~few):
        values = _solved(block.system, torch.eye(block.system.shape[-1]).to(block.system).expand_as(block.system))
        block.write(found, values.diagonal(dim1=1, dim2=2).unsqueeze(2).expand(-1, -1, block.real.shape[2]))
    if inverse is None:
        return found.view(kept.shape)
    alone = inverse.diagonal(dim1=1, dim2=2).unsqueeze(1).expand_as(kept)
    gone = torch.zeros_like(found)
    for block in _blocks_of(inverse, ~kept & few):
        columns = inverse[block.group.unsqueeze(1), block.where.clamp(min=0)]  # (supports, most, inputs)
        columns = columns.masked_fill((block.where < 0).unsqueeze(2), 0.0)
        factor, _ = torch.linalg.cholesky_ex(block.system)
        taken = torch.linalg.solve_triangular(factor, columns, upper=False).square().sum(1)
        real = block.real[:, 0]
        gone[block.outs[:, 0][real]] = taken.unsqueeze(1).expand(-1, real.shape[1], -1)[real]
    return torch.where(kept & few, alone - gone.view(kept.shape), found.view(kept.shape))


def _ridge(gram: Tensor, damping: float) -> Tensor:
    """What is added to the diagonal of each group; a trace of it where all inputs are zero."""
    ridge = damping * gram.diagonal(dim1=1, dim2=2).mean(1)
    return torch.where(ridge > 0, ridge, _TRACE if damping > 0 else 0.0)


def _damped(gram: Tensor, damping: float) -> tuple[Tensor, Tensor | None]:
    """The damped Gram matrices, and their inverses if these can be trusted."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    damped = gram + _ridge(gram, damping).view(-1, 1, 1) * eye
    if damping < _SAFE_DAMPING:
        return damped, None
    factor, info = torch.linalg.cholesky_ex(damped)
    return damped, None if bool((info > 0).any()) else torch.cholesky_inverse(factor)


def _few(kept: Tensor, inverse: Tensor | None) -> Tensor:
    """Of which outputs so few inputs are pruned that it is quicker to look at those; shape `(groups, outputs, 1)`.

    Without an inverse to correct, of none.
    """
    if inverse is None:
        return torch.zeros_like(kept[..., :1])
    return (~kept).sum(-1, keepdim=True) < _FEW * kept.sum(-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class _Block:
    """Some supports, of like size, each a set of inputs that one or more outputs have to be solved on.

    Attributes:
        group: Of each support.
        where: Its inputs, then -1; shape `(supports, most)`.
        outs: The outputs that share it, counted over all groups, shape `(supports, 1, most sharing)`.
        real: Which pairs of an input and an output there are, shape `(supports, most, most sharing)`.
        system: The matrix on these inputs, shape `(supports, most, most)`; one on the diagonal where padded.
    """

    group: Tensor
    where: Tensor
    outs: Tensor
    real: Tensor
    system: Tensor

    def at(self) -> tuple[Tensor, Tensor]:
        """The output and the input of each pair."""
        return self.outs.expand_as(self.real), self.where.clamp(min=0).unsqueeze(2).expand_as(self.real)

    def write(self, found: Tensor, values: Tensor) -> None:
        """Write what was found for each pair, into shape `(outputs of all groups, inputs)`."""
        out, place = self.at()
        found[out[self.real], place[self.real]] = values[self.real]


def _solved_on(matrix: Tensor, members: Tensor, right: Tensor) -> Tensor:
    """For each output the solution of the system of its members alone; zero elsewhere.

    Args:
        matrix: Positive semidefinite, shape `(groups, inputs, inputs)`.
        members: Bool, shape `(groups, outputs, inputs)`.
        right: Shape `(groups, outputs, inputs)`.
    """
    flat = right.reshape(-1, right.shape[-1])
    found = torch.zeros_like(flat)
    for block in _blocks_of(matrix, members):
        block.write(found, _solved(block.system, torch.where(block.real, flat[block.at()], 0.0)))
    return found.view(right.shape)


def _blocks_of(matrix: Tensor, members: Tensor) -> Iterator[_Block]:
    """The distinct sets of members, empty ones left out, with as many outputs as share each."""
    groups, outputs, inputs = members.shape
    owner = torch.arange(groups, device=members.device).repeat_interleave(outputs)
    keyed = torch.cat([owner.unsqueeze(1), members.reshape(-1, inputs).long()], 1)
    supports, support_of, sharing = torch.unique(keyed, dim=0, return_inverse=True, return_counts=True)
    by_support, first = support_of.argsort(), sharing.cumsum(0) - sharing
    for some in _like_sized(supports[:, 1:].sum(1), sharing):
        where = _places(supports[some, 1:])
        turn = torch.arange(int(sharing[some].max()), device=members.device)
        outs = by_support[(first[some].unsqueeze(1) + turn).clamp(max=len(by_support) - 1)]
        real = (where >= 0).unsqueeze(2) & (turn < sharing[some].unsqueeze(1)).unsqueeze(1)
        group = supports[some, 0]
        yield _Block(group, where, outs.unsqueeze(1), real, _systems(matrix, group, where))


def _places(kept: Tensor) -> Tensor:
    """For each row the indices of what is not zero, then -1."""
    counts, order = kept.sum(1), kept.argsort(dim=1, descending=True, stable=True)
    most = max(1, int(counts.max()))
    turn = torch.arange(most, device=kept.device)
    return torch.where(turn < counts.unsqueeze(1), order[:, :most], -1)


def _like_sized(sizes: Tensor, sharing: Tensor) -> Iterator[Tensor]:
    """Supports of like size that are not empty, as many at a time as their systems fit into the memory of a block."""
    order = sizes.argsort(descending=True)
    order = order[sizes[order] > 0]
    known, shared = sizes[order].tolist(), sharing[order].tolist()
    begin = 0
    while begin < len(known):
        end, most = begin + 1, shared[begin]
        while end < len(known) and known[end] >= _LIKE * known[begin]:
            most = max(most, shared[end])
            if (end + 1 - begin) * known[begin] * (known[begin] + most) * 8 > limits().system_bytes:
                break
            end += 1
        yield order[begin:end]
        begin = end


def _systems(matrix: Tensor, group: Tensor, where: Tensor) -> Tensor:
    """The part of its group's matrix that each support sees; ones on the diagonal where padded."""
    at, real = where.clamp(min=0), where >= 0
    system = matrix[group.view(-1, 1, 1), at.unsqueeze(2), at.unsqueeze(1)]
    system = system.masked_fill_(~(real.unsqueeze(2) & real.unsqueeze(1)), 0.0)
    system.diagonal(dim1=1, dim2=2).add_((~real).to(system))
    return system


def _solved(system: Tensor, right: Tensor) -> Tensor:
    """The solution of positive semidefinite systems, that of least norm where there are many; NaN if not finite."""
    factor, info = torch.linalg.cholesky_ex(system)
    solved = torch.cholesky_solve(right, factor)
    fit = system.isfinite().flatten(1).all(1) & right.isfinite().flatten(1).all(1)
    solved[~fit] = math.nan
    poor = (fit & ((info > 0) | ~solved.isfinite().flatten(1).all(1))).nonzero().flatten()
    if len(poor):
        solved[poor] = torch.linalg.pinv(system[poor], hermitian=True) @ right[poor]
    return solved
