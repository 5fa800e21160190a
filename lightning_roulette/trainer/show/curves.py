"""A search as curves: in TensorBoard, and in every other Lightning logger through `log_metrics`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_roulette.mask.mask import Mask
from lightning_roulette.report.records import Level
from lightning_roulette.report.report import SearchReport
from lightning_roulette.trainer.show.display import Display

# The first tag of "Margin" is drawn as a line, the other two as the edges of a band.
_LAYOUT = {
    "roulette": {
        "score and floor": ["Multiline", ["roulette/score$", "roulette/floor$", "roulette/held_out$"]],
        "branch": ["Margin", ["roulette/branch/median", "roulette/branch/min", "roulette/branch/max"]],
    }
}


class Curves(Display):
    """Draws the accepted levels of a search in the loggers of the Trainer, in the first process.

    The x-axis of every curve is the level; level 0 is the dense network.

    | tag | value |
    |---|---|
    | `roulette/sparsity` | share of prunable weights removed |
    | `roulette/score` | score of the level's winner on the search half |
    | `roulette/floor` | the worst score that is accepted |
    | `roulette/held_out` | score of the same network on the held-out half, if it was judged there |
    | `roulette/score_error`, `roulette/held_out_error` | paired standard errors against the dense score, if known |
    | `roulette/branch/min`, `/median`, `/max` | spread of the scores of the candidates |
    | `roulette/density/<parameter>` | share of the weights of a parameter that is kept |

    TensorBoard also gets a layout of charts, and the report with all levels as a table in its text tab.

    Args:
        trainer: The Trainer whose loggers are used.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._loggers = list(trainer.loggers) if trainer.is_global_zero else []

    def on_dense(self, report: SearchReport, mask: Mask, work: float) -> None:
        """Draw level 0."""
        self._draw_dense(report, mask)

    def on_level(self, report: SearchReport, mask: Mask) -> None:
        """Draw the level, if it was accepted."""
        if report.levels[-1].accepted:
            self._draw_level(report, mask)

    def on_confirmed(self, report: SearchReport, level: Level) -> None:
        """Draw the score on the held-out half."""
        self._draw_held_out(level)

    def on_judged(self, report: SearchReport, mask: Mask, epoch: int) -> None:
        """Draw level 0, or the score of the trained level."""
        if report.levels:
            self._draw_held_out(report.levels[-1])
        else:
            self._draw_dense(report, mask)

    def on_cut(self, report: SearchReport, mask: Mask) -> None:
        """Draw the level that was cut."""
        self._draw_level(report, mask)

    def on_end(self, report: SearchReport) -> None:
        """Write the report into the text tab of TensorBoard."""
        for writer in self._tensorboards():
            writer.experiment.add_text("roulette/report", report.markdown(), len(report.accepted))
        for logger in self._loggers:
            logger.save()

    def _draw_dense(self, report: SearchReport, mask: Mask) -> None:
        for writer in self._tensorboards():
            writer.experiment.add_custom_scalars(_LAYOUT)
        spread = (report.dense_score,) * 3
        self._draw(0, report.dense_score, report.floor, 0.0, spread, dict.fromkeys(mask, 1.0))
        if report.held_out_dense is not None:
            self._log(0, {"roulette/held_out": report.held_out_dense})

    def _draw_level(self, report: SearchReport, mask: Mask) -> None:
        level = report.levels[-1]
        self._draw(level.level, level.score, report.floor, level.sparsity, level.spread, mask.densities)
        if not math.isnan(level.error):
            self._log(level.level, {"roulette/score_error": level.error})

    def _draw_held_out(self, level: Level) -> None:
        points = {"roulette/held_out": level.held_out_score, "roulette/held_out_error": level.held_out_error}
        known = {tag: value for tag, value in points.items() if value is not None and not math.isnan(value)}
        self._log(level.level, known)

    def _draw(
        self,
        step: int,
        score: float,
        floor: float,
        sparsity: float,
        spread: tuple[float, float, float],
        densities: Mapping[str, float],
    ) -> None:
        points = {"roulette/sparsity": sparsity, "roulette/score": score, "roulette/floor": floor}
        points |= {f"roulette/branch/{name}": x for name, x in zip(("min", "median", "max"), spread, strict=True)}
        points |= {f"roulette/density/{name}": density for name, density in densities.items()}
        self._log(step, points)

    def _log(self, step: int, points: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.log_metrics(dict(points), step=step)
            logger.save()

    def _tensorboards(self) -> list[TensorBoardLogger]:
        return [one for one in self._loggers if isinstance(one, TensorBoardLogger)]
