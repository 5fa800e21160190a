"""Rounding of a layer's weights, by the error of the layer: one after another, and then again one at a time.

- One after another: when a weight is rounded, the rest of its output is solved again. This is optimal brain
  quantisation (Frantar and Alistarh, "Optimal brain compression", NeurIPS 2022, arXiv:2208.11580) in a fixed order
  (Frantar et al., "GPTQ", arXiv:2210.17323), with its own survivors for each output. It is computed from one Cholesky
  factor of each set of survivors, as the nearest plane algorithm of Babai (Chen et al., "The geometry of LLM
  quantization", arXiv:2507.18553).
- Again one at a time: each weight is rounded to the value that is best for the others as they are (Behdin et al.,
  "QuantEase", arXiv:2309.01885), in several sweeps over all weights.

The value of a weight is chosen by the error and by the bits that its code costs (Conzelmann and Bamler, "Reducing
storage of pretrained neural networks by rate-constrained quantization and entropy coding", arXiv:2505.18758).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_roulette.refit.solvers.cholesky import Block, blocks_of
from lightning_roulette.refit.solvers.conjugate_gradient import quotient
from lightning_roulette.refit.solvers.cost import worth_rounding_exactly
from lightning_roulette.refit.solvers.grid import Grid, rounded_to

_BLOCK = 64  # inputs after which the residual of all inputs is brought up to date


@dataclass(frozen=True, eq=False)
class Problem:
    """The matrix of a layer, of which some entries are to be rounded.

    The error of a matrix is `sum((matrix - target) @ gram * (matrix - target))`, in units of the squared error of the
    layer's outputs, summed over the rows.

    Attributes:
        gram: Damped Gram matrices of the inputs, shape `(groups, inputs, inputs)`.
        target: The matrix before it is rounded, zero where pruned, float64, shape `(groups, outputs, inputs)`.
        rounded: Entries that are rounded, bool, the same shape.
        free: Entries that may change, but are not rounded, bool, the same shape.
        prices: The error that one bit is worth, shape `(groups, outputs)`.
    """

    gram: Tensor
    target: Tensor
    rounded: Tensor
    free: Tensor
    prices: Tensor

    def of_outputs(self, some: Tensor) -> Problem:
        """Return the problem of some outputs of each group. Its solution is that of the whole problem for these."""
        target, rounded, free = self.target[:, some], self.rounded[:, some], self.free[:, some]
        return Problem(self.gram, target, rounded, free, self.prices[:, some])

    def residual(self, matrix: Tensor) -> Tensor:
        """Return half of the negative derivative of the error, shape `(groups, outputs, inputs)`."""
        return (self.target - matrix) @ self.gram

    def errors(self, matrix: Tensor) -> Tensor:
        """Return the error of each output, shape `(groups, outputs)`."""
        return (self.residual(matrix) * (self.target - matrix)).sum(2)


def one_after_another(problem: Problem, grids: Sequence[Grid]) -> Tensor:
    """Return the matrix after each output was rounded weight by weight, with the rest solved again each time.

    The inputs with the largest mean square are rounded first.

    Outputs for which this takes much work are rounded to the nearest values (see `worth_rounding_exactly`).

    Args:
        problem: The layer.
        grids: Grids of all inputs with entries that are rounded.
    """
    free = problem.free.any(1)
    # the last input of an order is rounded first, and the free ones never
    order = problem.gram.diagonal(dim1=1, dim2=2).masked_fill(free, -1.0).argsort(dim=1)
    group = torch.arange(len(order), device=order.device).view(-1, 1, 1)
    gram = problem.gram[group, order.unsqueeze(2), order.unsqueeze(1)]
    columns = order.unsqueeze(1).expand_as(problem.target)
    outputs, inputs = problem.target.shape[1:]
    nearest = rounded_to(grids, problem.target, problem.rounded)
    target, rounded, found = (one.gather(2, columns) for one in (problem.target, problem.rounded, nearest))
    target, found = target.view(-1, inputs), found.view(-1, inputs)
    kept = (problem.rounded | problem.free).gather(2, columns)
    for block in blocks_of(gram, kept & worth_rounding_exactly(kept).unsqueeze(2)):
        turn = _Turn(block, order[block.group], rounded.view(-1, inputs), problem.prices.flatten())
        block.write(found, turn.rounded(target, grids))
    return torch.empty_like(nearest).scatter_(2, columns, found.view(-1, outputs, inputs))


@dataclass(frozen=True, eq=False)
class _Turn:
    """Outputs of similar numbers of survivors that are rounded together.

    Attributes:
        block: The outputs.
        inputs: The inputs in their order, of each support, shape `(supports, inputs)`.
        entries: Entries that are rounded, in this order, shape `(outputs of all groups, inputs)`.
        prices: The error that one bit is worth, shape `(outputs of all groups,)`.
    """

    block: Block
    inputs: Tensor
    entries: Tensor
    prices: Tensor

    def rounded(self, target: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return the values of each pair of an input and an output, shape `(supports, most, most sharing)`.

        Args:
            target: The solutions, shape `(outputs of all groups, inputs)`.
            grids: The grids.
        """
        factor = _factors(self.block.system)
        weights = factor.diagonal(dim1=1, dim2=2).square().unsqueeze(2)
        upper = (factor / factor.diagonal(dim1=1, dim2=2).unsqueeze(1)).mT.contiguous()
        at = self.block.at()
        begin = torch.where(self.block.real, target[at], 0.0)
        found, moved = begin.clone(), torch.zeros_like(begin)
        entries, outs = self.entries[at] & self.block.real, self.block.outs[:, 0]
        for turn in reversed(range(begin.shape[1])):
            shift = upper[:, turn, None, turn + 1 :] @ moved[:, turn + 1 :]
            value = begin[:, turn] + shift[:, 0]
            on_grid = self._chosen(value, turn, outs, weights[:, turn].expand_as(value), grids)
            found[:, turn] = torch.where(entries[:, turn], on_grid, value)
            moved[:, turn] = torch.where(self.block.real[:, turn], begin[:, turn] - found[:, turn], 0.0)
        return found

    def _chosen(self, value: Tensor, turn: int, outs: Tensor, weights: Tensor, grids: Sequence[Grid]) -> Tensor:
        places = self.inputs.gather(1, self.block.where[:, turn : turn + 1].clamp(min=0))
        found = value
        for grid in grids:
            chosen = grid.chosen(value, grid.scales.flatten()[outs], weights, self.prices[outs])
            here = (places >= grid.columns.start) & (places < grid.columns.stop)
            found = torch.where(here, chosen, found)
        return found


def _factors(system: Tensor) -> Tensor:
    """Return Cholesky factors; of a system without one, that of its diagonal."""
    factor, info = torch.linalg.cholesky_ex(system)
    poor = (info > 0).view(-1, 1, 1)
    diagonal = system.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(system.dtype).tiny).sqrt().diag_embed()
    return torch.where(poor, diagonal, factor)


def swept(problem: Problem, grids: Sequence[Grid], matrix: Tensor) -> Tensor:
    """Return a matrix after each entry was chosen once more, the others as they are. The error with its price falls.

    Args:
        problem: The layer.
        grids: Grids of all inputs with entries that are rounded.
        matrix: The matrix, on these grids.
    """
    found, residual = matrix.clone(), problem.residual(matrix)
    inputs = torch.arange(matrix.shape[2], device=matrix.device)
    parts: list[tuple[Grid | None, Tensor]] = [(grid, inputs[grid.columns]) for grid in grids]
    for grid, columns in [*parts, (None, inputs[max(grid.columns.stop for grid in grids) :])]:
        entries = problem.free if grid is None else problem.rounded
        used = columns[entries[..., columns].flatten(0, 1).any(0)]
        for some in used.split(_BLOCK):
            before = found[..., some]
            found[..., some] = _block_swept(problem, grid, some, before, residual[..., some])
            residual -= (found[..., some] - before) @ problem.gram[:, some]
    return found


def _block_swept(problem: Problem, grid: Grid | None, some: Tensor, matrix: Tensor, residual: Tensor) -> Tensor:
    """Return some columns of the matrix after each entry was chosen once more.

    Args:
        problem: The layer.
        grid: Their grid. None: they are free.
        some: The inputs.
        matrix: Their columns, shape `(groups, outputs, some)`.
        residual: The residual of these inputs, the same shape.
    """
    gram, found = problem.gram[:, some.unsqueeze(1), some], matrix.clone()
    entries = (problem.free if grid is None else problem.rounded)[..., some]
    for turn in range(len(some)):
        now = found[..., turn].clone()
        weight = gram[:, turn, turn].unsqueeze(1).expand_as(now)
        best = now + quotient(residual[..., turn], weight)
        best = best if grid is None else grid.chosen(best, grid.scales, weight, problem.prices)
        found[..., turn] = torch.where(entries[..., turn], best, now)
        residual = residual - (found[..., turn] - now).unsqueeze(2) * gram[:, turn].unsqueeze(1)
    return found
