"""How long the levels of a search will take, in words."""

from __future__ import annotations

import math

from lightning_roulette.report.report import SearchReport
from lightning_roulette.search.observer import LevelTime

FACTOR = 1.4  # a new forecast is given when a level takes this many times longer or shorter
SLOW = 1.0  # levels shorter than this, in seconds, get few forecasts and no advice


class Forecast:
    """Forecasts how long a level will take: as long as the last one.

    Before the first level only the time of the validations is known. After each level a new forecast is given if the
    last one was wrong: much of the first level is done only once, and later refits may solve larger systems.
    """

    def __init__(self) -> None:
        self._said: float | None = None
        self._levels = 0
        self._advised = False

    def before(self, report: SearchReport, work: float) -> str:
        """Return the forecast before the first level.

        Args:
            report: The report of the dense network.
            work: Expected work of one level, in validations of one network on all folds.
        """
        if report.refit or report.importance != "magnitude":
            return "How long a level takes is known after the first."
        self._said = seconds = work * report.seconds / max(report.validations, 1)
        return f"A level of {report.branches} candidates will take about {seconds:.1f} s."

    def after(self, report: SearchReport, time: LevelTime) -> list[str]:
        """Return the sentences to log after a level.

        Args:
            report: The report with this level.
            time: How long the level took.
        """
        said = []
        if self._is_news(time.seconds):
            self._said = time.seconds
            said.append(_forecast(report, time))
        if time.seconds >= SLOW and time.refit > time.seconds / 2 and not self._advised:
            self._advised = True
            said.append(_advice(report))
        return said

    def _is_news(self, seconds: float) -> bool:
        """Whether there is no forecast yet, or a wrong one. Short levels get at most two forecasts."""
        self._levels += 1
        if self._said is None:
            return True
        low, high = sorted((self._said, seconds))
        return high > FACTOR * low and high >= (SLOW if self._levels > 2 else SLOW / 10)


def _forecast(report: SearchReport, time: LevelTime) -> str:
    refit = f", {time.refit:.1f} s of it for the refit" if time.refit >= 0.05 else ""
    left = levels_left(report)
    whole = f", and {left} levels to the target about {_duration(left * time.seconds)}" if left else ""
    return (
        f"level {report.levels[-1].level} took {time.seconds:.1f} s{refit}. "
        f"A level of {_candidates(report)} will take about {time.seconds:.1f} s{whole}."
    )


def _candidates(report: SearchReport) -> str:
    """Return how many candidates the last level has. A coarse level has one."""
    count = len(report.levels[-1].candidates)
    return "one candidate" if count == 1 else f"{count} candidates"


def levels_left(report: SearchReport) -> int:
    """Return how many levels lead to the target sparsity at the last pruning rate; 0 without a target."""
    goal = 0 if report.target_sparsity is None else (1 - report.target_sparsity) * report.size
    accepted = [level.survivors for level in report.levels if level.accepted]
    survivors, rate = (accepted or [report.survivors])[-1], report.levels[-1].pruning_rate
    if not 0 < goal < survivors or not 0 < rate < 1:
        return 0
    return math.ceil(math.log(goal / survivors) / math.log(1 - rate))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _advice(report: SearchReport) -> str:
    name = "LeastSquares" if "least squares" in report.refit else "Refit"
    steps = f"refit={name}(distill=...) with fewer steps, " if "gradient steps" in report.refit else ""
    return (
        f"most of a level's time is the refit. For a faster search pass {steps}refit={name}(batches=...) with fewer "
        f"batches than now, refit={name}(each_level=False) to refit accepted levels only, or refit=None."
    )
