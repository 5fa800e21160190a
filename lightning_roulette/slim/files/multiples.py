"""Weights that are whole multiples of one scale for each row, and a model of the multiples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_roulette.slim.files.coder import Coder
from lightning_roulette.slim.files.floats import LAYOUTS, Bits, Numbers
from lightning_roulette.slim.files.logits import Integers
from lightning_roulette.slim.files.symbols import Frequencies

LARGEST = 32767
_DIGITS = 3  # of a multiple in its bucket, after the first one
_BUCKETS = (LARGEST.bit_length() << _DIGITS) + 1


@dataclass
class Multiples:
    """What was learnt from the multiples and the scales so far."""

    _signs: Frequencies = field(default_factory=lambda: Frequencies(2))
    _buckets: Frequencies = field(default_factory=lambda: Frequencies(_BUCKETS))
    _scales: Numbers = field(default_factory=lambda: Numbers(LAYOUTS["float32"]))

    def code(self, coder: Coder, multiples: Integers | None, count: int) -> Integers:
        """Write or read multiples between -`LARGEST` and `LARGEST`.

        Args:
            coder: Writes or reads.
            multiples: The multiples, or None to read them.
            count: How many they are.
        """
        sizes = None if multiples is None else np.abs(multiples)
        signs = self._signs.code(coder, None if multiples is None else multiples < 0, count)
        buckets = self._buckets.code(coder, None if sizes is None else _buckets(sizes), count)
        found = _smallest(buckets)
        for width in range(1, LARGEST.bit_length()):
            here = buckets - 1 >> _DIGITS == width + _DIGITS
            given = None if sizes is None else (sizes - found)[here].astype(np.uint64)
            found[here] += coder.raw(given, int(here.sum()), width).astype(np.int64)
        return np.where(signs, -found, found)

    def scales(self, coder: Coder, scales: npt.NDArray[np.float32] | None, count: int) -> npt.NDArray[np.float32]:
        """Write or read scales."""
        given: Bits | None = None if scales is None else scales.view(np.uint32).astype(np.uint64)
        found: npt.NDArray[np.float32] = self._scales.code(coder, given, count).astype(np.uint32).view(np.float32)
        return found


def _buckets(sizes: Integers) -> npt.NDArray[Any]:
    """0 for 0; else the exponent of a size and its first digits, from 1."""
    bits = sizes.astype(np.float32).view(np.uint32).astype(np.int64) >> (23 - _DIGITS)
    return np.where(sizes == 0, 0, bits - (127 << _DIGITS) + 1)


def _smallest(buckets: Integers) -> Integers:
    """The smallest size in each bucket."""
    bits = (np.maximum(buckets, 1) - 1 + (127 << _DIGITS)) << (23 - _DIGITS)
    smallest = bits.astype(np.uint32).view(np.float32).astype(np.int64)
    found: Integers = np.where(buckets == 0, 0, smallest)
    return found
