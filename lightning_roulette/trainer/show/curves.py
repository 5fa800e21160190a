"""A search as curves: in TensorBoard, and in any other Lightning logger through `log_metrics`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_roulette.report.records import Level
from lightning_roulette.report.report import SearchReport

# "Margin" draws the first tag as a line and the other two as the edges of a band.
_LAYOUT = {
    "roulette": {
        "score and floor": ["Multiline", ["roulette/score$", "roulette/floor$", "roulette/held_out$"]],
        "branch": ["Margin", ["roulette/branch/median", "roulette/branch/min", "roulette/branch/max"]],
    }
}


class Curves:
    """Draws a search while it runs; the x-axis of every curve is the level, 0 the dense network.

    | tag | value |
    |---|---|
    | `roulette/sparsity` | share of prunable weights removed |
    | `roulette/score`, `roulette/floor` | the accepted winner's score on the ranking folds, and the worst it might be |
    | `roulette/held_out` | the same network's score on the confirmation folds, as far as these were asked |
    | `roulette/score_error`, `roulette/held_out_error` | their paired standard errors against the dense score |
    | `roulette/branch/min`, `/median`, `/max` | spread of the scores of the accepted winner's branch |
    | `roulette/density/<parameter>` | share of the parameter's weights that is kept |

    Failed levels are in the table of the report, which goes to the text tab.

    Args:
        loggers: Where to draw. What only TensorBoard can show, only a TensorBoardLogger gets.
    """

    def __init__(self, loggers: Iterable[Logger]) -> None:
        self._loggers = list(loggers)

    def draw_dense(self, report: SearchReport, parameters: Iterable[str]) -> None:
        """The points of level 0, and what is shown together."""
        for writer in self._tensorboards():
            writer.experiment.add_custom_scalars(_LAYOUT)
        spread = (report.dense_score,) * 3
        self._draw(0, report.dense_score, report.floor, 0.0, spread, dict.fromkeys(parameters, 1.0))
        if report.held_out_dense is not None:
            self._log(0, {"roulette/held_out": report.held_out_dense})

    def draw_level(self, level: Level, floor: float, densities: Mapping[str, float]) -> None:
        """The points of one accepted level."""
        self._draw(level.level, level.score, floor, level.sparsity, level.spread, densities)
        if not math.isnan(level.error):
            self._log(level.level, {"roulette/score_error": level.error})

    def draw_confirmed(self, level: Level) -> None:
        """The points of one level on the confirmation folds."""
        points = {"roulette/held_out": level.held_out_score, "roulette/held_out_error": level.held_out_error}
        known = {tag: value for tag, value in points.items() if value is not None and not math.isnan(value)}
        self._log(level.level, known)

    def draw_report(self, report: SearchReport) -> None:
        """The report as a table in TensorBoard's text tab."""
        for writer in self._tensorboards():
            writer.experiment.add_text("roulette/report", report.markdown(), len(report.accepted))
        for logger in self._loggers:
            logger.save()

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
