"""Codes and scales, found again from numbers that are multiples of a scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_roulette import Codebook


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


def is_on_grid(weight: Tensor, values: str | Codebook) -> bool:
    """Whether the values of a weight may be stored so. Its outputs are found by trying, as transposed forms differ."""
    if values == "float16":
        return torch.equal(weight.half().to(weight), weight)
    if isinstance(values, Codebook):
        return len(weight[weight != 0].unique()) <= 2**values.bits
    ways = [weight, weight.transpose(0, 1)]
    if len(weight) % 2 == 0:  # transposed, with two groups
        ways.append(weight.unflatten(0, (2, -1)).transpose(1, 2).flatten(0, 1))
    rows = [[codes_of(row)[0] for row in one.flatten(1)] for one in ways]
    return any(all(int(codes.abs().max()) <= 127 for codes in its if len(codes)) for its in rows)
