"""Pruning between epochs: a level is cut, the network is trained further, and then the level is judged.

The caller decides when the network is judged and cut. Each cut removes the same share of the survivors. With a target
sparsity, cuts follow the cubic schedule of Zhu and Gupta instead (see `cubic`).
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
from lightning_roulette.mask.history import History
from lightning_roulette.mask.mask import Mask
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.refit.inputs import Calibration
from lightning_roulette.refit_settings import Refit
from lightning_roulette.report.records import StopReason
from lightning_roulette.report.report import SearchReport
from lightning_roulette.search.arguments import check_units, held_of
from lightning_roulette.search.drawing import Drawing
from lightning_roulette.search.level import try_level
from lightning_roulette.search.observer import Observer
from lightning_roulette.search.policies import Levels, OneLevel, Policy, Step, cubic
from lightning_roulette.search.refitter import Refitter
from lightning_roulette.search.run import Run, begin
from lightning_roulette.search.state import State
from lightning_roulette.settings import Tree, Validation, Wheel
from lightning_roulette.unit import Reduction
from lightning_roulette.wheel.units.units import Units


@dataclass(frozen=True)
class Cuts:
    """How a network is cut, the same for every cut.

    Attributes:
        branches: Candidates of a cut.
        tolerance: How far below the dense score a level may be when it is judged. None: half a standard error of the
            dense score, see `default_tolerance`.
        target_sparsity: Sparsity after the last cut, in (0, 1). None: each cut removes the tree's pruning rate.
        number: Number of cuts.
        refit: What is done to the survivors of a cut before training goes on. None: nothing.
        wheel: How candidates are drawn.
        tree: Only `pruning_rate` and `max_levels` are read here.
        validation: Only `confirm` and `race` are read here. With one candidate per cut, nothing is held out.
        seed: Source of all chance.
    """

    branches: int
    tolerance: float | None
    target_sparsity: float | None
    number: int
    refit: Refit | None = None
    wheel: Wheel = field(default_factory=Wheel)
    tree: Tree = field(default_factory=Tree)
    validation: Validation = field(default_factory=Validation)
    seed: int = 0

    def policy(self, place: int, units: Units | None = None) -> Policy:
        """Policy of the cut of this number. Numbers count from 1.

        Args:
            place: The number.
            units: The units of the network. None: single weights leave.
        """
        share, target, tree = place / self.number, self.tree.target, self.tree
        if self.target_sparsity is None and target is None:
            return Levels(tree, self.branches, self.wheel.scope, None, units)
        goal = None if self.target_sparsity is None else cubic(self.target_sparsity, share)
        if target is not None:
            tree = replace(tree, target=Reduction(**{target.counted: cubic(target.share, share)}))
        return OneLevel(Levels(tree, self.branches, self.wheel.scope, goal, units))


class Gradual:
    """A network that is pruned between epochs of its training.

    The caller shows the network as training left it (`judge`). If its deepest level holds, it may be cut (`cut`). The
    first network shown is the dense one. Its score sets the floor for all that follow.

    Args:
        cuts: How it is cut.

    Attributes:
        report: Report so far. None before a network was shown. A level that was cut is accepted. It held if its score
            kept the floor at least once. Its held-out score is the score when it was judged: on the held-out half, or
            on all data if nothing is held out.
        history: Masks of all levels. Its `level` is the slimmest that held. None before a network was shown.
    """

    def __init__(self, cuts: Cuts) -> None:
        self._cuts = cuts
        self._factors: dict[str, float] = {}
        self._shown: tuple[Run, State] | None = None
        self._counted = 0.0
        self.report: SearchReport | None = None
        self.history: History | None = None

    @property
    def found(self) -> tuple[SearchReport, History]:
        """Report and history. A network must have been shown before."""
        assert self.report is not None
        assert self.history is not None
        return self.report, self.history

    @property
    def mask(self) -> Mask | None:
        """Mask of the deepest level. None before a network was shown."""
        return None if self.history is None else self.history.mask_at(self.history.deepest)

    def judge(
        self,
        weights: Mapping[str, Tensor],
        evaluate: Evaluator | Callable[[Mask], float],
        calibration: Calibration | None = None,
        observer: Observer | None = None,
        units: Units | None = None,
        held: Mask | None = None,
    ) -> bool:
        """Validate the network as it is, and record whether its deepest level holds.

        Args:
            weights: Prunable weights as training left them, the pruned ones zero.
            evaluate: See `search`.
            calibration: The network with inputs. Needed for a refit and for importances on inputs.
            observer: Is told of the candidates of a cut that follows.
            units: The units of the network, for a cut that follows. None: single weights leave.
            held: See `search`. The masks of all levels lie within that of the first network that is shown.

        Returns:
            Whether the network keeps the floor.

        Raises:
            ValueError: If the dense score is NaN.
        """
        began = time.monotonic()
        run, state = self._begin(weights, evaluate, calibration, observer or Observer(), units, held)
        # a cut is judged after the training that follows it, so it has no floor
        self._shown = run, replace(state, report=replace(state.report, tolerance=math.inf))
        self._counted = 0.0
        report = state.report
        now = report.dense_score if report.held_out_dense is None else report.held_out_dense
        if self.report is None or self.history is None:
            target = self._cuts.target_sparsity
            self.report = replace(report, held_out_dense=now, gradual=True, target_sparsity=target)
            self.history, holds = state.history, True
        else:
            holds = self._judged(now)
        self._add_work(run, began)
        return holds

    def cut(self, place: int, epoch: int | None = None) -> PrunedWeights | None:
        """Cut the network that was shown last.

        Args:
            place: Number of the cut, from 1. It gives the place in the schedule of a target sparsity. If a cut is left
                out, the next one reaches the sparsity of the schedule.
            epoch: Number of trained epochs, for the report.

        Returns:
            The network to train on. None if no weight may be removed, or no candidate has a score.

        Raises:
            RuntimeError: If a refit kept a weight that was pruned before. Training holds it at zero.
            ValueError: If the units that `judge` was given are not those that the wheel asks for.
        """
        assert self._shown is not None
        (run, state), began = self._shown, time.monotonic()
        check_units(run.drawing.units, self._cuts.wheel, self._cuts.tree, run.refitter.weights)
        if not isinstance(step := self._cuts.policy(place, run.drawing.units).next(state), Step):
            return None
        after = try_level(run, state, step)
        _refuse_revived(state.parent, after.parent)
        self._shown = run, after
        self._add_work(run, began)
        level = after.report.levels[-1]
        if not level.accepted:
            return None
        report, history = self.found
        levels = (*report.levels, replace(level, held=False, epoch=epoch))
        self.report = replace(report, levels=levels, importance=run.drawing.in_words)
        self.history = after.history.won_by(history.level)
        self._factors = dict(after.factors)
        return run.refitter.network(after.parent, after.refitted)

    def ended(self) -> SearchReport:
        """The report when training is over, after the last network was shown."""
        (report, history), cuts = self.found, self._cuts
        reason, deepest = StopReason.TRAINING_ENDED, history.level == history.deepest
        if deepest and report.target_met:
            reason = StopReason.TARGET_REACHED
        elif deepest and history.level == cuts.tree.max_levels:
            reason = StopReason.MAX_LEVELS
        self.report = replace(report, stop_reason=reason)
        return self.report

    def state(self) -> dict[str, Any]:
        """Plain tensors and numbers for a checkpoint. `restore` reads them back."""
        if self.report is None or self.history is None:
            return {}
        return {**self.history.state(), "importance_factors": dict(self._factors), "report": self.report.to_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned. An empty state changes nothing."""
        if state:
            factors = state.get("importance_factors", state.get("leaning", {}))  # its former name
            self.history, self._factors = History.from_state(state), dict(factors)
            self.report = SearchReport.from_dict(state["report"])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shown": None}  # it refers to a Trainer's data

    def _begin(
        self,
        weights: Mapping[str, Tensor],
        evaluate: Evaluator | Callable[[Mask], float],
        calibration: Calibration | None,
        observer: Observer,
        units: Units | None,
        held: Mask | None,
    ) -> tuple[Run, State]:
        """Validate the network as the parent of a level. The first one, the dense network, sets the tolerance."""
        cuts = self._cuts
        judge = Judge(evaluate, cuts.validation.confirm if cuts.branches > 1 else 0.0)
        refitter = Refitter(weights, cuts.refit, calibration, True, units=units, held=held_of(held, weights))
        importance = None if calibration is None else "sensitivity"
        return begin(
            judge,
            refitter,
            Drawing(cuts.wheel, refitter, cuts.branches, cuts.seed, importance, units),
            observer,
            branches=cuts.branches,
            tolerance=self._cuts.tolerance if self.report is None else math.inf,
            confidence=None,
            race=cuts.validation.race,
            seed=cuts.seed,
            history=None if self.history is None else self.history.won_by(self.history.deepest),
            factors=self._factors,
            refuse_nan=self.report is None,
            target=cuts.tree.target,
        )

    def _judged(self, now: float) -> bool:
        """Record the score of the deepest level. A level that held before keeps its score unless it holds again."""
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

    def _add_work(self, run: Run, began: float) -> None:
        """Add validations and seconds since they were last added."""
        report, _ = self.found
        done, self._counted = run.judge.validations - self._counted, run.judge.validations
        seconds = report.seconds + time.monotonic() - began
        self.report = replace(report, validations=report.validations + done, seconds=seconds)


def _refuse_revived(parent: Mask, child: Mask) -> None:
    if not child <= parent:
        raise RuntimeError(
            "a cut kept weights that an earlier cut had pruned, but training holds these at zero, so masks must nest "
            "between epochs. This is an error in lightning_roulette. Pass refit=None to do without a refit."
        )
