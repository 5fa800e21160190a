"""Records of levels and candidates."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest

from lightning_roulette import Candidate, Level
from tests.support.reports import CONFIRMED, HELD, LEVELS, REPORT


def test_the_score_of_a_level_is_that_of_its_winner():
    assert [level.score for level in LEVELS if level.winner is not None] == [0.97, 0.962, 0.2]
    assert math.isnan(LEVELS[1].score)


def test_the_winner_is_found_by_its_number_and_not_its_place():
    retried = tuple(Candidate(index, 0.2, index / 10, index / 10) for index in (3, 4, 5))
    assert Level(1, 0.1, 0.2, 80, retried, winner=4, accepted=True).score == 0.4


def test_the_spread_leaves_nan_out():
    assert LEVELS[0].spread == (0.93, 0.95, 0.97)
    assert LEVELS[2].spread == (0.3, 0.5, 0.962)
    assert LEVELS[3].spread == pytest.approx((0.1, 0.15, 0.2))
    assert all(math.isnan(value) for value in LEVELS[1].spread)


@pytest.mark.parametrize(
    ("record", "field"), [(REPORT, "dense_score"), (LEVELS[0], "accepted"), (LEVELS[0].candidates[0], "score")]
)
def test_records_are_frozen(record, field):
    with pytest.raises(FrozenInstanceError):
        setattr(record, field, 1.0)


def test_former_names_still_work_and_say_the_present_one():
    with pytest.warns(DeprecationWarning, match="gated is now held_out_score"):
        assert HELD.gated == 0.9511
    with pytest.warns(DeprecationWarning, match="gated_floor is now held_out_floor"):
        assert CONFIRMED.gated_floor == CONFIRMED.held_out_floor
    with pytest.raises(AttributeError, match="'Level' object has no attribute 'gatet'"):
        HELD.gatet
