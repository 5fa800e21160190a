"""The result of a search, and the part of it that a checkpoint keeps.

A checkpoint holds one dictionary, `SavedState`. A worker process hands over the same dictionary, in which the report
may also be None and the masks may be missing.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypedDict

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_roulette.mask.history import History
from lightning_roulette.mask.mask import Mask, breaks, fits
from lightning_roulette.report.report import SearchReport
from lightning_roulette.search.winner import Winner
from lightning_roulette.trainer.between_epochs import BetweenEpochs


class SavedState(TypedDict, total=False):
    """The state of the callback in a checkpoint: plain tensors and Python values.

    Attributes:
        pruned_at: For each parameter the level that pruned each weight, if all masks nest; see `History.state`.
        packed: Names and shapes of the parameters whose numbers are packed; see `History.state`.
        level: The winner's level, if all masks nest; else a sentence.
        deepest: The last level.
        level_bits: The masks of all levels, if some do not nest; see `History.state`.
        shapes: Names and shapes of the parameters of these masks.
        winner_level: The winner's level, beside `level_bits`.
        level_0: The masks of level 0 where weights were zero before the search; see `History.state`.
        report: The report as plain values.
        best_model_path: The checkpoint of the winner, or an empty string.
        measured_at_batch: The number of batches that were trained when the winner was last measured.
        gradual: The state of pruning between epochs. Only saved where `at_epoch` names several epochs.
    """

    pruned_at: dict[str, Tensor]
    packed: dict[str, list[int]]
    level: int | str
    deepest: int
    level_bits: list[Tensor]
    shapes: dict[str, list[int]]
    winner_level: int
    level_0: dict[str, Tensor]
    report: dict[str, Any] | None
    best_model_path: str
    measured_at_batch: int
    gradual: dict[str, Any]


class Progress(Enum):
    """How far the pruning of a network is; the value is a sentence."""

    DENSE = "Nothing was pruned yet."
    CUTTING = "Levels are cut between epochs, and training has not ended."
    PRUNED = "The search has ended and its winner was loaded."


class Result:
    """The result of a search.

    Args:
        between_epochs: The state of pruning between epochs; None if one search was asked for.

    Attributes:
        report: The report; None before a search.
        history: The masks of all levels; None before a search has ended.
        best_model_path: The checkpoint of the winner; empty if none was written.
        measured_at_batch: The number of batches that were trained when the winner was last measured.
        winner: The weights of all levels. Not saved: None after a checkpoint was loaded.
        module: The network that was pruned. Not saved, and not copied.
        example: The path of a network inside the module, and what it is called with. Only with `shrink`; not saved.
        between_epochs: See above.
    """

    def __init__(self, between_epochs: BetweenEpochs | None) -> None:
        self.report: SearchReport | None = None
        self.history: History | None = None
        self.best_model_path = ""
        self.measured_at_batch = 0
        self.winner: Winner | None = None
        self.module: weakref.ref[LightningModule] | None = None
        self.example: tuple[str, Any] | None = None
        self.between_epochs = between_epochs

    def forget(self, between_epochs: BetweenEpochs | None) -> None:
        """Return to the state of a new object."""
        self.__init__(between_epochs)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "module": None}  # a module belongs to one process

    @property
    def progress(self) -> Progress:
        """How far the pruning is."""
        if self.between_epochs is not None and self.between_epochs.goes_on:
            return Progress.CUTTING
        return Progress.DENSE if self.history is None or self.report is None else Progress.PRUNED

    @property
    def mask(self) -> Mask | None:
        """The winner's mask; None before a search has ended."""
        return None if self.history is None else self.history.mask

    @property
    def held(self) -> Mask | None:
        """The mask whose zeros are held in training: the winner's, or the deepest level's between epochs."""
        cuts = self.between_epochs
        return cuts.mask if cuts is not None and cuts.goes_on else self.mask

    def masks(self) -> History:
        """Return the masks of all levels.

        Raises:
            RuntimeError: If no search has ended.
        """
        if self.history is None:
            raise RuntimeError("no search has ended, so there are no levels yet. Call fit first.")
        return self.history

    def weights_at(self, level: int) -> dict[str, Tensor]:
        """Return the weights of an accepted level; see `RouletteWheelPruning.weights_at`."""
        self.masks().mask_at(level)
        if self.between_epochs is not None and self.report is not None and self.report.gradual:
            return self.between_epochs.weights_at(level)
        if self.winner is None:
            raise RuntimeError(
                "this callback was loaded from a checkpoint after its search, or it searched in another process. "
                "Either brings back only the weights of the winner, which are in the module. The mask of every level "
                "is in mask_at(level)."
            )
        return self.winner.weights_at(level)

    def is_of(self, module: LightningModule) -> bool:
        """Return whether `module` is the network that was pruned, and still has its zeros.

        A copy of the callback has no reference to the network. It recognises a network by its zeros.
        """
        if (mask := self.held) is None or not fits(mask, module) or breaks(mask, module):
            return False
        return mask.survivors < mask.size if self.module is None else self.module() is module

    def state(self) -> SavedState:
        """Return what a checkpoint holds; empty before a search has ended."""
        if self.history is None or self.report is None:
            return {}
        state: SavedState = {
            **self.history.state(),  # type: ignore[typeddict-item]
            "report": self.report.to_dict(),
            "best_model_path": self.best_model_path,
            "measured_at_batch": self.measured_at_batch,
        }
        if self.between_epochs is not None:
            state["gradual"] = self.between_epochs.state()
        return state

    def handed_over(self) -> SavedState:
        """Return what a worker process hands over: what `state` returns, and the report of an unfinished search."""
        state = self.state()
        state["report"] = None if self.report is None else self.report.to_dict()
        return state

    def take_over(self, state: Mapping[str, Any], between_epochs: BetweenEpochs | None) -> None:
        """Take over what `state` or `handed_over` returned.

        Args:
            state: The dictionary. Older versions may have left out some keys.
            between_epochs: A new state of pruning between epochs; None if one search was asked for.
        """
        self.forget(between_epochs)
        self.history = History.from_state(state) if "pruned_at" in state else None
        self.report = SearchReport.from_dict(state["report"]) if state["report"] else None
        self.best_model_path = state.get("best_model_path", "")
        self.measured_at_batch = state.get("measured_at_batch", 0)
        if self.between_epochs is not None:
            self.between_epochs.restore(state.get("gradual", {}))
