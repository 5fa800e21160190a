"""The picture of a search: scores over sparsity, over multiply-adds, or over levels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_roulette.report.optional import imported
from lightning_roulette.report.records import Level

if TYPE_CHECKING:
    from lightning_roulette.report.report import SearchReport

AXES = ("sparsity", "multiply_adds", "level")
EXTRA = "plot"
SIZE = (7.5, 4.2)  # of a new figure, in inches

_SEARCH, _HELD_OUT, _FAILED, _CANDIDATE = "tab:blue", "tab:orange", "tab:red", "0.6"
_SPARSITIES = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999)  # with a mark at the axis
_PERCENTS_LEFT = (100, 80, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.01)  # of multiply-adds, with a mark at the axis
_MORE = 1.0  # how far the picture reaches beyond the winners on the worse side, in ranges of their scores


@dataclass(frozen=True)
class _Names:
    """Names of the two curves in the legend."""

    search: str
    held_out: str


def plot(report: SearchReport, over: str, axes: Any) -> Any:
    """Draw a report; see `SearchReport.plot`."""
    if over not in AXES:
        raise ValueError(f"over is {over!r}, but must be one of {', '.join(map(repr, AXES))}.")
    if over == "multiply_adds" and not has_multiply_adds(report):
        raise ValueError(
            "over is 'multiply_adds', but this report does not count them. They are counted if whole neurons or heads "
            "leave, as with Wheel(unit='neuron'). Pass over='sparsity' or over='level'."
        )
    if axes is None:
        _, axes = imported("matplotlib.pyplot", "report.plot()", EXTRA).subplots(figsize=SIZE, layout="constrained")
    names = _names(report)
    hidden = _limit(report, axes)
    _draw_candidates(report, over, axes, hidden)
    _draw_curve(axes, _points(report, over, report.dense_score, "score"), names.search, _SEARCH, ".")
    _draw_failed(report, over, axes)
    _draw_floor(axes, report.floor, f"floor: {names.search}", _SEARCH)
    if report.held_out_dense is not None and report.held_out_floor is not None:
        held_out = _points(report, over, report.held_out_dense, "held_out_score")
        _draw_curve(axes, held_out, names.held_out, _HELD_OUT, "s")
        _draw_floor(axes, report.held_out_floor, f"floor: {names.held_out}", _HELD_OUT)
    _mark_result(report, over, axes)
    _label(report, over, axes)
    return axes


def has_multiply_adds(report: SearchReport) -> bool:
    """Return whether a report counts the multiply-adds of the dense network and of each level."""
    return bool(report.multiply_adds) and all(level.multiply_adds is not None for level in report.levels)


def _names(report: SearchReport) -> _Names:
    if report.gradual:
        return _Names("at the cut", "after training")
    return _Names("search half" if report.folds[1] else "validation data", "held-out half")


def _place(report: SearchReport, over: str, level: Level | None) -> float:
    """Return the x of a level, which is the share of weights or multiply-adds left. None is the dense network."""
    if over == "level":
        return 0 if level is None else level.level
    if over == "multiply_adds":
        return max(_share_of_work(report, level), 0.5 / max(1, report.multiply_adds or 0))
    result = level or report.held
    return _share_left(report, result.sparsity) if result else 1.0


def _share_left(report: SearchReport, sparsity: float) -> float:
    """Return the share of the weights that is left, above 0 for a logarithmic axis."""
    return max(1 - sparsity, 0.5 / max(1, report.size))


def _share_of_work(report: SearchReport, level: Level | None) -> float:
    """Return the share of all multiply-adds that is left, where both numbers are known. None is the dense network."""
    result = level or report.held
    if result is None or result.multiply_adds is None or not report.multiply_adds:
        return 1.0
    return result.multiply_adds / report.multiply_adds


def _points(report: SearchReport, over: str, dense: float, field: str) -> list[tuple[float, float]]:
    """Return x and y of the dense network and of the accepted levels whose score is known."""
    scored = [(_place(report, over, level), getattr(level, field)) for level in report.accepted]
    return [(_place(report, over, None), dense), *((x, y) for x, y in scored if y is not None and math.isfinite(y))]


def _scores(report: SearchReport) -> list[float]:
    """Return the scores that the picture must show."""
    ours = [report.dense_score, report.floor, *(level.score for level in report.levels if level.accepted)]
    held_out = [report.held_out_dense, report.held_out_floor, *(level.held_out_score for level in report.accepted)]
    return _finite(one for one in (*ours, *held_out) if one is not None)


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _limit(report: SearchReport, axes: Any) -> int:
    """Limit the y-axis to what matters. Return how many candidates are worse than its end."""
    scores, tried = _scores(report), _finite(one.score for level in report.levels for one in level.candidates)
    low, high = (min(scores), max(scores)) if scores else (0.0, 1.0)
    span = (high - low) or max(abs(high), 1.0) / 20
    better, worse = 0.1 * span, 0.1 * span + (_MORE * span if tried else 0)
    bottom, top = (low - worse, high + better) if report.mode == "max" else (low - better, high + worse)
    axes.set_ylim(bottom, top)
    return sum(not bottom <= score <= top for score in tried)


def _draw_candidates(report: SearchReport, over: str, axes: Any, hidden: int) -> None:
    points = [
        # candidates of units may differ in their sparsity; what each multiplies is not known
        (_share_left(report, one.sparsity) if over == "sparsity" else _place(report, over, level), one.score)
        for level in report.levels
        for one in level.candidates
    ]
    if not points:
        return
    beyond = f" ({hidden} are outside)" if hidden else ""
    axes.scatter(*zip(*points, strict=True), s=9, color=_CANDIDATE, alpha=0.5, lw=0, label=f"candidates{beyond}")


def _draw_curve(axes: Any, points: list[tuple[float, float]], name: str, color: str, marker: str) -> None:
    """Draw a line through the points. The first is the dense network, with a mark of its own."""
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color=color, marker=marker, ms=4, lw=1.2, label=f"winners: {name}")
    axes.plot(x[:1], y[:1], color=color, marker="D", ms=7, ls="", label=f"dense: {name}")


def _draw_failed(report: SearchReport, over: str, axes: Any) -> None:
    failed = [(_place(report, over, one), one.score) for one in report.levels if not one.accepted]
    if failed:
        axes.plot(*zip(*failed, strict=True), "x", ms=4, color=_FAILED, label="levels below the floor")


def _draw_floor(axes: Any, floor: float, name: str, color: str) -> None:
    if math.isfinite(floor):
        axes.axhline(floor, color=color, lw=1, ls="--", label=name)


def _mark_result(report: SearchReport, over: str, axes: Any) -> None:
    if report.winner is not None:
        x, what = _place(report, over, report.winner), f"sparsity {report.sparsity:.2%}"
        if over == "multiply_adds":
            what = f"{_share_of_work(report, report.winner):.2%} of the multiply-adds"
        axes.axvline(x, color="black", lw=0.8, ls=":", label=f"result: {what}")


def _label(report: SearchReport, over: str, axes: Any) -> None:
    axes.set_ylabel(report.monitor)
    if over == "level":
        axes.set_xlabel("level")
    elif over == "multiply_adds":
        _label_shares(report, over, axes, {one / 100: one for one in _PERCENTS_LEFT})
        axes.set_xlabel("multiply-adds of a sample that are left (%)")
    else:
        _label_shares(report, over, axes, {1 - one: 100 * one for one in _SPARSITIES})
        axes.set_xlabel("sparsity (%)")
    axes.legend(fontsize="x-small", loc="best")


def _label_shares(report: SearchReport, over: str, axes: Any, marks: Mapping[float, float]) -> None:
    """Scale the x-axis by the logarithm of the share that is left, and label shares with percents."""
    axes.set_xscale("log")
    least = min([_place(report, over, level) for level in report.levels], default=0.5)
    axes.set_xlim(1.1, least / 1.15)
    shown = {share: percent for share, percent in marks.items() if share >= least / 1.15}
    axes.set_xticks(list(shown), [f"{percent:g}" for percent in shown.values()])
    axes.minorticks_off()
