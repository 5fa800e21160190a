"""Mean and variance of numbers over rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_roulette.large.processes import Processes


class MeanAndVariance:
    """Mean and variance of several numbers over rows, computed from sums."""

    def __init__(self) -> None:
        self._shift = self._total = self._squares = torch.zeros(())
        self._rows = 0

    def add(self, x: Tensor) -> None:
        """Add values of several numbers, float32 or float64, shape `(samples, numbers, positions)`.

        Float32 squares are summed over positions in float32, so their sum is exact up to some 1e-7 of itself.
        """
        if self._rows == 0:
            self._shift = x.mean((0, 2))  # without it, squares of numbers far from zero lose the digits of the variance
        x = x - self._shift.unsqueeze(1)
        self._total = self._total + x.sum(2).to(torch.float64).sum(0)
        self._squares = self._squares + x.square().sum(2).to(torch.float64).sum(0)
        self._rows += x.shape[0] * x.shape[2]

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of each number; NaN if there are fewer than two rows."""
        if self._rows < 2:
            return (torch.full((), math.nan),) * 2
        mean = self._total / self._rows
        variance = (self._squares - self._rows * mean.square()).clamp(min=0) / (self._rows - 1)
        return mean + self._shift, variance

    def over(self, processes: Processes, like: Tensor) -> MeanAndVariance:
        """Return the sums over the rows of all processes.

        Args:
            processes: They all call this.
            like: A tensor of as many numbers.
        """
        if processes.ranks == 1:
            return self
        found, empty = MeanAndVariance(), like.new_zeros(like.shape, dtype=torch.float64)
        rows = torch.tensor(self._rows)
        found._rows = int(processes.add(rows.clone())[0])
        total = self._total + rows * self._shift.to(torch.float64) if self._rows else empty
        (whole,) = processes.add(total.clone())
        found._shift, found._total = whole / max(1, found._rows), empty
        # squares of the distances to the common mean
        moved = self._shift - found._shift
        squares = self._squares + 2 * moved * self._total + rows * moved.square() if self._rows else empty
        (found._squares,) = processes.add(squares.clone())
        return found
