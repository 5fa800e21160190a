"""Reports of a search that was not confirmed, and of one that was confirmed and certified."""

from __future__ import annotations

import math
from dataclasses import replace

from lightning_roulette import Candidate, Level, Method, SearchReport, StopReason


def branch(*scores: float, sparsity: float = 0.2) -> tuple[Candidate, ...]:
    return tuple(Candidate(index, sparsity, score, rank=score) for index, score in enumerate(scores))


LEVELS = (
    Level(1, 0.2, 0.2, 8000, branch(0.95, 0.97, 0.93), winner=1, accepted=True),
    Level(2, 0.2, 0.36, 6400, branch(math.nan, math.nan, math.nan, sparsity=0.36), winner=None, accepted=False),
    Level(2, 0.1, 0.28, 7200, branch(math.nan, 0.5, 0.962, 0.3, sparsity=0.28), winner=2, accepted=True),
    Level(3, 0.1, 0.352, 6480, branch(0.1, 0.2, sparsity=0.352), winner=1, accepted=False),
)
REPORT = SearchReport("val_acc", "max", 0.965, 0.005, 3, -7, 10_000, LEVELS, StopReason.DECLINED, 13, 4.25)
DENSE = replace(REPORT, levels=(LEVELS[3],))
# on the held-out half the first accepted level held, and the second did not
HELD = replace(LEVELS[0], error=0.002, held_out_score=0.9511, held_out_error=0.0021, p_value=0.0123, held=True)
MISSED = replace(LEVELS[2], error=0.003, held_out_score=0.94, held_out_error=math.nan, p_value=0.6, held=False)
CONFIRMED = replace(
    REPORT,
    levels=(HELD, LEVELS[1], MISSED, LEVELS[3]),
    validations=7.125,
    rank_by="val_loss",
    folds=(8, 8),
    held_out_dense=0.9523,
    confidence=0.95,
    method=Method.BETTING,
    samples=5000,
)
