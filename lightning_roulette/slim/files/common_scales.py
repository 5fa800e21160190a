"""Weights that are whole multiples of one number in each row, as those that were rounded to int8 are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_roulette.slim.files.logits import Integers
from lightning_roulette.slim.files.multiples import LARGEST

_DIGITS = 53  # of a float64
_MOST_DIGITS = 62  # of a whole number here
_OF_ZERO = 2**31  # an exponent that no weight has


def in_multiples(
    weights: npt.NDArray[np.float64], in_rows: Integers
) -> tuple[Integers, npt.NDArray[np.float32]] | None:
    """The weights in units of the greatest common divisor of their row.

    Args:
        weights: The weights of all rows, one row after the other, finite.
        in_rows: How many weights each row has, at least one.

    Returns:
        The multiples, at most `LARGEST`, and the divisor of each row, whose products are exactly the weights. None if
        there are none.
    """
    if len(in_rows) == 0 or _divided(weights[: in_rows[0]], in_rows[:1]) is None:  # most networks end here
        return None
    return _divided(weights, in_rows)


def _divided(weights: npt.NDArray[np.float64], in_rows: Integers) -> tuple[Integers, npt.NDArray[np.float32]] | None:
    starts = np.cumsum(in_rows) - in_rows
    odd, places = _odd(weights)
    lowest = np.minimum.reduceat(places, starts)
    lowest = np.where(lowest == _OF_ZERO, 0, lowest)
    shifts = np.where(odd == 0, 0, places - np.repeat(lowest, in_rows))
    if int((shifts + np.frexp(np.abs(odd).astype(np.float64))[1]).max()) > _MOST_DIGITS:
        return None
    whole = odd << shifts
    divisors = np.maximum(np.gcd.reduceat(np.abs(whole), starts), 1)
    multiples = whole // np.repeat(divisors, in_rows)
    with np.errstate(over="ignore", under="ignore"):
        scales = np.ldexp(divisors.astype(np.float64), lowest).astype(np.float32)
        products = multiples.astype(np.float32) * np.repeat(scales, in_rows)
    fits = int(np.abs(multiples).max()) <= LARGEST and np.array_equal(products.astype(np.float64), weights)
    return (multiples, scales) if fits else None


def _odd(weights: npt.NDArray[np.float64]) -> tuple[Integers, Integers]:
    """Odd numbers and exponents of two whose products are the weights; 0 and `_OF_ZERO` for 0."""
    mantissa, exponent = np.frexp(weights)
    whole = np.ldexp(mantissa, _DIGITS).astype(np.int64)
    zeros = np.where(whole == 0, 0, np.frexp((whole & -whole).astype(np.float64))[1] - 1).astype(np.int64)
    places = np.where(whole == 0, _OF_ZERO, exponent.astype(np.int64) - _DIGITS + zeros)
    return whole >> zeros, places
