"""Log lines about a search, in the logger "lightning_roulette"."""

from __future__ import annotations

import logging
import math
import time

from lightning.pytorch import Trainer

from lightning_roulette.mask.mask import Mask
from lightning_roulette.report.report import SearchReport
from lightning_roulette.report.words import start
from lightning_roulette.search.observer import LevelTime
from lightning_roulette.trainer.show.display import Display
from lightning_roulette.trainer.show.forecast import Forecast

log = logging.getLogger("lightning_roulette")

SECONDS_BETWEEN_LEVELS = 10.0


def speak_up() -> None:
    """Print the log lines of the package, as Lightning does for its own, unless the user has configured logging."""
    if not log.handlers and not logging.getLogger().handlers:
        log.addHandler(logging.StreamHandler())
        log.propagate = False
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)


class LogLines(Display):
    """Writes log lines about a search, in the first process.

    Levels are said at most every `SECONDS_BETWEEN_LEVELS` seconds, so that a search of many short levels stays short
    in the log. The report has all of them.

    Args:
        trainer: The Trainer whose network is pruned.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._speaks = trainer.is_global_zero
        self._forecast = Forecast()
        self._last_level = -math.inf

    def on_dense(self, report: SearchReport, mask: Mask, work: float) -> None:
        """Say the dense score, how far it may decline, and how long a level will take, as far as it is known."""
        searching, held_out = report.folds
        data = f"the search half ({searching} of {searching + held_out} folds)" if held_out else "all validation data"
        self._say(f"dense network on {data}: {start(report)}. {self._forecast.before(report, work)}")

    def on_level(self, report: SearchReport, mask: Mask) -> None:
        """Say the score of the level, and whether it was accepted."""
        if time.monotonic() - self._last_level < SECONDS_BETWEEN_LEVELS:
            return
        self._last_level = time.monotonic()
        level = report.levels[-1]
        verdict = "accepted" if level.accepted else f"below the floor {report.floor:.6g}"
        self._say(f"level {level.level}: sparsity {level.sparsity:.2%}, {report.monitor} {level.score:.6g}, {verdict}")

    def on_timed(self, report: SearchReport, seconds: LevelTime) -> None:
        """Say how long a level takes, when that is news, and what to do if most of it is the refit."""
        for sentence in self._forecast.after(report, seconds):
            self._say(sentence)

    def on_judged(self, report: SearchReport, mask: Mask, epoch: int) -> None:
        """Say the score of the trained network, and whether its level held."""
        if not report.levels:
            self._say(f"dense network after {_epochs(epoch)}: {start(report)}")
            return
        level = report.levels[-1]
        verdict = "held" if level.held else f"below the floor {report.held_out_floor:.6g}"
        self._say(
            f"level {level.level} after {_epochs(epoch)}: sparsity {level.sparsity:.2%}, {report.monitor} "
            f"{level.held_out_score:.6g}, {verdict}"
        )

    def on_cut(self, report: SearchReport, mask: Mask) -> None:
        """Say the sparsity after the cut."""
        level = report.levels[-1]
        self._say(f"cut to level {level.level}: sparsity {level.sparsity:.2%}, {report.monitor} {level.score:.6g}")

    def on_end(self, report: SearchReport) -> None:
        """Say the result, and why the search ended."""
        for sentence in report.summary():
            self._say(sentence)

    def _say(self, text: str) -> None:
        if self._speaks:
            log.info(f"RouletteWheelPruning: {text}")


def _epochs(number: int) -> str:
    return "1 epoch" if number == 1 else f"{number} epochs"
