"""Passes the steps of a search to every display."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_roulette.mask.mask import Mask
from lightning_roulette.report.records import Candidate, Level
from lightning_roulette.report.report import SearchReport
from lightning_roulette.search.observer import LevelTime, Observer
from lightning_roulette.search.winner import Winner
from lightning_roulette.trainer.choices import Choices
from lightning_roulette.trainer.scores.monitored_metric import MonitoredMetric
from lightning_roulette.trainer.show.album import Album
from lightning_roulette.trainer.show.bar import ProgressLine
from lightning_roulette.trainer.show.board import boards_of
from lightning_roulette.trainer.show.curves import Curves
from lightning_roulette.trainer.show.display import Display
from lightning_roulette.trainer.show.level_table import LevelTable
from lightning_roulette.trainer.show.log import LogLines
from lightning_roulette.trainer.show.row import settings_of

DISPLAYS: tuple[type[Display], ...] = (LogLines, ProgressLine, Curves, Album, LevelTable)

_Show = TypeVar("_Show", bound="Show")


def begin_rows(trainer: Trainer, module: LightningModule, choices: Choices) -> None:
    """Begin the row of a search in the tables of TensorBoard. Call this before Lightning logs hyperparameters.

    Args:
        trainer: The Trainer whose loggers are used.
        module: Its module.
        choices: The arguments of the callback.
    """
    owners = [one for one in (module, trainer.datamodule) if one is not None]  # type: ignore[attr-defined]
    # these log their hyperparameters; lightning has no public name for it
    logging = [one for one in owners if getattr(one, "_log_hyperparams", False)]
    for board in boards_of(trainer):
        board.begin_row(
            settings_of(choices), {name: one for each in logging for name, one in each.hparams_initial.items()}
        )


class Show(Observer):
    """Shows a search on every display, with all scores in the units of the metric. Enter it with `with`.

    Args:
        trainer: The Trainer whose network is pruned.
        metric: The metric of the scores.
        choices: The arguments of the callback.
    """

    def __init__(self, trainer: Trainer, metric: MonitoredMetric, choices: Choices) -> None:
        self._metric = metric
        self._displays = [kind(trainer) for kind in DISPLAYS]
        for one in self._displays:
            one.on_begin(settings_of(choices))

    def __enter__(self: _Show) -> _Show:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._displays:
            one.close()

    def on_dense(self, so_far: Winner, work: float) -> None:
        """See `Observer`."""
        report = self._metric.units_of(so_far.report)
        for one in self._displays:
            one.on_dense(report, so_far.mask, work)
            one.on_weights(0, so_far.mask, so_far.dense)

    def on_candidate(self, level: int, done: int, planned: int, best: Candidate | None, sparsity: float) -> None:
        """See `Observer`."""
        score = None if best is None else self._metric.sign * best.score
        for one in self._displays:
            one.on_candidate(level, done, planned, score, sparsity)

    def on_level(self, level: Level, so_far: Winner) -> None:
        """See `Observer`."""
        report = self._metric.units_of(so_far.report)
        for one in self._displays:
            one.on_level(report, so_far.mask)

    def on_timed(self, level: Level, so_far: Winner, time: LevelTime) -> None:
        """See `Observer`."""
        report = self._metric.units_of(so_far.report)
        for one in self._displays:
            one.on_timed(report, time)

    def on_confirmed(self, level: Level, so_far: Winner) -> None:
        """See `Observer`."""
        report = self._metric.units_of(so_far.report)
        ours = next(one for one in report.accepted if one.level == level.level)
        for one in self._displays:
            one.on_confirmed(report, ours)

    def on_weights(self, level: int, mask: Mask, weights: Mapping[str, Tensor]) -> None:
        """Show the weights of a network; see `Display.on_weights`."""
        for one in self._displays:
            one.on_weights(level, mask, weights)

    def on_end(self, report: SearchReport) -> None:
        """Show the final report, which is in the units of the metric already."""
        for one in self._displays:
            one.on_end(report)


class ShowBetweenEpochs(Show):
    """Shows the judgements and cuts between two epochs. The steps of a level's search are not shown."""

    def on_dense(self, so_far: Winner, work: float) -> None:
        """Show nothing: this is the network as trained, which may be pruned already."""

    def on_level(self, level: Level, so_far: Winner) -> None:
        """Show nothing: the level is judged after further training."""

    def on_timed(self, level: Level, so_far: Winner, time: LevelTime) -> None:
        """Show nothing: training follows a cut, not another level."""

    def on_judged(self, report: SearchReport, mask: Mask, epoch: int) -> None:
        """Show a judgement; see `Display.on_judged`."""
        for one in self._displays:
            one.on_judged(report, mask, epoch)

    def on_cut(self, report: SearchReport, mask: Mask) -> None:
        """Show a cut; see `Display.on_cut`."""
        for one in self._displays:
            one.on_cut(report, mask)
