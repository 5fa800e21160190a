"""Rounding of weights to few values."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_roulette.slim.files.logits import Integers
from lightning_roulette.values import INT8_MOST, SCALE_BITS

Floats: TypeAlias = npt.NDArray[np.float32]
_ROUNDS = 100  # of Lloyd's algorithm, at most
_DIGITS = 24  # significant bits of float32
_NEVER = 1 << 20  # larger than any exponent


def by_codebook(survivors: Floats, bits: int) -> Floats:
    """The nearest value of a codebook for each survivor.

    The values are found by k-means (Lloyd's algorithm). Their first ones follow the density of the survivors, so they
    are deterministic. Survivors with no more different values than the codebook has stay as they are. Other values are
    rounded to 8 digits in base 2.

    Args:
        survivors: Shape `(n,)`, finite.
        bits: The codebook has at most `2**bits` values.
    """
    ordered = np.sort(survivors.astype(np.float64))
    size = 1 << bits
    if len(np.unique(ordered)) <= size:
        return survivors
    centres = _lloyd(ordered, _first_centres(ordered, size))
    rounded = np.unique(_of_eight_digits(centres))
    borders = (rounded[1:].astype(np.float64) + rounded[:-1]) / 2
    nearest: Floats = rounded[np.searchsorted(borders, survivors)]
    return nearest


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


def _of_eight_digits(values: npt.NDArray[np.float64]) -> Floats:
    """The nearest numbers whose mantissa has eight digits in base 2, as bfloat16 has."""
    mantissa, exponent = np.frexp(values)
    most = np.finfo(np.float32).max
    rounded: Floats = np.ldexp(np.rint(mantissa * 256) / 256, exponent).clip(-most, most).astype(np.float32)
    return rounded


def exact_scales(rows: Floats) -> Floats:
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


def scales_for_int8(largest: Floats) -> Floats:
    """A scale for each row, so that its largest size is at most 127 scales.

    A scale has four digits in base 2, rounded up. So it takes few bits, and its multiples are exact.

    Args:
        largest: The largest size of each row, finite.
    """
    mantissa, exponent = np.frexp(largest.astype(np.float64) / INT8_MOST)
    scales = np.maximum(np.ldexp(np.ceil(mantissa * 16) / 16, exponent), float(np.finfo(np.float32).tiny))
    found: Floats = scales.astype(np.float32)
    return found


def multiples_of(weights: Floats, scales: Floats) -> Integers:
    """The nearest whole multiple of the scale of each row. A weight that is not zero gets none that is.

    Args:
        weights: Shape `(rows, n)`, finite.
        scales: Shape `(rows,)`, positive.
    """
    nearest = np.rint(np.abs(weights).astype(np.float64) / scales[:, None].astype(np.float64)).astype(np.int64)
    bounded: Integers = np.sign(weights).astype(np.int64) * np.clip(nearest, 1, INT8_MOST)
    return bounded
