"""Copies of tensors, in a temporary file if they would take too much memory."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_roulette.large.bits import flat_part
from lightning_roulette.large.limits import limits
from lightning_roulette.large.shards import any_sharded


def copies_of(tensors: Mapping[str, Tensor], held: int = 0) -> Mapping[str, Tensor]:
    """Copies of tensors on the CPU, or of shards on their own device.

    More than `limits().copied_bytes` go to a temporary file if it can be written. Shards always stay in memory.

    Args:
        tensors: The tensors.
        held: Bytes of earlier copies in memory, which count too.
    """
    if any_sharded(tensors.values()):
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}
    if held + sum(tensor.nbytes for tensor in tensors.values()) > limits().copied_bytes:
        try:
            return OnDisk(tensors)
        except OSError:  # the disk is full, or there is no folder for temporary files
            pass
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a file.

    Attributes:
        start: Position of its first byte.
        shape: Shape of the tensor.
        dtype: Type of the tensor.
    """

    start: int
    shape: torch.Size
    dtype: torch.dtype


class TensorFile:
    """Tensors in a temporary file, which is deleted with this object.

    Raises:
        OSError: If there is no folder for temporary files.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # it stays open as long as this object lives
        weakref.finalize(self, self._file.close)

    def add(self, tensor: Tensor) -> Place:
        """Append the values of a tensor.

        Raises:
            OSError: If they cannot be written.
        """
        place = Place(self._file.seek(0, os.SEEK_END), tensor.shape, tensor.dtype)
        for start in range(0, tensor.numel(), limits().written_entries):
            stop = min(start + limits().written_entries, tensor.numel())
            self._file.write(_bytes_of(flat_part(tensor.detach(), start, stop).cpu()))
        self._file.flush()
        return place

    def read(self, place: Place, what: str) -> Tensor:
        """Return a tensor on the CPU, contiguous.

        Args:
            place: Where it is.
            what: What it holds, for the error message.

        Raises:
            OSError: If the file has become too short.
        """
        found = torch.empty(place.shape, dtype=place.dtype)
        self._file.seek(place.start)
        if self._file.readinto(_bytes_of(found.view(-1))) != found.nbytes:
            raise OSError(f"the temporary file with {what} is too short. Another process changed it.")
        return found


class OnDisk(Mapping[str, Tensor]):
    """Copies of tensors in a temporary file, which is deleted with this object. Each access reads a tensor again.

    Args:
        tensors: Copied when this object is made. Copies are contiguous.

    Raises:
        OSError: If they cannot be written.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._file = TensorFile()
        self._places = {name: self._file.add(tensor) for name, tensor in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._file.read(self._places[name], f"the weights of {name!r}")

    def __contains__(self, name: object) -> bool:
        return name in self._places  # Mapping's own method would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return OnDisk, (dict(self),)


def _bytes_of(flat: Tensor) -> memoryview:
    """The bytes of a flat tensor on the CPU; a view where it is contiguous."""
    found: memoryview = flat.contiguous().view(torch.uint8).numpy().data
    return found
