"""Validation data in folds: kept in memory, or read by the Trainer's own loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_roulette.network.containers import rebuilt
from lightning_roulette.trainer.data.checksums import Checksums, sum_of
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
    _checksums: Checksums | None = None

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
        """Read the batches of some folds into memory, if they fit. Call it before weights are lent.

        Raises:
            RuntimeError: If a batch in memory has been written to, and the check of it is due.
        """
        if self._checksums is not None:
            self._checksums.check_if_due()

    def altered(self) -> bool:
        """Return whether a validation has written into a batch that is kept."""
        return self._checksums is not None and self._checksums.altered()

    def check(self) -> None:
        """Compare the batches in memory with what they were.

        Raises:
            RuntimeError: If one has been written to.
        """
        if self._checksums is not None:
            self._checksums.check()

    def check_only_when_told(self) -> None:
        """Let `fetch` check nothing. Processes must do the same at the same time."""
        if self._checksums is not None:
            self._checksums.by_time = False

    def undivided(self, why: str) -> FoldedData:
        """Return the batches of the loaders in one fold.

        Args:
            why: The reason, for the report.
        """
        return self

    def stay_regrouped(self) -> None:
        """Forget the batches of the loaders."""

    def sum(self) -> int | None:
        """Return one number for all the data, whatever their order is; None if they are not kept in memory."""
        return None

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
        self._checksums = Checksums(
            {
                f"loader {loader}, batch {place}" if isinstance(one, WholeBatches) else f"loader {loader}": batch
                for loader, one in self._portions.items()
                for place, batch in enumerate(one.contents())
            }
        )
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

    def sum(self) -> int:
        """See `FoldedData`."""
        return sum_of(batch for one in self._portions.values() for batch in one.contents())

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
