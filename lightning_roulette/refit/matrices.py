"""A layer in the form that a solver needs: rows of its input, and a matrix of its weights and biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_roulette.large.precision import full_precision
from lightning_roulette.large.processes import ONE_PROCESS, Processes
from lightning_roulette.large.products import products_with
from lightning_roulette.network.layers import Layer
from lightning_roulette.refit.held_out import ONE_IN
from lightning_roulette.refit.traversal import Call, Given
from lightning_roulette.wheel.chance import random_bits, stream

_ROWS_FOR_EACH_INPUT, _LEAST_ROWS, _MOST_ROWS = 32, 2**12, 2**16


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a layer's input in one call. A layer with a bias has a last column of ones.

    Attributes:
        values: Float32 or float64, shape `(groups, rows, inputs)`.
        count: Number of rows from which these were chosen.
        held_out: Number of rows, at the end, that judge a fit; 0 in a call with fewer than eight.
    """

    values: Tensor
    count: int
    held_out: int


@dataclass(frozen=True)
class RowSampler:
    """Chooses rows of a layer's input: one row of each of equal parts of a call's rows.

    The choice depends on the number of rows, but not on their values.

    Attributes:
        total: Number of rows over all batches. None chooses 32 for each input of the layer, at least 4,096 and at most
            65,536. Eight are chosen from each call at least.
        batches: Number of batches of all processes.
        seed: Seed of the choice.
        processes: Those that share the batches.
    """

    total: int | None
    batches: int
    seed: int
    processes: Processes = ONE_PROCESS
    _inputs: dict[Layer, int] = field(default_factory=dict, repr=False)

    def rows(self, layer: Layer, call: Call, given: Given) -> Rows:
        """Return rows of a layer's input in a call."""
        count = held_out = 0
        most = self._most(layer, given)

        def chosen(rows: int) -> Tensor:
            nonlocal count, held_out
            index = torch.arange(min(rows, most))
            if rows > most:
                name, batch = f"rows of {layer.names[0]} {layer.offsets.start}", self.processes.number(call.batch)
                key = stream(self.seed, batch, call.number, name)
                begin, end = index * rows // most, (index + 1) * rows // most
                index = begin + random_bits(key, index).remainder(end - begin)
            count, held_out = rows, int((index >= rows - rows // ONE_IN).sum())
            return index

        values = layer.rows(*given, chosen)
        if layer.bias is not None:
            values = torch.cat([values, values.new_ones(*values.shape[:2], 1)], 2)
        return Rows(values, count, held_out)

    def wanted(self, layer: Layer, given: Given) -> int:
        """Return the number of rows of a layer's input that are chosen from all batches, if there are as many."""
        if self.total is not None:
            return self.total
        if layer not in self._inputs:
            self._inputs[layer] = layer.rows(*given, lambda _: torch.arange(0)).shape[2]
        return min(max(_LEAST_ROWS, _ROWS_FOR_EACH_INPUT * self._inputs[layer]), _MOST_ROWS)

    def _most(self, layer: Layer, given: Given) -> int:
        """Return the largest number of rows that are chosen from a call."""
        return max(ONE_IN, self.wanted(layer, given) // self.batches)


def rows_in(layer: Layer, given: Given) -> int:
    """Return the number of rows of a layer's input in a call."""
    found = 0

    def none(rows: int) -> Tensor:
        nonlocal found
        found = rows
        return torch.arange(0)

    layer.rows(*given, none)
    return found


def matrix_of(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a layer's weight, and its bias as a last column, float64, shape `(groups, outputs, inputs)`."""
    # a copy, as the weight may be written to while the matrix is needed
    matrix = layer.matrices(tensors).to(torch.float64, copy=True)
    if layer.bias is None:
        return matrix
    bias = tensors[layer.bias].detach()[layer.offsets].to(matrix)
    return torch.cat([matrix, bias.view(*matrix.shape[:2], 1)], 2)


def outputs_of(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return a layer's outputs for rows of its input, of the type of the rows, shape `(groups, rows, outputs)`."""
    with full_precision(rows.device):
        return products_with(matrix.to(rows.dtype))(rows)


def kept_in_matrix(layer: Layer, mask: Mapping[str, Tensor]) -> Tensor:
    """Return which entries of a layer's matrix a mask keeps. A bias that the mask does not name is kept."""
    kept = layer.matrices(mask)
    if layer.bias is None:
        return kept
    biases = mask[layer.bias][layer.offsets].to(kept) if layer.bias in mask else kept.new_ones(kept.shape[:2])
    return torch.cat([kept, biases.view(*kept.shape[:2], 1)], 2)


@torch.no_grad()
def write_matrix(layer: Layer, tensors: Mapping[str, Tensor], matrix: Tensor) -> None:
    """Write a layer's matrix into its weight and bias."""
    layer.write(tensors, matrix)
    if layer.bias is not None:
        tensors[layer.bias][layer.offsets].copy_(matrix[..., -1].flatten())
