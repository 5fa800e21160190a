"""Digests: one number for the bits of a tensor. It finds changes without a copy of the tensor.

The tensor is read as 32-bit words w, in rows of 2**16. Its digest is, modulo 2**64,

    seed + sum over rows r of P**r * sum over i of M[i] * w[r, i]

where the M[i] are fixed random 64-bit numbers, P is an odd constant, and the seed depends on the dtype and the shape.
This is multilinear hashing (Lemire and Kaser, "Strongly universal string hashing is fast", The Computer Journal 2014).
A change within a row, for example a permutation or a negation, leaves the sum as it is with probability at most 2**-32.

A digest costs about one pass over the memory, and a buffer of 2**16 words on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from math import prod
from typing import Any, cast
from zlib import crc32

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_roulette.large.devices import device_for_bits

_ROW = 1 << 16  # words
_WORD = 4  # bytes
_ROWS_OFF_CPU = 64
_STEP = 0xD1342543DE82EF95 - 2**64  # the int64 with the same bits


def digest_of(tensor: Tensor) -> int:
    """Return the digest of a tensor: a 64-bit number, the same for the same dtype, shape and bits on all devices.

    Args:
        tensor: A tensor of any shape, dtype and layout, not on the meta device. NaNs are compared by their bits.
    """
    return digests_of([tensor])[0]


def digests_of(tensors: Iterable[Tensor]) -> list[int]:
    """Return the digest of each tensor, with one synchronisation for each device.

    Args:
        tensors: See `digest_of`.
    """
    found = [_digest(tensor) for tensor in tensors]
    numbers = [0] * len(found)
    for device in {one.device for one in found}:
        places = [place for place, one in enumerate(found) if one.device == device]
        for place, number in zip(places, torch.stack([found[place] for place in places]).tolist(), strict=True):
            numbers[place] = number
    return numbers


@torch.no_grad()
def _digest(tensor: Tensor) -> Tensor:
    """The digest as int64 without dimensions, on the device of the tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        parts = strided_parts(tensor.detach())
        digests = [_digest_of_strided(part) for part in parts]
    seed = crc32(repr((tensor.dtype, () if tensor.is_nested else tuple(tensor.shape))).encode())
    total = torch.full((), seed, dtype=torch.int64, device=digests[0].device)
    for digest in digests:
        total = total * _STEP + digest.to(total.device)
    return total


def strided_parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold the values of a sparse, nested, quantised or wrapped tensor; else the tensor."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = cast(Any, tensor).__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]
    elif tensor.is_nested:
        parts = list(tensor.unbind())
    elif tensor.layout == torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    elif tensor.is_quantized:
        parts = [tensor.int_repr(), *_scales(tensor)]
    else:
        return [tensor]
    return [inner for part in parts for inner in strided_parts(part.detach())] or [torch.zeros(0)]


def _scales(tensor: Tensor) -> list[Tensor]:
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)]
    return [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]


def _digest_of_strided(tensor: Tensor) -> Tensor:
    device = device_for_bits(tensor)
    total = torch.zeros((), dtype=torch.int64, device=device)
    factor = 1
    for words in _words(tensor):
        words = words.to(device)
        rows = -(-len(words) // _ROW)
        if device.type == "cpu":  # torch has no integer products of matrices on other devices
            row = torch.dot(words.to(torch.int64), _multipliers(device)[: len(words)])
            total += row * factor
        else:
            padded = torch.nn.functional.pad(words, (0, rows * _ROW - len(words))).view(rows, _ROW)
            total += ((padded * _multipliers(device)).sum(dim=1) * _powers(device)[:rows]).sum() * factor
        factor = _wrapped(factor * pow(_STEP, rows, 2**64))
    return total


def _words(tensor: Tensor) -> Iterator[Tensor]:
    """The bits of a tensor as int32, in pieces of whole rows; only the last piece may be shorter."""
    rows = 1 if tensor.device.type in ("cpu", "mps") else _ROWS_OFF_CPU
    for part in _pieces(tensor.resolve_conj().resolve_neg(), rows * _ROW * _WORD // max(1, tensor.element_size())):
        raw = part.view(torch.uint8)
        if (short := -len(raw) % _WORD) or raw.storage_offset() % _WORD:
            raw = torch.nn.functional.pad(raw, (0, short)) if short else raw.clone()
        yield raw.view(torch.int32)


def _pieces(tensor: Tensor, entries: int) -> Iterator[Tensor]:
    """Contiguous vectors of `entries` entries each, in order; only the last may be shorter. Copies are of one piece."""
    if tensor.is_contiguous():
        yield from tensor.reshape(-1).split(entries) if tensor.numel() else ()
        return
    waiting = tensor.new_empty(0)
    for block in _blocks(tensor, entries):
        *full, waiting = torch.cat([waiting, block]).split(entries)
        yield from full
    if len(waiting):
        yield waiting


def _blocks(tensor: Tensor, entries: int) -> Iterator[Tensor]:
    """Contiguous vectors of at most `entries` entries each, in order."""
    if tensor.numel() <= entries:
        yield tensor.contiguous().view(-1)
        return
    row = prod(tensor.shape[1:])
    for part in tensor.split(max(1, entries // row)) if row <= entries else tensor.unbind():
        yield from _blocks(part, entries)


@lru_cache(maxsize=8)
def _multipliers(device: torch.device) -> Tensor:
    chance = torch.Generator().manual_seed(0x5EED)
    return torch.randint(-(2**63), 2**63 - 1, (_ROW,), generator=chance, dtype=torch.int64).to(device)


@lru_cache(maxsize=8)
def _powers(device: torch.device) -> Tensor:
    powers = [_wrapped(pow(_STEP, row, 2**64)) for row in range(_ROWS_OFF_CPU)]
    return torch.tensor(powers, dtype=torch.int64, device=device)


def _wrapped(number: int) -> int:
    """The int64 that is equal to a number modulo 2**64."""
    return (number + 2**63) % 2**64 - 2**63
