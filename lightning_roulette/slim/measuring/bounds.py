"""The bytes of a network's weights: as they are, as archives, compressed, and the limit of entropy."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_roulette.slim.files.compressed import compressed
from lightning_roulette.slim.files.tensors import check_tensors, state_of

_EXPONENTS = {torch.float64: 11, torch.float32: 8, torch.float16: 5, torch.bfloat16: 8}


@dataclass(frozen=True)
class Bytes:
    """The bytes of a state dict. Tied weights are counted once.

    Attributes:
        dense: Of its numbers, zeros included.
        gzip: Of the same, by gzip at its best.
        xz: Of the same, by xz at its best.
        compressed: Of a lossless file of `save_compressed`.
        bound: The limit of coders that know the sparsity of each tensor and the frequency of each exponent: the
            entropies of both, and the signs and other digits of the survivors as they are. A coder that knows more,
            such as which inputs a layer does not use, may get below.
    """

    dense: int
    gzip: int
    xz: int
    compressed: int
    bound: int


def bytes_of(state: Mapping[str, Tensor]) -> Bytes:
    """Measure the bytes of a state dict."""
    state = state_of(state)
    check_tensors(state)
    tensors = [one.detach().cpu().contiguous() for one in each_once(state)]
    raw = b"".join(one.reshape(-1).view(torch.uint8).numpy().tobytes() for one in tensors)
    return Bytes(
        len(raw),
        len(gzip.compress(raw, 9)),
        len(lzma.compress(raw, preset=9)),
        len(compressed(state, "float32")),
        math.ceil(sum(bound_of(one) for one in tensors) / 8),
    )


def each_once(state: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors of a state dict, tied ones once, empty ones left out."""
    return list({(one.data_ptr(), one.shape, one.stride()): one for one in state.values() if one.numel()}.values())


def bound_of(tensor: Tensor) -> float:
    """The bits of a tensor at the limit that `Bytes.bound` describes."""
    if tensor.dtype not in _EXPONENTS:
        return 8.0 * tensor.numel() * tensor.itemsize
    survivors = tensor[tensor != 0].double().abs()
    share = len(survivors) / tensor.numel()
    positions = _entropy(np.array([share, 1 - share])) * tensor.numel() if tensor.dim() > 1 else 0.0
    counted = survivors if tensor.dim() > 1 else tensor.double().abs().reshape(-1)
    exponents = torch.frexp(counted)[1].unique(return_counts=True)[1].double().numpy()
    digits = 8 * tensor.itemsize - _EXPONENTS[tensor.dtype]
    return positions + len(counted) * (digits + _entropy(exponents / max(len(counted), 1)))


def _entropy(shares: npt.NDArray[np.float64]) -> float:
    """The entropy of a distribution in bits."""
    some = shares[shares > 0]
    return float(-(some * np.log2(some)).sum())
