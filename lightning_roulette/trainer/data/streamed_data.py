"""Validation data in folds that is read again from the loaders; the choice whether data is kept or read again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from lightning_roulette.network.containers import rebuilt
from lightning_roulette.network.samples import bytes_of
from lightning_roulette.trainer.data.checksums import Checksums, checksums_of
from lightning_roulette.trainer.data.dealing import FOLDS, folds_of
from lightning_roulette.trainer.data.folded_data import FoldedData, KeptData

# Reads the loaders from the first batch to the last, each batch with the number of its loader.
Read = Callable[[], Iterator[tuple[Any, int]]]

_OTHER_BATCHES = (
    "RouletteWheelPruning: loader {} of the validation data gives another batch {} than when it was first read. "
    "Then equal networks get other scores. Batches are read again because cache_bytes does not hold the data. Pass "
    "validation=Validation(cache_bytes=...) with more memory, or let the data set give the same samples at each pass: "
    "transforms must draw from the global random generators, and a stream must start from the beginning at each "
    "__iter__."
)


class StreamedData(FoldedData):
    """Batches that are partly in memory: the folds asked for last, and as many of the next folds as fit.

    Args:
        read: See `dealt`.
        sizes: The size of each batch of each loader, in bytes.
        sums: The checksums of each batch of each loader, as they were first read.
        lengths: See `dealt`.
        seed: See `dealt`.
        cache_bytes: See `dealt`.
        copies: See `dealt`.
        undivided_because: See `dealt`.
    """

    def __init__(
        self,
        read: Read,
        sizes: Mapping[int, list[int]],
        sums: Mapping[int, list[object]],
        lengths: Sequence[float],
        seed: int,
        cache_bytes: int,
        copies: bool = False,
        undivided_because: str = "",
    ) -> None:
        self._arguments = (read, sizes, sums, lengths, seed, cache_bytes, copies)
        self._sums = sums
        self._read, self._most, self._copies = read, cache_bytes, copies
        self.folds = 1 if undivided_because else min(FOLDS, max(1, min(len(found) for found in sizes.values())))
        alone = "a loader gives a single batch, and cache_bytes does not hold the data"
        self.undivided_because = undivided_because or ("" if self.folds > 1 else alone)
        self._fold_of = {
            loader: folds_of(len(found), self.folds, lengths[loader], seed, loader) for loader, found in sizes.items()
        }
        self._bytes = [0] * self.folds
        for loader, found in sizes.items():
            for fold, size in zip(self._fold_of[loader], found, strict=True):
                self._bytes[fold] += size
        self.at_once = max(1, min(self.folds, cache_bytes // max(1, *self._bytes)))
        self._kept: dict[int, list[tuple[int, int, Any]]] = {}
        self._by_time = True

    def check_only_when_told(self) -> None:
        """See `FoldedData`."""
        self._by_time = False
        super().check_only_when_told()

    def fetch(self, folds: Sequence[int]) -> None:
        """See `FoldedData`."""
        super().fetch(folds)
        fits = sum(self._bytes[fold] for fold in folds) <= self._most
        if fits and not self._kept.keys() >= set(folds):
            self._keep(folds)

    def of(self, folds: Sequence[int]) -> Iterator[tuple[Any, int]]:
        """See `FoldedData`."""
        self.fetch(folds)
        if not self._kept.keys() >= set(folds):
            return ((batch, loader) for loader, _, batch in self._batches(folds))
        found = sorted((one for fold in folds for one in self._kept[fold]), key=lambda one: one[:2])
        return ((rebuilt(batch, self._copies), loader) for loader, _, batch in found)

    def counts(self, folds: Sequence[int]) -> list[int]:
        """See `FoldedData`."""
        return [sum(fold in folds for fold in found) for found in self._fold_of.values()]

    def undivided(self, why: str) -> StreamedData:
        """See `FoldedData`."""
        return StreamedData(*self._arguments, undivided_because=why)

    def _keep(self, folds: Sequence[int]) -> None:
        wanted, size = list(folds), sum(self._bytes[fold] for fold in folds)
        following = [(max(folds) + step) % self.folds for step in range(1, self.folds)]
        for fold in following:
            if fold not in wanted and (size := size + self._bytes[fold]) <= self._most:
                wanted.append(fold)
        self._kept, self._checksums = {}, None  # freed before the next batches are read
        kept: dict[int, list[tuple[int, int, Any]]] = {fold: [] for fold in wanted}
        for loader, place, batch in self._batches(wanted):
            kept[self._fold_of[loader][place]].append((loader, place, batch))
        self._kept = kept
        found = sorted((one for ours in kept.values() for one in ours), key=lambda one: one[:2])
        self._checksums = Checksums({f"loader {loader}, batch {place}": batch for loader, place, batch in found})
        self._checksums.by_time = self._by_time

    def _batches(self, folds: Collection[int]) -> Iterator[tuple[int, int, Any]]:
        """Yield the loader, the place in it, and the batch, for each batch of these folds."""
        place = dict.fromkeys(self._fold_of, -1)
        for batch, loader in self._read():
            place[loader] += 1
            at = place[loader]
            if at >= len(self._sums[loader]):
                raise RuntimeError(_OTHER_BATCHES.format(loader, at))
            if self._fold_of[loader][at] in folds:
                if checksums_of(batch) != self._sums[loader][at]:
                    raise RuntimeError(_OTHER_BATCHES.format(loader, at))
                yield loader, at, batch
        if any(at + 1 < len(self._sums[loader]) for loader, at in place.items()):
            raise RuntimeError(_OTHER_BATCHES.format(*min(place.items())))


def dealt(
    read: Read,
    lengths: Sequence[float],
    seed: int,
    cache_bytes: int,
    copies: bool = False,
    by_rows: bool = False,
    undivided_because: str = "",
) -> FoldedData:
    """Read the data of some loaders once, and deal it to folds.

    Whole batches are dealt if each loader gives at least 16. Otherwise single samples are dealt, if batches can be
    split.

    Args:
        read: Reads the loaders. It gives the same batches at each call.
        lengths: The number of batches of each loader; `inf` if unknown. Batches of such a loader go to the folds one
            after the other.
        seed: Seed of the permutation by which the other loaders are dealt.
        cache_bytes: The largest memory for batches, in bytes. If they take more, the loaders are read again for each
            fold that is not in memory.
        copies: Whether to give out copies of tensors, for a module that writes into its batches.
        by_rows: Whether to deal single samples if batches can be split. Whole batches are not independent samples if
            the data is ordered, for example by class.
        undivided_because: Why the data must be one fold; empty if it is to be divided.
    """
    kept: dict[int, list[Any]] = {loader: [] for loader in range(len(lengths))}
    sizes: dict[int, list[int]] = {loader: [] for loader in range(len(lengths))}
    sums: dict[int, list[object]] = {loader: [] for loader in range(len(lengths))}
    total = 0
    for batch, loader in read():
        sizes[loader].append(bytes_of(batch))
        sums[loader].append(checksums_of(batch))
        total += sizes[loader][-1]
        if total <= cache_bytes:
            kept[loader].append(batch)
        else:
            kept = {loader: [] for loader in kept}
    if total <= cache_bytes:
        return KeptData(kept, lengths, seed, copies, undivided_because, by_rows)
    return StreamedData(read, sizes, sums, lengths, seed, cache_bytes, copies, undivided_because)
