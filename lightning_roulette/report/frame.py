"""The levels of a report as rows of numbers."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lightning_roulette.report.optional import imported
from lightning_roulette.report.records import Level

if TYPE_CHECKING:
    from lightning_roulette.report.report import SearchReport


def frame(report: SearchReport) -> Any:
    """Return a pandas DataFrame; see `SearchReport.to_dataframe`."""
    pandas = imported("pandas", "report.to_dataframe()", "pandas")
    return pandas.DataFrame([_numbers(level) for level in report.levels], columns=list(_numbers(_NONE)))


def _numbers(level: Level) -> dict[str, Any]:
    low, middle, high = level.spread
    found = {one.name: getattr(level, one.name) for one in fields(level)}
    found |= {"score": level.score, "candidates": len(level.candidates), "undone": len(level.undone)}
    return found | {"branch_min": low, "branch_median": middle, "branch_max": high}


_NONE = Level(0, 0.0, 0.0, 0, (), None, False)  # names the columns of a report without levels
