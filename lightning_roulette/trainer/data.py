"""Validation batches dealt to folds at random, and kept in memory as far as that is allowed."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_roulette.network.samples import attributes_of, bytes_of, joined, rows_of, taken, tensors_of
from lightning_roulette.wheel.chance import random_bits, stream

FOLDS = 16

# Reads the loaders from the first batch to the last: each batch with the number of its loader.
Read = Callable[[], Iterator[tuple[Any, int]]]


class FoldedData(Protocol):
    """Validation data in folds.

    Attributes:
        folds: How many there are.
        whole: Why there is only one, else empty.
        at_once: How many of them fit into memory.
        at_least: How many of them make up no more than a single batch.
    """

    folds: int
    whole: str
    at_once: int
    at_least: int

    def of(self, folds: Sequence[int]) -> Iterator[tuple[Any, int]]:
        """The batches of some folds, each with the number of its loader; in the order of the loaders."""
        ...

    def counts(self, folds: Sequence[int]) -> list[int]:
        """How many batches of each loader those are."""
        ...

    def altered(self) -> bool:
        """Whether a validation has written into a tensor that is kept."""
        ...


def dealt(
    read: Read,
    lengths: Sequence[float],
    seed: int,
    cache_bytes: int,
    copies: bool = False,
    by_rows: bool = False,
    whole: str = "",
) -> KeptData | StreamedData:
    """The data of some loaders, dealt to folds.

    Whole batches are dealt where each loader gives at least 16, else single samples, where batches can be split.

    Args:
        read: Reads the loaders, the same batches each time.
        lengths: How many batches each loader has, infinity where that is unknown: these are dealt in turn.
        seed: Of the permutation by which the others are dealt.
        cache_bytes: If the batches take more than this, the loaders are read again when a fold is asked for that is not
            kept.
        copies: Whether to give out copies of the tensors that are kept: for a module that writes into its batches.
        by_rows: Whether to deal single samples wherever batches can be split: of batches in some order, by class say,
            whole ones are no independent samples.
        whole: Why the data is not to be divided: then it is one fold. Empty if it is.
    """
    kept: dict[int, list[Any]] = {loader: [] for loader in range(len(lengths))}
    sizes: dict[int, list[int]] = {loader: [] for loader in range(len(lengths))}
    total = 0
    for batch, loader in read():
        sizes[loader].append(bytes_of(batch))
        total += sizes[loader][-1]
        if total <= cache_bytes:
            kept[loader].append(batch)
        else:
            kept = {loader: [] for loader in kept}
    if total <= cache_bytes:
        return KeptData(kept, lengths, seed, copies, whole, by_rows)
    return StreamedData(read, sizes, lengths, seed, cache_bytes, copies, whole)


class KeptData:
    """Batches that are all in memory.

    Args:
        batches: Of each loader, in its order.
        lengths: See `dealt`.
        seed: See `dealt`.
        copies: See `dealt`.
        whole: Why they are not to be divided; empty if they are.
        by_rows: See `dealt`.

    Attributes:
        uncut: The batches of each loader as they were read, if some were cut: until it is forgotten.
    """

    def __init__(
        self,
        batches: Mapping[int, list[Any]],
        lengths: Sequence[float],
        seed: int,
        copies: bool = False,
        whole: str = "",
        by_rows: bool = False,
    ) -> None:
        self._lengths, self._seed = lengths, seed
        self.whole = whole or next((why for loader, found in batches.items() if (why := _resists(loader, found))), "")
        self.folds = self.at_once = 1 if self.whole else FOLDS
        self._portions: dict[int, WholeBatches | SplitRows] = {
            loader: WholeBatches(found, folds_of(len(found), self.folds, lengths[loader], seed, loader))
            if self.whole or (len(found) >= FOLDS and not (by_rows and _splits(found)))
            else SplitRows.shuffled(found, seed, loader)
            for loader, found in batches.items()
        }
        fills = [one.at_least if isinstance(one, SplitRows) else 1 for one in self._portions.values()]
        self.at_least = min(fills, default=1)
        self._copies, self._tensors = copies, tensors_of([one.contents() for one in self._portions.values()])
        self._before = _states(self._tensors)
        cut = any(isinstance(one, SplitRows) for one in self._portions.values())
        self.uncut: Mapping[int, list[Any]] | None = batches if cut else None

    def of(self, folds: Sequence[int]) -> Iterator[tuple[Any, int]]:
        """See `FoldedData`."""
        found = ((batch, loader) for loader, portion in self._portions.items() for batch in portion.of(folds))
        return ((rebuilt(batch, self._copies), loader) for batch, loader in found)

    def counts(self, folds: Sequence[int]) -> list[int]:
        """See `FoldedData`."""
        return [portion.count(folds) for portion in self._portions.values()]

    def altered(self) -> bool:
        """See `FoldedData`."""
        return _states(self._tensors) != self._before

    def undivided(self, why: str) -> KeptData:
        """The batches as they were read, in one fold."""
        portions = self._portions.items()
        batches = self.uncut or {loader: one.contents() for loader, one in portions}
        return KeptData(batches, self._lengths, self._seed, self._copies, why)


class StreamedData:
    """Batches of which only some are in memory: the last asked for, and as many of the next folds as fit.

    Args:
        read: See `dealt`.
        sizes: Of the batches of each loader, in bytes.
        lengths: See `dealt`.
        seed: See `dealt`.
        cache_bytes: See `dealt`.
        copies: See `dealt`.
    """

    def __init__(
        self,
        read: Read,
        sizes: Mapping[int, list[int]],
        lengths: Sequence[float],
        seed: int,
        cache_bytes: int,
        copies: bool = False,
        whole: str = "",
    ) -> None:
        self._all = (read, sizes, lengths, seed, cache_bytes, copies)
        self._read, self._most, self._copies, self.at_least = read, cache_bytes, copies, 1
        fewest = min(len(found) for found in sizes.values())
        self.folds = 1 if whole else min(FOLDS, max(1, fewest))
        self.whole = (
            whole
            if whole or self.folds > 1
            else "a loader gives a single batch, and cache_bytes does not hold the data"
        )
        self._fold_of = {
            loader: folds_of(len(found), self.folds, lengths[loader], seed, loader) for loader, found in sizes.items()
        }
        self._bytes = [0] * self.folds
        for loader, found in sizes.items():
            for fold, size in zip(self._fold_of[loader], found, strict=True):
                self._bytes[fold] += size
        self.at_once = max(1, min(self.folds, cache_bytes // max(1, *self._bytes)))
        self._kept: dict[int, list[tuple[int, int, Any]]] = {}
        self._tensors: list[Tensor] = []
        self._before: list[int] = []

    def of(self, folds: Sequence[int]) -> Iterator[tuple[Any, int]]:
        """See `FoldedData`."""
        if not self._kept.keys() >= set(folds):
            if sum(self._bytes[fold] for fold in folds) > self._most:
                return ((batch, loader) for loader, _, batch in self._batches(folds))
            self._keep(folds)
        found = sorted((one for fold in folds for one in self._kept[fold]), key=lambda one: one[:2])
        return ((rebuilt(batch, self._copies), loader) for loader, _, batch in found)

    def counts(self, folds: Sequence[int]) -> list[int]:
        """See `FoldedData`."""
        return [sum(fold in folds for fold in found) for found in self._fold_of.values()]

    def altered(self) -> bool:
        """See `FoldedData`."""
        return _states(self._tensors) != self._before

    def undivided(self, why: str) -> StreamedData:
        """The same batches in one fold."""
        return StreamedData(*self._all, whole=why)

    def _keep(self, folds: Sequence[int]) -> None:
        wanted, size = list(folds), sum(self._bytes[fold] for fold in folds)
        following = [(max(folds) + step) % self.folds for step in range(1, self.folds)]
        for fold in following:
            if fold not in wanted and (size := size + self._bytes[fold]) <= self._most:
                wanted.append(fold)
        self._kept, self._tensors = {}, []  # before the next are read
        kept: dict[int, list[tuple[int, int, Any]]] = {fold: [] for fold in wanted}
        for loader, place, batch in self._batches(wanted):
            kept[self._fold_of[loader][place]].append((loader, place, batch))
        self._kept, self._tensors = kept, tensors_of(kept)
        self._before = _states(self._tensors)

    def _batches(self, folds: Collection[int]) -> Iterator[tuple[int, int, Any]]:
        """The loader, the place in it, and the batch, for all of these folds."""
        place = dict.fromkeys(self._fold_of, -1)
        for batch, loader in self._read():
            place[loader] += 1
            if self._fold_of[loader][place[loader]] in folds:
                yield loader, place[loader], batch


@dataclass(frozen=True, eq=False)
class WholeBatches:
    """Batches of one loader, dealt as they are.

    Attributes:
        batches: In the order of the loader.
        folds: The fold of each.
    """

    batches: Sequence[Any]
    folds: Sequence[int]

    def of(self, folds: Sequence[int]) -> Iterator[Any]:
        """The batches of these folds, in the order of the loader."""
        return (batch for batch, fold in zip(self.batches, self.folds, strict=True) if fold in folds)

    def count(self, folds: Sequence[int]) -> int:
        """How many those are."""
        return sum(fold in folds for fold in self.folds)

    def contents(self) -> list[Any]:
        """What is kept."""
        return list(self.batches)


@dataclass(frozen=True, eq=False)
class SplitRows:
    """Samples of one loader, dealt one by one.

    Attributes:
        pools: Batches with their rows in random order; a fold is a stretch of each.
        ends: Where the stretches of each pool begin, and where the last ends.
        most: How many rows a batch cut from a pool has at most.
    """

    pools: Sequence[Any]
    ends: Sequence[Sequence[int]]
    most: int

    @classmethod
    def shuffled(cls, batches: Sequence[Any], seed: int, loader: int) -> SplitRows:
        """The rows of batches in random order: in one pool where they can be joined, else each batch on its own."""
        whole = joined(batches)
        pools = batches if whole is None else [whole]
        sizes = [rows_of(pool) or 0 for pool in pools]
        turns = _order(sum(sizes), seed, f"rows {loader}").argsort()  # of each row among those of all pools
        starts = torch.tensor([sum(sizes) * fold // FOLDS for fold in range(FOLDS + 1)])
        orders = [turn.sort() for turn in turns.split(sizes)]
        shuffled = [taken(pool, order.indices) for pool, order in zip(pools, orders, strict=True)]
        ends = [torch.searchsorted(order.values, starts).tolist() for order in orders]
        return cls(shuffled, ends, max(rows_of(batch) or 0 for batch in batches))

    @property
    def at_least(self) -> int:
        """How many folds fit into one batch."""
        rows = math.ceil(sum(ends[-1] for ends in self.ends) / FOLDS)
        return max(1, self.most // rows) if len(self.pools) == 1 else 1

    def of(self, folds: Sequence[int]) -> Iterator[Any]:
        """Batches cut from the pools, neighbouring folds as one; of like size, as not every module takes one sample."""
        return (taken(pool, rows) for pool, rows in self._cuts(folds))

    def count(self, folds: Sequence[int]) -> int:
        """How many those are."""
        return sum(1 for _ in self._cuts(folds))

    def _cuts(self, folds: Sequence[int]) -> Iterator[tuple[Any, slice]]:
        """The pool of each batch, and which of its rows."""
        for pool, ends in zip(self.pools, self.ends, strict=True):
            for first, last in _stretches(folds):
                start, rows = ends[first], ends[last + 1] - ends[first]
                count = math.ceil(rows / self.most)
                for part in range(count):
                    yield pool, slice(start + rows * part // count, start + rows * (part + 1) // count)

    def contents(self) -> list[Any]:
        """What is kept."""
        return list(self.pools)


def folds_of(count: int, folds: int, length: float, seed: int, loader: int) -> list[int]:
    """The fold of each of `count` batches: by a random permutation, or in turn if the loader tells no length.

    Folds differ by one batch at most, and so do the first half of them and the last; the first fold is a small one.
    """
    if math.isfinite(length):
        turns = _order(count, seed, f"batches {loader}").argsort().tolist()
        return [((turn + 1) * folds - 1) // count for turn in turns]
    in_turn = [folds - 1 - turn // 2 - (turn % 2) * ((folds + 1) // 2) for turn in range(folds)]
    return [in_turn[turn % folds] for turn in range(count)]


def _splits(batches: Sequence[Any]) -> bool:
    return all(rows_of(batch) is not None for batch in batches)


def _resists(loader: int, batches: Sequence[Any]) -> str:
    """Why the batches of a loader can be dealt neither whole nor in rows; empty if they can."""
    if len(batches) >= FOLDS:
        return ""
    rows = [rows_of(batch) for batch in batches]
    if None in rows:
        return (
            f"loader {loader} gives {len(batches)} batches, fewer than {FOLDS}, and their tensors do not share a first "
            "dimension to split them along"
        )
    count = sum(size or 0 for size in rows)
    return "" if count >= FOLDS else f"loader {loader} gives {count} samples, fewer than {FOLDS}"


def _order(count: int, seed: int, what: str) -> Tensor:
    return random_bits(stream(seed, 0, 0, what), torch.arange(count)).argsort()


def _stretches(folds: Sequence[int]) -> list[tuple[int, int]]:
    """The runs of neighbouring folds, each by its first and last."""
    runs: list[tuple[int, int]] = []
    for fold in sorted(folds):
        if runs and runs[-1][1] == fold - 1:
            runs[-1] = (runs[-1][0], fold)
        else:
            runs.append((fold, fold))
    return runs


def rebuilt(batch: Any, copies: bool) -> Any:
    """The same tensors, or copies of them, in new containers: a validation_step may take from those it is given."""
    if isinstance(batch, Tensor):
        return batch.clone() if copies else batch
    if type(batch) in (dict, OrderedDict, UserDict, defaultdict):
        twin = copy.copy(batch)
        twin.update({key: rebuilt(value, copies) for key, value in batch.items()})
        return twin
    if type(batch) in (list, tuple):
        return type(batch)(rebuilt(value, copies) for value in batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(rebuilt(value, copies) for value in batch))
    if copies:
        return copy.deepcopy(batch)
    twin = copy.copy(batch)
    if is_dataclass(twin):
        for name, value in attributes_of(batch).items():
            object.__setattr__(twin, name, rebuilt(value, copies))  # also of a frozen one
    return twin


def _states(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor has been written to, as far as that can be told."""
    return [tensor._version for tensor in tensors if not tensor.is_inference()]
