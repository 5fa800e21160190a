"""Batches in new containers, so that a step may take entries out of its batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_roulette.network.containers import parts_of, with_parts


def rebuilt(batch: Any, copies: bool) -> Any:
    """Return a batch with the same tensors, or copies of them, in new containers.

    `apply_to_collection` of lightning-utilities refuses frozen dataclasses and leaves other objects as they are;
    `torch.utils._pytree` also leaves dataclasses and `UserDict` as they are. A step may write into all of these.

    Args:
        batch: A tensor, or containers and objects that hold tensors.
        copies: Whether to copy the tensors.
    """
    if isinstance(batch, Tensor):
        return batch.clone() if copies else batch
    if (parts := parts_of(batch)) is not None:
        try:
            return with_parts(batch, {key: rebuilt(part, copies) for key, part in parts.items()})
        except Exception:  # a class that takes no assignments
            return copy.deepcopy(batch) if copies else copy.copy(batch)
    return copy.deepcopy(batch) if copies else copy.copy(batch)


def write_counts(tensors: Sequence[Tensor]) -> list[int]:
    """Return how often each tensor has been written to. Inference tensors do not count this and are left out."""
    return [tensor._version for tensor in tensors if not tensor.is_inference()]
