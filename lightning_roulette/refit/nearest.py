"""Weights rounded to the nearest values, without inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_roulette.refit.solvers.grid_fit import levels_of, scale_digits, shortened
from lightning_roulette.values import INT8_MOST, Codebook


def nearest(matrix: Tensor, values: str | Codebook, kind: torch.dtype, levels: Tensor | None = None) -> Tensor:
    """Return a matrix with each number rounded to the nearest one that is allowed.

    Zeros stay zero, and no other number becomes zero. Numbers that are not finite stay as they are.

    Args:
        matrix: Float64, shape `(outputs, inputs)`.
        values: How they are stored; see `values_of`.
        kind: The type of the weights.
        levels: The values of the list of a codebook. None: a list is fitted to the matrix.
    """
    entries = (matrix != 0) & matrix.isfinite()
    if values == "float32" or not bool(entries.any()):
        return matrix
    if isinstance(values, Codebook):
        found = _listed(matrix, entries, values, kind, levels)
    else:
        found = _half(matrix) if values == "float16" else _multiples(matrix, entries, kind)
    return torch.where(entries, found, matrix)


def own_levels(matrix: Tensor, book: Codebook, kind: torch.dtype) -> Tensor:
    """Return a list of values for the numbers of a matrix that are finite and not zero."""
    found = matrix[(matrix != 0) & matrix.isfinite()]
    return levels_of(found, torch.ones_like(found), torch.zeros_like(found), 2**book.bits, kind)


def _listed(matrix: Tensor, entries: Tensor, book: Codebook, kind: torch.dtype, levels: Tensor | None) -> Tensor:
    known = own_levels(matrix, book, kind) if levels is None else levels
    return known[torch.bucketize(matrix.contiguous(), (known[1:] + known[:-1]) / 2)]


def _half(matrix: Tensor) -> Tensor:
    info = torch.finfo(torch.float16)
    size = matrix.abs().clamp(info.smallest_normal * info.eps, info.max).to(torch.float16)
    return size.to(matrix).copysign(matrix)


def _multiples(matrix: Tensor, entries: Tensor, kind: torch.dtype) -> Tensor:
    most = torch.where(entries, matrix.abs(), 0.0).amax(1, keepdim=True)
    scales = shortened(most / INT8_MOST, scale_digits(kind), up=True)
    scales = torch.where(most > 0, scales, 1.0)
    return ((matrix / scales).abs().round().clamp(1, INT8_MOST) * scales).copysign(matrix)
