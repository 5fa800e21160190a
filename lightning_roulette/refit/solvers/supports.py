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


def supports_of(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the different supports of each group.

    Args:
        kept: Bool, shape `(groups, outputs, inputs)`.

    Returns:
        - The number of each output's support, shape `(groups * outputs,)`.
        - How many outputs share each support, shape `(supports,)`.
    """
    groups, outputs, inputs = kept.shape
    group = torch.arange(groups, device=kept.device).repeat_interleave(outputs)
    codes = torch.cat([group.unsqueeze(1), codes_of(kept.reshape(-1, inputs))], 1)
    _, numbers, sharing = torch.unique(codes, dim=0, return_inverse=True, return_counts=True)
    return numbers, sharing
