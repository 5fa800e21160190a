"""Digests (placeholder)."""

from __future__ import annotations

import torch
from torch import Tensor


def digest_of(tensor: Tensor) -> int:
    """Digest."""
    t = tensor.detach().contiguous().reshape(-1)
    raw = t.view(torch.uint8).to(torch.int64)
    return int((raw * (torch.arange(raw.numel()) * 2 + 1)).sum())
