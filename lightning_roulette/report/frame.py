"""The levels of a report as rows of numbers."""

from __future__ import annotations

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
    return {
        "level": level.level,
        "epoch": level.epoch,
        "pruning_rate": level.pruning_rate,
        "sparsity": level.sparsity,
        "survivors": level.survivors,
        "candidates": len(level.candidates),
        "score": level.score,
        "error": level.error,
        "branch_min": low,
        "branch_median": middle,
        "branch_max": high,
        "accepted": level.accepted,
        "held_out_score": level.held_out_score,
        "held_out_error": level.held_out_error,
        "p_value": level.p_value,
        "held": level.held,
    }


_NONE = Level(0, 0.0, 0.0, 0, (), None, False)  # names the columns of a report without levels
