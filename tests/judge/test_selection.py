"""Selection: which candidate of a branch wins, and whether it keeps the floor."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette import Candidate
from lightning_roulette.judge.selection import best_of, keeps_floor


def candidates(*scores: tuple[float, ...]) -> list[Candidate]:
    """Of (rank, tiebreak, score), the last two optional."""
    return [
        Candidate(index, 0.5, score=rest[1] if len(rest) > 1 else rank, rank=rank, tiebreak=rest[0] if rest else 0.0)
        for index, (rank, *rest) in enumerate(scores)
    ]


def winner_of(*scores: tuple[float, ...]) -> int | None:
    """Index of the winner, which must not depend on the order in which candidates are compared."""
    found = {one and one.index for one in map(best_of, permutations(candidates(*scores)))}
    assert len(found) == 1
    return found.pop()


def test_the_best_rank_wins():
    assert winner_of((0.1,), (0.9,), (0.5,)) == 1


def test_rank_decides_and_score_does_not():
    assert winner_of((0.9, 0.0, 0.1), (0.1, 9.0, 0.9)) == 0


@pytest.mark.parametrize("bad", [(math.nan,), (math.nan, 0.0, 2.0), (2.0, 0.0, math.nan)])
def test_nan_never_wins(bad):
    assert winner_of(bad, (-1e30,), bad) == 1


def test_a_branch_of_nan_has_no_winner():
    assert winner_of((math.nan,), (1.0, 0.0, math.nan)) is None
    assert best_of([]) is None


def test_equal_ranks_go_to_the_larger_tiebreak():
    assert winner_of((0.5, -3.0), (0.5, -1.0), (0.5, -2.0), (0.1, 5.0)) == 1


def test_equal_in_everything_goes_to_the_earlier_draw():
    assert winner_of((0.1, 1.0), (0.5, 1.0), (0.5, 1.0), (0.5, 1.0)) == 1


def test_a_tiebreak_of_nan_loses_to_any_other_but_does_not_exclude():
    assert winner_of((0.5, math.nan), (0.5, -1e30)) == 1
    assert winner_of((0.5, math.nan), (0.4, 1.0)) == 0
    assert winner_of((0.5, math.nan), (0.5, math.nan)) == 0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from([math.nan, 0.0, 0.5, 1.0]), st.sampled_from([math.nan, -1.0, 0.0]))))
def test_one_by_one_the_same_candidate_wins(scores):
    branch, best = candidates(*scores), None
    for one in branch:
        best = best_of([one] if best is None else [best, one])
    # a lone NaN gives None, as if nothing had been seen
    assert best == best_of(branch)


@pytest.mark.parametrize(
    ("score", "floor", "kept"),
    [
        (0.9, 0.9, True),
        (0.91, 0.9, True),
        (0.899, 0.9, False),
        (-1.0, -0.9, False),
        (-0.9, -0.9, True),
        (0.0, 0.0, True),
        (-1e-12, 0.0, False),
        (0.0, -0.0, True),
        (-1e30, -math.inf, True),
        (1e30, math.inf, False),
        (math.nan, 0.9, False),
        (math.nan, -math.inf, False),
        (0.9, math.nan, False),
    ],
)
def test_a_score_keeps_the_floor(score, floor, kept):
    assert keeps_floor(score, floor) is kept


@pytest.mark.parametrize("dense", [0.9012345678, -0.3456789, 97.6, -1e-4, 123456.789])
def test_rounding_to_single_precision_does_not_break_the_floor(dense):
    rounded = float(np.float32(dense))
    for units in (0, 1, 2):
        below = rounded - units * abs(float(np.spacing(np.float32(dense))))
        assert keeps_floor(below, dense)
    assert not keeps_floor(dense - abs(dense) * 1e-6, dense)


@pytest.mark.parametrize("samples", [100, 10_000, 1_000_000])
def test_one_sample_less_is_below_the_floor(samples):
    right = int(0.976 * samples)
    assert keeps_floor(float(np.float32(right / samples)), right / samples)
    assert not keeps_floor(float(np.float32((right - 1) / samples)), right / samples)
