"""A report in words: six plain lines, and what is unusual about the search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from lightning_roulette.report.names import listed, shortened
from lightning_roulette.report.records import Held, Level, StopReason

if TYPE_CHECKING:
    from lightning_roulette.report.report import SearchReport

_MOST_WEIGHTS = 6  # names of weights that were not refitted, for each reason


def summary(report: SearchReport) -> list[str]:
    """Return the result of a search in a few lines.

    They say how many weights are kept, what the network takes and how many weights could be pruned, the metric of both
    networks on the same data, the decline on held-out data, whether the target was met and why the search ended, and
    the time. Then come the notes, and what is unusual about the importance and the refit.
    """
    return [
        _kept(report),
        *_held(report),
        *_units(report),
        *_footprint(report),
        *_prunable(report),
        *_metric(report),
        *_decline(report),
        *_certificate(report),
        _outcome(report),
        f"Time: {report.seconds:.1f} s, and as much work as {_rounded(report.validations, 4)} full validations.",
        *report.notes,
        *_unusual(report),
    ]


def start(report: SearchReport) -> str:
    """Return the dense score, and how far the tolerance lets it decline, in units of the metric.

    Between epochs the score is that of the first judgement. In a search it is the score on the search half.
    """
    score, floor = report.dense_score, report.floor
    if report.gradual and report.held_out_dense is not None and report.held_out_floor is not None:
        score, floor = report.held_out_dense, report.held_out_floor
    if math.isinf(report.tolerance):
        return f"{report.monitor} {score:.6g}, no floor"
    verb = "fall" if report.mode == "max" else "rise"
    may = f"may {verb} to {floor:.6g}" if report.tolerance else f"may not {verb}"
    why = f": {report.tolerance_why}; pass tolerance=... to choose another" if report.tolerance_why else ""
    return f"{report.monitor} {score:.6g}, {may} (tolerance {report.tolerance:.3g}{why})"


def _unpruned(report: SearchReport) -> bool:
    """Whether the search broke off, so that the network stays dense even if levels were accepted."""
    return report.stop_reason in (StopReason.INTERRUPTED, StopReason.FAILED)


def _kept(report: SearchReport) -> str:
    """Return how many weights are kept, of how many."""
    if _unpruned(report) and report.winner is not None:
        size = _size(report, report.winner, "prunable weights")
        return f"The slimmest accepted level keeps {size}. It was not loaded."
    if report.winner is not None:
        whole = " All weights in matrices are prunable." if report.size == report.matrices else ""
        return f"{_size(report, report.winner, 'prunable weights kept')}.{whole}"
    if report.held is not None:
        return f"{_size(report, report.held, 'prunable weights kept')}: the network stays as it was."
    return f"All {report.size:,} prunable weights kept: the network stays dense."


def _held(report: SearchReport) -> list[str]:
    """Return how many weights were held at zero before the search, if any were."""
    if report.held is None:
        return []
    held = report.size - report.held.survivors
    return [
        f"{held:,} of them were held at zero before the search. They count as pruned, and 'dense' means the network "
        "with these zeros."
    ]


def _units(report: SearchReport) -> list[str]:
    """Return how many units and multiply-adds are left, if units leave."""
    if report.units is None:
        return []
    result = report.winner or report.held or report
    units, left = result.units, result.multiply_adds
    line = f"{units:,} of {report.units:,} units left (unit: {report.unit})"
    if report.multiply_adds and left is not None:
        share = left / report.multiply_adds
        line += f", with {left:,} of {report.multiply_adds:,} multiply-adds of a sample ({share:.2%})"
    return [f"{line}."]


def _size(report: SearchReport, level: Level | Held, what: str) -> str:
    """Return how many weights a level keeps, its sparsity and its compression."""
    times = f", compression {_rounded(report.size / level.survivors, 3)}x" if level.survivors else ""
    kept = f"{level.survivors:,} of {report.size:,} {what} ({1 - level.sparsity:.2%})"
    return f"{kept}: sparsity {level.sparsity:.2%}{times}"


def _rounded(number: float, digits: int) -> str:
    """Return a positive number with some digits, and never as a power of ten."""
    return f"{number:,.0f}" if number >= 10 ** (digits - 1) else f"{number:.{digits}g}"


def _footprint(report: SearchReport) -> list[str]:
    """Return the bytes and the multiply-adds of the network, as far as they are known."""
    if (found := report.footprint) is None:
        return []
    line = f"Bytes: {found.dense_bytes:,} dense"
    if found.compressed_bytes is not None:
        line += f", {found.compressed_bytes:,} compressed by save_compressed (lossless)"
    if found.dense_multiply_adds is not None and found.effective_multiply_adds is not None:
        line += f". Multiply-adds of a sample: {found.dense_multiply_adds:,} dense"
        line += f", {found.effective_multiply_adds:,} effective"
    return [f"{line}."]


def _prunable(report: SearchReport) -> list[str]:
    """Return how many of all weights in matrices could be pruned, and which could not."""
    if report.matrices in (0, report.size):
        return []
    share = f"{report.size:,} of {report.matrices:,} weights in matrices ({report.size / report.matrices:.1%})"
    return [f"Prunable: {share}.", *([f"Not prunable: {listed(report.skipped)}."] if report.skipped else [])]


def _metric(report: SearchReport) -> list[str]:
    """Return the metric of the dense and of the pruned network, both on the same data."""
    after = "" if report.trained_score is None else f", {report.trained_score:.6g} after the training that followed"
    dense = _dense_on_all(report)
    if report.score is not None and dense is not None:
        return [_scores(report, f"all validation data{_ranked(report)}", dense, report.score, after)]
    if report.gradual:
        return []
    if report.score is not None:
        after = f"; pruned {report.score:.6g} on all validation data{after}"
    data = "the data that ranked the candidates" if report.folds[1] else "all validation data"
    return [_scores(report, data, report.dense_score, report.search_score, after)]


def _dense_on_all(report: SearchReport) -> float | None:
    """Return the metric of the dense network on all validation data; None if it is not known."""
    if report.dense_measured is not None or report.folds[1]:
        return report.dense_measured
    return report.held_out_dense if report.gradual else report.dense_score


def _scores(report: SearchReport, data: str, dense: float, pruned: float, after: str) -> str:
    what = f"dense {dense:.6g}" if report.winner is None else f"dense {dense:.6g}, pruned {pruned:.6g}"
    return f"{report.monitor} on {data}: {what}{after}."


def _ranked(report: SearchReport) -> str:
    """Return which share of the data ranked the candidates, if not all of it did."""
    searching, held_out = report.folds
    share = "half" if searching == held_out else f"{searching / (searching + held_out):.0%}"
    return f" ({share} of it ranked the candidates)" if held_out else ""


def _decline(report: SearchReport) -> list[str]:
    """Return how much worse the pruned network is on data that ranked no candidate."""
    if report.held_out_dense is None:
        why = f" ({report.undivided_because})" if report.undivided_because else ""
        said = f"No validation data was held out{why}: the same data chose and judged the pruned network."
        error = report.winner.error if report.winner else None
        return [f"{said} {_declined(report, error)}" if report.winner else said]
    if report.winner is None or report.winner.held_out_score is None:
        return []
    if report.gradual:
        return [_decline_after_training(report, report.winner.held_out_score)]
    return [
        f"On the held-out half, which ranked no candidates: dense {report.held_out_dense:.6g}, "
        f"pruned {report.winner.held_out_score:.6g}. {_declined(report, report.winner.held_out_error)}"
    ]


def _decline_after_training(report: SearchReport, score: float) -> str:
    """Return how much worse a network is that was trained after its cuts, than the network before the first cut."""
    networks = "The dense network is the one before the first cut, and the pruned one was trained further"
    decline = _declined(report, None)
    if report.folds[1]:
        scores = f"dense {report.held_out_dense:.6g}, pruned {score:.6g}"
        return f"{networks}. On the held-out half, which ranked no candidates: {scores}. {decline}"
    if report.score is not None:
        return f"{networks}. The same data judged every cut. {decline}"
    return f"{report.monitor} on all validation data: dense {report.held_out_dense:.6g}, pruned {score:.6g}. {decline}"


def _declined(report: SearchReport, error: float | None) -> str:
    """Return the decline, its standard error and the tolerance as a sentence."""
    decline = "unknown" if math.isnan(report.decline) else f"{report.decline:.4g}"
    known = "" if error is None or math.isnan(error) else f" (standard error {error:.2g})"
    why = f" ({report.tolerance_why})" if report.tolerance_why else ""
    allowed = f", allowed {report.tolerance:.4g}{why}" if math.isfinite(report.tolerance) else ""
    return f"{'Decline' if report.held_out_dense is None else 'Estimated decline'} {decline}{known}{allowed}."


def _certificate(report: SearchReport) -> list[str]:
    if report.confidence is None or report.method is None or _unpruned(report):
        return []
    if report.winner is None:
        return [f"No level could be certified with confidence {report.confidence:g}: the network stays dense."]
    if not report.winner.held:
        return []
    when = " before the training that followed" if report.trained_score is not None else ""
    return [
        f"With confidence {report.confidence:g} the pruned network's true decline{when} is at most "
        f"{report.tolerance:g}. {report.method.value}"
    ]


def _outcome(report: SearchReport) -> str:
    """Return whether the target was met, why the search ended, and which level is the result."""
    return " ".join(filter(None, (_target(report), _stopped(report), _result(report))))


def _target(report: SearchReport) -> str:
    if report.target_met is None or report.stop_reason is None:
        return ""
    if report.target_reduction is not None:
        what = report.counted.replace("_", "-")
        return f"Target {report.target_reduction:.2%} fewer {what}: {'met' if report.target_met else 'missed'}."
    return f"Target sparsity {report.target_sparsity:.2%}: {'met' if report.target_met else 'missed'}."


def _stopped(report: SearchReport) -> str:
    """Return why the search stopped, with the number of levels that missed the floor at its end."""
    if report.stop_reason is None:
        return "The search is running."
    if report.stop_reason is StopReason.TARGET_REACHED and report.target_met is not None:
        words = str(StopReason.TARGET_NOT_HELD.value)
        return "" if report.target_met else words.replace(" sparsity", "" if report.target_reduction else " sparsity")
    if report.stop_reason is not StopReason.DECLINED:
        return str(report.stop_reason.value)
    missed = len(list(takewhile(lambda level: not level.accepted, reversed(report.levels))))
    if missed == 1:
        return "Stopped: a level missed the floor."
    return str(report.stop_reason.value).replace("`patience`", str(missed))


def _result(report: SearchReport) -> str:
    """Return which level is the result, if it is not the last one that the search accepted."""
    if _unpruned(report) or report.stop_reason is None:
        return ""
    if not report.accepted:
        scores = [level.score for level in report.levels if not math.isnan(level.score)]
        best = (max if report.mode == "max" else min)(scores) if scores else math.nan
        return f"No level kept the floor {report.floor:.6g}; the best scored {best:.6g}." if report.levels else ""
    last, kept = report.accepted[-1].level, report.winner.level if report.winner else 0
    if kept == last:
        return ""
    missed = next((level for level in report.accepted if level.level > kept), None)
    return f"{f'Level {kept} of {last} is the result' if kept else 'No level held'}{_missed(report, missed)}."


def _missed(report: SearchReport, level: Level | None) -> str:
    """Return by what the next level missed the floor, in words that follow a sentence."""
    if level is None or level.held_out_score is None or report.held_out_floor is None:
        return ""
    data = "held-out half" if report.folds[1] else "validation data"
    if report.confidence is not None:
        return f": level {level.level} could not be certified on the {data}"
    return (
        f": level {level.level} missed the floor {report.held_out_floor:.6g} on the {data} "
        f"({report.monitor} {level.held_out_score:.6g})"
    )


def _unusual(report: SearchReport) -> list[str]:
    """Return what is unusual about the importance and the refit: a fallback, and weights that were not refitted."""
    lines = [f"Importance: {report.importance}."] if ", as " in report.importance else []
    undone = _by_reason(report.winner.undone) if report.winner else {}
    lines += [f"Not refitted: {one}." for one in _not_refitted(report)]
    lines += [f"Refit not kept for {names}: {why}." for why, names in undone.items()]
    return [*lines, f"Refit: {report.refit}."] if "not kept" in report.refit else lines


def _not_refitted(report: SearchReport) -> list[str]:
    """Return which weights were not refitted, with their share of the prunable weights and the reason."""
    if not report.not_refitted:  # reports of earlier versions have names alone
        return [f"{names} ({why})" for why, names in _by_reason(report.left_alone).items()]
    size = max(1, report.size)
    return [
        f"{one.weights / size:.1%} of the prunable weights, in {shortened(one.names)} ({one.why})"
        for one in report.not_refitted
    ]


def _by_reason(reasons: Mapping[str, str]) -> dict[str, str]:
    """Return for each reason its names in one string: the first of them, and how many more there are."""
    sharing = {why: [name for name, its in reasons.items() if its == why] for why in reasons.values()}
    return {why: ", ".join(_first(names)) for why, names in sharing.items()}


def _first(names: Sequence[str]) -> Sequence[str]:
    more = len(names) - _MOST_WEIGHTS
    return [*names[:_MOST_WEIGHTS], f"{more} more"] if more > 0 else names
