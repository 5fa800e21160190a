"""Weights whose bits are easily lost, and their bits."""

from __future__ import annotations

import math

import torch

from lightning_roulette import Mask


def odd_weights(times: int = 1) -> dict[str, torch.Tensor]:
    """NaN payloads, -0.0, infinity, subnormal numbers and a transposed tensor; 24 entries, repeated `times` times."""
    payload = torch.tensor([0x7FC01234, -1, 0x7F800000, -(2**31), 1, 0x3F800000], dtype=torch.int32)
    half = torch.tensor([0x7FC3, -32768, 1, 0x3F80], dtype=torch.int16)
    return {
        "single": payload.repeat(times).view(torch.float32).reshape(2, -1),
        "brain": half.repeat(times).view(torch.bfloat16),
        "half": half.repeat(times).view(torch.float16),
        "double": torch.tensor([math.nan, -0.0, 5e-324, math.inf], dtype=torch.float64).repeat(times),
        "turned": torch.arange(6.0 * times).view(2, -1).T,
    }


def bits_of(tensors) -> dict[str, bytes]:
    return {name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def mask_of(**kept) -> Mask:
    return Mask({name: torch.tensor(values, dtype=torch.bool) for name, values in kept.items()})


def every_other(weights) -> Mask:
    return Mask({name: torch.arange(one.numel()).view(one.shape) % 2 == 0 for name, one in weights.items()})
