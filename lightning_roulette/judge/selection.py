"""Which scored candidate wins, and whether it keeps the floor."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lightning_roulette.report.records import Candidate

# A score logged in float32 that equals the floor may be below it by rounding: four units in the last place.
_ROUNDING = 2.0**-21


def best_of(candidates: Iterable[Candidate]) -> Candidate | None:
    """Return the candidate with the best rank; None if every candidate has NaN as rank or score.

    Among equal ranks the larger tiebreak wins, then the earlier draw.
    """
    fit = [one for one in candidates if not math.isnan(one.rank) and not math.isnan(one.score)]
    return max(fit, key=lambda one: (one.rank, _number_or_least(one.tiebreak), -one.index), default=None)


def best_few(candidates: Iterable[Candidate], count: int) -> list[Candidate]:
    """Return the `count` best candidates in the order given. Candidates that score NaN are not among them.

    If there are at most `count` candidates, all are returned, even those that score NaN.
    """
    entrants = list(candidates)
    if count >= len(entrants):
        return entrants
    best: list[int] = []
    while len(best) < count and (one := best_of([one for one in entrants if one.index not in best])) is not None:
        best.append(one.index)
    return [one for one in entrants if one.index in best]


def keeps_floor(score: float, floor: float) -> bool:
    """Return whether a score is at least the floor, up to the rounding of a float32."""
    return score >= floor - _ROUNDING * abs(floor) if math.isfinite(floor) else score >= floor


def _number_or_least(value: float) -> float:
    return -math.inf if math.isnan(value) else value
