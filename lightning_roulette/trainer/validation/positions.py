"""The position of a stream: what an iterable data set, or a loader that is its own iterator, remembers between passes.

Data sets that are asked by index have no position and are left alone. A data set that is read by workers moves in the
workers only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import GeneratorType
from typing import Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lightning_roulette.trainer.validation.attributes import CONTAINERS, refill

_LARGEST = 1 << 12  # entries of a container that is looked into; a larger one holds the data itself


class Position:
    """The position of a stream at the time it is made.

    These are put back:

    - plain attributes, the contents of small containers and the values of tensors in them, and iterators that can be
      copied;
    - the positions of open files;
    - what `state_dict` returns, by `load_state_dict`, if the stream has both, and it differs or the rest cannot be
      put back. Otherwise it is not loaded, as some data sets begin the next pass at the end of a finished one then.

    Objects that the stream holds are streams too, if they are data sets or iterators.

    Args:
        stream: The data set or the loader.

    Attributes:
        lost: Names of attributes that cannot be put back, for example of generators.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._before = dict(vars(stream)) if hasattr(stream, "__dict__") else {}
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._copies = {name: copied for name, one in self._before.items() if (copied := _copied(one)) is not None}
        self._files = [(one, at) for one in self._before.values() if (at := _place(one)) is not None]
        self._state = copy.deepcopy(stream.state_dict()) if _has_state(stream) else None
        waiting = list(self._before.values())
        self._inner = [Position(one) for one in waiting if _is_stream(one) and not _is_builtin_iterator(one)]
        while waiting:
            one = waiting.pop()
            if isinstance(one, Tensor) and one.numel() <= _LARGEST:
                self._contents[id(one)] = one, one.clone()
            elif type(one) in CONTAINERS and id(one) not in self._contents and len(one) <= _LARGEST:
                self._contents[id(one)] = one, copy.copy(one)
                waiting += one.values() if isinstance(one, dict) else one
        known = {id(one) for one, _ in self._files}
        moving = [name for name, one in self._before.items() if _moves(one) and id(one) not in known]
        moving = [name for name in moving if name not in self._copies]
        self._must_load = bool(moving) and self._state is not None
        self.lost = [] if self._must_load else [f"{type(stream).__name__}.{name}" for name in moving]
        self.lost += [name for inner in self._inner for name in inner.lost]
        if isinstance(stream, GeneratorType) or (isinstance(stream, Iterator) and not self._before and not self._state):
            self.lost.append(type(stream).__name__)

    def restore(self) -> None:
        """Put the stream back."""
        if self._before:
            attributes = vars(self._stream)
            for name in attributes.keys() - self._before.keys():
                del attributes[name]
            attributes.update(self._before)
            for name, copied in self._copies.items():
                attributes[name] = copy.copy(copied)
        for one, before in self._contents.values():
            _put_back(one, before)
        for file, at in self._files:
            with suppress(OSError, ValueError):
                file.seek(at)
        for inner in self._inner:
            inner.restore()
        if self._must_load or (self._state is not None and not _equal(self._stream.state_dict(), self._state)):
            self._stream.load_state_dict(copy.deepcopy(self._state))


def streams_of(loaders: Iterable[Any]) -> list[Any]:
    """Return the data sets and loaders that may remember a position."""
    return [one for loader in loaders for one in (loader, getattr(loader, "dataset", None)) if _is_stream(one)]


def _is_stream(one: Any) -> bool:
    if isinstance(one, IterableDataset):
        return True
    return isinstance(one, Iterator) and not isinstance(one, nn.Module) and not hasattr(one, "read")


def _is_builtin_iterator(one: Any) -> bool:
    return isinstance(one, Iterator) and not hasattr(one, "__dict__")


def _has_state(one: Any) -> bool:
    return callable(getattr(one, "state_dict", None)) and callable(getattr(one, "load_state_dict", None))


def _moves(one: Any) -> bool:
    return isinstance(one, GeneratorType) or hasattr(one, "readline") or _is_builtin_iterator(one)


def _copied(one: Any) -> Any | None:
    """Return a copy of an iterator that can be copied; None for all else."""
    if not _is_builtin_iterator(one) or isinstance(one, GeneratorType) or hasattr(one, "read"):
        return None
    try:
        return copy.copy(one)
    except TypeError:
        return None


def _place(one: Any) -> int | None:
    """Return the position of an open file; None for all else."""
    if not (hasattr(one, "seek") and hasattr(one, "tell") and not getattr(one, "closed", False)):
        return None
    try:
        return int(one.tell()) if one.seekable() else None
    except (OSError, ValueError, AttributeError):
        return None


def _put_back(one: Any, before: Any) -> None:
    if isinstance(one, Tensor):
        one.detach().copy_(before)
    else:
        refill(one, before)


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):  # tensors or arrays inside
        return False
