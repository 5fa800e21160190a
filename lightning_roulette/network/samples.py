"""The samples of a batch: counted, taken, and joined, whatever the batch is built of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def rows_of(batch: Any) -> int | None:
    """How many samples a batch holds: the first dimension that all its tensors share; None if they share none.

    A batch is a tensor, or a dict, list or tuple of batches. A list without tensors counts if it has an entry for each
    sample; what is neither is the same for all samples.
    """
    sizes = {leaf.shape[0] if leaf.dim() else None for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
    size = next(iter(sizes)) if len(sizes) == 1 else None
    return size if size is not None and _is_plain(batch, size) else None


def taken(batch: Any, rows: slice | Tensor) -> Any:
    """Some samples of a batch, in new containers; a slice gives views.

    Args:
        batch: One of which `rows_of` tells the samples.
        rows: A slice, or the index of each sample, shape `(m,)`, int64.
    """
    if isinstance(batch, Tensor):
        return batch[rows if isinstance(rows, slice) else rows.to(batch.device)]
    if isinstance(batch, Mapping):
        return {key: taken(value, rows) for key, value in batch.items()}
    if not _is_list(batch):
        return batch
    if _has_tensors(batch):
        return _like(batch, [taken(value, rows) for value in batch])
    return batch[rows] if isinstance(rows, slice) else type(batch)(batch[row] for row in rows.tolist())


def pieces_of(batches: Sequence[Any], samples: int = 2**11, at_a_time: int = 2**8) -> list[Any]:
    """Small batches of the first samples of these, as views; whole batches where it is not known what a sample is.

    Args:
        batches: As many as there are.
        samples: How many in all, up to the rest of a small batch; one of unknown size counts as `at_a_time`.
        at_a_time: How many in one at most.
    """
    found: list[Any] = []
    for batch in batches:
        rows = rows_of(batch)
        if samples <= 0:
            break
        if rows is None or rows <= at_a_time:
            found.append(batch)
        else:
            ends = min(rows, samples)
            found += [taken(batch, slice(at, min(at + at_a_time, ends))) for at in range(0, ends, at_a_time)]
        samples -= at_a_time if rows is None else rows
    return found


def joined(batches: Sequence[Any]) -> Any | None:
    """One batch of the samples of all, in order; None if batches differ in more than their samples.

    Args:
        batches: Of which `rows_of` tells the samples.
    """
    try:
        return _joined(list(batches))
    except (TypeError, ValueError, RuntimeError, KeyError):  # of another structure, shape, dtype or device
        return None


def _is_plain(batch: Any, size: int) -> bool:
    """Whether a batch can be built anew from its parts, and no list in it could be meant for other than its samples."""
    if isinstance(batch, Tensor):
        return type(batch) is Tensor and not batch.is_nested and batch.layout == torch.strided
    if type(batch) is dict:
        return all(_is_plain(value, size) for value in batch.values())
    if _is_list(batch):
        if _has_tensors(batch):
            return all(_is_plain(value, size) for value in batch)
        return len(batch) == size and not hasattr(batch, "_fields")
    return batch is None or isinstance(batch, str | int | float | bool)


def _is_list(batch: Any) -> bool:
    return type(batch) in (list, tuple) or (isinstance(batch, tuple) and hasattr(batch, "_fields"))


def _has_tensors(batch: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(batch))


def _like(batch: Any, parts: list[Any]) -> Any:
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def _joined(batches: list[Any]) -> Any:
    first = batches[0]
    if any(type(batch) is not type(first) for batch in batches):
        raise TypeError
    if isinstance(first, Tensor):
        if any(batch.dtype != first.dtype or batch.shape[1:] != first.shape[1:] for batch in batches):
            raise ValueError
        return torch.cat(batches)
    if isinstance(first, Mapping):
        if any(batch.keys() != first.keys() for batch in batches):
            raise KeyError
        return {key: _joined([batch[key] for batch in batches]) for key in first}
    if not _is_list(first):
        if any(batch != first for batch in batches):
            raise ValueError
        return first
    if _has_tensors(first):
        return _like(first, [_joined(list(parts)) for parts in zip(*batches, strict=True)])
    return type(first)(entry for batch in batches for entry in batch)


def bytes_of(batch: Any) -> int:
    """The bytes of all tensors in a batch."""
    return sum(tensor.nbytes for tensor in tensors_of(batch))


def tensors_of(batch: Any) -> list[Tensor]:
    """Every tensor in a batch: in containers of any kind, and in the attributes of objects."""
    found: list[Tensor] = []
    seen: set[int] = set()
    waiting = [batch]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            found.append(one)
            continue
        if id(one) in seen or isinstance(one, str | bytes | int | float | type | nn.Module):
            continue
        seen.add(id(one))
        if isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, list | tuple | set):
            waiting += one
        else:
            waiting += attributes_of(one).values()
    return found


def attributes_of(one: Any) -> dict[str, Any]:
    """The attributes of an object, also where it is a dataclass with slots."""
    names = [field.name for field in fields(one)] if is_dataclass(one) else []
    return {name: getattr(one, name) for name in names if hasattr(one, name)} | getattr(one, "__dict__", {})
