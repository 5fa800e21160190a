"""Observers, which are told of each step of a search."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_roulette.report.records import Candidate, Level
from lightning_roulette.search.winner import Winner


@dataclass(frozen=True)
class LevelTime:
    """How long one level took. It is no part of the report, because it differs from run to run.

    Attributes:
        seconds: Wall time of the level: drawing, importance, validation, refit and standard errors.
        refit: Wall time of its refits, in seconds. 0 without a refit.
    """

    seconds: float
    refit: float = 0.0


class Observer:
    """Base class for objects that follow a search. Every method does nothing by default.

    All scores are scores of the evaluator: larger is better.
    """

    def on_dense(self, so_far: Winner, work: float) -> None:
        """Called when the dense network was validated.

        Args:
            so_far: What the search would return if it ended now.
            work: Expected work of one level, in validations of one network on all folds.
        """

    def on_candidate(self, level: int, done: int, planned: int, best: Candidate | None, sparsity: float) -> None:
        """Called when a candidate was validated.

        Args:
            level: Number of the level, from 1.
            done: Validations of candidates of this level so far.
            planned: Expected number of these validations.
            best: Best candidate so far. None if no score is a number yet.
            sparsity: Sparsity of all candidates of the level.
        """

    def on_level(self, level: Level, so_far: Winner) -> None:
        """Called when a level was judged on the search half. Levels come in the order of the report, each once.

        One step of a policy may add several levels.

        Args:
            level: The level, the last one of the report.
            so_far: What the search would return if it ended now.
        """

    def on_timed(self, level: Level, so_far: Winner, time: LevelTime) -> None:
        """Called after `on_level`.

        Args:
            level: The level.
            so_far: What the search would return if it ended now.
            time: How long the level took.
        """

    def on_confirmed(self, level: Level, so_far: Winner) -> None:
        """Called when an accepted level was judged on the held-out half.

        Args:
            level: The level.
            so_far: What the search would return if it ended now.
        """
