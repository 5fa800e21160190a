"""Which weights of a layer stay, for given numbers, by the squared error of its outputs on its Gram sums.

The number is that of an output. It can also be that of each few neighbouring inputs, or of blocks; see `pieces`.

The method is the alternating direction method of multipliers for a sparse least-squares problem, as in Meng et al.,
"ALPS: Improved optimization for highly sparse one-shot pruning for large language models" (NeurIPS 2024,
arXiv:2406.07831). It alternates between the matrix that fits best and stays close to a sparse one, and the sparse
matrix that is closest to it. A penalty on their distance grows in a few stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_roulette.refit.gram import GramSums
from lightning_roulette.refit.solvers.conjugate_gradient import quotient
from lightning_roulette.refit.solvers.cost import inverses_pay, step_cost
from lightning_roulette.refit.solvers.pieces import Pieces, Singly

# The penalties are in units of the diagonal of the scaled Gram matrix, which is one.
_PENALTIES = (0.1, 0.3, 1.0)
_ROUNDS = 10  # with each penalty
_HALVINGS = 16  # of the range in which a threshold is sought; a sort takes longer than all else
_STEPS = 8  # of conjugate gradients in a round, where no inverse is computed

# Takes right-hand sides, shape `(groups, outputs, inputs)`, and a matrix to start from. Returns solutions.
_Fit = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """The weights of a layer, of which a number is to be kept.

    Attributes:
        sums: Gram sums of the layer.
        ridges: What is added to the diagonal of each group's Gram matrix, shape `(groups,)`.
        dense: The matrix of the dense layer, float64, shape `(groups, outputs, inputs)`. The ridge pulls to it.
        free: Which entries are chosen among, bool, the same shape. The others stay as they are given.
        outputs: Number of outputs of each group of the layer, of which these may be some.
        pieces: What stays or leaves as a whole, and the sets that each keep their own number. Each free entry is in a
            piece.
    """

    sums: GramSums
    ridges: Tensor
    dense: Tensor
    free: Tensor
    outputs: int
    pieces: Pieces = field(default_factory=Singly)

    def of_outputs(self, some: Tensor) -> Problem:
        """Return the problem of some outputs. Its solution is that of the whole problem for these outputs.

        Args:
            some: Indices of outputs of each group. The pieces must be `by_output`.
        """
        return replace(self, sums=self.sums.of_outputs(some), dense=self.dense[:, some], free=self.free[:, some])

    def error(self, matrix: Tensor) -> float:
        """Squared error of a matrix with the part of the ridge, summed over the rows."""
        pull = (self.ridges.view(-1, 1, 1) * (matrix - self.dense).square()).sum()
        return self.sums.error(matrix) * max(1, self.sums.rows) + float(pull)


def chosen(problem: Problem, kept: Tensor) -> Tensor:
    """Return other kept entries that leave a small error after the kept weights are solved, as many of each set.

    Which outputs keep more is not chosen: the squared error of a layer does not tell which of its outputs matter. The
    choice is a heuristic, which may be worse than what is given. It works on float32 copies. Of the given entries it
    uses the numbers, and the entries themselves only as the start.

    Args:
        problem: The layer.
        kept: The entries that are given, bool, shape `(groups, outputs, inputs)`.

    Returns:
        Bool, the same shape. Outside of `problem.free` it is `kept`. Equal to `kept` if there is nothing to choose.
    """
    pieces, free = problem.pieces, problem.pieces.whole(problem.free)
    counts = pieces.whole(kept & problem.free).sum(-1, keepdim=True)
    if not bool(((counts > 0) & (counts < free.sum(-1, keepdim=True))).any()):
        return kept
    split = _Splitting.begun(problem, kept, counts)
    for penalty in _PENALTIES:
        fit = _fit_of(split.gram, penalty, problem.outputs)
        for _ in range(_ROUNDS):
            split.go(fit, penalty)
    found = largest(pieces.sizes(split.wanted.abs()), free, counts)
    return pieces.entries(found, kept) | (kept & ~problem.free)


def choice_cost(problem: Problem) -> float:
    """Return the work that the choice takes for its outputs, without that for the layer."""
    groups, outputs, inputs = problem.dense.shape
    return groups * outputs * len(_PENALTIES) * _ROUNDS * step_cost(inputs) / 2  # in float32


def largest(values: Tensor, among: Tensor, counts: Tensor) -> Tensor:
    """Return where the largest values of each row are. Of equal values the first ones are taken.

    Args:
        values: At least 0. A row is the last dimension.
        among: Bool, the same shape. Only these are compared.
        counts: How many of each row, of the same shape but for a last dimension of 1.
    """
    order = values.masked_fill(~among, -1.0).argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(values.shape[-1], device=values.device) < counts
    return torch.zeros_like(among).scatter_(-1, order, first)


@dataclass(eq=False)
class _Splitting:
    """The iteration, in scaled weights `w * sqrt(diagonal)`, with which the Gram matrix has a diagonal of ones.

    Attributes:
        gram: The scaled and damped Gram matrices, shape `(groups, inputs, inputs)`.
        right: Right-hand sides, shape `(groups, outputs, inputs)`.
        problem: The layer, whose free entries are chosen among.
        pruned: The entries that are zero in any case, the same shape.
        counts: Number of kept pieces of each set among the free ones. Its last dimension is 1.
        dense: The matrix that fits, the same shape.
        sparse: The sparse matrix, the same shape.
        dual: The multipliers, the same shape.
        wanted: What the sparse matrix is closest to, the same shape.
    """

    gram: Tensor
    right: Tensor
    problem: Problem
    pruned: Tensor
    counts: Tensor
    dense: Tensor
    sparse: Tensor
    dual: Tensor
    wanted: Tensor

    @classmethod
    def begun(cls, problem: Problem, kept: Tensor, counts: Tensor) -> _Splitting:
        """Return the iteration before its first round."""
        gram, ridges = problem.sums.gram, problem.ridges
        diagonal = gram.diagonal(dim1=1, dim2=2) + ridges.unsqueeze(1)
        root = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
        scaled = (gram / root.unsqueeze(1) / root.unsqueeze(2)).float()
        scaled.diagonal(dim1=1, dim2=2).fill_(1.0)
        right = (problem.sums.cross.mT + ridges.view(-1, 1, 1) * problem.dense) / root.unsqueeze(1)
        begin = torch.where(kept, problem.dense, 0.0) * root.unsqueeze(1)
        most = torch.maximum(right.abs().max(), begin.abs().max())  # float32 has a smaller range
        most = torch.where(most > 0, torch.frexp(most).exponent.double().exp2(), 1.0)  # other outputs change no digit
        right, begin = (right / most).float(), (begin / most).float()
        zeros = torch.zeros_like(begin)
        return cls(scaled, right, problem, ~problem.free & ~kept, counts, begin, begin, zeros, begin)

    def go(self, fit: _Fit, penalty: float) -> None:
        """Go on by one round."""
        self.dense = fit(self.right - self.dual + penalty * self.sparse, self.dense)
        self.wanted = self.dense + self.dual / penalty
        pieces, free = self.problem.pieces, self.problem.free
        size = pieces.sizes(self.wanted.abs()).masked_fill_(~pieces.whole(free), -1.0)
        few = (size < _threshold(size, self.counts)) | (self.counts == 0)
        small = pieces.entries(few, free) & free
        self.sparse = self.wanted.masked_fill(small | self.pruned, 0.0)
        self.dual = self.dual + penalty * (self.dense - self.sparse)


def _threshold(size: Tensor, counts: Tensor) -> Tensor:
    """Return for each row a number that about as many entries reach as given, and not fewer."""
    low, high = torch.zeros_like(size[..., :1]), size.amax(-1, keepdim=True)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        enough = (size >= middle).sum(-1, keepdim=True) >= counts
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


def _fit_of(gram: Tensor, penalty: float, outputs: int) -> _Fit:
    """Return what solves with Gram matrices to whose diagonals a penalty is added: exactly, or by a few steps."""
    penalised = gram.clone()
    penalised.diagonal(dim1=1, dim2=2).add_(penalty)
    if not inverses_pay(gram.shape[1], outputs, len(_PENALTIES), _ROUNDS * len(_PENALTIES) * _STEPS):
        return lambda right, begin: _closer(penalised, right, begin)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(penalised))
    return lambda right, begin: right @ inverse


def _closer(matrix: Tensor, right: Tensor, begin: Tensor) -> Tensor:
    """Return solutions that a few steps of conjugate gradients bring closer."""
    found = begin.clone()
    rest = right - begin @ matrix
    direction, square = rest.clone(), rest.square().sum(2, keepdim=True)
    for _ in range(_STEPS):
        moved = direction @ matrix
        length = quotient(square, (direction * moved).sum(2, keepdim=True))
        found += length * direction
        rest -= length * moved
        before, square = square, rest.square().sum(2, keepdim=True)
        direction = rest + quotient(square, before) * direction
    return found
