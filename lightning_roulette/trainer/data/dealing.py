"""Deals the batches of one loader to folds at random: whole batches, or single samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_roulette.network.samples import joined, rows_of, taken
from lightning_roulette.wheel.chance import random_bits, stream

FOLDS = 16


@dataclass(frozen=True, eq=False)
class WholeBatches:
    """Batches of one loader, dealt as they are.

    Attributes:
        batches: In the order of the loader.
        folds: The fold of each batch.
        at_least: See `FoldedData`.
    """

    batches: Sequence[Any]
    folds: Sequence[int]
    at_least: int = 1

    def of(self, folds: Sequence[int]) -> Iterator[Any]:
        """Return the batches of these folds, in the order of the loader."""
        return (batch for batch, fold in zip(self.batches, self.folds, strict=True) if fold in folds)

    def count(self, folds: Sequence[int]) -> int:
        """Return the number of batches of these folds."""
        return sum(fold in folds for fold in self.folds)

    def contents(self) -> list[Any]:
        """Return all that is in memory."""
        return list(self.batches)


@dataclass(frozen=True, eq=False)
class SplitRows:
    """Samples of one loader, dealt one by one.

    Attributes:
        pools: Batches with their rows in random order. A fold is a range of rows in each pool.
        ends: For each pool, the first row of each fold, and the number of rows.
        most: The largest number of rows of a batch.
    """

    pools: Sequence[Any]
    ends: Sequence[Sequence[int]]
    most: int

    @classmethod
    def shuffled(cls, batches: Sequence[Any], seed: int, loader: int) -> SplitRows:
        """Shuffle the rows of batches: in one pool if the batches can be joined, otherwise in a pool for each."""
        whole = joined(batches)
        pools = batches if whole is None else [whole]
        sizes = [rows_of(pool) or 0 for pool in pools]
        turns = _order(sum(sizes), seed, f"rows {loader}").argsort()  # place of each row in the order of all rows
        starts = torch.tensor([sum(sizes) * fold // FOLDS for fold in range(FOLDS + 1)])
        orders = [turn.sort() for turn in turns.split(sizes)]
        shuffled = [taken(pool, order.indices) for pool, order in zip(pools, orders, strict=True)]
        ends = [torch.searchsorted(order.values, starts).tolist() for order in orders]
        return cls(shuffled, ends, max(rows_of(batch) or 0 for batch in batches))

    @property
    def at_least(self) -> int:
        """The number of folds that fit into one batch."""
        rows = math.ceil(sum(ends[-1] for ends in self.ends) / FOLDS)
        return max(1, self.most // rows) if len(self.pools) == 1 else 1

    def of(self, folds: Sequence[int]) -> Iterator[Any]:
        """Return batches of the samples of these folds.

        Neighbouring folds are cut as one. Batches have about equal sizes, as some modules fail on a single sample.
        """
        return (taken(pool, rows) for pool, rows in self._cuts(folds))

    def count(self, folds: Sequence[int]) -> int:
        """Return the number of batches of these folds."""
        return sum(1 for _ in self._cuts(folds))

    def contents(self) -> list[Any]:
        """Return all that is in memory."""
        return list(self.pools)

    def _cuts(self, folds: Sequence[int]) -> Iterator[tuple[Any, slice]]:
        """Yield the pool and the rows of each batch."""
        for pool, ends in zip(self.pools, self.ends, strict=True):
            for first, last in _neighbours(folds):
                start, rows = ends[first], ends[last + 1] - ends[first]
                count = math.ceil(rows / self.most)
                for part in range(count):
                    yield pool, slice(start + rows * part // count, start + rows * (part + 1) // count)


def folds_of(count: int, folds: int, length: float, seed: int, loader: int) -> list[int]:
    """Return the fold of each of `count` batches.

    Any two folds differ by at most one batch, and so do the two halves of the folds. The first fold is the smallest.

    Args:
        count: The number of batches.
        folds: The number of folds.
        length: The length of the loader. If it is infinite, batches go to the folds one after the other; otherwise
            they are dealt by a permutation.
        seed: Seed of the permutation.
        loader: The number of the loader. Each loader has a permutation of its own.
    """
    if math.isfinite(length):
        turns = _order(count, seed, f"batches {loader}").argsort().tolist()
        return [((turn + 1) * folds - 1) // count for turn in turns]
    in_turn = [folds - 1 - turn // 2 - (turn % 2) * ((folds + 1) // 2) for turn in range(folds)]
    return [in_turn[turn % folds] for turn in range(count)]


def splits(batches: Sequence[Any]) -> bool:
    """Return whether batches can be split into samples."""
    return all(rows_of(batch) is not None for batch in batches)


def why_one_fold(loader: int, batches: Sequence[Any]) -> str:
    """Return why the batches of a loader cannot be dealt, neither whole nor in samples; empty if they can."""
    if len(batches) >= FOLDS:
        return ""
    if not splits(batches):
        return (
            f"loader {loader} gives {len(batches)} batches, fewer than {FOLDS}, and their tensors do not share a first "
            "dimension to split them along"
        )
    count = sum(rows_of(batch) or 0 for batch in batches)
    samples = "1 sample" if count == 1 else f"{count} samples"
    return "" if count >= FOLDS else f"loader {loader} gives {samples}, fewer than {FOLDS}"


def _order(count: int, seed: int, what: str) -> Tensor:
    return random_bits(stream(seed, 0, 0, what), torch.arange(count)).argsort()


def _neighbours(folds: Sequence[int]) -> list[tuple[int, int]]:
    """Return the runs of neighbouring folds, each as its first and its last."""
    runs: list[tuple[int, int]] = []
    for fold in sorted(folds):
        if runs and runs[-1][1] == fold - 1:
            runs[-1] = (runs[-1][0], fold)
        else:
            runs.append((fold, fold))
    return runs
