"""The table of levels of a report, with one row for each level."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_roulette.report.columns import in_columns
from lightning_roulette.report.records import Level
from lightning_roulette.report.words import summary

if TYPE_CHECKING:
    from lightning_roulette.report.report import SearchReport

SHORT = 10  # levels in the table of a printed report

_SEARCH_COLUMNS = ("score", "s.e.", "branch min", "median", "max", "accepted")
_HEADINGS = ("level", "pruning rate", "sparsity", "weights left", *_SEARCH_COLUMNS, "held-out", "s.e.", "held")
_LONG = ("pruning rate", "branch min", "median", "max")  # not in brief tables
_ERROR, _ACCEPTED, _HELD_OUT = (_HEADINGS.index(name) for name in ("s.e.", "accepted", "held-out"))


def text(report: SearchReport) -> str:
    """Return the summary and a short table of levels as aligned text."""
    return "\n".join([*summary(report), *(["", aligned(report, SHORT)] if report.levels else [])])


def markdown(report: SearchReport, *, brief: bool = False) -> str:
    """Return the summary and the table of all levels in Markdown; see `SearchReport.markdown`."""
    cells = rows(report)
    shown = [place for place, name in enumerate(cells[0]) if not brief or name not in _LONG]
    head, *body = ([row[place] for place in shown] for row in cells)
    lines = [head, ["---:"] * len(head), *body]
    return "\n\n".join(summary(report)) + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def aligned(report: SearchReport, most: int | None = None) -> str:
    """Return the table of levels as aligned text; see `SearchReport.table`."""
    cells, left_out = some_rows(report, most)
    return "\n".join([*in_columns(cells), *([left_out] if left_out else [])])


def some_rows(report: SearchReport, most: int | None) -> tuple[list[list[str]], str]:
    """Return the table of about `most` levels, headings first, and a sentence about levels that are left out."""
    head, *body = rows(report)
    places = range(len(body)) if most is None else shown(report, most)
    left_out = len(body) - len(places)
    said = f"{left_out} of {len(body)} levels are left out. report.table() returns all of them." if left_out else ""
    return [head, *(body[place] for place in places)], said


def shown(report: SearchReport, most: int) -> list[int]:
    """Return the places of the levels in a table of about `most` rows.

    The first level, the winner, the first level that did not hold on held-out data, and the last level are always
    shown. The levels after the last accepted one take up to a third of the rows. The others are spread evenly.
    """
    levels, everything = report.levels, range(len(report.levels))
    if len(levels) <= most:
        return list(everything)
    accepted = [place for place in everything if levels[place].accepted]
    winner = [place for place in accepted if levels[place] is report.winner]
    missed = [place for place in accepted if levels[place].held is False and levels[place].held_out_score is not None]
    failed = [place for place in everything if place > max(accepted, default=-1)]
    found = {0, *winner, *missed[:1], *failed[-max(1, most // 3) :], len(levels) - 1}
    others = [place for place in accepted or everything if place not in found]
    spare = min(max(0, most - len(found)), len(others))
    return sorted(found | {others[(2 * step + 1) * len(others) // (2 * spare)] for step in range(spare)})


def rows(report: SearchReport) -> list[list[str]]:
    """Return the table of levels as text, headings first."""
    cells = [list(_HEADINGS), *(_row(level) for level in report.levels)]
    if not report.gradual:
        return cells
    columns = list(zip(*cells, strict=True))
    epochs = ("epoch", *("-" if level.epoch is None else str(level.epoch) for level in report.levels))
    judged = ("judged", *columns[_HELD_OUT][1:])
    scores = columns[1 : _ACCEPTED if report.branches > 1 else _ERROR]
    return [list(row) for row in zip(columns[0], epochs, *scores, judged, columns[-1], strict=True)]


def _row(level: Level) -> list[str]:
    return [
        str(level.level),
        f"{level.pruning_rate:.3g}",
        f"{level.sparsity:.2%}",
        f"{level.survivors:,}",
        f"{level.score:.6g}",
        _known(level.error, ".2g"),
        *(f"{value:.6g}" for value in level.spread),
        "yes" if level.accepted else "no",
        _known(level.held_out_score, ".6g"),
        _known(level.held_out_error, ".2g"),
        "-" if level.held is None else "yes" if level.held else "no",
    ]


def _known(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)
