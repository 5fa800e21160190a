"""Observers of a search: for the winner so far, for several observers, and for a metric that cannot be judged."""

from __future__ import annotations

from lightning_roulette.report.records import Candidate, Level
from lightning_roulette.search.observer import LevelTime, Observer
from lightning_roulette.search.winner import Winner
from lightning_roulette.trainer.scores.monitored_metric import MonitoredMetric

_FAR = 0.25  # of the larger of the scores


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


class Comparable(Observer):
    """Refuses a search if scores on parts of the data say nothing about the score on all of it.

    The dense score on all data must not be far from both its scores on the search half and on the held-out half. It is
    far if a validation looks up targets by the number of a batch, for example, because batches of a part of the data
    have other numbers.

    Args:
        on_all: The metric of the dense network on all validation data; None if it is unknown.
        metric: The metric.
    """

    def __init__(self, on_all: float | None, metric: MonitoredMetric) -> None:
        self._on_all, self._metric = on_all, metric

    def on_dense(self, so_far: Winner, work: float) -> None:
        """Compare the scores of the dense network.

        Raises:
            RuntimeError: If they are too far apart.
        """
        report, whole = self._metric.units_of(so_far.report), self._on_all
        if whole is None or report.folds[1] == 0 or report.held_out_dense is None:
            return
        parts = (report.dense_score, report.held_out_dense)
        outside = max(min(parts) - whole, whole - max(parts))
        if outside <= _FAR * max(abs(whole), *map(abs, parts)):  # False if a score is NaN
            return
        raise RuntimeError(
            f"RouletteWheelPruning: {report.monitor} of the dense network is {whole:.6g} on all validation data, but "
            f"{parts[0]:.6g} on one half of it and {parts[1]:.6g} on the other. Candidates are judged on parts of the "
            "data, which says nothing here. Likely causes: (1) validation_step looks up targets by batch_idx. Put them "
            "into the batch. (2) The metric counts samples of a table that holds all data. Divide by the samples seen. "
            "To judge on all data, pass validation=Validation(confirm=0, race=False)."
        )
