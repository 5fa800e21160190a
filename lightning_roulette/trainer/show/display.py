"""The base class of displays, with one method for each step of a search. New displays are listed in `show.py`."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_roulette.mask.mask import Mask
from lightning_roulette.report.records import Level
from lightning_roulette.report.report import SearchReport
from lightning_roulette.search.observer import LevelTime
from lightning_roulette.trainer.show.row import Setting


class Display:
    """Shows the steps of a search. This base class shows nothing. All scores are in the units of the metric.

    Args:
        trainer: The Trainer whose network is pruned.
    """

    def __init__(self, trainer: Trainer) -> None:
        pass

    def on_begin(self, settings: Mapping[str, Setting]) -> None:
        """A search begins with these settings; see `row.settings_of`."""

    def on_dense(self, report: SearchReport, mask: Mask, work: float) -> None:
        """The dense network was judged, and a search begins.

        Args:
            report: The report so far.
            mask: The mask of the dense network.
            work: Expected work of one level, in validations of one network on all folds.
        """

    def on_candidate(self, level: int, done: int, planned: int, best: float | None, sparsity: float) -> None:
        """A candidate was judged.

        Args:
            level: The number of the level.
            done: Validations of candidates of this level so far.
            planned: Expected number of these validations.
            best: The best score so far; None if no score is a number yet.
            sparsity: The sparsity of every candidate of the level.
        """

    def on_level(self, report: SearchReport, mask: Mask) -> None:
        """The last level of the report was judged on the search half. `mask` is the mask of the last accepted one."""

    def on_timed(self, report: SearchReport, seconds: LevelTime) -> None:
        """The last level of the report took this long. Called after `on_level`."""

    def on_confirmed(self, report: SearchReport, level: Level) -> None:
        """An accepted level was judged on the held-out half."""

    def on_judged(self, report: SearchReport, mask: Mask, epoch: int) -> None:
        """Between epochs, the trained network was judged: the last level of the report, or the dense network.

        Args:
            report: The report so far.
            mask: The mask of the slimmest network that held.
            epoch: Number of trained epochs.
        """

    def on_cut(self, report: SearchReport, mask: Mask) -> None:
        """Between epochs, the last level of the report was cut. `mask` is the mask of the network after the cut."""

    def on_weights(self, level: int, mask: Mask, weights: Mapping[str, Tensor]) -> None:
        """These are the weights of the dense network (level 0), or of the result, which was loaded.

        Args:
            level: The level of the network.
            mask: Its mask.
            weights: Weights by the names of the mask, and perhaps others.
        """

    def on_end(self, report: SearchReport) -> None:
        """The search has ended, and its winner was loaded."""

    def close(self) -> None:
        """Nothing more will be shown. This is also called after an error."""
