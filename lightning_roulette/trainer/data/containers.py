"""Batches in new containers, so that a step may take entries out of its batch."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor

from lightning_roulette.network.samples import attributes_of


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
    if type(batch) in (dict, OrderedDict, UserDict, defaultdict):
        twin = copy.copy(batch)
        twin.update({key: rebuilt(value, copies) for key, value in batch.items()})
        return twin
    if type(batch) in (list, tuple):
        return type(batch)(rebuilt(value, copies) for value in batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(rebuilt(value, copies) for value in batch))
    if copies:
        return copy.deepcopy(batch)
    twin = copy.copy(batch)
    if is_dataclass(twin):
        for name, value in attributes_of(batch).items():
            object.__setattr__(twin, name, rebuilt(value, copies))  # works for a frozen dataclass too
    return twin


def write_counts(tensors: Sequence[Tensor]) -> list[int]:
    """Return how often each tensor has been written to. Inference tensors do not count this and are left out."""
    return [tensor._version for tensor in tensors if not tensor.is_inference()]
