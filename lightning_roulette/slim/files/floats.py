"""A model of numbers: how large they are is learnt while they are written or read; their last digits are raw.

A number is its sign, a bucket (its exponent and the first digits of its mantissa), and the rest of its digits. NaN,
-0.0 and denormal numbers are numbers like others. Of a vector with few different values, each value is written once
where this takes fewer bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lightning_roulette.slim.files.coder import Coder, Meter
from lightning_roulette.slim.files.symbols import LARGEST_ALPHABET, Frequencies

Bits = npt.NDArray[np.uint64]
_LARGEST_DICTIONARY = 1024
_PLAIN, _DICTIONARY = 0, 1


@dataclass(frozen=True)
class Layout:
    """Where the parts of a floating-point number are.

    Attributes:
        width: Its bits.
        bucket: The bits of its bucket.
    """

    width: int
    bucket: int

    @property
    def rest(self) -> int:
        """The bits below the bucket."""
        return self.width - 1 - self.bucket


LAYOUTS: Mapping[str, Layout] = {
    "float64": Layout(64, 12),
    "float32": Layout(32, 11),
    "float16": Layout(16, 8),
    "bfloat16": Layout(16, 11),
}


@dataclass
class Numbers:
    """What was learnt from the vectors of one type so far.

    Attributes:
        layout: Where the parts of a number are.
    """

    layout: Layout
    _signs: Frequencies = field(init=False)
    _buckets: Frequencies = field(init=False)

    def __post_init__(self) -> None:
        self._signs, self._buckets = Frequencies(2), Frequencies(1 << self.layout.bucket)

    def code(self, coder: Coder, values: Bits | None, count: int) -> Bits:
        """Write or read a vector of numbers.

        Args:
            coder: Writes or reads.
            values: The bits of each number, or None to read them.
            count: How many they are.
        """
        if count == 0:
            return np.zeros(0, np.uint64)
        different = None if values is None else self._list_of(values)
        kind = None if values is None else _PLAIN if different is None else _DICTIONARY
        if coder.number(kind, 2) == _PLAIN:
            return self._plain(coder, values, count)
        return self._by_dictionary(coder, values, different, count)

    def _list_of(self, values: Bits) -> Bits | None:
        """The different values, if a vector takes fewer bits with each of them written once; else None."""
        if (different := few(values)) is None:
            return None
        plain, listed = Meter(), Meter()
        deepcopy(self)._plain(plain, values, len(values))
        deepcopy(self)._by_dictionary(listed, values, different, len(values))
        return different if listed.spent < plain.spent else None

    def _by_dictionary(self, coder: Coder, values: Bits | None, different: Bits | None, count: int) -> Bits:
        size = coder.number(None if different is None else len(different) - 1, _LARGEST_DICTIONARY) + 1
        words = self._plain(coder, different, size)
        order = np.argsort(_ascending(words, self.layout), kind="stable")
        places = None
        if values is not None:
            ascending = _ascending(words, self.layout)[order]
            places = np.searchsorted(ascending, _ascending(values, self.layout)).astype(np.int64)
        return words[order][Frequencies(max(size, 2)).code(coder, places, count)]

    def _plain(self, coder: Coder, values: Bits | None, count: int) -> Bits:
        layout = self.layout
        sign, bucket, rest = _parts(values, layout)
        signs = self._signs.code(coder, sign, count).astype(np.uint64)
        buckets = self._buckets.code(coder, bucket, count).astype(np.uint64)
        unused = coder.number(None if rest is None else _unused(rest, layout.rest), layout.rest + 1)
        given = None if rest is None else rest >> np.uint64(unused)
        last = coder.raw(given, count, layout.rest - unused) << np.uint64(unused)
        whole: Bits = signs << np.uint64(layout.width - 1) | buckets << np.uint64(layout.rest) | last
        return whole


def _parts(
    values: Bits | None, layout: Layout
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Bits] | tuple[None, None, None]:
    """The sign, the bucket and the rest of each number."""
    if values is None:
        return None, None, None
    sign = (values >> np.uint64(layout.width - 1)).astype(np.int64)
    bucket = (values >> np.uint64(layout.rest)).astype(np.int64) & ((1 << layout.bucket) - 1)
    return sign, bucket, values & np.uint64((1 << layout.rest) - 1)


def _unused(rest: Bits, width: int) -> int:
    """How many of the last bits are zero in all numbers."""
    used = int(np.bitwise_or.reduce(rest))
    return width if used == 0 else (used & -used).bit_length() - 1


def few(values: Bits) -> Bits | None:
    """The different values, if they are few and taken twice each on average; else None."""
    sample = np.unique(values[:: max(len(values) // (8 * _LARGEST_DICTIONARY), 1)])
    if len(sample) > _LARGEST_DICTIONARY:
        return None
    different = np.unique(values)
    return different if len(different) <= min(_LARGEST_DICTIONARY, len(values) // 2) else None


def _ascending(values: Bits, layout: Layout) -> Bits:
    """Numbers whose order is that of the values, negative ones first."""
    sign = np.uint64(1 << (layout.width - 1))
    mask = np.uint64((1 << layout.width) - 1)
    ascending: Bits = np.where(values & sign, ~values & mask, values | sign)
    return ascending


assert max(1 << one.bucket for one in LAYOUTS.values()) <= LARGEST_ALPHABET
