"""The points of the curves of a search: tag, value, and what the tag means."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_roulette.mask.mask import Mask
from lightning_roulette.report.names import layer_names
from lightning_roulette.report.records import Level
from lightning_roulette.report.report import SearchReport

MOST_LAYERS = 20  # the largest ones are shown one by one

SPARSITY, MULTIPLY_ADDS = "roulette/sparsity", "roulette/multiply_adds"
SCORE, FLOOR = "roulette/score", "roulette/floor"
HELD_OUT, HELD_OUT_FLOOR = "roulette/held_out", "roulette/held_out_floor"
BRANCH = ("roulette-branch/min", "roulette-branch/median", "roulette-branch/max")
SCORE_ERROR, HELD_OUT_ERROR = "roulette-branch/score_error", "roulette-branch/held_out_error"
DENSITY = "roulette-density/"

_AXIS = "x-axis (step): level of the search. Level 0 is the dense network."
_MEANINGS = {
    SPARSITY: "Share of the prunable weights that is removed.",
    MULTIPLY_ADDS: "Share of the multiply-adds of the dense network that is left, for one sample.",
    SCORE: "{monitor} of the best candidate, on the data that ranks the candidates.",
    FLOOR: "The worst score that is accepted: {monitor} of the dense network on the same data, less the tolerance.",
    HELD_OUT: "{monitor} of the same network on the held-out half of the validation data, which ranks no candidate.",
    HELD_OUT_FLOOR: "The worst held-out score that is accepted.",
    BRANCH[0]: "The smallest {monitor} among the candidates.",
    BRANCH[1]: "The median {monitor} of the candidates.",
    BRANCH[2]: "The largest {monitor} among the candidates.",
    SCORE_ERROR: "Standard error of the score minus that of the dense network, paired.",
    HELD_OUT_ERROR: "Standard error of the held-out score minus that of the dense network, paired.",
}


def described(tag: str, monitor: str) -> str:
    """Return what the curve of a tag shows, and what its x-axis is.

    Args:
        tag: A tag of this module.
        monitor: Name of the metric.
    """
    if tag.startswith(DENSITY):
        return f"Share of the weights of {tag.removeprefix(DENSITY)} that is kept. {_AXIS}"
    return f"{_MEANINGS[tag].format(monitor=monitor)} {_AXIS}"


def of_dense(report: SearchReport, mask: Mask) -> dict[str, float]:
    """Return the points of level 0. `mask` is its mask."""
    points = {
        SPARSITY: mask.sparsity,
        SCORE: report.dense_score,
        FLOOR: report.floor,
        **dict.fromkeys(BRANCH, report.dense_score),
    }
    if report.held_out_dense is not None:
        points[HELD_OUT] = report.held_out_dense
    if report.multiply_adds:
        left = report.multiply_adds if report.held is None else report.held.multiply_adds
        points[MULTIPLY_ADDS] = 1.0 if left is None else left / report.multiply_adds
    return {**points, **_held_out_floor(report), **_densities(mask)}


def of_level(report: SearchReport, mask: Mask) -> dict[str, float]:
    """Return the points of the last level on the data that ranks the candidates. `mask` is the mask of its winner."""
    level = report.levels[-1]
    points = {SPARSITY: level.sparsity, SCORE: level.score, FLOOR: report.floor, SCORE_ERROR: level.error}
    if report.multiply_adds and level.multiply_adds is not None:
        points[MULTIPLY_ADDS] = level.multiply_adds / report.multiply_adds
    return _known({**points, **dict(zip(BRANCH, level.spread, strict=True)), **_densities(mask)})


def of_held_out(report: SearchReport, level: Level) -> dict[str, float]:
    """Return the points of a level on the held-out half."""
    return _known({HELD_OUT: level.held_out_score, HELD_OUT_ERROR: level.held_out_error, **_held_out_floor(report)})


def largest(mask: Mask) -> dict[str, str]:
    """Return short names of the largest parameters of a mask, by their names, in the order of the network."""
    by_size = sorted(mask, key=lambda name: -mask.flags[name].numel())
    shown = set(by_size[:MOST_LAYERS])
    return {name: short for name, short in layer_names(list(mask)).items() if name in shown}


def _densities(mask: Mask) -> dict[str, float]:
    densities = mask.densities
    return {f"{DENSITY}{short}": densities[name] for name, short in largest(mask).items()}


def _held_out_floor(report: SearchReport) -> dict[str, float]:
    return {} if report.held_out_floor is None else {HELD_OUT_FLOOR: report.held_out_floor}


def _known(points: Mapping[str, float | None]) -> dict[str, float]:
    return {tag: value for tag, value in points.items() if value is not None and not math.isnan(value)}
