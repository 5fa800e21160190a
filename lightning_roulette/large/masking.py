"""Masking of tensors that may be sharded, or too large to be masked in one operation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_roulette.large.bits import Flags, is_small
from lightning_roulette.large.limits import limits
from lightning_roulette.large.shards import local, part_of, start_of


def pruned_parts(tensor: Tensor, kept: Flags) -> Iterator[tuple[Tensor, Tensor]]:
    """The parts of a tensor that this process holds, as views, each with a bool tensor that is True where pruned.

    A large tensor is divided into blocks of rows with at most `limits().masked_entries` entries.

    Args:
        tensor: The weight.
        kept: The mask of the whole weight, True where kept.
    """
    ours = local(tensor)
    if is_small(kept):
        yield ours, ~part_of(kept, tensor).to(ours.device)
        return
    if not ours.numel():
        return
    start, row = start_of(tensor), ours[0].numel()
    rows = max(1, limits().masked_entries // row)
    for first in range(0, len(ours), rows):
        part = ours[first : first + rows]
        begin = start + first * row
        yield part, ~kept.part(begin, begin + part.numel()).view(part.shape).to(part.device)


def fill(tensor: Tensor, kept: Flags) -> None:
    """Write zero into a tensor, in place, wherever `kept` is False."""
    for part, gone in pruned_parts(tensor, kept):
        part.masked_fill_(gone, 0)


def masked(tensor: Tensor, kept: Flags) -> Tensor:
    """A contiguous copy of a tensor that is zero wherever `kept` is False."""
    copy = tensor.clone(memory_format=torch.contiguous_format)
    fill(copy, kept)
    return copy


class RemovedValues:
    """The values of a large weight that a mask removes, set aside so that they can be written back.

    Args:
        weight: The weight, before the mask is applied.
        kept: The mask, True where kept.

    Attributes:
        values: The removed values in order of index, flat.
    """

    def __init__(self, weight: Tensor, kept: Flags) -> None:
        self._weight, self._kept = weight, kept
        self.values = local(weight).new_empty(self._count())
        place = 0
        for part, gone in self._parts():
            values = part[gone]
            self.values[place : place + len(values)] = values
            place += len(values)

    def fill(self) -> None:
        """Write zero wherever the weight is pruned."""
        for part, gone in self._parts():
            part.masked_fill_(gone, 0)

    def give_back(self) -> None:
        """Write the removed values back. May be repeated."""
        place = 0
        for part, gone in self._parts():
            part.masked_scatter_(gone, self.values[place:])
            place += int(gone.count_nonzero())

    def _count(self) -> int:
        if local(self._weight) is self._weight:
            return self._kept.numel() - self._kept.count()
        return sum(int(gone.count_nonzero()) for _, gone in pruned_parts(self._weight, self._kept))

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of the weight; none if nothing is removed here."""
        return pruned_parts(self._weight, self._kept) if len(self.values) else iter(())
