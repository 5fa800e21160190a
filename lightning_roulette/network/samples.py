"""The samples of a batch: count them, take some of them, and join those of several batches.

Containers are handled by `torch.utils._pytree`. In addition, a list without tensors that has one entry for each sample
is cut and joined like a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def rows_of(batch: Any) -> int | None:
    """Number of samples in a batch: the first dimension that all its tensors share.

    A batch is a tensor, or a dict, list or tuple of batches. A list without tensors needs one entry for each sample.
    Numbers, strings and None belong to all samples.

    Returns:
        The number; None if the tensors do not share their first dimension, or if the batch has parts of another kind.
    """
    sizes = {leaf.shape[0] if leaf.dim() else None for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
    size = next(iter(sizes)) if len(sizes) == 1 else None
    return size if size is not None and _is_plain(batch, size) else None


def taken(batch: Any, rows: slice | Tensor) -> Any:
    """Some samples of a batch, in new containers.

    Args:
        batch: A batch for which `rows_of` returns a number.
        rows: A slice, which gives views; or the index of each sample, shape `(m,)`, int64, which gives copies.
    """

    def part(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[rows if isinstance(rows, slice) else rows.to(leaf.device)]
        if not _is_list(leaf):
            return leaf
        return leaf[rows] if isinstance(rows, slice) else type(leaf)(leaf[row] for row in rows.tolist())

    return tree_map(part, batch, is_leaf=_lists_samples)


def pieces_of(batches: Sequence[Any], samples: int = 2**11, at_a_time: int = 2**8) -> list[Any]:
    """The first samples of some batches in small batches, as views.

    Batches for which `rows_of` returns None are not cut, and count as `at_a_time` samples.

    Args:
        batches: Any number of batches.
        samples: Number of samples in all. The last small batch may exceed it.
        at_a_time: Largest number of samples in a small batch.
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
    """One batch with the samples of all batches, in order.

    Args:
        batches: Batches for which `rows_of` returns a number.

    Returns:
        The batch; None if the batches differ in structure, shape, dtype, device, or in parts of all samples.
    """
    first, *others = batches
    try:
        return tree_map(lambda *leaves: _joined(leaves), first, *others, is_leaf=_lists_samples)
    except (TypeError, ValueError, RuntimeError, KeyError):
        return None


def _joined(leaves: Sequence[Any]) -> Any:
    first = leaves[0]
    if any(type(leaf) is not type(first) for leaf in leaves):
        raise TypeError
    if isinstance(first, Tensor):
        if any(leaf.dtype != first.dtype or leaf.shape[1:] != first.shape[1:] for leaf in leaves):
            raise ValueError
        return torch.cat(list(leaves))
    if _is_list(first):
        return type(first)(entry for leaf in leaves for entry in leaf)
    if any(leaf != first for leaf in leaves):
        raise ValueError
    return first


def _is_plain(batch: Any, size: int) -> bool:
    """Whether a batch can be built again from its parts, and lists without tensors have one entry per sample."""
    if isinstance(batch, Tensor):
        return type(batch) is Tensor and not batch.is_nested and batch.layout == torch.strided
    if type(batch) is dict:
        return all(_is_plain(value, size) for value in batch.values())
    if _is_list(batch):
        if not _lists_samples(batch):
            return all(_is_plain(value, size) for value in batch)
        return len(batch) == size and not hasattr(batch, "_fields")
    return batch is None or isinstance(batch, str | int | float | bool)


def _is_list(batch: Any) -> bool:
    return type(batch) in (list, tuple) or (isinstance(batch, tuple) and hasattr(batch, "_fields"))


def _lists_samples(batch: Any) -> bool:
    """Whether this is a list without tensors."""
    return _is_list(batch) and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(batch))


def bytes_of(batch: Any) -> int:
    """Bytes of all tensors in a batch."""
    return sum(tensor.nbytes for tensor in tensors_of(batch))


def tensors_of(batch: Any) -> list[Tensor]:
    """Every tensor in a batch, in containers of any kind and in the attributes of any objects.

    Neither `tree_leaves` nor `apply_to_collection` of lightning-utilities looks into sets or into objects that are not
    dataclasses.
    """
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
    """The attributes of an object, including those of a dataclass with slots."""
    names = [field.name for field in fields(one)] if is_dataclass(one) else []
    return {name: getattr(one, name) for name in names if hasattr(one, name)} | getattr(one, "__dict__", {})
