"""What a search says while it runs: a progress line, log lines, curves; and what it has found so far."""

from __future__ import annotations

import logging
from typing import TypeVar

from lightning.pytorch import Trainer

from lightning_roulette.mask.mask import Mask
from lightning_roulette.report.records import Candidate, Level
from lightning_roulette.report.report import SearchReport
from lightning_roulette.search.observer import Observer
from lightning_roulette.search.winner import Winner
from lightning_roulette.trainer.scores.monitored_metric import MonitoredMetric
from lightning_roulette.trainer.show.bar import line_of
from lightning_roulette.trainer.show.curves import Curves

log = logging.getLogger("lightning_roulette")
_W = TypeVar("_W", bound="Watcher")


def speak_up() -> None:
    """Let the package's log lines be seen, unless the user has arranged for logging: as Lightning does for its own."""
    if not log.handlers and not logging.getLogger().handlers:
        log.addHandler(logging.StreamHandler())
        log.propagate = False
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)


class Watcher(Observer):
    """Passes a search on to the people who wait for it, in the units of the metric.

    Args:
        trainer: Its loggers get the curves, its progress bar the line.
        metric: What scores mean.
    """

    def __init__(self, trainer: Trainer, metric: MonitoredMetric) -> None:
        self._metric = metric
        self._speaks = trainer.is_global_zero
        self._curves, self._line = Curves(trainer.loggers if self._speaks else ()), line_of(trainer)
        self.so_far: Winner | None = None

    def __enter__(self: _W) -> _W:
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()

    def on_dense(self, so_far: Winner, work: float) -> None:
        """Say the dense score and what a level will cost."""
        self.so_far = so_far
        ours = self._metric.units_of(so_far.report)
        ranking, confirming = ours.folds
        kept = f", {confirming} of {ranking + confirming} folds kept for confirmation" if confirming else ""
        seconds = work * ours.seconds / max(ours.validations, 1)
        self._say(
            f"{ours.monitor}: dense {ours.dense_score:.6g}, floor {ours.floor:.6g}{kept}. "
            f"A level of {ours.branches} candidates will take about {seconds:.1f} s."
        )
        self._curves.draw_dense(ours, so_far.mask)

    def on_candidate(self, level: int, done: int, planned: int, best: Candidate | None, sparsity: float) -> None:
        """Move the progress line."""
        found = "" if best is None else f", best {self._metric.sign * best.score:.4g}"
        self._line.show(f"Pruning level {level} to {sparsity:.2%}{found}", done, planned)

    def on_level(self, level: Level, so_far: Winner) -> None:
        """Say how the level ended; draw it if it was accepted."""
        self.so_far = so_far
        report = self._metric.units_of(so_far.report)
        ours = report.levels[-1]
        verdict = "accepted" if ours.accepted else f"below the floor {report.floor:.6g}"
        self._say(f"level {ours.level}: sparsity {ours.sparsity:.2%}, {report.monitor} {ours.score:.6g}, {verdict}")
        if ours.accepted:
            self._curves.draw_level(ours, report.floor, so_far.mask.densities)

    def on_confirmed(self, level: Level, so_far: Winner) -> None:
        """Say whether the level held; draw its point."""
        self.so_far = so_far
        report = self._metric.units_of(so_far.report)
        ours = next(one for one in report.accepted if one.level == level.level)
        verdict = "held" if ours.held else "did not hold"
        self._line.show(f"Confirming level {ours.level} of {len(report.accepted)}", ours.level, len(report.accepted))
        if not ours.held or ours is report.accepted[-1]:
            self._say(
                f"level {ours.level} on the confirmation data: {report.monitor} {ours.held_out_score:.6g}, {verdict}"
            )
        self._curves.draw_confirmed(ours)

    def on_end(self, report: SearchReport) -> None:
        """Say why the search ended; draw the report, which is in the units of the metric already."""
        for sentence in report.summary():
            self._say(sentence)
        self._curves.draw_report(report)

    def _say(self, text: str) -> None:
        if self._speaks:
            log.info(f"RouletteWheelPruning: {text}")


class EpochWatcher(Watcher):
    """Passes on what happens between two epochs: the verdict on the network as trained, and the cut that follows.

    Args:
        trainer: Its loggers get the curves, its progress bar the line.
        metric: What scores mean.
        epoch: How many epochs are trained.
    """

    def __init__(self, trainer: Trainer, metric: MonitoredMetric, epoch: int) -> None:
        super().__init__(trainer, metric)
        self._epoch = epoch

    def on_dense(self, so_far: Winner, work: float) -> None:
        """Nothing: it is the network as trained, whatever was cut from it."""

    def on_level(self, level: Level, so_far: Winner) -> None:
        """Nothing: the level is judged when training has gone on."""

    def on_judged(self, report: SearchReport, mask: Mask) -> SearchReport:
        """Say the dense score, or whether the deepest level holds; draw it. Returns the report in the metric's units.

        Args:
            report: In which scores are the evaluator's.
            mask: Of the slimmest network that held.
        """
        ours = self._metric.units_of(report)
        if not ours.levels:
            score, floor = ours.held_out_dense, ours.held_out_floor
            self._say(f"after {self._epoch} epochs {ours.monitor} is {score:.6g}, floor {floor:.6g}.")
            self._curves.draw_dense(ours, mask)
            return ours
        level = ours.levels[-1]
        verdict = "held" if level.held else f"below the floor {ours.held_out_floor:.6g}"
        self._say(
            f"level {level.level}, sparsity {level.sparsity:.2%}, after {self._epoch} epochs: {ours.monitor} "
            f"{level.held_out_score:.6g}, {verdict}"
        )
        self._curves.draw_confirmed(level)
        return ours

    def on_cut(self, report: SearchReport, mask: Mask) -> SearchReport:
        """Say how slim the network is now; draw it. Returns the report in the units of the metric."""
        ours = self._metric.units_of(report)
        level = ours.levels[-1]
        self._say(f"cut to level {level.level}: sparsity {level.sparsity:.2%}, {ours.monitor} {level.score:.6g}")
        self._curves.draw_level(level, ours.floor, mask.densities)
        return ours
