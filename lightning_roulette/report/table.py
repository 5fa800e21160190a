"""A report in words: a few sentences, and a table with one row for each level."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import takewhile
from typing import TYPE_CHECKING

from lightning_roulette.report.records import Level, StopReason

if TYPE_CHECKING:
    from lightning_roulette.report.report import SearchReport

_SEARCH_COLUMNS = ("score", "s.e.", "branch min", "median", "max", "accepted")
_HEADINGS = ("level", "pruning rate", "sparsity", "weights left", *_SEARCH_COLUMNS, "held-out", "s.e.", "held")
_ERROR, _ACCEPTED, _HELD_OUT = (_HEADINGS.index(name) for name in ("s.e.", "accepted", "held-out"))
_HELD_OUT_DATA = "the held-out half of the validation data"


def text(report: SearchReport) -> str:
    """Return the summary and the table of levels as aligned text."""
    cells = rows(report)
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([*summary(report), "", *lines])


def markdown(report: SearchReport) -> str:
    """Return the summary and the table of levels in Markdown."""
    head, *body = rows(report)
    lines = [head, ["---:"] * len(head), *body]
    return "\n\n".join(summary(report)) + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(report: SearchReport) -> list[str]:
    """Return the result of a search in a few sentences."""
    sentences = [_size(report), *(_gradual(report) if report.gradual else _choice(report)), *_refits(report)]
    if report.trained_score is not None:
        sentences.append(f"{report.monitor} after the training that followed: {report.trained_score:.6g}.")
    cost = f"Work: as much as {report.validations:.4g} full validations, {report.seconds:.1f} s."
    return [*sentences, f"{_stopped(report)} {cost}"]


def rows(report: SearchReport) -> list[list[str]]:
    """Return the table of levels as text, headings first."""
    cells = [list(_HEADINGS), *(_row(level) for level in report.levels)]
    if not report.gradual:
        return cells
    columns = list(zip(*cells, strict=True))
    epochs = ("epoch", *("-" if level.epoch is None else str(level.epoch) for level in report.levels))
    judged = ("judged", *columns[_HELD_OUT][1:])
    shown = columns[1 : _ACCEPTED if report.branches > 1 else _ERROR]
    return [list(row) for row in zip(columns[0], epochs, *shown, judged, columns[-1], strict=True)]


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


def _size(report: SearchReport) -> str:
    """Return the number of kept weights as a sentence."""
    level = report.winner.level if report.winner else 0
    kind = "pruned" if report.gradual else "accepted"
    return (
        f"{report.survivors:,} of {report.size:,} prunable weights kept ({1 - report.sparsity:.2%}): "
        f"sparsity {report.sparsity:.2%}, level {level} of {len(report.accepted)} {kind} levels."
    )


def _choice(report: SearchReport) -> list[str]:
    """Return the scores that a search chose the winner by, and the scores on the held-out half."""
    data = "all validation data" if report.held_out_dense is None else "search half"
    return [
        f"{report.monitor}: dense {report.dense_score:.6g}, floor {report.floor:.6g}, "
        f"pruned {report.search_score:.6g} ({data}){_loaded(report)}.",
        *_confirmation(report),
    ]


def _loaded(report: SearchReport) -> str:
    return "" if report.score is None else f", {report.score:.6g} after loading (all validation data)"


def _gradual(report: SearchReport) -> list[str]:
    """Return the scores after the training that followed the cuts."""
    if report.held_out_dense is None:
        return []
    found = report.winner.held_out_score if report.winner else None
    score = report.held_out_dense if found is None else found
    data = _HELD_OUT_DATA if report.folds[1] else "all validation data"
    return [
        f"{report.monitor} on {data}, after further training: dense {report.held_out_dense:.6g}, floor "
        f"{report.held_out_floor:.6g}, pruned {score:.6g}{_loaded(report)}."
    ]


def _confirmation(report: SearchReport) -> list[str]:
    """Return the scores on the held-out folds."""
    if report.held_out_dense is None:
        why = f" ({report.undivided_because})" if report.undivided_because else ""
        return [f"No validation data was held out{why}: the same data chose and judged the pruned network."]
    score = report.winner.held_out_score if report.winner else report.held_out_dense
    if score is None:
        return []
    error = _known(report.winner.held_out_error if report.winner else None, ".2g")
    pruned = f"{score:.6g}" if error == "-" else f"{score:.6g} (s.e. {error})"
    return [
        f"On {_HELD_OUT_DATA}: dense {report.held_out_dense:.6g}, pruned {pruned}; "
        f"estimated decline {report.decline:.4g}.",
        *_certificate(report),
    ]


def _certificate(report: SearchReport) -> list[str]:
    if report.confidence is None or report.method is None:
        return []
    if report.winner is None:
        return [f"No level could be certified with confidence {report.confidence:g}: the network stays dense."]
    when = " before the training that followed" if report.trained_score is not None else ""
    return [
        f"With confidence {report.confidence:g} the pruned network's true decline{when} is at most "
        f"{report.tolerance:g}. {report.method.value}"
    ]


def _refits(report: SearchReport) -> list[str]:
    """Return the importance and the refit, and which weights were not refitted."""
    said = [f"Importance: {report.importance}."] if report.importance not in ("", "magnitude") else []
    if not report.refit:
        return said
    undone = _by_reason(report.winner.undone) if report.winner else {}
    said.append(f"Refit: {report.refit}.")
    said += [f"Not refitted: {names} ({why})." for why, names in _by_reason(report.left_alone).items()]
    said += [f"Refit not kept for {names}: {why}." for why, names in undone.items()]
    return [" ".join(said)]


def _by_reason(reasons: Mapping[str, str]) -> dict[str, str]:
    """Return the names that share a reason, in one string."""
    return {why: ", ".join(name for name, its in reasons.items() if its == why) for why in reasons.values()}


def _stopped(report: SearchReport) -> str:
    """Why the search stopped, with the number of levels that missed the floor at its end."""
    if report.stop_reason is None:
        return "The search is running."
    if report.stop_reason is not StopReason.DECLINED:
        return str(report.stop_reason.value)
    missed = len(list(takewhile(lambda level: not level.accepted, reversed(report.levels))))
    if missed == 1:
        return "Stopped: a level missed the floor."
    return str(report.stop_reason.value).replace("`patience`", str(missed))
