"""Rows of a layer that judge a fit."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_roulette.large.precision import full_precision


@dataclass(eq=False)
class HeldOutRows:
    """Rows that judge a fit. All of them are kept.

    Attributes:
        rows: Number of rows.
    """

    rows: int = 0
    _parts: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    @property
    def finite(self) -> bool:
        """Whether all rows are finite."""
        return all(bool(one.isfinite().all()) for part in self._parts for one in part)

    @property
    def mean_square(self) -> float:
        """Mean over rows of the summed square of the wanted outputs."""
        return sum(_squares(y) for _, y in self._parts) / max(1, self.rows)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Keep rows, which must not change. For shapes see `GramSums.add`."""
        self._parts.append((x, y))
        self.rows += x.shape[1]

    def error(self, matrix: Tensor) -> float:
        """Mean over rows of the summed squared error of the outputs `matrix @ x`.

        It is exact up to about 1e-7 of the root of the product of itself and `mean_square`; for float64 rows 1e-16.

        Args:
            matrix: Float64, shape `(groups, outputs, inputs)`.
        """
        with full_precision(matrix.device):
            return sum(_squares(x @ matrix.to(x.dtype).mT - y) for x, y in self._parts) / max(1, self.rows)


def _squares(numbers: Tensor) -> float:
    return float(numbers.to(torch.float64).square().sum())
