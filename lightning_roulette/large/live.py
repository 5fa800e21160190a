"""The memory of the tensors that code has made and still holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode


class LiveBytes(TorchFunctionMode):
    """Counts the memory of tensors that torch functions return to Python inside the block and that are still alive.

    Views of tensors from outside the block do not count. Results are the same bits as without the block, because
    functions run as usual. What a function needs while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Call a function, and note the memory of its results."""
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor | tuple | list):
            given = {storage._cdata for storage in _storages((args, kwargs))}
            for storage in _storages(found):
                if storage._cdata not in given:
                    self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return found

    def total(self) -> int:
        """Return the number of bytes."""
        self._made = {key: one for key, one in self._made.items() if not one[0].expired()}
        return sum(size for _, size in self._made.values())


def _storages(found: Any) -> Iterator[Any]:
    if isinstance(found, Tensor):
        try:
            yield found.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse tensors have none
            return
    elif isinstance(found, tuple | list):
        for one in found:
            yield from _storages(one)
    elif isinstance(found, Mapping):
        yield from _storages(tuple(found.values()))
