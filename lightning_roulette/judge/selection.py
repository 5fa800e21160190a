"""Among scored candidates, which one wins, and whether it keeps the floor."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lightning_roulette.report.records import Candidate

# A score logged in float32 that ties with the floor may fall below it by rounding: four units in the last place.
_ROUNDING = 2.0**-21


def best_of(candidates: Iterable[Candidate]) -> Candidate | None:
    """The candidate of best rank; ties go to the larger tiebreak, then to the earlier draw.

    A candidate whose rank or score is NaN never wins; None if there is no other.
    """
    fit = [one for one in candidates if not math.isnan(one.rank) and not math.isnan(one.score)]
    return max(fit, key=lambda one: (one.rank, _number_or_least(one.tiebreak), -one.index), default=None)


def keeps_floor(score: float, floor: float) -> bool:
    """Whether a score is at least the floor, up to the rounding of a float32."""
    return score >= floor - _ROUNDING * abs(floor) if math.isfinite(floor) else score >= floor


def _number_or_least(value: float) -> float:
    return -math.inf if math.isnan(value) else value
