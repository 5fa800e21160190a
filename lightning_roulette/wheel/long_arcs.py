"""Arcs of large networks: nothing is held for each weight, and each spin makes all keys again from the importance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from lightning_roulette.large.bits import Bits
from lightning_roulette.mask.mask import Mask
from lightning_roulette.wheel.arcs import Arc, Cut, HeldArc, block_size, only_here
from lightning_roulette.wheel.importance import flat_importance
from lightning_roulette.wheel.law import Law, check_importance, keys_of, smallest_positive


@dataclass(frozen=True, eq=False)
class LongArc(Arc):
    """An arc that makes its terms again for each block of weights.

    Attributes:
        name: Name of the parameter.
        parent: Its mask, packed.
        importance: Returns the importance of the weights from one index of the flattened parameter to another.
        law: Makes terms of importances.
        counts: Number of survivors in each block of weights.
    """

    name: str
    parent: Bits
    importance: Callable[[int, int], Tensor]
    law: Law
    counts: Sequence[int]

    @property
    def size(self) -> int:
        """Number of weights of the parameter, kept or not."""
        return self.parent.numel()

    @property
    def count(self) -> int:
        """Number of survivors."""
        return sum(self.counts)

    @property
    def device(self) -> torch.device:
        """Device of the survivors."""
        return self.parent.device

    def at(self, positions: Tensor) -> HeldArc:
        """Return the survivors at these positions, which are ascending and count from 0."""
        ends = torch.tensor([0, *accumulate(self.counts)], device=positions.device)
        parts = positions.tensor_split(torch.searchsorted(positions, ends[1:]).tolist())
        index = [torch.empty(0, dtype=torch.int64, device=self.device)]
        terms = [torch.empty(0, dtype=torch.float64, device=self.device)]
        for (_, _, places, values), part, end in zip(self._blocks(), parts, ends.tolist(), strict=False):
            index.append(places[part - end])
            terms.append(self.law.terms(values[part - end]))
        return HeldArc(self.name, self.parent.shape, torch.cat(index), torch.cat(terms))

    def all_keys(self, streams: Mapping[str, int]) -> Iterator[Tensor]:
        """Yield the keys of all survivors, one block at a time."""
        for _, _, places, values in self._blocks():
            yield keys_of(self.law.terms(values), streams.get(self.name), places)

    def cut(self, streams: Mapping[str, int], low: float, high: float) -> LongCut:
        """Compare all keys with two numbers between which the threshold may lie."""
        kept = Bits.empty(self.parent.shape, self.device)
        near = [torch.empty(0, dtype=torch.int64, device=self.device)]
        near_keys = [torch.empty(0, dtype=torch.float64, device=self.device)]
        for start, stop, places, values in self._blocks():
            keys = keys_of(self.law.terms(values), streams.get(self.name), places)
            stays = keys >= low
            found = stays.logical_and(keys <= high).nonzero().flatten()
            near.append(places[found])
            near_keys.append(keys[found])
            if len(places) < stop - start:
                stays = stays.new_zeros(stop - start).scatter_(0, places - start, stays)
            kept.write(start, stays)
        return LongCut(kept, torch.cat(near), torch.cat(near_keys))

    def smallest_positive(self) -> float:
        """Return the smallest importance above zero of the survivors; infinity if there is none."""
        return min((smallest_positive(values) for _, _, _, values in self._blocks()), default=math.inf)

    def check(self) -> float:
        """Return the smallest importance of all weights; raise `ValueError` if one is negative or not finite."""
        return min((check_importance(self.name, self.importance(*span)) for span in self._spans()), default=math.inf)

    def _spans(self) -> Iterator[tuple[int, int]]:
        return self.parent.blocks(block_size(self.device))

    def _blocks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yield for each block its first index, its end, the indices of its survivors, and their importance."""
        for (start, stop), count in zip(self._spans(), self.counts, strict=True):
            values = self.importance(start, stop)
            if count == stop - start:
                yield start, stop, torch.arange(start, stop, device=self.device), values
            else:
                local = self.parent.part(start, stop).nonzero().flatten()
                yield start, stop, local + start, values[local]


@dataclass(frozen=True, eq=False)
class LongCut(Cut):
    """A cut whose mask is packed."""

    kept: Bits

    @property
    def staying(self) -> int:
        """Number of weights that stay."""
        return self.kept.count()

    def without(self, drawn: Tensor) -> Bits:
        """Remove some of the weights at `places` from `kept`, in place: bool, one for each place."""
        self.kept.clear(self.places[drawn])
        return self.kept


def long_arcs(
    importance: Mapping[str, Tensor],
    parent: Mask,
    sharpness: float,
    least_of: Callable[[float], float] = only_here,
) -> dict[str, LongArc]:
    """Make the arcs of a mask. They hold only the importance and the mask.

    Args:
        importance: Parameter name to tensor.
        parent: The mask whose survivors are on the wheel.
        sharpness: Exponent of the odds.
        least_of: Returns the minimum of a number over all processes.

    Raises:
        ValueError: If an importance is negative or not finite.
    """
    arcs = {name: _arc(importance, name, kept.bits(), sharpness) for name, kept in parent.flags.items()}
    smallest = least_of(min((arc.check() for arc in arcs.values()), default=math.inf))
    if smallest == 0 and 0 < sharpness < math.inf:  # in any process
        smallest = least_of(min((arc.smallest_positive() for arc in arcs.values()), default=math.inf))
    law = Law.of(sharpness, smallest)
    return {name: replace(arc, law=law) for name, arc in arcs.items()}


def _arc(importance: Mapping[str, Tensor], name: str, parent: Bits, sharpness: float) -> LongArc:
    counts = [parent.count(*block) for block in parent.blocks(block_size(parent.device))]
    return LongArc(name, parent, partial(flat_importance, importance, name, parent.device), Law(sharpness), counts)
