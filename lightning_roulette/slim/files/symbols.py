"""A model of symbols that learns their frequencies while they are written or read."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_roulette.slim.files.coder import Coder
from lightning_roulette.slim.files.logits import ONE, RAREST, Integers

LARGEST_ALPHABET = 4096
_FIRST, _LAST = 16, 16384  # sizes of blocks: each has the frequencies of all before it
_LEARNT = 24  # how much is kept of what was learnt from other tensors, in symbols
# what counts for the frequency of a symbol: each time that it came; each time that a neighbour came, up to so many
# times; and that it may come
_WEIGHT, _NEAR, _NEAR_AT_MOST, _UNSEEN = 16, 4, 4, 2


class Frequencies:
    """How often each symbol came.

    Symbols are coded in blocks whose size doubles. All symbols of a block have the same probabilities, those of what
    came before. Neighbours in the alphabet are like each other, as buckets of numbers are, so a symbol also counts a
    little for its neighbours while few were seen.

    Args:
        size: The size of the alphabet, at most `LARGEST_ALPHABET`.
    """

    def __init__(self, size: int) -> None:
        self._counts = np.zeros(size, np.int64)

    def code(self, coder: Coder, values: npt.NDArray[Any] | None, count: int) -> Integers:
        """Write or read symbols.

        Args:
            coder: Writes or reads.
            values: The symbols, or None to read them.
            count: How many they are.
        """
        if count == 0:
            return np.zeros(0, np.int64)
        size = len(self._counts)
        low = coder.number(None if values is None else int(values.min()), size)
        high = coder.number(None if values is None else int(values.max()), size)
        if high < low:
            raise ValueError("its symbols have no range")
        if high == low:  # a second symbol, so that every value takes some bits, however few
            low, high = max(low - 1, 0), max(high, 1)
        total = int(self._counts.sum())
        self._counts = self._counts * min(_LEARNT, total) // max(total, 1) if total > _LEARNT else self._counts
        blocks = [
            self._block(coder, None if values is None else values[start:end] - low, end - start, low, high)
            for start, end in _blocks(count)
        ]
        return np.concatenate(blocks) + low

    def _block(
        self, coder: Coder, values: npt.NDArray[Any] | None, count: int, low: int, high: int
    ) -> npt.NDArray[Any]:
        counts = self._counts[low : high + 1]
        found = coder.symbols(values, count, _shares(counts))
        counts += np.bincount(found, minlength=len(counts))
        return found


def _blocks(count: int) -> list[tuple[int, int]]:
    """The first and the last index of each block."""
    bounds, size = [0], _FIRST
    while bounds[-1] < count:
        bounds.append(min(bounds[-1] + size, count))
        size = min(2 * size, _LAST)
    return list(pairwise(bounds))


def _shares(counts: Integers) -> Integers:
    """The probabilities of symbols that came so often, in units of 1/65536."""
    near = np.zeros_like(counts)
    near[1:] += counts[:-1]
    near[:-1] += counts[1:]
    frequencies = _WEIGHT * counts + _NEAR * np.minimum(near, _NEAR_AT_MOST) + _UNSEEN
    rarest = min(RAREST, ONE // (4 * len(counts)))
    shares: Integers = frequencies * (ONE - rarest * len(counts)) // frequencies.sum() + rarest
    shares[shares.argmax()] += ONE - shares.sum()
    return shares
