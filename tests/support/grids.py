"""Codes and scales, found again from numbers that are multiples of a scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def codes_of(row: Tensor) -> tuple[Tensor, float]:
    """The whole numbers, and the largest scale, of which numbers are exact products. Zeros are left out."""
    found = row[row != 0].double()
    if not len(found):
        return torch.zeros(0, dtype=torch.int64), 1.0
    least = int(torch.frexp(found).exponent.min()) - 53
    whole = [int(math.ldexp(one, -least)) for one in found.tolist()]
    shared = math.gcd(*whole)
    return torch.tensor([one // shared for one in whole]), math.ldexp(shared, least)


def significant_bits(number: float) -> int:
    """How many binary digits a number has, without zeros at its end."""
    whole = int(math.ldexp(math.frexp(number)[0], 53))
    return (whole // (whole & -whole)).bit_length()
