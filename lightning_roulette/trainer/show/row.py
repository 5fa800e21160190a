"""A search as one row of a table of runs: its settings and its final numbers."""

from __future__ import annotations

import math

from lightning_roulette.report.report import SearchReport
from lightning_roulette.trainer.choices import Choices

Setting = bool | int | float | str
RESULT = "roulette-result/"

MEANINGS = {
    "sparsity": "Share of the prunable weights that is removed.",
    "weights_left": "Number of prunable weights that are kept.",
    "score": "The metric of the pruned network on all validation data.",
    "tolerance": "How much worse the metric was allowed to be.",
    "decline": "How much worse the metric is: the estimate of the report.",
    "held_out_decline": "How much worse the metric is on the held-out half, as measured.",
    "seconds": "Wall time of the search.",
    "validations": "Work of the search, in full validations of one network.",
    "bytes": "Bytes of the file that save_compressed writes, lossless.",
    "multiply_adds": "Multiply-adds of one sample with weights that are not zero.",
}


def settings_of(choices: Choices) -> dict[str, Setting]:
    """Return the settings of a search that decide most about its result, by tags. All rows have the same."""
    wheel, tree, validation = choices.wheel, choices.tree, choices.validation
    refit = choices.refit if choices.refit is None or isinstance(choices.refit, str) else type(choices.refit).__name__
    importance = getattr(wheel.importance, "__name__", wheel.importance)
    named: dict[str, Setting] = {
        "branches": choices.branches,
        "tolerance": str(choices.tolerance),
        "seed": choices.seed,
        "refit": str(refit),
        "target_sparsity": str(choices.target_sparsity),
        "confidence": str(choices.confidence),
        "wheel.sharpness": wheel.sharpness,
        "wheel.importance": str(importance),
        "wheel.scope": wheel.scope,
        "tree.pruning_rate": tree.pruning_rate,
        "tree.coarse_rate": str(tree.coarse_rate),
        "tree.patience": tree.patience,
        "validation.confirm": validation.confirm,
    }
    return {f"roulette/{name}": value for name, value in named.items()}


def result_of(report: SearchReport) -> dict[str, float]:
    """Return the final numbers of a search by tags. What is unknown is left out."""
    footprint, winner = report.footprint, report.winner
    numbers = {
        "sparsity": report.sparsity,
        "weights_left": report.survivors,
        "score": report.score,
        "tolerance": report.tolerance,
        "decline": report.decline,
        "held_out_decline": _held_out_decline(report, None if winner is None else winner.held_out_score),
        "seconds": report.seconds,
        "validations": report.validations,
        "bytes": None if footprint is None else footprint.compressed_bytes,
        "multiply_adds": None if footprint is None else footprint.effective_multiply_adds,
    }
    known = {name: float(one) for name, one in numbers.items() if one is not None and math.isfinite(one)}
    return {f"{RESULT}{name}": value for name, value in known.items()}


def described(tag: str) -> str:
    """Return what a final number is."""
    return f"{MEANINGS[tag.removeprefix(RESULT)]} The step is the level of the result."


def _held_out_decline(report: SearchReport, score: float | None) -> float | None:
    if report.held_out_dense is None or score is None:
        return None
    return report.held_out_dense - score if report.mode == "max" else score - report.held_out_dense
