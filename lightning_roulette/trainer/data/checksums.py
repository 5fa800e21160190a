"""Checksums of batches that are kept in memory. They find changes that torch's version counters do not see."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_roulette.large.digests import digests_of, strided_parts
from lightning_roulette.network.containers import leaves_of
from lightning_roulette.trainer.data.containers import write_counts
from lightning_roulette.trainer.pace import PacedCheck


class Checksums(PacedCheck):
    """The checksums of batches that are kept, which are compared with the batches from time to time.

    A check reads all batches once.

    Args:
        contents: The batches, by names for error messages.
    """

    def __init__(self, contents: Mapping[str, Any]) -> None:
        super().__init__()
        self._leaves = {name: _buffers(batch) for name, batch in contents.items()}
        with self.measured():
            self._sums = _sums_of(list(self._leaves.values()))
        self._tensors = [one for found in self._leaves.values() for one in found if isinstance(one, Tensor)]
        self._counts = write_counts(self._tensors)
        self._clock = time.strftime("%H:%M:%S")

    def altered(self) -> bool:
        """Return whether a batch has been written to."""
        return write_counts(self._tensors) != self._counts or bool(self._changed())

    def check(self) -> None:
        """Compare all batches.

        Raises:
            RuntimeError: If a batch has been written to since the last check.
        """
        before, self._clock = self._clock, time.strftime("%H:%M:%S")
        with self.measured():
            changed = self._changed()
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise RuntimeError(
                f"RouletteWheelPruning: {changed[0]}{more} of the validation data was written to between {before} and "
                f"{self._clock}, which no validation did before. Scores since {before} cannot be trusted, so "
                "the search ends. The network is dense, as before the search. Let the step write into a copy, for "
                "example with x = x.clone() before x.numpy(), x.data or an operation in place."
            )

    def _changed(self) -> list[str]:
        now = _sums_of(list(self._leaves.values()))
        return [name for name, one, other in zip(self._leaves, self._sums, now, strict=True) if one != other]


def checksums_of(batch: Any) -> tuple[object, ...]:
    """Return the checksums of the tensors, arrays and byte arrays in a batch."""
    return _sums_of([_buffers(batch)])[0]


@torch.no_grad()
def sum_of(batches: Iterable[Any]) -> int:
    """Return one number for all values in batches, whatever their order is and however they are grouped."""
    return sum(_sum(one) for batch in batches for one in _buffers(batch)) % 2**64


def _sum(one: Any) -> int:
    if isinstance(one, Tensor):
        words = [part.contiguous().view(-1).view(_word(part)) for part in strided_parts(one.detach())]
        return sum(int(part.sum(dtype=torch.int64)) for part in words)
    if isinstance(one, np.ndarray):
        return 0 if one.dtype.hasobject else int(np.ascontiguousarray(one).reshape(-1).view(np.uint8).sum())
    return sum(bytes(one))


def _word(part: Tensor) -> torch.dtype:
    return torch.uint8 if part.element_size() % 4 else torch.int32


def _sums_of(batches: list[list[Any]]) -> list[tuple[object, ...]]:
    """Return the checksums of some lists of buffers, with one synchronisation for each device."""
    digests = iter(digests_of([one for buffers in batches for one in buffers if isinstance(one, Tensor)]))
    return [tuple(next(digests) if isinstance(one, Tensor) else _digest(one) for one in buffers) for buffers in batches]


def _buffers(batch: Any) -> list[Any]:
    """What in a batch can be written to: tensors, arrays and byte arrays. Object arrays count by their entries."""
    return [one for one in leaves_of(batch) if isinstance(one, Tensor | np.ndarray | bytearray | memoryview)]


def _digest(one: Any) -> object:
    if not isinstance(one, np.ndarray):
        return blake2b(bytes(one), digest_size=8).digest()
    if one.dtype.hasobject:
        return one.shape
    raw = np.ascontiguousarray(one).reshape(-1).view(np.uint8)
    return one.dtype.str, one.shape, blake2b(raw.data, digest_size=8).digest()
