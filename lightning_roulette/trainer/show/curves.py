"""A search as curves: in TensorBoard, and in every other Lightning logger through `log_metrics`."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from lightning_roulette.mask.mask import Mask
from lightning_roulette.report.records import Level
from lightning_roulette.report.report import SearchReport
from lightning_roulette.trainer.show import points
from lightning_roulette.trainer.show.board import boards_of, is_tensorboard
from lightning_roulette.trainer.show.display import Display
from lightning_roulette.trainer.show.log import log
from lightning_roulette.trainer.show.row import Setting, result_of


class Curves(Display):
    """Draws the accepted levels of a search in the loggers of the Trainer, in the first process.

    The x-axis of every curve is the level; level 0 is the dense network.

    | tag | value |
    |---|---|
    | `roulette/sparsity` | share of prunable weights removed |
    | `roulette/multiply_adds` | share of the multiply-adds left, where whole units leave and the report counts them |
    | `roulette/score` | score of the level's winner on the search half |
    | `roulette/floor` | the worst score that is accepted |
    | `roulette/held_out`, `/held_out_floor` | the same on the held-out half, where a level was judged there |
    | `roulette-branch/min`, `/median`, `/max` | spread of the scores of the candidates |
    | `roulette-branch/score_error`, `/held_out_error` | paired standard errors against the dense score, if known |
    | `roulette-density/<layer>` | share of the weights of a layer that is kept, for the twenty largest layers |

    TensorBoard also gets a layout of charts. At the end each logger gets the settings of the search as hyperparameters,
    and its final numbers as `roulette-result/*`. In TensorBoard they are a row of the table of hyperparameters.

    Args:
        trainer: The Trainer whose loggers are used.
    """

    def __init__(self, trainer: Trainer) -> None:
        others = [one for one in trainer.loggers if not is_tensorboard(one)]
        self._boards, self._others = boards_of(trainer), others if trainer.is_global_zero else []
        self._settings: Mapping[str, Setting] = {}

    def on_begin(self, settings: Mapping[str, Setting]) -> None:
        """Remember the settings."""
        self._settings = settings

    def on_dense(self, report: SearchReport, mask: Mask, work: float) -> None:
        """Draw level 0."""
        self._draw_dense(report, mask)

    def on_level(self, report: SearchReport, mask: Mask) -> None:
        """Draw the level, if it was accepted."""
        if report.levels[-1].accepted:
            self._draw(report.levels[-1].level, points.of_level(report, mask), report)

    def on_confirmed(self, report: SearchReport, level: Level) -> None:
        """Draw the score on the held-out half."""
        self._draw(level.level, points.of_held_out(report, level), report)

    def on_judged(self, report: SearchReport, mask: Mask, epoch: int) -> None:
        """Draw level 0, or the score of the trained level."""
        if report.levels:
            self.on_confirmed(report, report.levels[-1])
        else:
            self._draw_dense(report, mask)

    def on_cut(self, report: SearchReport, mask: Mask) -> None:
        """Draw the level that was cut."""
        self._draw(report.levels[-1].level, points.of_level(report, mask), report)

    def on_end(self, report: SearchReport) -> None:
        """Log the settings and the final numbers."""
        result = result_of(report)
        step = 0 if report.winner is None else report.winner.level
        for board in self._boards:
            board.end_row(self._settings, result, step)
            board.save()
        for logger in self._others:
            _log_settings(logger, self._settings)
            logger.log_metrics(dict(result), step=step)
            logger.save()

    def _draw_dense(self, report: SearchReport, mask: Mask) -> None:
        for board in self._boards:
            board.lay_out()
        self._draw(0, points.of_dense(report, mask), report)

    def _draw(self, step: int, values: Mapping[str, float], report: SearchReport) -> None:
        for board in self._boards:
            for tag, value in values.items():
                board.scalar(tag, value, step, points.described(tag, report.monitor))
            board.save()
        for logger in self._others:
            logger.log_metrics(dict(values), step=step)
            logger.save()


def _log_settings(logger: Logger, settings: Mapping[str, Setting]) -> None:
    """Log the settings of a search. A logger may refuse other settings than those of an earlier search in its run."""
    try:
        logger.log_hyperparams(dict(settings))
    except Exception as error:  # the search has ended well, whatever the logger does
        log.warning(f"RouletteWheelPruning: {type(logger).__name__} refused the settings of the search: {error}")
