"""How the values of weights are stored: which numbers a weight may have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_roulette.checks import as_group, check_choice, check_count

STORED = ("float32", "float16", "int8")
INT8_MOST = 127  # largest code; the smallest is its negative
SCALE_BITS = 4  # significant bits of a scale
LEVEL_BITS = 8  # significant bits of a value in a list


@dataclass(frozen=True)
class Codebook:
    """Values of a layer from a short list that all of its outputs share.

    Use it for the smallest files. Zero is not in the list, as pruned weights are stored by their positions.

    Args:
        bits: The list of a layer has at most `2 ** bits` values, of 8 significant bits; or the values that the layer
            has, if they are so few. A whole number from 3 to 8.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not allowed.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        check_count("bits", self.bits, at_least=3)
        if self.bits > 8:
            raise ValueError(f"bits is {self.bits}, but must be at most 8. Use 'float16' for more values.")


def values_of(values: str | Codebook | Mapping[str, Any]) -> str | Codebook:
    """Return how values are stored.

    Args:
        values: One of

            - `"float32"`: as they are.
            - `"float16"`: rounded to half precision.
            - `"int8"`: a whole number from -127 to 127, times the scale of the output that the weight belongs to. The
              scale has 4 significant bits, for bfloat16 1, so that the product is exact in the type of the weights.
            - A `Codebook`, or a mapping from its fields to their values.

    Raises:
        TypeError: If `values` is none of these types.
        ValueError: If `values` is another word, or a field is not allowed.
    """
    if isinstance(values, Codebook):
        return values
    if isinstance(values, Mapping):
        return as_group("values", values, Codebook)
    if not isinstance(values, str):
        raise TypeError(f"values is {values!r}, but must be one of {', '.join(STORED)}, or a Codebook(...).")
    check_choice("values", values, STORED, remedy="Or pass a Codebook(...).")
    return values


def in_words(values: str | Codebook) -> str:
    """Return how values are stored, as words of a sentence."""
    return f"a codebook of {values.bits} bits" if isinstance(values, Codebook) else values


def scale_digits(kind: torch.dtype) -> int:
    """Return how many significant bits a scale has, so that its products with int8 are exact in a type."""
    return min(SCALE_BITS, _digits(kind) - INT8_MOST.bit_length())


def shortened(numbers: Tensor, digits: int, up: bool = False) -> Tensor:
    """Return the nearest numbers, or the next larger ones, of a few significant bits."""
    mantissa, exponent = torch.frexp(numbers)
    whole = mantissa * 2**digits
    return torch.ldexp((whole.ceil() if up else whole.round()) / 2**digits, exponent)


def on_list(levels: Tensor, kind: torch.dtype) -> Tensor:
    """Return numbers of few significant bits, exact in the type of the weights and none of them zero."""
    most = torch.finfo(kind).max
    short = shortened(levels, min(LEVEL_BITS, _digits(kind))).clamp(-most, most).to(kind).to(levels)
    return torch.where(short == 0, torch.finfo(kind).tiny, short)


def _digits(kind: torch.dtype) -> int:
    return round(1 - math.log2(torch.finfo(kind).eps))
