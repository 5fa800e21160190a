"""Rows of a layer that judge a fit."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_roulette.large.precision import full_precision
from lightning_roulette.large.processes import ONE_PROCESS, Processes
from lightning_roulette.large.products import products_with

ONE_IN = 8  # one row in this many judges a fit


@dataclass(eq=False)
class HeldOutRows:
    """Rows that judge a fit. All of them are kept. Each process keeps its own.

    Attributes:
        rows: Number of rows.
        processes: Those over whose rows errors are computed. They must all ask for the same.
    """

    rows: int = 0
    processes: Processes = field(default=ONE_PROCESS, repr=False)
    _parts: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    @property
    def finite(self) -> bool:
        """Whether all rows are finite."""
        ours = all(bool(one.isfinite().all()) for part in self._parts for one in part)
        return not self.processes.anywhere(not ours)

    @property
    def mean_square(self) -> float:
        """Mean over rows of the summed square of the wanted outputs."""
        return self._mean(sum(_squares(y) for _, y in self._parts))

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
            times = {kind: products_with(matrix.to(kind)) for kind in {x.dtype for x, _ in self._parts}}
            return self._mean(sum(_squares(times[x.dtype](x) - y) for x, y in self._parts))

    def output_variance(self, like: Tensor) -> float:
        """Variance of the wanted outputs over the rows, summed over outputs and groups.

        Args:
            like: A tensor of shape `(groups, outputs)`.
        """
        sums, squares = torch.zeros_like(like), torch.zeros_like(like)
        for _, y in self._parts:
            sums += y.to(like.dtype).sum(1)
            squares += y.to(like.dtype).square().sum(1)
        sums, squares = self.processes.add(sums, squares)
        rows = max(1, self.rows)
        return float((squares / rows - (sums / rows).square()).clamp(min=0).sum())

    def over(self, processes: Processes) -> HeldOutRows:
        """Return the rows of all processes, of which each keeps its own. All processes call this."""
        if processes.ranks == 1:
            return self
        return HeldOutRows(int(processes.add(torch.tensor(self.rows))[0]), processes, self._parts)

    def _mean(self, total: float) -> float:
        (whole,) = self.processes.add(torch.tensor(total, dtype=torch.float64))
        return float(whole) / max(1, self.rows)


def _squares(numbers: Tensor) -> float:
    return float(numbers.to(torch.float64).square().sum())
