"""`Tree.max_time`: no level begins that would end too late, and what was found is confirmed."""

from __future__ import annotations

import math
import time
from datetime import timedelta

import pytest
import torch

from lightning_roulette import Evaluator, PrunedWeights, Scores, StopReason, Tree, search
from lightning_roulette.judge.journal import Journal
from lightning_roulette.judge.noted import Noted

WEIGHTS = {"w": torch.arange(1.0, 1001.0)}
LEVEL = 10.0  # seconds


class Slow(Evaluator):
    """Every mask has the same score. A clock goes on by a level's time when a pruned network is first seen."""

    def __init__(self, clock: Clock, agreed=lambda here: here) -> None:
        self.clock, self.seen, self.agreed = clock, {WEIGHTS["w"].numel()}, agreed

    def __call__(self, candidate: PrunedWeights, folds) -> Scores:
        if candidate.mask.survivors not in self.seen:
            self.seen.add(candidate.mask.survivors)
            self.clock.now += LEVEL
        return Scores(1.0, 1.0)

    def in_any_process(self, here: bool) -> bool:
        return self.agreed(here)


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(time, "monotonic", found := Clock())
    return found


def levels(evaluate, **tree) -> tuple[int, StopReason]:
    report = search(WEIGHTS, evaluate, branches=1, tree=Tree(0.1, **{"max_levels": 8} | tree)).report
    return len(report.levels), report.stop_reason


@pytest.mark.parametrize(
    ("max_time", "found"),
    [
        ("00:00:01", 1),  # the first level takes a time that nobody knows before
        ("00:00:10", 1),
        ("00:00:29", 2),
        ("00:00:30", 3),
        ("00:00:00:30", 3),
        (timedelta(seconds=45), 4),
        ({"minutes": 1}, 6),
    ],
)
def test_no_level_begins_that_would_end_too_late(clock, max_time, found):
    assert levels(Slow(clock), max_time=max_time) == (found, StopReason.OUT_OF_TIME)


@pytest.mark.parametrize("max_time", [None, "01:00:00"])
def test_enough_time_changes_nothing(clock, max_time):
    assert levels(Slow(clock), max_time=max_time) == (8, StopReason.MAX_LEVELS)


def test_the_levels_that_were_found_are_the_winner(clock):
    winner = search(WEIGHTS, Slow(clock), branches=1, tree=Tree(0.1, max_time="00:00:20"))
    assert winner.report.survivors == int(winner.mask["w"].sum()) == 810
    assert "max_time" in str(winner.report)


def test_all_processes_end_at_the_same_level(clock):
    asked = []

    def agreed(here: bool) -> bool:
        asked.append(here)
        return len(asked) == 4  # another process has no time left before the fourth level

    assert levels(Slow(clock, agreed), max_time="01:00:00") == (3, StopReason.OUT_OF_TIME)
    assert asked == [False] * 4


def test_processes_are_asked_through_a_journal_and_by_objects_of_other_classes(clock, tmp_path):
    class Other:
        folds = 1

        def __init__(self) -> None:
            self.slow = Slow(clock, lambda here: True)

        def __call__(self, candidate, folds):
            return self.slow(candidate, folds)

        def in_any_process(self, here):
            return self.slow.in_any_process(here)

    noted = Noted(Slow(clock, lambda here: True), Journal(tmp_path / "journal", "search", []))
    for evaluate in (Other(), noted):
        assert levels(evaluate, max_time="01:00:00") == (0, StopReason.OUT_OF_TIME)


def test_without_a_limit_no_process_is_asked(clock):
    def agreed(here: bool) -> bool:
        raise AssertionError

    assert levels(Slow(clock, agreed)) == (8, StopReason.MAX_LEVELS)


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        ("30 minutes", ValueError, 'max_time is \'30 minutes\', but must be "DD:HH:MM:SS" or "HH:MM:SS", a timedelta'),
        ("30:00", ValueError, "must be"),
        ("00:00:00", ValueError, "must be longer than zero"),
        (timedelta(seconds=-1), ValueError, "must be longer than zero"),
        ({"minute": 3}, ValueError, "a dict of its arguments such as"),
        ({"minutes": "3"}, ValueError, "a dict of its arguments"),
        (30, TypeError, "max_time is 30, but must be"),
    ],
)
def test_other_values_are_refused(value, error, match):
    with pytest.raises(error, match=match):
        Tree(max_time=value)


def test_seconds():
    assert Tree().seconds == math.inf
    assert Tree(max_time="1:02:03:04").seconds == 93784
    assert Tree(max_time="02:03:04").seconds == 7384
