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
    """Candidates with these (rank, tiebreak, score); the last two are optional."""
    return [
        Candidate(index, 0.5, score=rest[1] if len(rest) > 1 else rank, rank=rank, tiebreak=rest[0] if rest else 0.0)
        for index, (rank, *rest) in enumerate(scores)
    ]


NAN = math.nan


@pytest.mark.parametrize(
    ("scores", "winner"),
    [
        pytest.param([(0.1,), (0.9,), (0.5,)], 1, id="the best rank wins"),
        pytest.param([(0.9, 0.0, 0.1), (0.1, 9.0, 0.9)], 0, id="the rank decides and the score does not"),
        *(
            pytest.param([bad, (-1e30,), bad], 1, id="NaN never wins")
            for bad in [(NAN,), (NAN, 0.0, 2.0), (2.0, 0.0, NAN)]
        ),
        pytest.param([(NAN,), (1.0, 0.0, NAN)], None, id="a branch of NaN has no winner"),
        pytest.param([], None, id="an empty branch has no winner"),
        pytest.param([(0.5, -3), (0.5, -1), (0.5, -2), (0.1, 5)], 1, id="equal ranks go to the larger tiebreak"),
        pytest.param([(0.1, 1), (0.5, 1), (0.5, 1), (0.5, 1)], 1, id="equal scores go to the earlier draw"),
        pytest.param([(0.5, NAN), (0.5, -1e30)], 1, id="a tiebreak of NaN loses to any other"),
        pytest.param([(0.5, NAN), (0.4, 1.0)], 0, id="a tiebreak of NaN does not exclude"),
        pytest.param([(0.5, NAN), (0.5, NAN)], 0, id="equal tiebreaks of NaN go to the earlier draw"),
    ],
)
def test_the_winner_of_a_branch_in_any_order_of_comparison(scores, winner):
    assert {one and one.index for one in map(best_of, permutations(candidates(*scores)))} == {winner}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from([NAN, 0.0, 0.5, 1.0]), st.sampled_from([NAN, -1.0, 0.0]))))
def test_the_same_candidate_wins_if_they_are_compared_one_by_one(scores):
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
        (NAN, 0.9, False),
        (NAN, -math.inf, False),
        (0.9, NAN, False),
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
