"""The forms in which the weights of a layer are stored in C, and the smallest of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Form = Literal["dense", "constant", "bitmap", "gaps"]


@dataclass(frozen=True, eq=False)
class Packed:
    """The weights of a layer, row by row.

    `dense`: all weights. `constant`: one weight, to which all are equal. `bitmap`: a bit for each weight, most
    significant bit of a byte first, and the weights that are not zero. `gaps`: for each row the number of its weights
    that are not zero, then for each of them the number of zeros before it; all in Rice codes, and the weights that are
    not zero. The Rice code of a number `n` with `b` low bits is `n >> b` ones, a zero, and the low bits.

    Attributes:
        form: Which of the four.
        positions: The bits, in bytes; empty if dense or constant.
        values: The weights that are stored.
        count_bits: Low bits of the Rice code of numbers of weights, for gaps.
        gap_bits: Low bits of the Rice code of gaps.
    """

    form: Form
    positions: NDArray[np.uint8]
    values: NDArray[np.generic]
    count_bits: int = 0
    gap_bits: int = 0

    @property
    def size(self) -> int:
        """Bytes of positions and values."""
        return self.positions.nbytes + self.values.nbytes


def packed(weight: NDArray[np.generic]) -> Packed:
    """Return weights in the smallest form.

    Args:
        weight: Shape `(outputs, ...)`.
    """
    rows = weight.reshape(len(weight), -1)
    if (rows == rows[0, 0]).all():
        return Packed("constant", np.zeros(0, np.uint8), rows[0, :1])
    forms = (dense(rows), in_bitmap(rows), in_gaps(rows))
    return min(forms, key=lambda one: one.size)


def dense(rows: NDArray[np.generic]) -> Packed:
    """Return all weights."""
    return Packed("dense", np.zeros(0, np.uint8), rows.reshape(-1))


def in_bitmap(rows: NDArray[np.generic]) -> Packed:
    """Return a bit for each weight, and the weights that are not zero."""
    kept = (rows != 0).reshape(-1)
    return Packed("bitmap", np.packbits(kept), rows.reshape(-1)[kept])


def in_gaps(rows: NDArray[np.generic]) -> Packed:
    """Return the gaps between the weights that are not zero, and these weights."""
    kept = rows != 0
    counts = kept.sum(1)
    row, column = kept.nonzero()
    first = np.ones(len(row), bool)
    first[1:] = row[1:] != row[:-1]
    before = np.where(first, -1, np.roll(column, 1))
    gaps = column - before - 1
    count_bits, gap_bits = _best_bits(counts), _best_bits(gaps)
    numbers = np.insert(gaps, np.cumsum(counts) - counts, counts)
    low = np.full(len(gaps), gap_bits)
    low = np.insert(low, np.cumsum(counts) - counts, count_bits)
    return Packed("gaps", rice(numbers, low), rows[kept], count_bits, gap_bits)


def rice(numbers: NDArray[np.int64], low: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the Rice codes of numbers, each with its number of low bits, as bytes."""
    high = numbers >> low
    ends = np.cumsum(high + 1 + low)
    bits = np.ones(int(ends[-1]) if len(ends) else 0, np.uint8)
    bits[ends - low - 1] = 0
    for place in range(int(low.max(initial=0))):  # from the lowest bit
        has = low > place
        bits[(ends - 1 - place)[has]] = (numbers[has] >> place) & 1
    return np.packbits(bits)


def _best_bits(numbers: NDArray[np.int64]) -> int:
    """Return the number of low bits with which the Rice codes are shortest."""
    return min(range(24), key=lambda low: int((numbers >> low).sum()) + low * len(numbers))
