"""Validation data in folds: kept in memory, read again from the loaders, or read by the Trainer's own loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_roulette.network.samples import bytes_of, tensors_of
from lightning_roulette.trainer.data.containers import rebuilt, write_counts
from lightning_roulette.trainer.data.dealing import (
    FOLDS,
    SplitRows,
    WholeBatches,
    folds_of,
    splits,
    why_one_fold,
)
from lightning_roulette.trainer.validation.isolation import IsolatedValidation
from lightning_roulette.trainer.validation.logged import Logged

# Reads the loaders from the first batch to the last, each batch with the number of its loader.
Read = Callable[[], Iterator[tuple[Any, int]]]


class FoldedData:
    """Validation data in folds.

    Attributes:
        folds: The number of folds.
        undivided_because: Why there is only one fold; empty if there are several.
        at_once: The number of folds that fit into memory.
        at_least: The number of folds that fit into a single batch.
    """

    folds = at_once = at_least = 1
    undivided_because = ""

    def of(self, folds: Sequence[int]) -> Iterator[tuple[Any, int]]:
        """Return the batches of some folds, each with the number of its loader, in the order of the loaders."""
        raise NotImplementedError

    def counts(self, folds: Sequence[int]) -> list[int]:
        """Return the number of batches of each loader in some folds."""
        raise NotImplementedError

    @property
    def regrouped(self) -> bool:
        """Whether samples were regrouped into new batches, while the batches of the loaders are still known."""
        return False

    @property
    def first_tried(self) -> range:
        """The folds of the first validation. Afterwards `altered` tells about these folds."""
        return range(1)

    @property
    def first_folds(self) -> range:
        """The first fold, and as many more as take no longer to validate."""
        return range(min(self.folds, self.at_least))

    @property
    def tries_everything(self) -> bool:
        """Whether the first validation is on all the data."""
        return len(self.first_tried) == self.folds

    def fetch(self, folds: Sequence[int]) -> None:
        """Read the batches of some folds into memory, if they fit. Call it before weights are lent."""

    def altered(self) -> bool:
        """Return whether a validation has written into a tensor that is kept."""
        return False

    def undivided(self, why: str) -> FoldedData:
        """Return the batches of the loaders in one fold.

        Args:
            why: The reason, for the report.
        """
        return self

    def stay_regrouped(self) -> None:
        """Forget the batches of the loaders."""

    def validate(self, validation: IsolatedValidation, folds: Sequence[int]) -> Logged:
        """Validate on some folds, and return what the module logs."""
        return validation.run_on(self.of(folds), counts=self.counts(folds))

    def record(self, validation: IsolatedValidation, folds: Sequence[int]) -> Logged:
        """Validate on some folds, in batches of one fold each, and record what is logged for each batch."""
        counts = [sum(ours) for ours in zip(*(self.counts([fold]) for fold in folds), strict=True)]
        return validation.run_on(self.by_fold(folds), recorded=True, counts=counts)

    def by_fold(self, folds: Sequence[int]) -> Iterator[tuple[Any, int]]:
        """Return the same as `of`, in batches that hold samples of one fold each."""
        return self.of(folds)

    def validate_all(self, validation: IsolatedValidation) -> Logged:
        """Validate on all the data, read by the Trainer's loop unless it is in memory."""
        return validation.run()


class TrainerLoopData(FoldedData):
    """Validation data that only the Trainer's own loop can read, in one fold."""

    undivided_because = "validation_step takes the iterator over the loaders, so its batches cannot be dealt to folds"

    def validate(self, validation: IsolatedValidation, folds: Sequence[int]) -> Logged:
        """See `FoldedData`."""
        return validation.run()

    def record(self, validation: IsolatedValidation, folds: Sequence[int]) -> Logged:
        """See `FoldedData`. No batch is recorded."""
        return validation.run()


class KeptData(FoldedData):
    """Batches that are all in memory.

    Args:
        batches: The batches of each loader, in its order.
        lengths: See `dealt`.
        seed: See `dealt`.
        copies: See `dealt`.
        undivided_because: See `dealt`.
        by_rows: See `dealt`.
    """

    def __init__(
        self,
        batches: Mapping[int, list[Any]],
        lengths: Sequence[float],
        seed: int,
        copies: bool = False,
        undivided_because: str = "",
        by_rows: bool = False,
    ) -> None:
        self._lengths, self._seed, self._copies = lengths, seed, copies
        reasons = (why_one_fold(loader, found) for loader, found in batches.items())
        self.undivided_because = undivided_because or next(filter(None, reasons), "")
        self.folds = self.at_once = 1 if self.undivided_because else FOLDS
        self._portions = {loader: self._dealt(loader, found, by_rows) for loader, found in batches.items()}
        self.at_least = min((one.at_least for one in self._portions.values()), default=1)
        self._tensors = tensors_of([one.contents() for one in self._portions.values()])
        self._before = write_counts(self._tensors)
        split = any(isinstance(one, SplitRows) for one in self._portions.values())
        self._original: Mapping[int, list[Any]] | None = batches if split else None

    def _dealt(self, loader: int, batches: list[Any], by_rows: bool) -> WholeBatches | SplitRows:
        if self.undivided_because or (len(batches) >= FOLDS and not (by_rows and splits(batches))):
            folds = folds_of(len(batches), self.folds, self._lengths[loader], self._seed, loader)
            return WholeBatches(batches, folds)
        return SplitRows.shuffled(batches, self._seed, loader)

    def of(self, folds: Sequence[int]) -> Iterator[tuple[Any, int]]:
        """See `FoldedData`."""
        found = ((batch, loader) for loader, portion in self._portions.items() for batch in portion.of(folds))
        return ((rebuilt(batch, self._copies), loader) for batch, loader in found)

    def counts(self, folds: Sequence[int]) -> list[int]:
        """See `FoldedData`."""
        return [portion.count(folds) for portion in self._portions.values()]

    @property
    def regrouped(self) -> bool:
        """See `FoldedData`."""
        return self._original is not None

    @property
    def first_tried(self) -> range:
        """All folds."""
        return range(self.folds)

    def altered(self) -> bool:
        """See `FoldedData`."""
        return write_counts(self._tensors) != self._before

    def undivided(self, why: str) -> KeptData:
        """See `FoldedData`."""
        batches = self._original or {loader: one.contents() for loader, one in self._portions.items()}
        return KeptData(batches, self._lengths, self._seed, self._copies, why)

    def stay_regrouped(self) -> None:
        """See `FoldedData`."""
        self._original = None

    def by_fold(self, folds: Sequence[int]) -> Iterator[tuple[Any, int]]:
        """See `FoldedData`. `of` cuts neighbouring folds as one."""
        return iter(sorted((one for fold in folds for one in self.of([fold])), key=lambda one: one[1]))

    def validate_all(self, validation: IsolatedValidation) -> Logged:
        """See `FoldedData`."""
        return self.validate(validation, range(self.folds))


class StreamedData(FoldedData):
    """Batches that are partly in memory: the folds asked for last, and as many of the next folds as fit.

    Args:
        read: See `dealt`.
        sizes: The size of each batch of each loader, in bytes.
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
        lengths: Sequence[float],
        seed: int,
        cache_bytes: int,
        copies: bool = False,
        undivided_because: str = "",
    ) -> None:
        self._arguments = (read, sizes, lengths, seed, cache_bytes, copies)
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
        self._tensors: list[Tensor] = []
        self._before: list[int] = []

    def fetch(self, folds: Sequence[int]) -> None:
        """See `FoldedData`."""
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

    def altered(self) -> bool:
        """See `FoldedData`."""
        return write_counts(self._tensors) != self._before

    def undivided(self, why: str) -> StreamedData:
        """See `FoldedData`."""
        return StreamedData(*self._arguments, undivided_because=why)

    def _keep(self, folds: Sequence[int]) -> None:
        wanted, size = list(folds), sum(self._bytes[fold] for fold in folds)
        following = [(max(folds) + step) % self.folds for step in range(1, self.folds)]
        for fold in following:
            if fold not in wanted and (size := size + self._bytes[fold]) <= self._most:
                wanted.append(fold)
        self._kept, self._tensors = {}, []  # freed before the next batches are read
        kept: dict[int, list[tuple[int, int, Any]]] = {fold: [] for fold in wanted}
        for loader, place, batch in self._batches(wanted):
            kept[self._fold_of[loader][place]].append((loader, place, batch))
        self._kept, self._tensors = kept, tensors_of(kept)
        self._before = write_counts(self._tensors)

    def _batches(self, folds: Collection[int]) -> Iterator[tuple[int, int, Any]]:
        """Yield the loader, the place in it, and the batch, for each batch of these folds."""
        place = dict.fromkeys(self._fold_of, -1)
        for batch, loader in self._read():
            place[loader] += 1
            if self._fold_of[loader][place[loader]] in folds:
                yield loader, place[loader], batch


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
    total = 0
    for batch, loader in read():
        sizes[loader].append(bytes_of(batch))
        total += sizes[loader][-1]
        if total <= cache_bytes:
            kept[loader].append(batch)
        else:
            kept = {loader: [] for loader in kept}
    if total <= cache_bytes:
        return KeptData(kept, lengths, seed, copies, undivided_because, by_rows)
    return StreamedData(read, sizes, lengths, seed, cache_bytes, copies, undivided_because)
