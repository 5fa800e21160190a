"""Gram sums: sums of products of a layer's inputs and outputs, from which its weights are solved."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_roulette.large.limits import limits

_COLUMNS = 256  # of a block of the Gram matrix, of which the half below the diagonal is computed


class GramSums:
    """Sums of products over rows `x` of inputs and rows `y` of wanted outputs, in float64, for each group.

    Memory does not grow with the number of rows: it is `inputs ** 2 + inputs * outputs` numbers for each group.

    Attributes:
        cross: Sum of `x y^T`, shape `(groups, inputs, outputs)`.
        power: Sum of `y ** 2`, shape `(groups, outputs)`.
        rows: Number of rows.
    """

    def __init__(self) -> None:
        self._gram = self.cross = self.power = torch.zeros(())
        self._is_whole = True
        self.rows = 0

    @property
    def gram(self) -> Tensor:
        """Sum of `x x^T`, shape `(groups, inputs, inputs)`."""
        if not self._is_whole:
            _mirror(self._gram)
            self._is_whole = True
        return self._gram

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
        return all(bool(sums.isfinite().all()) for sums in (self.gram, self.cross, self.power))

    @property
    def mean_square(self) -> float:
        """Mean over rows of the summed square of the wanted outputs."""
        return float(self.power.sum() / max(1, self.rows))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows to the sums.

        Args:
            x: Inputs, float64, shape `(groups, rows, inputs)`.
            y: Wanted outputs, float64, shape `(groups, rows, outputs)`.
        """
        if self.rows == 0:
            groups, inputs, outputs = x.shape[0], x.shape[2], y.shape[2]
            self._gram, self.cross = x.new_zeros(groups, inputs, inputs), x.new_zeros(groups, inputs, outputs)
            self.power = x.new_zeros(groups, outputs)
        for xs, ys in zip(x.split(limits().gram_rows, 1), y.split(limits().gram_rows, 1), strict=True):
            _add_products(self._gram, xs)
            self.cross.baddbmm_(xs.mT, ys)
            self.power += ys.square().sum(1)
        self._is_whole = False
        self.rows += x.shape[1]

    def error(self, matrix: Tensor) -> float:
        """Mean over rows of the summed squared error of the outputs `matrix @ x`.

        Args:
            matrix: Float64, shape `(groups, outputs, inputs)`.
        """
        explained = (matrix * (matrix @ self.gram - 2 * self.cross.mT)).sum()
        return float((explained + self.power.sum()) / max(1, self.rows))

    def output_variance(self, centred: bool) -> Tensor:
        """Variance of the wanted outputs, summed over outputs and groups; at least the smallest positive number.

        Args:
            centred: Whether to subtract the mean. It is read from `cross`, where the last input must be one in every
                row. If False, the mean square is returned instead.
        """
        mean = self.cross[:, -1] / self.rows if centred else torch.zeros_like(self.power)
        return (self.power / self.rows - mean.square()).sum().clamp(min=torch.finfo(torch.float64).tiny)


def _add_products(gram: Tensor, x: Tensor) -> None:
    """Add `x^T x` to the blocks of a Gram matrix on and below its diagonal."""
    inputs = gram.shape[1]
    for begin in range(0, inputs, _COLUMNS):
        end = min(begin + _COLUMNS, inputs)
        gram[:, begin:end, :end].baddbmm_(x[..., begin:end].mT, x[..., :end])


def _mirror(gram: Tensor) -> None:
    """Copy the blocks below the diagonal of a matrix to those above it."""
    inputs = gram.shape[1]
    for begin in range(_COLUMNS, inputs, _COLUMNS):
        end = min(begin + _COLUMNS, inputs)
        gram[:, :begin, begin:end] = gram[:, begin:end, :begin].mT


@dataclass(frozen=True, eq=False)
class LayerSums:
    """Gram sums of one layer.

    Attributes:
        fit: Sums over the rows that the layer is fitted to.
        held_out: Sums over the rows that judge the fit.
    """

    fit: GramSums = field(default_factory=GramSums)
    held_out: GramSums = field(default_factory=GramSums)

    def add(self, x: Tensor, y: Tensor, held_out: int = 0) -> None:
        """Add rows to the sums. The last `held_out` rows judge the fit. For shapes see `GramSums.add`."""
        fitted = x.shape[1] - held_out
        self.fit.add(x[:, :fitted], y[:, :fitted])
        if held_out:
            self.held_out.add(x[:, fitted:], y[:, fitted:])

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
        return self.fit.finite and self.held_out.finite


class MeanAndVariance:
    """Mean and variance of several numbers over rows, computed from sums."""

    def __init__(self) -> None:
        self._shift = self._total = self._squares = torch.zeros(())
        self._rows = 0

    def add(self, x: Tensor) -> None:
        """Add rows, float64, shape `(rows, numbers)`."""
        if self._rows == 0:
            self._shift = x.mean(0)  # without it, squares of numbers far from zero lose the digits of the variance
        x = x - self._shift
        self._total, self._squares = self._total + x.sum(0), self._squares + x.square().sum(0)
        self._rows += len(x)

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of each number; NaN if there are fewer than two rows."""
        if self._rows < 2:
            return (torch.full((), math.nan),) * 2
        mean = self._total / self._rows
        variance = (self._squares - self._rows * mean.square()).clamp(min=0) / (self._rows - 1)
        return mean + self._shift, variance
