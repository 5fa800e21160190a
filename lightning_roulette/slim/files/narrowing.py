"""Rounding of weights to the nearest of few values, without data."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_roulette.slim.files.logits import Integers
from lightning_roulette.values import INT8_MOST, SCALE_BITS, Codebook, on_list, scale_digits, shortened

Floats: TypeAlias = npt.NDArray[np.float32]
_ROUNDS = 100  # of Lloyd's algorithm, at most
_DIGITS = 24  # significant bits of float32
_NEVER = 1 << 20  # larger than any exponent


def nearest(weights: Tensor, values: str | Codebook, kind: torch.dtype, levels: Tensor | None = None) -> Tensor:
    """Return weights, each rounded to the nearest value that is allowed.

    Zeros stay zero, and no other number becomes zero. Numbers that are not finite stay as they are. What was rounded
    so before stays as it is.

    Args:
        weights: Float64, shape `(rows, n)`. With int8, each row has a scale.
        values: How they are stored; see `values_of`.
        kind: The type of the weights.
        levels: The values of the list of a codebook, in ascending order. None: see `levels_for`.
    """
    entries = (weights != 0) & weights.isfinite()
    if values == "float32" or not bool(entries.any()):
        return weights
    if isinstance(values, Codebook):
        known = levels_for(weights[entries], 2**values.bits, kind) if levels is None else levels
        found = known[torch.bucketize(weights.contiguous(), (known[1:] + known[:-1]) / 2)]
    elif values == "float16":
        found = _half(weights)
    else:
        multiples, scales = in_int8(torch.where(entries, weights, 0.0), kind)
        found = multiples * scales.unsqueeze(1)
    return torch.where(entries, found, weights)


def levels_for(survivors: Tensor, most: int, kind: torch.dtype) -> Tensor:
    """Return the list of a codebook for some weights, in ascending order.

    It is found by k-means (Lloyd's algorithm), whose first centres follow the density of the weights, so that it is
    deterministic. Weights with no more different values than the list has are the list themselves.

    Args:
        survivors: Float64, shape `(n,)`, finite and not zero.
        most: Largest number of values in the list.
        kind: The type of the weights.

    Returns:
        Float64, shape `(levels,)`; a one if there are no weights.
    """
    if not len(survivors):
        return survivors.new_ones(1)
    ordered = np.sort(survivors.cpu().numpy())
    different = np.unique(ordered)
    if len(different) <= most:
        return torch.from_numpy(different).to(survivors)
    centres = torch.from_numpy(_lloyd(ordered, _first_centres(ordered, most)))
    levels: Tensor = on_list(centres.to(survivors), kind).unique()
    return levels


def in_int8(rows: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return weights as whole multiples, up to 127, of a scale of their row, and the scales.

    A scale has few digits in base 2, rounded up, so that its multiples are exact in the type of the weights. A weight
    that is not zero is no multiple of zero. Rows of such multiples stay as they are.

    Args:
        rows: Float64, shape `(rows, n)`, finite.
        kind: The type of the weights.

    Returns:
        Multiples, float64, shape `(rows, n)`, and scales, float64, shape `(rows,)`.
    """
    sizes, digits, info = rows.abs(), scale_digits(kind), torch.finfo(kind)
    largest = sizes.amax(1) if rows.shape[1] else sizes.new_zeros(len(rows))
    # so that multiples of all digits are exact even among the smallest numbers of the type
    least = max(torch.finfo(torch.float32).tiny, info.smallest_normal * info.eps * 2 ** (digits - 1))
    exact = torch.from_numpy(_exact_scales(rows.float().cpu().numpy())).to(rows)
    exact = torch.where((rows == rows.float()).all(1), exact, 0.0)
    scales = torch.where(exact > 0, exact, shortened(largest / INT8_MOST, digits, up=True).clamp(min=least))
    multiples = (sizes / scales.unsqueeze(1)).round().clamp(1, INT8_MOST) * rows.sign()
    most = min(info.max, torch.finfo(torch.float32).max)
    beyond = multiples.abs() * scales.unsqueeze(1) > most
    return torch.where(beyond, multiples - multiples.sign(), multiples), scales


def _half(weights: Tensor) -> Tensor:
    info = torch.finfo(torch.float16)
    sizes = weights.abs().clamp(info.smallest_normal * info.eps, info.max).to(torch.float16)
    return sizes.to(weights).copysign(weights)


def _first_centres(ordered: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.float64]:
    """Centres whose density is the cube root of that of the values, which is best for many centres (Bennett 1948).

    Where values are a distance `d` apart, their density is `1 / d`, so `d ** (2 / 3)` centres lie between them.
    """
    reached = np.concatenate([[0.0], np.cumsum(np.diff(ordered) ** (2 / 3))])
    wanted = (np.arange(size) + 0.5) / size * reached[-1]
    return np.unique(ordered[np.searchsorted(reached, wanted)])


def _lloyd(ordered: npt.NDArray[np.float64], centres: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Move each centre to the mean of the values that are nearest to it, until none moves."""
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    for _ in range(_ROUNDS):
        inner = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        ends = np.concatenate([[0], inner, [len(ordered)]])
        counts = np.diff(ends)
        moved = np.where(counts > 0, np.diff(sums[ends]) / np.maximum(counts, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def _exact_scales(rows: Floats) -> Floats:
    """A scale of four digits for each row, of which its numbers are whole multiples up to 127; 0 if there is none.

    Args:
        rows: Shape `(rows, n)`, finite.
    """
    used = rows != 0
    exponents = np.frexp(rows)[1]
    least = np.where(used, exponents, _NEVER).min(1, initial=_NEVER, keepdims=True)
    near = used.any(1) & (np.where(used, exponents - least, 0).max(1, initial=0) <= INT8_MOST.bit_length())
    least = np.where(near[:, None], least, 0)
    whole = np.abs(np.ldexp(np.where(near[:, None], rows, 0).astype(np.float64), _DIGITS - least)).astype(np.int64)
    scales = np.ldexp(_whole_scales(whole).astype(np.float64), least[:, 0] - _DIGITS)
    found: Floats = scales.astype(np.float32)
    return found


def _whole_scales(rows: Integers) -> Integers:
    """The largest such scale of each row of whole numbers that are not negative; 0 if there is none."""
    shared, most = np.gcd.reduce(rows, axis=1), rows.max(1, initial=0)
    found: Integers = np.zeros_like(shared)
    for parts in range(1, INT8_MOST + 1):
        scale = shared // parts
        short = scale // np.maximum(scale & -scale, 1) < 2**SCALE_BITS
        fits = (found == 0) & (scale * parts == shared) & (most <= INT8_MOST * scale) & short
        found = np.where(fits, scale, found)
    return found
