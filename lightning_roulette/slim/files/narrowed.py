"""The survivors of a tensor as they are stored: as they are, rounded, or as whole multiples of scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_roulette.slim.files.floats import Bits
from lightning_roulette.slim.files.header import Entry
from lightning_roulette.slim.files.logits import Integers
from lightning_roulette.slim.files.narrowing import by_codebook, multiples_of, scales_for_int8
from lightning_roulette.slim.files.tensors import bits_of, from_bits
from lightning_roulette.values import Codebook

_REMEDY = "Pass values='float32', which stores every number as it is"


@dataclass(frozen=True, eq=False)
class Survivors:
    """What is stored of a tensor.

    Attributes:
        kept: True where a weight is stored, in the shape of the tensor. The others are zero.
        bits: The bits of the weights that are stored; None if they are multiples.
        multiples: Those weights in units of the scale of their row, the first dimension.
        scales: The scales of the rows with such weights.
    """

    kept: npt.NDArray[np.bool_]
    bits: Bits | None = None
    multiples: Integers | None = None
    scales: npt.NDArray[np.float32] | None = None

    @property
    def count(self) -> int:
        """How many weights are stored."""
        return int(np.count_nonzero(self.kept))

    def tensor(self, entry: Entry) -> Tensor:
        """The tensor that is read from the file."""
        bits = self.bits
        if bits is None:
            bits = bits_of(torch.from_numpy(self._products()).to(getattr(torch, entry.dtype))).astype(np.uint64)
        whole = np.zeros(entry.size, np.uint64)
        whole[self.kept.reshape(-1)] = bits
        return from_bits(whole, entry)

    def _products(self) -> npt.NDArray[np.float32]:
        if self.multiples is None or self.scales is None:
            raise TypeError("multiples have no scales")
        in_rows = rows_of(self.kept).sum(1)
        found: npt.NDArray[np.float32] = self.multiples.astype(np.float32) * np.repeat(
            self.scales, in_rows[in_rows > 0]
        )
        return found


def survivors_of(name: str, tensor: Tensor, values: str | Codebook, mask: Tensor | None) -> Survivors:
    """What shall be stored of a tensor.

    Args:
        name: Its name, for errors.
        tensor: Floating-point numbers, with at least two dimensions.
        values: How they are stored.
        mask: True where a weight is kept. None: those that are not zero are kept.

    Raises:
        ValueError: If a weight that the mask prunes is not zero, or a weight cannot be narrowed.
    """
    bits = bits_of(tensor).reshape(tuple(tensor.shape))
    kept: npt.NDArray[np.bool_] = bits != 0  # a weight of -0.0 is stored, too
    if mask is not None:
        flags = mask.detach().cpu().numpy()
        if bool((tensor.detach().cpu()[~mask.cpu()] != 0).any()):
            raise ValueError(f"mask prunes weights of {name} that are not zero. Pass the mask of these weights.")
        kept = kept | flags
    if values == "float32":
        return Survivors(kept, bits[kept].astype(np.uint64))
    numbers = tensor.detach().cpu().double()[torch.from_numpy(kept)]
    if values == "float16":
        return Survivors(kept, _in_type(_as_float16(name, numbers), tensor.dtype))
    _check_finite(name, numbers)
    if isinstance(values, Codebook):
        rounded = torch.from_numpy(by_codebook(numbers.float().numpy(), values.bits))
        return Survivors(kept, _in_type(rounded, tensor.dtype))
    return _as_int8(tensor.detach().cpu().float().numpy(), kept)


def rows_of(kept: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same entries as a matrix, whose rows are the first dimension."""
    return kept.reshape(kept.shape[0], -1) if kept.size else kept.reshape(kept.shape[0], 0)


def _as_int8(weights: npt.NDArray[np.float32], kept: npt.NDArray[np.bool_]) -> Survivors:
    """Multiples of one scale for each row."""
    rows = rows_of(weights)
    scales = scales_for_int8(np.abs(rows).max(1, initial=0.0))
    multiples = multiples_of(rows, scales)[rows_of(kept)]
    return Survivors(kept, multiples=multiples, scales=scales[rows_of(kept).any(1)])


def _as_float16(name: str, numbers: Tensor) -> Tensor:
    rounded = numbers.half()
    if bool((rounded.isinf() & numbers.isfinite()).any()):
        raise ValueError(
            f"{name} has weights above {torch.finfo(torch.float16).max:g}, the limit of float16. {_REMEDY}."
        )
    return rounded


def _in_type(numbers: Tensor, dtype: torch.dtype) -> Bits:
    found: Bits = bits_of(numbers.to(dtype)).astype(np.uint64)
    return found


def _check_finite(name: str, numbers: Tensor) -> None:
    if not bool((numbers.abs() <= torch.finfo(torch.float32).max).all()):
        raise ValueError(f"{name} has weights that are not finite, which cannot be rounded. {_REMEDY}.")
