"""How often the tensors of a batch were written to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def write_counts(tensors: Sequence[Tensor]) -> list[int]:
    """Return how often each tensor has been written to. Inference tensors do not count this and are left out."""
    return [tensor._version for tensor in tensors if not tensor.is_inference()]
