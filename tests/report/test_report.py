"""The report: which level wins, how far it declined, and the units of its metric."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.support.reports import CONFIRMED, DENSE, HELD, LEVELS, MISSED, REPORT

BOTH = replace(CONFIRMED, levels=(HELD, replace(MISSED, held=True)))
NONE_HELD = replace(CONFIRMED, levels=(replace(HELD, held=False), *LEVELS[1:]))


@pytest.mark.parametrize(
    ("report", "winner", "numbers"),
    [
        (REPORT, LEVELS[2], (0.28, 7200, 0.962)),  # the sparsest accepted level
        (DENSE, None, (0.0, 10_000, 0.965)),
        (CONFIRMED, HELD, (0.2, 8000, 0.97)),  # the sparsest level that held
        (BOTH, BOTH.levels[1], (0.28, 7200, 0.962)),
        (NONE_HELD, None, (0.0, 10_000, 0.965)),
        # every accepted level counts until the first is confirmed
        (replace(CONFIRMED, levels=LEVELS), LEVELS[2], (0.28, 7200, 0.962)),
        (replace(CONFIRMED, levels=(HELD, *LEVELS[1:])), HELD, (0.2, 8000, 0.97)),
    ],
)
def test_the_winner_is_the_sparsest_level_that_stands_or_the_dense_network(report, winner, numbers):
    assert report.winner == winner
    assert (report.sparsity, report.survivors, report.search_score) == numbers
    assert report.accepted == tuple(level for level in report.levels if level.accepted)


@pytest.mark.parametrize(
    ("report", "decline"),
    [
        (replace(CONFIRMED, levels=(HELD,)), 0.9523 - 0.9511),
        (CONFIRMED, 0.005),  # halfway to the level that did not hold would be more than is tolerated
        (replace(CONFIRMED, levels=(replace(HELD, held_out_score=0.96),)), 0.0),  # no decline is negative
        (NONE_HELD, 0.0),
        (replace(CONFIRMED, levels=LEVELS), math.nan),  # nothing was confirmed yet
        (REPORT, 0.965 - 0.962),
        (DENSE, 0.0),
    ],
)
def test_the_decline_is_that_on_the_held_out_half_if_there_is_one(report, decline):
    assert report.decline == pytest.approx(decline, nan_ok=True)


@pytest.mark.parametrize(
    ("missed", "expected"),
    [((), 0.9523 - 0.9495), ((0.947,), 0.9523 - (0.9495 + 0.947) / 2), ((0.93,), 0.005), ((0.9515,), 0.9523 - 0.9495)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_decline_is_halfway_from_the_largest_that_held_to_the_first_that_did_not(sign, missed, expected):
    held_out = [(0.951, True), (0.9495, True), (0.9520, True), *((one, False) for one in missed)]
    levels = tuple(
        replace(HELD, level=i + 1, held_out_score=sign * one, held=held) for i, (one, held) in enumerate(held_out)
    )
    mode = "max" if sign == 1 else "min"
    report = replace(CONFIRMED, mode=mode, held_out_dense=sign * 0.9523, levels=levels)
    assert report.winner == levels[2]
    assert report.decline == pytest.approx(expected)


@pytest.mark.parametrize(("mode", "floor", "held_out"), [("max", 0.96, 0.9473), ("min", 0.97, 0.9573)])
def test_each_half_has_a_floor_on_the_worse_side(mode, floor, held_out):
    report = replace(CONFIRMED, mode=mode)
    assert (report.floor, report.held_out_floor) == pytest.approx((floor, held_out))
    assert replace(REPORT, mode=mode).held_out_floor is None


def test_a_metric_to_be_minimised_is_reported_in_its_own_units():
    scored = replace(REPORT, monitor="score", dense_score=-0.5, tolerance=0.1, score=-0.55)
    loss = scored.in_metric("val_loss", "min")
    assert (loss.monitor, loss.mode, loss.dense_score, loss.score) == ("val_loss", "min", 0.5, 0.55)
    assert loss.floor == pytest.approx(0.6)
    assert [level.score for level in loss.levels if level.winner is not None] == [-0.97, -0.962, -0.2]
    assert loss.levels[0].spread == (-0.97, -0.95, -0.93)
    assert loss.search_score == -0.962
    assert (loss.held_out_dense, {(level.held_out_score, level.held) for level in loss.levels}) == (
        None,
        {(None, None)},
    )
    # ranks stay as they ordered the branch
    assert [one.rank for one in loss.levels[0].candidates] == [0.95, 0.97, 0.93]


def test_a_confirmed_search_is_reported_in_the_units_of_its_metric():
    negative = replace(
        CONFIRMED,
        dense_score=-0.5,
        held_out_dense=-0.52,
        tolerance=0.1,
        levels=(replace(HELD, held_out_score=-0.55), MISSED),
    )
    loss = negative.in_metric("val_loss", "min")
    assert (loss.held_out_dense, loss.levels[0].held_out_score) == (0.52, 0.55)
    assert loss.held_out_floor == pytest.approx(0.62)
    assert loss.decline == pytest.approx(negative.decline) == pytest.approx(0.03)
    assert loss.search_score == -0.97
    assert loss.winner == loss.levels[0]
    # errors, p-values and verdicts have no sign
    for ours, others in zip(loss.levels, negative.levels, strict=True):
        assert (ours.error, ours.p_value, ours.held) == (others.error, others.p_value, others.held)
        assert repr(ours.held_out_error) == repr(others.held_out_error)


def test_a_metric_to_be_maximised_only_gets_its_name():
    assert repr(REPORT.in_metric("top5", "max")) == repr(replace(REPORT, monitor="top5"))  # with NaN in it


@pytest.mark.parametrize(
    ("target", "met"), [(None, None), (0.2, True), (0.20004, True), (0.28, False), (0.20006, False), (0.1, True)]
)
def test_the_target_is_met_by_as_many_weights_as_it_asks_for(target, met):
    assert CONFIRMED.survivors == 8000  # of 10,000
    assert replace(CONFIRMED, target_sparsity=target).target_met is met
