"""Gram sums: sums of products of a layer's inputs and outputs, from which its weights are solved."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_roulette.large.limits import limits
from lightning_roulette.large.precision import full_precision
from lightning_roulette.large.processes import Processes
from lightning_roulette.large.products import products_with
from lightning_roulette.refit.centre import Centre
from lightning_roulette.refit.held_out import ONE_IN, HeldOutRows
from lightning_roulette.refit.matrices import Rows

_COLUMNS = 256  # of a block of the Gram matrix, of which the half below the diagonal is computed
_NARROW = (
    32  # fewer inputs are multiplied in float64, as that takes little time and float32 products of them round more
)
_SMALLEST, _LARGEST = 2.0**-30, 2.0**50  # between them, squares of float32 numbers neither vanish nor overflow
_ROUNDING, _ROUNDING_FLOAT64 = 1e-6, 1e-9  # see GramSums.rounding


class GramSums:
    """Sums of products over rows `x` of inputs and rows `y` of wanted outputs, in float64, for each group.

    Products of float32 rows are computed in float32, over `limits().gram_rows` rows at a time, after a constant near
    their mean is subtracted. They are summed in float64. The entries of the centred matrix are then exact up to some
    1e-7 of the root of the product of their two diagonal entries, and those on the diagonal up to some 1e-6 of
    themselves. Products of float64 rows are computed in float64.

    Memory does not grow with the number of rows: it is `inputs ** 2 + inputs * outputs` float64 numbers for each group,
    and `limits().gram_rows` rows. As long as there are few rows, these are kept and nothing is summed (see `few`).

    Attributes:
        rows: Number of rows.
        rounding: Share of the wanted outputs' power to which squared errors from these sums are exact.
    """

    def __init__(self) -> None:
        self._gram = self._cross = self._power = torch.zeros(())
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._waiting_rows = 0
        self._centre: Centre | None = None
        self._is_whole = True
        self.rows = 0
        self.rounding = _ROUNDING_FLOAT64

    @property
    def gram(self) -> Tensor:
        """Sum of `x x^T`, shape `(groups, inputs, inputs)`."""
        self._settle()
        return self._gram

    @property
    def cross(self) -> Tensor:
        """Sum of `x y^T`, shape `(groups, inputs, outputs)`."""
        self._settle()
        return self._cross

    @property
    def power(self) -> Tensor:
        """Sum of `y ** 2`, shape `(groups, outputs)`."""
        self._settle()
        return self._power

    @property
    def few(self) -> tuple[Tensor, Tensor] | None:
        """The rows themselves, if they are fewer than half of the inputs; for shapes see `add`.

        They then take less memory and less work than the sums, which are computed when they are read. None if there are
        more rows, if sums were read, or if float32 does not hold the rows and their products.
        """
        if not self._are_few:
            return None
        x, y = _joined(self._waiting)
        self._waiting = [(x, y)]
        if x.dtype != torch.float32 or not (_fits(x) and _fits(y)):
            return None
        self.rounding = _ROUNDING
        return x, y

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
        if (few := self.few) is not None:
            return all(bool(rows.isfinite().all()) for rows in few)
        return all(bool(sums.isfinite().all()) for sums in (self.gram, self.cross, self.power))

    @property
    def mean_square(self) -> float:
        """Mean over rows of the summed square of the wanted outputs."""
        return float(self.power.sum() / max(1, self.rows))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows to the sums. The tensors must not change before the sums are read.

        Args:
            x: Inputs, float32 or float64, shape `(groups, rows, inputs)`.
            y: Wanted outputs, float32 or float64, shape `(groups, rows, outputs)`.
        """
        self._waiting.append((x, y))
        self._waiting_rows += x.shape[1]
        self.rows += x.shape[1]
        if self._waiting_rows >= limits().gram_rows and not self._are_few:
            self._sum_waiting()

    @property
    def _are_few(self) -> bool:
        """Whether all rows wait, and are fewer than half of the inputs."""
        return 0 < self.rows == self._waiting_rows and 2 * self.rows < self._waiting[0][0].shape[2]

    def of_outputs(self, some: Tensor) -> GramSums:
        """Return the sums for some of the outputs. They share the Gram matrix.

        Args:
            some: Indices or bools of outputs of each group.
        """
        found = GramSums()
        found._gram, found._cross, found._power = self.gram, self.cross[..., some], self.power[..., some]
        found.rows, found.rounding = self.rows, self.rounding
        return found

    def over(self, processes: Processes, like: Tensor) -> GramSums:
        """Return the sums over the rows of all processes.

        Args:
            processes: They all call this.
            like: A matrix of the layer, shape `(groups, outputs, inputs)`.
        """
        if processes.ranks == 1:
            return self
        found = GramSums()
        sums = (self.gram, self.cross, self.power) if self.rows else _no_sums(like)
        found._gram, found._cross, found._power = processes.add(*sums)
        known = processes.each(torch.tensor([self.rows, self.rounding], dtype=torch.float64))
        found.rows, found.rounding = int(known[:, 0].sum()), float(known[:, 1].max())
        return found

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

    def _settle(self) -> None:
        """Bring the sums up to date with all rows."""
        self._sum_waiting()
        if not self._is_whole:
            _mirror(self._gram)
            self._is_whole = True
        if self._centre is not None:
            self._centre.move_to_zero(self._gram, self._cross)
            self._centre = None

    def _sum_waiting(self) -> None:
        if not self._waiting:
            return
        (x, y), self._waiting, self._waiting_rows = _joined(self._waiting), [], 0
        if self._gram.dim() == 0:
            groups, inputs, outputs = x.shape[0], x.shape[2], y.shape[2]
            self._gram = x.new_zeros(groups, inputs, inputs, dtype=torch.float64)
            self._cross = x.new_zeros(groups, inputs, outputs, dtype=torch.float64)
            self._power = x.new_zeros(groups, outputs, dtype=torch.float64)
        with full_precision(x.device):
            for xs, ys in zip(x.split(limits().gram_rows, 1), y.split(limits().gram_rows, 1), strict=True):
                self._sum_block(xs, ys)

    def _sum_block(self, x: Tensor, y: Tensor) -> None:
        self._is_whole = False
        self._power += y.to(torch.float64).square().sum(1)
        if x.dtype != torch.float64:
            self.rounding = _ROUNDING
            self._centre = Centre.of(x, y) if self._centre is None else self._centre
            x, y = self._centre.subtracted(x, y)
            if x.shape[2] < _NARROW or not (_fits(x) and _fits(y)):
                x, y = x.to(torch.float64), y.to(torch.float64)
        _add_products(self._gram, x)
        self._cross += products_with(y.mT.contiguous())(x.mT.contiguous()) if x.dtype != torch.float64 else x.mT @ y


def _no_sums(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums over no rows."""
    groups, outputs, inputs = like.shape
    shapes = (groups, inputs, inputs), (groups, inputs, outputs), (groups, outputs)
    gram, cross, power = (like.new_zeros(shape, dtype=torch.float64) for shape in shapes)
    return gram, cross, power


def _joined(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return all rows together, inputs and wanted outputs of the same type."""
    x, y = (torch.cat(parts, 1) if len(rows) > 1 else parts[0] for parts in zip(*rows, strict=True))
    kind = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(kind), y.to(kind)


def _fits(rows: Tensor) -> bool:
    """Return whether float32 holds the products of these numbers."""
    if rows.numel() == 0:
        return True
    least, most = torch.aminmax(rows)
    largest = float(torch.maximum(-least, most))
    return largest == 0 or _SMALLEST < largest < _LARGEST


def _add_products(gram: Tensor, x: Tensor) -> None:
    """Add `x^T x` to the blocks of a Gram matrix on and below its diagonal."""
    columns = x.mT.contiguous() if x.dtype != gram.dtype else x.mT
    for begin in range(0, gram.shape[1], _COLUMNS):
        some, all_until = columns[:, begin : begin + _COLUMNS], columns[:, : begin + _COLUMNS]
        part = gram[:, begin : begin + _COLUMNS, : begin + _COLUMNS]
        if x.dtype == gram.dtype:
            part.baddbmm_(some, all_until.mT)
        else:
            part += products_with(all_until)(some)


def _mirror(gram: Tensor) -> None:
    """Copy the blocks below the diagonal of a matrix to those above it."""
    inputs = gram.shape[1]
    for begin in range(_COLUMNS, inputs, _COLUMNS):
        end = min(begin + _COLUMNS, inputs)
        gram[:, :begin, begin:end] = gram[:, begin:end, :begin].mT


@dataclass(eq=False)
class LayerSums:
    """What is known about one layer.

    Attributes:
        fit: Sums over the rows that the layer is fitted to.
        held_out: The rows that judge the fit.
    """

    fit: GramSums = field(default_factory=GramSums)
    held_out: HeldOutRows = field(default_factory=HeldOutRows)
    _of_small_calls: int = field(default=0, repr=False)

    def add_call(self, rows: Rows, y: Tensor) -> None:
        """Add the rows of a call, with the wanted outputs `y`. Some of them judge the fit.

        Of the rows of all calls with fewer than eight, the second and every eighth after it judge.
        """
        held_out = rows.held_out
        if rows.count < ONE_IN:
            before = self._of_small_calls + ONE_IN - 2
            self._of_small_calls += rows.count
            held_out = (before + rows.count) // ONE_IN - before // ONE_IN
        self.add(rows.values, y, held_out)

    def add(self, x: Tensor, y: Tensor, held_out: int = 0) -> None:
        """Add rows. The last `held_out` rows judge the fit. For shapes see `GramSums.add`."""
        fitted = x.shape[1] - held_out
        self.fit.add(x[:, :fitted], y[:, :fitted])
        if held_out:
            self.held_out.add(x[:, fitted:].clone(), y[:, fitted:].clone())  # copies, so that the other rows are freed

    def over(self, processes: Processes, like: Tensor) -> LayerSums:
        """Return what all processes know together; see `GramSums.over`."""
        return LayerSums(self.fit.over(processes, like), self.held_out.over(processes))

    @property
    def finite(self) -> bool:
        """Whether all sums and rows are finite."""
        return self.fit.finite and self.held_out.finite
