"""Supports: the sets of inputs that the outputs of a layer keep."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_BITS = 32  # bits of an int64 that are used


def codes_of(members: Tensor) -> Tensor:
    """Return rows of integers that are equal where rows of bools are equal.

    Args:
        members: Bool, shape `(rows, inputs)`.

    Returns:
        Shape `(rows, ceil(inputs / 32))`.
    """
    whole = pad(members, (0, -members.shape[1] % _BITS)).view(len(members), -1, _BITS)
    powers = 1 << torch.arange(_BITS, device=members.device)
    return (whole * powers).sum(2)


def sharing_of(kept: Tensor) -> Tensor:
    """Return how many outputs of its group keep the same inputs as each output, itself included.

    Args:
        kept: Bool, shape `(groups, outputs, inputs)`.

    Returns:
        Shape `(groups, outputs)`.
    """
    found = [torch.unique(codes_of(one), dim=0, return_inverse=True, return_counts=True) for one in kept]
    return torch.stack([counts[support_of] for _, support_of, counts in found])
