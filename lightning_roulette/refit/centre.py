"""The centre of rows: constants that are subtracted before float32 products, so that a large mean costs no digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Centre:
    """Constants that are subtracted from rows, and what moves sums of the centred products back.

    Attributes:
        x: Constant of each input, shape `(groups, 1, inputs)`.
        y: Constant of each output, shape `(groups, 1, outputs)`.
        total_x: Sum of the inputs, float64, the shape of `x`. It is not summed from the centred inputs, because their
            rounding would be multiplied with the constants of other inputs.
        total_y: Sum of the outputs, float64, the shape of `y`.
        rows: Number of rows.
    """

    x: Tensor
    y: Tensor
    total_x: Tensor
    total_y: Tensor
    rows: int = 0

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Centre:
        """Return the means of some rows as constants."""
        means = [one.mean(1, keepdim=True, dtype=torch.float64).nan_to_num(0.0, 0.0, 0.0) for one in (x, y)]
        return cls(means[0].to(x.dtype), means[1].to(y.dtype), torch.zeros_like(means[0]), torch.zeros_like(means[1]))

    def subtracted(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return centred rows, and add them to the totals."""
        self.total_x += x.sum(1, keepdim=True, dtype=torch.float64)
        self.total_y += y.sum(1, keepdim=True, dtype=torch.float64)
        self.rows += x.shape[1]
        return x - self.x, y - self.y

    def move_to_zero(self, gram: Tensor, cross: Tensor) -> None:
        """Add to sums of centred products what they lack of sums of products."""
        x, y = self.x.to(torch.float64), self.y.to(torch.float64)
        left = torch.cat([x, self.total_x], 1).mT
        gram.baddbmm_(left, torch.cat([self.total_x - self.rows * x, x], 1))
        cross.baddbmm_(left, torch.cat([self.total_y - self.rows * y, y], 1))
