"""The plain attributes of objects, and the contents of the containers in them."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Sequence
from typing import Any

from torch import nn

CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict)

_MODULE_PARTS = frozenset(vars(nn.Module()))


class PlainAttributes:
    """The plain attributes of some objects, and the contents of the lists, dicts and sets in them.

    Containers keep their identity, because other objects may hold the same list.

    Args:
        holders: The `vars` of each object. The attributes that `nn.Module` itself needs are left alone.
    """

    def __init__(self, holders: Sequence[dict[str, Any]]) -> None:
        self._before = [
            (holder, {name: one for name, one in holder.items() if name not in _MODULE_PARTS}) for holder in holders
        ]
        self._contents: dict[int, tuple[Any, Any]] = {}  # each container by its id, and a shallow copy
        for _, before in self._before:
            self._copy_containers(list(before.values()))

    def restore(self) -> None:
        """Put everything back, in the same containers."""
        for attributes, before in self._before:
            for name in attributes.keys() - before.keys() - _MODULE_PARTS:
                del attributes[name]
            attributes.update(before)
        for container, contents in self._contents.values():
            refill(container, contents)

    def _copy_containers(self, waiting: list[Any]) -> None:
        while waiting:
            one = waiting.pop()
            if isinstance(one, tuple):
                waiting += one
            elif type(one) in CONTAINERS and id(one) not in self._contents:
                self._contents[id(one)] = one, copy.copy(one)
                waiting += one.values() if isinstance(one, dict) else one


def refill(container: Any, contents: Any) -> None:
    """Give a container the contents of another one of its class. It keeps its identity."""
    container.clear()
    if isinstance(container, list | deque):
        container.extend(contents)
    else:
        container.update(contents)
