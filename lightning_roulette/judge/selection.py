"""Which scored candidate wins, and whether it keeps the floor."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lightning_roulette.report.records import Candidate

# A score logged in float32 that equals the floor may be below it by rounding: four units in the last place.
_ROUNDING = 2.0**-21


def best_of(candidates: Iterable[Candidate]) -> Candidate | None:
    """Return the candidate with the best rank. Among equal ranks the larger tiebreak wins, then the earlier draw.

    A candidate whose rank or score is NaN never wins. Returns None if there is no other candidate.
    """
    fit = [one for one in candidates if not math.isnan(one.rank) and not math.isnan(one.score)]
    return max(fit, key=lambda one: (one.rank, _number_or_least(one.tiebreak), -one.index), default=None)


def best_few(candidates: Iterable[Candidate], count: int) -> list[Candidate]:
    """Return the `count` best candidates, or all if they are no more, in the order given. A NaN is never among them.

    If `count` does not exclude anyone, candidates without a number stay in the list.
    """
    entrants = list(candidates)
    if count >= len(entrants):
        return entrants
    best: list[int] = []
    while len(best) < count and (one := best_of([one for one in entrants if one.index not in best])) is not None:
        best.append(one.index)
    return [one for one in entrants if one.index in best]


def keeps_floor(score: float, floor: float) -> bool:
    """Whether a score is at least the floor, up to the rounding of a float32."""
    return score >= floor - _ROUNDING * abs(floor) if math.isfinite(floor) else score >= floor


def _number_or_least(value: float) -> float:
    return -math.inf if math.isnan(value) else value
