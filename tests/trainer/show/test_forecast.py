"""What is said of the time of a search's levels."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_roulette import LevelTime
from lightning_roulette.trainer.show.forecast import Forecast, levels_left
from tests.support.reports import LEVELS, REPORT

# 13 validations took 4.25 s
DENSE = replace(REPORT, levels=(), importance="magnitude")
FIRST = replace(DENSE, levels=LEVELS[:1])
SOLVED = replace(FIRST, refit="survivors by least squares, and running statistics, of the best candidate of a level")
FIT = "A level of 3 candidates will take about"


def test_without_a_refit_a_level_takes_as_long_as_its_validations():
    assert Forecast().before(DENSE, 26) == f"{FIT} 8.5 s."


@pytest.mark.parametrize("unknown", [{"refit": SOLVED.refit}, {"importance": "sensitivity"}])
def test_before_the_first_level_no_time_is_promised_for_what_was_never_done(unknown):
    assert Forecast().before(replace(DENSE, **unknown), 26) == "How long a level takes is known after the first."


def said(report, *seconds, work=26):
    """What a forecast says before and after levels that took so long."""
    forecast = Forecast()
    forecast.before(replace(report, levels=()), work)
    return [forecast.after(report, one if isinstance(one, LevelTime) else LevelTime(one)) for one in seconds]


def test_the_first_level_forecasts_the_next_with_its_refit():
    (lines,) = said(SOLVED, LevelTime(0.9, 0.3))
    assert lines == [f"level 1 took 0.9 s, 0.3 s of it for the refit. {FIT} 0.9 s."]


def test_a_coarse_level_forecasts_levels_with_one_candidate():
    coarse = replace(SOLVED, levels=(replace(LEVELS[0], candidates=LEVELS[0].candidates[:1]),))
    (lines,) = said(coarse, LevelTime(0.9, 0.3))
    assert lines == ["level 1 took 0.9 s, 0.3 s of it for the refit. A level of one candidate will take about 0.9 s."]


def test_a_forecast_that_was_right_is_not_said_again():
    assert said(FIRST, 8.5, 8.0, 11.5, 6.2) == [[]] * 4


@pytest.mark.parametrize("seconds", [30.0, 4.0])
def test_a_forecast_that_was_wrong_is_corrected(seconds):
    corrected, kept = said(FIRST, seconds, seconds * 1.1)
    assert corrected == [f"level 1 took {seconds} s. {FIT} {seconds} s."]
    assert kept == []


def test_a_forecast_is_never_far_off_for_long():
    times = [2.0 * 1.3**level for level in range(12)]
    lines = said(SOLVED, *times)
    said_so_far = None
    for seconds, found in zip(times, lines, strict=True):
        assert said_so_far is None or seconds <= said_so_far * 1.5 * 1.3
        for line in found:
            said_so_far = float(line.split(" s.")[-2].split()[-1])
    assert sum(map(len, lines)) == 6


def test_of_short_levels_at_most_two_forecasts_are_said():
    assert [len(found) for found in said(SOLVED, 0.6, 0.3, 0.2, 0.6, 0.1)] == [1, 1, 0, 0, 0]


def test_a_slow_refit_is_said_once_with_what_to_pass():
    lines = said(SOLVED, LevelTime(9.0, 8.0), LevelTime(9.0, 8.0))
    assert lines[1] == []
    assert lines[0][1] == (
        "most of a level's time is the refit. For a faster search pass refit=LeastSquares(batches=...) with fewer "
        "batches than now, refit=LeastSquares(each_level=False) to refit accepted levels only, or refit=None."
    )
    statistics = replace(FIRST, refit="running statistics, of the best candidate of a level")
    assert "refit=Refit(batches=...)" in said(statistics, LevelTime(9.0, 8.0))[0][1]
    taught = replace(FIRST, refit="survivors by least squares and 300 gradient steps, of the best candidate of a level")
    fewer = "pass refit=LeastSquares(distill=...) with fewer steps, refit=LeastSquares(batches=...) with fewer batches"
    assert fewer in said(taught, LevelTime(9.0, 8.0))[0][1]


@pytest.mark.parametrize("time", [LevelTime(0.5, 0.4), LevelTime(9.0, 4.0), LevelTime(9.0)])
def test_a_refit_that_is_fast_is_not(time):
    assert "most of" not in " ".join(said(SOLVED, time)[0])


@pytest.mark.parametrize(
    ("target", "rate", "left"),
    [(None, 0.2, 0), (0.2, 0.2, 0), (0.36, 0.2, 1), (0.37, 0.2, 2), (0.9, 0.2, 10), (0.1, 0.2, 0), (0.9, 1.0, 0)],
)
def test_levels_to_the_target_are_counted_at_the_last_rate(target, rate, left):
    report = replace(FIRST, levels=(replace(LEVELS[0], pruning_rate=rate),), target_sparsity=target)
    assert report.levels[0].survivors == 8000  # of 10,000
    assert levels_left(report) == left


@pytest.mark.parametrize(("seconds", "whole"), [(2.0, "20.0 s"), (60.0, "10 min"), (3600.0, "10.0 h")])
def test_with_a_target_the_time_to_it_is_said(seconds, whole):
    ((line,),) = said(replace(SOLVED, target_sparsity=0.9), seconds)
    assert line.endswith(f"{FIT} {seconds} s, and 10 levels to the target about {whole}.")
