"""Arcs: the survivors of one parameter, with the operations that a search for the threshold needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_roulette.large.bits import Bits
from lightning_roulette.large.limits import limits
from lightning_roulette.mask.mask import Mask
from lightning_roulette.wheel.law import Law, check_importance, keys_of, smallest_positive

Kept: TypeAlias = Tensor | Bits  # the mask of one parameter, as `Mask` takes it
EVERY = slice(0, None)


class Arc(ABC):
    """The survivors of one parameter, in order of index.

    Streams of chance are passed as a dictionary from parameter name to stream. It is empty if the sharpness is
    infinite. The keys are then the terms alone.

    Attributes:
        name: Name of the parameter.
    """

    name: str

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of weights of the parameter, kept or not."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of survivors."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the survivors."""

    @abstractmethod
    def at(self, positions: Tensor) -> HeldArc:
        """Return the survivors at these positions, which are ascending and count from 0."""

    @abstractmethod
    def all_keys(self, streams: Mapping[str, int]) -> Iterator[Tensor]:
        """Yield the keys of all survivors, one block at a time."""

    @abstractmethod
    def cut(self, streams: Mapping[str, int], low: float, high: float) -> Cut:
        """Compare all keys with two numbers between which the threshold may lie."""


@dataclass(frozen=True, eq=False)
class Cut(ABC):
    """One parameter after its keys were compared with two numbers, `low` and `high`.

    Attributes:
        kept: Whether each weight stays. It stays if its key is at least `low`.
        places: Indices, in the flattened parameter, of the weights with keys from `low` to `high`.
        keys: Their keys.
    """

    kept: Kept
    places: Tensor
    keys: Tensor

    @property
    @abstractmethod
    def staying(self) -> int:
        """Number of weights that stay."""

    @abstractmethod
    def without(self, drawn: Tensor) -> Kept:
        """Remove some of the weights at `places` from `kept`, in place: bool, one for each place."""


@dataclass(frozen=True, eq=False)
class HeldCut(Cut):
    """A cut whose mask is a tensor."""

    kept: Tensor

    @property
    def staying(self) -> int:
        """Number of weights that stay."""
        return int(self.kept.count_nonzero())

    def without(self, drawn: Tensor) -> Tensor:
        """Remove some of the weights at `places` from `kept`, in place: bool, one for each place."""
        self.kept.view(-1)[self.places[drawn]] = False
        return self.kept


@dataclass(frozen=True, eq=False)
class HeldArc(Arc):
    """An arc that holds the term and the index of each survivor: at most 16 bytes per survivor.

    Attributes:
        name: Name of the parameter.
        shape: Its shape.
        index: Index of each survivor in the flattened parameter. None: all weights survive.
        terms: The term of each survivor, see `Law.terms`.
    """

    name: str
    shape: torch.Size
    index: Tensor | None
    terms: Tensor

    @property
    def size(self) -> int:
        """Number of weights of the parameter, kept or not."""
        return self.shape.numel()

    @property
    def count(self) -> int:
        """Number of survivors."""
        return len(self.terms)

    @property
    def device(self) -> torch.device:
        """Device of the survivors."""
        return self.terms.device

    def at(self, positions: Tensor) -> HeldArc:
        """Return the survivors at these positions, which are ascending and count from 0."""
        index = positions if self.index is None else self.index[positions]
        return HeldArc(self.name, self.shape, index, self.terms[positions])

    def all_keys(self, streams: Mapping[str, int]) -> Iterator[Tensor]:
        """Yield the keys of all survivors, one block at a time."""
        return (self.keys(streams, block, self.places(block)) for block in self.blocks())

    def cut(self, streams: Mapping[str, int], low: float, high: float) -> HeldCut:
        """Compare all keys with two numbers between which the threshold may lie."""
        kept = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        near = torch.empty(self.count, dtype=torch.bool, device=self.device)
        for block in self.blocks():
            places = self.places(block)
            keys = self.keys(streams, block, places)
            stays = keys >= low
            self.write(kept, block, stays)
            near[block] = stays.logical_and_(keys <= high)
        found = self.at(near.nonzero().flatten())
        places = found.places(EVERY)
        return HeldCut(kept.view(self.shape), places, found.keys(streams, EVERY, places))

    def blocks(self) -> Iterator[slice]:
        """Yield the positions of each block. Without survivors there is one empty block."""
        size = block_size(self.device)
        return (slice(start, start + size) for start in range(0, max(1, self.count), size))

    def places(self, block: slice) -> Tensor:
        """Return the indices of a block of survivors in the flattened parameter, int64."""
        if self.index is None:
            return torch.arange(block.start, min(block.stop or self.count, self.count), device=self.device)
        return self.index[block].to(torch.int64)

    def keys(self, streams: Mapping[str, int], block: slice, places: Tensor) -> Tensor:
        """Return the keys of a block of survivors, float64; `places` are its indices."""
        return keys_of(self.terms[block], streams.get(self.name), places)

    def write(self, kept: Tensor, block: slice, stays: Tensor) -> None:
        """Write into the flat mask `kept` whether each survivor of a block stays."""
        if self.index is None:
            kept[block] = stays
        else:
            kept.scatter_(0, self.places(block), stays)


def only_here(value: float) -> float:
    """Return the number itself, which is its minimum over one process."""
    return value


def held_arcs(
    importance: Mapping[str, Tensor],
    parent: Mask,
    sharpness: float,
    least_of: Callable[[float], float] = only_here,
) -> dict[str, HeldArc]:
    """Make the arcs of a mask. Each arc holds its terms.

    Args:
        importance: Parameter name to tensor.
        parent: The mask whose survivors are on the wheel.
        sharpness: Exponent of the odds.
        least_of: Returns the minimum of a number over all processes.

    Raises:
        ValueError: If an importance is negative or not finite.
    """
    index, values = {}, {}
    for name, kept in parent.items():
        check_importance(name, importance[name])
        index[name] = _index_of(kept)
        values[name] = _at(importance[name].detach().to(kept.device), index[name])
    law = Law.of(sharpness, least_of(min(map(smallest_positive, values.values()), default=math.inf)))
    return {
        name: HeldArc(name, kept.shape, index[name], law.terms(values[name])) for name, kept in parent.stored.items()
    }


def block_size(device: torch.device) -> int:
    """Return how many keys are made at a time on a device."""
    return limits().block_keys if device.type == "cpu" else limits().block_keys_off_cpu


def _index_of(kept: Tensor) -> Tensor | None:
    """Return the indices of the survivors in the smallest type that holds them; None if all weights survive."""
    if bool(kept.all()):
        return None
    fits = kept.numel() <= torch.iinfo(torch.int32).max
    return kept.flatten().nonzero().flatten().to(torch.int32 if fits else torch.int64)


def _at(importance: Tensor, index: Tensor | None) -> Tensor:
    """Return a new flat tensor of the survivors' importance."""
    return importance.flatten().clone() if index is None else importance.flatten()[index]
