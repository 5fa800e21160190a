"""Observers of a search: one remembers the winner so far, and one passes every step to several others."""

from __future__ import annotations

from lightning_roulette.report.records import Candidate, Level
from lightning_roulette.search.observer import LevelTime, Observer
from lightning_roulette.search.winner import Winner


class Latest(Observer):
    """Remembers the winner that the search would return if it ended now.

    Attributes:
        so_far: This winner; None before the dense network was judged.
    """

    def __init__(self) -> None:
        self.so_far: Winner | None = None

    def on_dense(self, so_far: Winner, work: float) -> None:
        """Remember the dense network."""
        self.so_far = so_far

    def on_level(self, level: Level, so_far: Winner) -> None:
        """Remember the levels so far."""
        self.so_far = so_far

    def on_confirmed(self, level: Level, so_far: Winner) -> None:
        """Remember the levels so far."""
        self.so_far = so_far


class Several(Observer):
    """Passes every step to several observers, in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def on_dense(self, so_far: Winner, work: float) -> None:
        """See `Observer`."""
        for one in self._observers:
            one.on_dense(so_far, work)

    def on_candidate(self, level: int, done: int, planned: int, best: Candidate | None, sparsity: float) -> None:
        """See `Observer`."""
        for one in self._observers:
            one.on_candidate(level, done, planned, best, sparsity)

    def on_level(self, level: Level, so_far: Winner) -> None:
        """See `Observer`."""
        for one in self._observers:
            one.on_level(level, so_far)

    def on_timed(self, level: Level, so_far: Winner, time: LevelTime) -> None:
        """See `Observer`."""
        for one in self._observers:
            one.on_timed(level, so_far, time)

    def on_confirmed(self, level: Level, so_far: Winner) -> None:
        """See `Observer`."""
        for one in self._observers:
            one.on_confirmed(level, so_far)
