"""Multiplication by a positive number in integers alone, as TensorFlow Lite's reference kernels do it.

A number is `multiplier * 2 ** (shift - 31)`, where the multiplier has 31 bits. The product is rounded twice: at the
31st bit, and after the shift (`MultiplyByQuantizedMultiplier` in TensorFlow Lite's `internal/common.cc`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = 31


@dataclass(frozen=True)
class Multipliers:
    """Numbers by which outputs are multiplied, one for each channel or one for all.

    Attributes:
        multipliers: From 2 ** 30 to 2 ** 31 - 1, or zero.
        shifts: From -31 to 30. Positive: to the left.
    """

    multipliers: tuple[int, ...]
    shifts: tuple[int, ...]


def multipliers(factors: list[float]) -> Multipliers:
    """Return positive numbers as multipliers and shifts. Those below 2 ** -32 become zero."""
    pairs = [_multiplier(one) for one in factors]
    return Multipliers(tuple(one for one, _ in pairs), tuple(shift for _, shift in pairs))


def multiplied(integers: Tensor, by: Multipliers) -> Tensor:
    """Return integers times the numbers, rounded.

    Args:
        integers: int64 with values of int32, shape `(n, channels, ...)`.
        by: One for each channel, or one for all.

    Returns:
        int64, the same shape.
    """
    shape = (1, -1, *[1] * (integers.ndim - 2)) if integers.ndim > 1 else (-1,)
    multiplier, shift = (torch.tensor(one, dtype=torch.int64).reshape(shape) for one in (by.multipliers, by.shifts))
    product = integers * (1 << shift.clamp(min=0)) * multiplier
    nudge = torch.where(product >= 0, 1 << (_BITS - 1), 1 - (1 << (_BITS - 1)))
    high = torch.div(product + nudge, 1 << _BITS, rounding_mode="trunc")
    return _shifted_right(high, (-shift).clamp(min=0))


def _shifted_right(integers: Tensor, bits: Tensor) -> Tensor:
    """Return integers divided by a power of two, rounded to the nearest, and away from zero if there are two."""
    mask = (1 << bits) - 1
    threshold = (mask >> 1) + (integers < 0).long()
    return (integers >> bits) + ((integers & mask) > threshold).long()


def _multiplier(factor: float) -> tuple[int, int]:
    significand, shift = math.frexp(factor)
    multiplier = math.floor(significand * (1 << _BITS) + 0.5)
    if multiplier == 1 << _BITS:
        multiplier, shift = multiplier // 2, shift + 1
    return (0, 0) if shift < -_BITS else (multiplier, shift)
