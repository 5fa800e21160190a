"""Grids: the values to which the weights of a layer are rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_NEIGHBOURS = 2  # codes on each side of the nearest one that are compared with it


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that some inputs of a layer's matrices may have: `levels[code] * scale of the output`.

    Attributes:
        columns: The inputs.
        levels: Float64, in ascending order, none of them zero, shape `(codes,)`.
        scales: Positive, float64, shape `(groups, outputs)`.
        bits: What each code costs in a file, in bits, shape `(codes,)`.
        kind: The type of the weights.
        scaled: Whether the scales may change; otherwise they are one, and the levels may change.
        alike: Whether all outputs have the same scale.
        fixed: Whether neither may change.
    """

    columns: slice
    levels: Tensor
    scales: Tensor
    bits: Tensor
    kind: torch.dtype
    scaled: bool = False
    alike: bool = False
    fixed: bool = False

    def of_outputs(self, some: Tensor) -> Grid:
        """Return the grid of some outputs of each group."""
        return replace(self, scales=self.scales[:, some])

    def codes(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return the codes of the nearest values.

        Args:
            values: Float64, any shape.
            scales: The scales of their outputs, which broadcast to this shape.
        """
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        return torch.bucketize((values / scales).contiguous(), middles)

    def codes_in(self, matrix: Tensor) -> Tensor:
        """Return the codes of these inputs of a matrix of shape `(groups, outputs, inputs)`."""
        return self.codes(matrix[..., self.columns], self.scales.unsqueeze(2))

    def values(self, codes: Tensor) -> Tensor:
        """Return the values of codes of shape `(groups, outputs, inputs)`."""
        return self.levels[codes] * self.scales.unsqueeze(2)

    def chosen(self, values: Tensor, scales: Tensor, weights: Tensor, prices: Tensor) -> Tensor:
        """Return for each value one of the grid, with the least weighted squared distance and price of its bits.

        Args:
            values: Float64, any shape.
            scales: The scales of their outputs, which broadcast to this shape.
            weights: Weights of the squared distances, likewise.
            prices: Prices of one bit, likewise.
        """
        near = self.codes(values, scales).unsqueeze(-1)
        turn = torch.arange(-_NEIGHBOURS, _NEIGHBOURS + 1, device=near.device)
        codes = (near + turn).clamp(0, len(self.levels) - 1)
        found = self.levels[codes] * scales.unsqueeze(-1)
        cost = weights.unsqueeze(-1) * (values.unsqueeze(-1) - found).square() + prices.unsqueeze(-1) * self.bits[codes]
        return found.gather(-1, cost.argmin(-1, keepdim=True)).squeeze(-1)

    def in_order(self) -> Grid:
        """Return the grid with its levels in ascending order, each once, and without bits."""
        levels = self.levels.unique()
        return replace(self, levels=levels, bits=torch.zeros_like(levels))

    def counted(self, matrix: Tensor, rounded: Tensor) -> Grid:
        """Return the grid with the bits of an adaptive code for the codes of a matrix.

        Args:
            matrix: Shape `(groups, outputs, inputs)`.
            rounded: Which of its entries are on the grid, bool, the same shape.
        """
        counts = self._counts(matrix, rounded).to(self.levels) + 0.5
        return replace(self, bits=(counts.sum() / counts).log2())

    def _counts(self, matrix: Tensor, rounded: Tensor) -> Tensor:
        return self.codes_in(matrix)[rounded[..., self.columns]].bincount(minlength=len(self.levels))


def rounded_to(grids: Sequence[Grid], matrix: Tensor, rounded: Tensor) -> Tensor:
    """Return a matrix whose entries are rounded to the nearest values of their grids.

    Args:
        grids: Grids of different inputs.
        matrix: Shape `(groups, outputs, inputs)`.
        rounded: Which of its entries are rounded, bool, the same shape.
    """
    found = matrix.clone()
    for grid in grids:
        found[..., grid.columns] = grid.values(grid.codes_in(matrix))
    return torch.where(rounded, found, matrix)
