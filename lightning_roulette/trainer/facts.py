"""Facts of a run that the search does not know, for the report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lightning_roulette.report.records import Skipped
from lightning_roulette.report.report import SearchReport


@dataclass(eq=False)
class Facts:
    """Facts of a run that the search does not know.

    Attributes:
        matrices: Number of weights in all parameters with at least two dimensions.
        skipped: The parameters among them that are not prunable, largest first.
        dense_measured: Metric of the dense network on all validation data; None if it was not measured.
        notes: Sentences for the report, each once.
    """

    matrices: int = 0
    skipped: tuple[Skipped, ...] = ()
    dense_measured: float | None = None
    notes: list[str] = field(default_factory=list)

    def note(self, sentence: str) -> None:
        """Add a sentence to the report, unless it is there already."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def go_on_from(self, report: SearchReport) -> None:
        """Take over what the report of an earlier run says, where this run knows nothing."""
        if not self.matrices:
            self.matrices, self.skipped = report.matrices, report.skipped
        if self.dense_measured is None:
            self.dense_measured = report.dense_measured
        self.notes[:] = dict.fromkeys([*report.notes, *self.notes])

    def added_to(self, report: SearchReport) -> SearchReport:
        """Return the report with these facts."""
        return replace(
            report,
            matrices=self.matrices,
            skipped=self.skipped,
            dense_measured=self.dense_measured,
            notes=tuple(dict.fromkeys([*report.notes, *self.notes])),
        )
