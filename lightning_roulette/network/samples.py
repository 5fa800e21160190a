"""The samples of a batch: count them, take some of them, and join those of several batches.

Containers are those of `network.containers`. In addition, lists that have one entry for each sample are cut and joined
like a tensor, and so are objects that cut and join themselves, as tensordicts do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_roulette.large.digests import strided_parts
from lightning_roulette.network.containers import can_be_rebuilt, leaves_of, parts_of, with_parts
from lightning_roulette.network.containers import tensors_of as tensors_of

_SHARED = (str, int, float, complex, np.generic, Enum, torch.dtype, torch.device, torch.Size, type, type(None))
_IsList = Callable[[Any], bool]


def rows_of(batch: Any) -> int | None:
    """Number of samples in a batch: the first dimension that all its tensors share.

    A batch is a tensor, a NumPy array, or a container of batches: a dict, a `UserDict`, a list, a tuple, a named tuple
    or a dataclass. A list without tensors needs one entry for each sample. If the tensors do not share a first
    dimension, lists of tensors or of dicts, all alike, may also have one entry for each sample; as those of images of
    several sizes and their targets do. Numbers, strings and None belong to all samples. An object with a `batch_size`
    that can be sliced, as a tensordict, counts its samples itself.

    Returns:
        The number; None if the parts do not agree on it, if it is ambiguous, or if the batch has parts of another kind.
    """
    found = _read(batch)
    return None if found is None else found[0]


def taken(batch: Any, rows: slice | Tensor) -> Any:
    """Some samples of a batch, in new containers of the same classes.

    Args:
        batch: A batch for which `rows_of` returns a number.
        rows: A slice, which gives views; or the index of each sample, shape `(m,)`, int64, which gives copies.

    Raises:
        ValueError: If `rows_of` returns None.
    """
    if (read := _read(batch)) is None:
        raise ValueError("The samples of this batch cannot be counted.")
    _, is_list = read

    def part(one: Any) -> Any:
        if isinstance(one, Tensor) or _cuts_itself(one):
            return one[rows if isinstance(rows, slice) else rows.to(one.device)]
        if isinstance(one, np.ndarray):
            return one[rows if isinstance(rows, slice) else rows.cpu().numpy()]
        if is_list(one):
            return one[rows] if isinstance(rows, slice) else type(one)(one[row] for row in rows.tolist())
        parts = parts_of(one)
        return one if parts is None else with_parts(one, {key: part(inner) for key, inner in parts.items()})

    return part(batch)


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
    reads = [_read(batch) for batch in batches]
    if None in reads or len({read[1] for read in reads if read}) > 1:
        return None
    try:
        whole = _joined(batches, cast(tuple[int, _IsList], reads[0])[1])
    except (TypeError, ValueError, RuntimeError, KeyError):
        return None
    return whole if rows_of(whole) == sum(read[0] for read in reads if read) else None


def _joined(batches: Sequence[Any], is_list: _IsList) -> Any:
    first = batches[0]
    if any(type(one) is not type(first) for one in batches):
        raise TypeError
    if isinstance(first, Tensor | np.ndarray):
        if any(one.dtype != first.dtype or one.shape[1:] != first.shape[1:] for one in batches):
            raise ValueError
        return torch.cat(list(batches)) if isinstance(first, Tensor) else np.concatenate(batches)
    if _cuts_itself(first):
        return torch.cat(list(batches))
    if is_list(first):
        return type(first)(entry for one in batches for entry in one)
    return _joined_parts(batches, is_list)


def _joined_parts(batches: Sequence[Any], is_list: _IsList) -> Any:
    first, *others = batches
    if (parts := parts_of(first)) is None:
        if any(one != first for one in others):
            raise ValueError
        return first
    rest = [parts_of(one) or {} for one in others]
    if any(one.keys() != parts.keys() for one in rest):
        raise ValueError
    return with_parts(first, {key: _joined([parts[key], *(one[key] for one in rest)], is_list) for key in parts})


def _read(batch: Any) -> tuple[int, _IsList] | None:
    """The number of samples, and which lists have one entry for each sample; None if it is not known."""
    plain = _size(batch, _is_plain_list)
    if plain is not None and not _has_list_of_dicts(batch):
        return plain, _is_plain_list
    by_entry = _size(batch, _is_list_of_samples, top=True)
    if plain is not None:
        return (plain, _is_plain_list) if by_entry is None else None
    return None if by_entry is None else (by_entry, _is_list_of_samples)


def _size(batch: Any, is_list: _IsList, top: bool = False) -> int | None:
    """The number of samples on which all parts agree; None if they do not, or if there are parts of another kind."""
    counting: set[int | None] = set()  # of parts that count samples
    listed: set[int] = set()

    def look(one: Any, top: bool) -> None:
        if isinstance(one, Tensor | np.ndarray):
            counting.add(one.shape[0] if _is_plain_array(one) else None)
        elif (rows := _own_rows(one)) is not None:
            counting.add(rows)
        elif is_list(one) and not (top and not _is_plain_list(one) and not _lists_dicts(one)):
            (listed if _is_plain_list(one) else counting).add(len(one))
        elif not isinstance(one, PackedSequence) and can_be_rebuilt(one):
            for part in (parts_of(one) or {}).values():
                look(part, False)
        elif not isinstance(one, _SHARED):
            counting.add(None)

    look(batch, top)
    size = next(iter(counting)) if len(counting) == 1 else None
    return size if listed <= {size} else None


def _is_plain_array(one: Tensor | np.ndarray) -> bool:
    """Whether the first dimension of a tensor or an array can be cut."""
    if isinstance(one, Tensor):
        return type(one) is Tensor and not one.is_nested and one.layout == torch.strided and one.dim() > 0
    return type(one) is np.ndarray and one.ndim > 0


def _is_plain_list(one: Any) -> bool:
    """Whether this is a list without tensors and arrays."""
    return type(one) in (list, tuple) and not any(isinstance(leaf, Tensor | np.ndarray) for leaf in leaves_of(one))


def _is_list_of_samples(one: Any) -> bool:
    """Whether this is a list without tensors, or a list of tensors or dicts that are alike."""
    if type(one) not in (list, tuple):
        return False
    kinds = {_kind(entry) for entry in one}
    return _is_plain_list(one) or (len(kinds) == 1 and None not in kinds)


def _kind(entry: Any) -> object:
    """What entries for single samples have in common; None if an entry is neither a tensor nor an array nor a dict."""
    if isinstance(entry, Tensor | np.ndarray):
        return type(entry), entry.dtype, entry.ndim
    return (type(entry), frozenset(entry)) if isinstance(entry, Mapping) else None


def _lists_dicts(one: Any) -> bool:
    return type(one) is list and bool(one) and isinstance(one[0], Mapping) and not _is_plain_list(one)


def _has_list_of_dicts(batch: Any) -> bool:
    return _lists_dicts(batch) or any(_has_list_of_dicts(part) for part in (parts_of(batch) or {}).values())


def _cuts_itself(one: Any) -> bool:
    return _own_rows(one) is not None


def _own_rows(one: Any) -> int | None:
    """The number of samples of an object that can be sliced and has a `batch_size`; None for other objects."""
    if isinstance(one, Tensor | np.ndarray | list | tuple | dict | str) or not hasattr(type(one), "__getitem__"):
        return None
    size = getattr(one, "batch_size", None)
    if not isinstance(size, tuple) or not size:
        return None
    try:
        part = one[:1]
        return int(size[0]) if type(part) is type(one) and part.batch_size[0] == min(1, size[0]) else None
    except Exception:
        return None


def bytes_of(batch: Any) -> int:
    """Bytes of all tensors, arrays, images, strings and numbers in a batch."""
    return sum(_bytes(leaf) for leaf in leaves_of(batch))


def _bytes(leaf: Any) -> int:
    if isinstance(leaf, Tensor):
        return sum(part.nbytes for part in strided_parts(leaf))
    if isinstance(leaf, str | bytes | bytearray | int | float):
        return sys.getsizeof(leaf)
    if isinstance(size := getattr(leaf, "nbytes", None), int):
        return size
    if callable(bands := getattr(leaf, "getbands", None)) and isinstance(size := getattr(leaf, "size", None), tuple):
        return int(np.prod(size)) * len(bands())
    return 0
