"""The survivors of a tensor as they are stored: as they are, rounded, or as whole multiples of scales."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_roulette.slim.files.common_scales import in_multiples
from lightning_roulette.slim.files.floats import LAYOUTS, Bits
from lightning_roulette.slim.files.header import Entry
from lightning_roulette.slim.files.logits import Integers
from lightning_roulette.slim.files.narrowing import in_int8, nearest
from lightning_roulette.slim.files.tensors import bits_of, from_bits
from lightning_roulette.values import Codebook

_Entries = TypeVar("_Entries", npt.NDArray[Any], Tensor)
_REMEDY = "Pass values='float32', which stores every number as it is"


@dataclass(frozen=True, eq=False)
class Survivors:
    """What is stored of a tensor.

    Attributes:
        kept: True where a weight is stored, in the shape of the tensor. The others are zero.
        bits: The bits of the weights that are stored; None if they are multiples only.
        multiples: Those weights in units of the scale of their row, the first dimension. With bits, the smaller form of
            the two is written.
        scales: The scales of the rows with such weights.
        negative: Of the zeros that are not stored, those that are -0.0; None if there are none.
    """

    kept: npt.NDArray[np.bool_]
    bits: Bits | None = None
    multiples: Integers | None = None
    scales: npt.NDArray[np.float32] | None = None
    negative: npt.NDArray[np.bool_] | None = None

    @property
    def count(self) -> int:
        """How many weights are stored."""
        return int(np.count_nonzero(self.kept))

    def tensor(self, entry: Entry) -> Tensor:
        """The tensor that is read from the file."""
        whole = np.zeros(entry.size, np.uint64)
        flat = self.kept.reshape(-1)
        whole[flat] = self.written_bits(getattr(torch, entry.dtype))
        if self.negative is not None:
            whole[~flat] = self.negative.astype(np.uint64) << np.uint64(LAYOUTS[entry.dtype].width - 1)
        return from_bits(whole, entry)

    def written_bits(self, dtype: torch.dtype) -> Bits:
        """The bits of the weights in the type of the tensor."""
        return _in_type(torch.from_numpy(self._products()), dtype) if self.bits is None else self.bits

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
    nonzero = tensor.detach().cpu() != 0
    kept: npt.NDArray[np.bool_] = nonzero.numpy()
    if mask is not None:
        flags = mask.detach().cpu().numpy()
        if bool(nonzero[~mask.cpu()].any()):
            raise ValueError(f"mask prunes weights of {name} that are not zero. Pass the mask of these weights.")
        kept = kept | flags
    if values == "float32":
        negative = bits[~kept] != 0
        found = _as_they_are(tensor, bits[kept].astype(np.uint64), kept)
        return replace(found, negative=negative) if negative.any() else found
    numbers = tensor.detach().cpu().double()
    _check_limits(name, numbers, values)
    if values == "int8":
        return _as_int8(numbers, tensor.dtype, kept)
    survivors = numbers[torch.from_numpy(kept)].unsqueeze(0)
    return Survivors(kept, _in_type(nearest(survivors, values, tensor.dtype), tensor.dtype))


def rows_of(entries: _Entries) -> _Entries:
    """The same entries as a matrix, whose rows are the first dimension."""
    return entries.reshape(entries.shape[0], -1 if math.prod(entries.shape) else 0)


def _as_they_are(tensor: Tensor, bits: Bits, kept: npt.NDArray[np.bool_]) -> Survivors:
    """The bits of the survivors, and multiples with exactly these bits if there are any."""
    plain = Survivors(kept, bits)
    numbers = tensor.detach().cpu().double().numpy()[kept]
    if len(numbers) == 0 or not np.isfinite(numbers).all():
        return plain
    in_rows = rows_of(kept).sum(1)
    if (found := in_multiples(numbers, in_rows[in_rows > 0])) is None:
        return plain
    divided = Survivors(kept, multiples=found[0], scales=found[1])
    exact = np.array_equal(divided.written_bits(tensor.dtype), bits)  # -0.0 is no multiple
    return replace(divided, bits=bits) if exact else plain


def _as_int8(weights: Tensor, kind: torch.dtype, kept: npt.NDArray[np.bool_]) -> Survivors:
    """Multiples of one scale for each row. See `in_int8`."""
    multiples, scales = in_int8(rows_of(weights), kind)
    in_rows = rows_of(kept)
    return Survivors(
        kept,
        multiples=multiples.numpy().astype(np.int64)[in_rows],
        scales=scales.numpy().astype(np.float32)[in_rows.any(1)],
    )


def _in_type(numbers: Tensor, dtype: torch.dtype) -> Bits:
    found: Bits = bits_of(numbers.to(dtype)).astype(np.uint64)
    return found


def _check_limits(name: str, numbers: Tensor, values: str | Codebook) -> None:
    """Check that weights can be rounded. float16 has infinite numbers and NaN, the others have not."""
    if values == "float16" and bool((numbers.half().isinf() & numbers.isfinite()).any()):
        raise ValueError(
            f"{name} has weights above {torch.finfo(torch.float16).max:g}, the limit of float16. {_REMEDY}."
        )
    if values != "float16" and not bool((numbers.abs() <= torch.finfo(torch.float32).max).all()):
        raise ValueError(f"{name} has weights that are not finite, which cannot be rounded. {_REMEDY}.")
