"""Pruning in turn with training: a level is cut, the network trains on, and only then is the level judged.

Which network is cut when is for the caller to say. Cuts take the same share of the survivors each, or follow the cubic
schedule of Zhu and Gupta, "To prune, or not to prune" (2017, arXiv:1710.01878), where a target sparsity is given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lightning_roulette.judge.evaluator import Evaluator, Judge
from lightning_roulette.judge.selection import keeps_floor
from lightning_roulette.mask.mask import History, Mask
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.refit.calibration import Calibration
from lightning_roulette.report.report import SearchReport, StopReason
from lightning_roulette.search.growing import Growing, Observer
from lightning_roulette.search.refitting import Refitting
from lightning_roulette.settings import Refit, Tree, Validation, Wheel

_ALL_THAT_IS_ASKED = 1 - 2.0**-40  # a pruning rate that leaves it to the target how many weights go


@dataclass(frozen=True)
class Cuts:
    """How a network is cut, the same for every cut.

    Attributes:
        branches: Candidates of a cut.
        tolerance: How far below the dense score a level may be when it is judged.
        target_sparsity: Where the last cut ends, in (0, 1); None: each cut takes the tree's pruning rate.
        number: How many cuts there may be.
        refit: What is done to the survivors of a cut before training goes on.
        wheel: How candidates are drawn.
        tree: `pruning_rate` and `max_levels` are read here.
        validation: `confirm` and `race` are read here. With one candidate a cut nothing ranks, and all data judges.
        seed: All chance.
    """

    branches: int
    tolerance: float
    target_sparsity: float | None
    number: int
    refit: Refit | None = None
    wheel: Wheel = field(default_factory=Wheel)
    tree: Tree = field(default_factory=Tree)
    validation: Validation = field(default_factory=Validation)
    seed: int = 0


class Gradual:
    """A network that is pruned in turn with its training.

    The network is shown as training has left it (`judge`); if its deepest level holds it may be cut (`cut`). The first
    one shown is the dense network, whose score sets the floor for all that follow.

    Args:
        cuts: How it is cut.

    Attributes:
        report: What was done so far; a level that was cut is accepted, and held once it has kept the floor. Its
            `held_out_score` is the score when judged: on the confirmation folds, or on all where nothing ranks or
            nothing is kept for confirmation. None before a network was shown.
        history: The masks of all levels; its level is the slimmest that has held.
    """

    def __init__(self, cuts: Cuts) -> None:
        self._cuts = cuts
        self._leaning: dict[str, float] = {}
        self._growing: Growing | None = None
        self._counted = 0.0
        self.report: SearchReport | None = None
        self.history: History | None = None

    @property
    def found(self) -> tuple[SearchReport, History]:
        """Report and history, of a network that was shown."""
        assert self.report is not None
        assert self.history is not None
        return self.report, self.history

    @property
    def mask(self) -> Mask | None:
        """That of the deepest level; None before a network was shown."""
        return None if self.history is None else self.history.mask_at(self.history.deepest)

    def judge(
        self,
        weights: Mapping[str, Tensor],
        evaluate: Evaluator | Callable[[Mask], float],
        calibration: Calibration | None = None,
        observer: Observer | None = None,
    ) -> bool:
        """Whether the network keeps the floor as it is; if so, its level has held.

        Args:
            weights: As training has left them, the pruned ones zero.
            evaluate: See `search`.
            calibration: The network with inputs, for a refit or an importance that looks at inputs.
            observer: Is told of the candidates of a cut that follows.

        Raises:
            ValueError: If the dense score is NaN.
        """
        cuts, began = self._cuts, time.monotonic()
        judge = Judge(evaluate, cuts.validation.confirm if cuts.branches > 1 else 0.0)
        refitting = Refitting(weights, cuts.refit, calibration)
        deepest = None if self.history is None else self.history.won_by(self.history.deepest)
        growing = Growing(
            weights, judge, cuts.branches, cuts.wheel, cuts.seed, observer or Observer(), refitting, deepest
        )
        growing.leaning |= self._leaning
        if cuts.wheel.importance is None and calibration is not None:
            growing.importance = "sensitivity"
        growing.start(math.inf, None, cuts.validation.race, refuse_nan=self.report is None)
        self._growing, self._counted = growing, 0.0
        now = growing.report.dense_score if growing.report.held_out_dense is None else growing.report.held_out_dense
        if self.report is None or self.history is None:
            self.report = replace(growing.report, tolerance=cuts.tolerance, held_out_dense=now, gradual=True)
            self.history = growing.history
            held = True
        else:
            held = self._judged(now)
        self._worked(growing, began)
        return held

    def cut(self, place: int, epoch: int | None = None) -> PrunedWeights | None:
        """Cut the network that was shown last: what it becomes, and is to train on as; None if nothing may go.

        Args:
            place: The number of the cut, from 1: it tells where the schedule of a target sparsity is. A cut that was
                left out is made up for by the next.
            epoch: How many epochs are trained, for the report.
        """
        growing, cuts, began = self._growing, self._cuts, time.monotonic()
        assert growing is not None
        goal = None if cuts.target_sparsity is None else cubic(cuts.target_sparsity, place / cuts.number)
        rate = cuts.tree.pruning_rate if goal is None else _ALL_THAT_IS_ASKED
        if growing.end(goal, cuts.tree) is not None:
            return None
        before = growing.parent.survivors
        growing.level(replace(cuts.tree, pruning_rate=rate), goal)
        level = growing.levels[-1]
        self._worked(growing, began)
        if not level.accepted:  # no candidate has a score
            return None
        if goal is not None:
            level = replace(level, pruning_rate=1 - level.survivors / before)
        report, history = self.found
        levels = (*report.levels, replace(level, held=False, epoch=epoch))
        self.report = replace(report, levels=levels, importance=growing.report.importance)
        self.history = growing.history.won_by(history.level)
        self._leaning = dict(growing.leaning)
        return growing.refitting.network(growing.parent)

    def ended(self) -> SearchReport:
        """The report when training is over, and the last network was shown."""
        (report, history), cuts = self.found, self._cuts
        reason, deepest = StopReason.TRAINING_ENDED, history.level == history.deepest
        goal = math.floor((cuts.target_sparsity or 0) * report.size + 0.5)
        if deepest and cuts.target_sparsity is not None and report.size - report.survivors >= goal:
            reason = StopReason.TARGET_REACHED
        elif deepest and history.level == cuts.tree.max_levels:
            reason = StopReason.MAX_LEVELS
        self.report = replace(report, stop_reason=reason)
        return self.report

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_growing": None}  # which knows a Trainer's data

    def state(self) -> dict[str, Any]:
        """Plain tensors and numbers for a checkpoint; read back by `restore`."""
        if self.report is None or self.history is None:
            return {}
        return {**self.history.state(), "leaning": dict(self._leaning), "report": self.report.to_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        if state:
            self.history, self._leaning = History.from_state(state), dict(state["leaning"])
            self.report = SearchReport.from_dict(state["report"])

    def _judged(self, now: float) -> bool:
        """Note the score of the deepest level; one that has held before stays as it was when it held."""
        report, history = self.found
        *before, level = report.levels or (None,)
        if level is None:
            return True
        held = keeps_floor(now, report.held_out_floor if report.held_out_floor is not None else math.nan)
        if held or not level.held:
            self.report = replace(report, levels=(*before, replace(level, held_out_score=now, held=held)))
        if held:
            self.history = history.won_by(level.level)
        return held

    def _worked(self, growing: Growing, began: float) -> None:
        report, _ = self.found
        done, self._counted = growing.judge.validations - self._counted, growing.judge.validations
        seconds = report.seconds + time.monotonic() - began
        self.report = replace(report, validations=report.validations + done, seconds=seconds)


def cubic(target_sparsity: float, share: float) -> float:
    """The sparsity when a share of the cuts is done: `target * (1 - (1 - share) ** 3)` (Zhu and Gupta 2017).

    Example:
        >>> cubic(0.75, 0.5)
        0.65625
    """
    return target_sparsity * (1 - (1 - share) ** 3)
