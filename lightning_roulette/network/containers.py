"""The parts of a container, and the same container with other parts; everything that a batch holds.

A container is a list, a tuple, a named tuple, a dict or `UserDict`, or a dataclass; classes that derive from the last
four keep their class and the other attributes of their instances.
"""

from __future__ import annotations

import copy
from collections import UserDict, deque
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

Parts = dict[tuple[str, Hashable], Any]


def parts_of(one: Any) -> Parts | None:
    """The parts of a container, each by what it is (an item or an attribute) and its key; None for other objects."""
    if type(one) in (list, tuple) or _is_named_tuple(one):
        return {("item", place): part for place, part in enumerate(one)}
    if isinstance(one, dict | UserDict):
        items: Parts = {("item", key): part for key, part in one.items()}
        hidden = one.data if isinstance(one, UserDict) else None
        own = {("attribute", name): part for name, part in attributes_of(one).items() if part is not hidden}
        return items | own
    if is_dataclass(one) and not isinstance(one, type):
        return {("attribute", name): part for name, part in attributes_of(one).items()}
    return None


def with_parts(one: Any, parts: Parts) -> Any:
    """A new container like another one, with other parts.

    Args:
        one: The container.
        parts: A part for each key of `parts_of(one)`.
    """
    if isinstance(one, list | tuple):
        return cast(Any, type(one))._make(parts.values()) if _is_named_tuple(one) else type(one)(parts.values())
    twin = copy.copy(one)
    for (kind, key), part in parts.items():
        if kind == "item":
            twin[key] = part
        else:
            object.__setattr__(twin, cast(str, key), part)  # works for a frozen dataclass too
    return twin


def can_be_rebuilt(one: Any) -> bool:
    """Whether `with_parts` gives a container of the same class with just the parts that it is given."""
    parts = parts_of(one)
    if parts is None:
        return False
    try:
        twin = with_parts(one, parts)
        again = parts_of(twin)
    except Exception:
        return False
    same = again is not None and again.keys() == parts.keys() and all(again[key] is parts[key] for key in parts)
    return same and type(twin) is type(one)


def rebuilt(batch: Any, copies: bool) -> Any:
    """A batch with the same tensors, or copies of them, in new containers.

    `apply_to_collection` of lightning-utilities refuses frozen dataclasses and leaves other objects as they are;
    `torch.utils._pytree` also leaves dataclasses and `UserDict` as they are. A step may write into all of these.

    Args:
        batch: A tensor, or containers and objects that hold tensors.
        copies: Whether to copy the tensors. Objects that cannot be copied are passed on.
    """
    if isinstance(batch, Tensor):
        return batch.clone() if copies else batch
    if (parts := parts_of(batch)) is not None:
        try:
            return with_parts(batch, {key: rebuilt(part, copies) for key, part in parts.items()})
        except Exception:  # a class that takes no assignments
            return _copied(batch, copies)
    return _copied(batch, copies)


def _copied(one: Any, deep: bool) -> Any:
    try:
        return copy.deepcopy(one) if deep else copy.copy(one)
    except Exception:  # an open file, a lock
        return one


def tensors_of(batch: Any) -> list[Tensor]:
    """Every tensor in a batch, in containers of any kind and in the attributes of any objects.

    Neither `tree_leaves` nor `apply_to_collection` of lightning-utilities looks into sets or into objects that are not
    dataclasses.
    """
    return [one for one in leaves_of(batch) if isinstance(one, Tensor)]


def leaves_of(batch: Any) -> Iterator[Any]:
    """Everything in a batch that is no container, in containers of any kind and in the attributes of any objects."""
    seen: set[int] = set()
    waiting = [batch]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            yield one
            continue
        if id(one) in seen or isinstance(one, type | nn.Module):
            continue
        if isinstance(one, str | bytes | bytearray | memoryview | int | float):
            yield one
            continue
        seen.add(id(one))
        waiting += _inside(one)
        if not isinstance(one, Mapping | list | tuple | set | frozenset | deque):
            yield one


def _inside(one: Any) -> list[Any]:
    if isinstance(one, Mapping):
        return list((parts_of(one) or one).values())
    if isinstance(one, list | tuple | set | frozenset | deque):
        return list(one)
    if isinstance(one, np.ndarray):
        return cast(list[Any], one.ravel().tolist()) if one.dtype.hasobject else []
    return list(attributes_of(one).values())


def attributes_of(one: Any) -> dict[str, Any]:
    """The attributes of an object, including those in slots."""
    if isinstance(one, type):
        return {}
    names = [field.name for field in fields(one)] if is_dataclass(one) else []
    slots = (getattr(base, "__slots__", ()) for base in type(one).__mro__)
    names += chain.from_iterable([each] if isinstance(each, str) else each for each in slots)
    # not getattr: a class may compute attributes that are no part of its instances
    found = {name: _slot(one, name) for name in names if not name.startswith("__")}
    return {name: part for name, part in found.items() if part is not _ABSENT} | getattr(one, "__dict__", {})


_ABSENT = object()


def _slot(one: Any, name: str) -> Any:
    try:
        return object.__getattribute__(one, name)
    except AttributeError:
        return _ABSENT


def _is_named_tuple(one: Any) -> bool:
    return isinstance(one, tuple) and hasattr(one, "_fields") and hasattr(one, "_make")
