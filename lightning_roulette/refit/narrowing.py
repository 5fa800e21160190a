"""Narrowing: the weights of a pruned network are rounded to few values, each layer by its error on its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_roulette.large.processes import ONE_PROCESS, Processes
from lightning_roulette.network.layers import Layer
from lightning_roulette.refit.gram import LayerSums
from lightning_roulette.refit.solvers.cholesky import DampedGram
from lightning_roulette.refit.solvers.grid import Grid
from lightning_roulette.refit.solvers.grid_fit import int8_grid, listed_grid, spread_levels
from lightning_roulette.refit.solvers.rounding import Problem
from lightning_roulette.refit.solvers.rounds import rounded
from lightning_roulette.slim.files.narrowing import levels_for, nearest
from lightning_roulette.values import Codebook

_PRICE = 0.005  # of one bit of all weights on average: this share of the variance of the layer's outputs
_MOST_SPENT = 4  # prices of a bit for each weight, by which the error may exceed that of the nearest values


@dataclass(frozen=True, eq=False)
class Narrowing:
    """How the weights of a pruned network are rounded.

    Attributes:
        values: How they are stored; see `values_of`. With `"float32"` nothing is rounded.
        weights: Number of weights of the network that are rounded.
        damping: See `Cholesky`.
        processes: Those that round a layer together.
        lists: The values of parameters of which several layers have parts, by name.
    """

    values: str | Codebook = "float32"
    weights: int = 1
    damping: float = 0.0
    processes: Processes = field(default=ONE_PROCESS, repr=False)
    lists: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def nearest(self, weight: Tensor) -> Tensor:
        """Return a weight rounded to the nearest values, for one whose inputs are not known.

        Its first dimension counts outputs. A weight with fewer than two dimensions is not rounded.
        """
        if weight.dim() < 2 or not weight.numel():
            return weight
        return nearest(weight.flatten(1).double(), self.values, weight.dtype).view(weight.shape).to(weight)

    def of_layer(self, layer: Layer, tensors: Mapping[str, Tensor], matrix: Tensor) -> Tensor:
        """Return a layer's matrix with its weights rounded to the nearest values.

        Args:
            layer: The layer.
            tensors: The parameters of the network, by name.
            matrix: Its matrix, float64, shape `(groups, outputs, inputs)`.
        """
        found = matrix.clone()
        for part in _parts(layer, tensors):
            own = matrix[..., part.columns]
            rows = own.flatten(0, 1) if part.in_rows else own.reshape(1, -1)
            near = nearest(rows, self.values, part.weight.dtype, self._shared_levels(part))
            found[..., part.columns] = near.view(own.shape)
        return found

    def refitted(self, layer: Layer, tensors: Mapping[str, Tensor], matrix: Tensor, sums: LayerSums) -> Tensor:
        """Return a layer's matrix with its weights rounded so that its outputs change least.

        It is the nearest values if their error on the held-out rows is smaller by far more than the bits are worth.

        Args:
            layer: See `of_layer`.
            tensors: See `of_layer`.
            matrix: See `of_layer`.
            sums: What is known about the layer.
        """
        plain = self.of_layer(layer, tensors, matrix)
        if self.values in ("float32", "float16") or not sums.finite or not sums.fit.rows:
            return plain
        problem = self._problem(layer, matrix, sums)
        grids = [self._grid(problem, part) for part in _parts(layer, tensors)]
        found = rounded(problem, grids, self.processes)
        worth = float((problem.prices * problem.rounded.sum(2)).sum()) / sums.fit.rows
        most = sums.held_out.error(plain) + _MOST_SPENT * worth
        return found if sums.held_out.error(found) <= most else plain

    def _problem(self, layer: Layer, matrix: Tensor, sums: LayerSums) -> Problem:
        entries, free = matrix != 0, torch.zeros_like(matrix, dtype=torch.bool)
        if layer.bias is not None:
            free[..., -1] = entries[..., -1]
            entries[..., -1] = False
        # the mean of an output is no information: a bias or a normalisation takes it away
        variance = sums.held_out.output_variance(matrix[..., 0]) * sums.fit.rows
        prices = matrix.new_full(matrix.shape[:2], _PRICE * variance / max(1, self.weights))
        return Problem(DampedGram(sums.fit.gram, self.damping).damped, matrix, entries, free, prices)

    def _grid(self, problem: Problem, part: _Part) -> Grid:
        kind = part.weight.dtype
        if not isinstance(self.values, Codebook):
            return int8_grid(problem, part.columns, kind, alike=not part.in_rows)
        shared = self._shared_levels(part)
        levels = spread_levels(problem, part.columns, 2**self.values.bits, kind) if shared is None else shared
        return listed_grid(problem, part.columns, levels, kind, fixed=shared is not None)

    def _shared_levels(self, part: _Part) -> Tensor | None:
        """Return the list of values of a parameter of which other layers have parts, too; None for other parameters."""
        if not isinstance(self.values, Codebook) or part.is_whole:
            return None
        if part.name not in self.lists:
            weights = part.weight.double()
            found = weights[(weights != 0) & weights.isfinite()]
            self.lists[part.name] = levels_for(found, 2**self.values.bits, part.weight.dtype)
        return self.lists[part.name]


@dataclass(frozen=True)
class _Part:
    """Inputs of a layer's matrices that are multiplied with the entries of one parameter, or of a part of it.

    Attributes:
        name: Name of the parameter.
        weight: The parameter.
        columns: The inputs.
        is_whole: Whether no other layer has a part of it.
        in_rows: Whether its first dimension counts outputs. In a file, each index of the first dimension has a scale.
    """

    name: str
    weight: Tensor
    columns: slice
    is_whole: bool
    in_rows: bool


def _parts(layer: Layer, tensors: Mapping[str, Tensor]) -> Iterator[_Part]:
    end = 0
    for one in layer.columns:
        weight = tensors[one.name].detach()
        view = one.view(weight)
        begin, end = end, end + view[0, 0].numel()
        in_rows = view.stride(1) == weight.stride(0)
        yield _Part(one.name, weight, slice(begin, end), view.numel() == weight.numel(), in_rows)
