"""Policies: what a search tries next, decided from its state alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_roulette.mask.history import History
from lightning_roulette.mask.mask import Mask
from lightning_roulette.report.records import StopReason
from lightning_roulette.search.state import State
from lightning_roulette.settings import Tree


@dataclass(frozen=True)
class Step:
    """One decision of a policy: the level to try next.

    Attributes:
        rate: Pruning rate, as the report gives it.
        draws: Weights that the level removes from its parent.
        branches: Candidates of the level.
        coarse: Whether the level is coarse. Its candidates share the importance factors of their parent, and its
            failure does not count: it makes all later levels fine.
    """

    rate: float
    draws: int
    branches: int
    coarse: bool = False


class Policy:
    """Decides what a search tries next."""

    def next(self, state: State) -> Step | StopReason:
        """The next step, or why there is none.

        Args:
            state: Where the search stands.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Levels(Policy):
    """Every level removes the same share of the survivors. After a failure the share is halved.

    Attributes:
        tree: Pruning rate, and when the search ends.
        branches: Candidates per level.
        scope: `"global"` or `"layer"`, see `Wheel`. With `"layer"` every layer keeps at least one weight.
        target_sparsity: Sparsity at which the search ends, in (0, 1). None: no such end.
    """

    tree: Tree
    branches: int
    scope: str = "global"
    target_sparsity: float | None = None

    def next(self, state: State) -> Step | StopReason:
        """See `Policy`."""
        rate = float(self.tree.pruning_rate) / 2.0**state.halvings
        if (reason := self._end(state, rate)) is not None:
            return reason
        return Step(rate, level_draws(state.parent.survivors, rate, self.most(state.parent)), self.branches)

    def most(self, parent: Mask) -> int:
        """The largest number of weights that may be removed from a parent."""
        spare = removable(parent, self.scope)
        return spare if self.target_sparsity is None else min(spare, missing(parent, self.target_sparsity))

    def _end(self, state: State, rate: float) -> StopReason | None:
        tree, deepest = self.tree, History.most_levels
        if state.failures >= tree.patience:
            return StopReason.DECLINED
        if state.halvings > 0 and rate < tree.smallest_rate:
            return StopReason.RATE_TOO_SMALL
        if self.target_sparsity is not None and missing(state.parent, self.target_sparsity) <= 0:
            return StopReason.TARGET_REACHED
        if state.history.level >= min(tree.max_levels or deepest, deepest):
            return StopReason.MAX_LEVELS
        return StopReason.EXHAUSTED if removable(state.parent, self.scope) <= 0 else None


@dataclass(frozen=True)
class CoarseToFine(Policy):
    """Coarse levels until one fails, then fine ones from the last that held.

    A coarse level removes more weights, and has a single candidate. With a least-squares refit the levels of a fifth
    with one candidate are as good as levels of a tenth with twenty, see docs/measurements.md. The branches are left for
    the last levels, where the floor is near. Larger levels would save nothing: a chain of small steps can be confirmed
    up to the first that fails, and each step of it needs a refit.

    Levels are fine, too, from two coarse levels above the target on.

    Attributes:
        fine: The fine levels, and when the search ends.
    """

    fine: Levels

    def next(self, state: State) -> Step | StopReason:
        """See `Policy`."""
        step, tree = self.fine.next(state), self.fine.tree
        rate = tree.coarse_rate
        if isinstance(step, StopReason) or state.fine or rate is None or rate <= tree.pruning_rate:
            return step
        target, parent = self.fine.target_sparsity, state.parent
        draws = level_draws(parent.survivors, rate, self.fine.most(parent))
        if target is not None and 2 * draws > missing(parent, target):
            return step
        return Step(rate, draws, branches=1, coarse=True)


@dataclass(frozen=True)
class OneLevel(Policy):
    """A single level reaches the target sparsity.

    Attributes:
        levels: Gives the target, and when there is nothing to do.
    """

    levels: Levels

    def next(self, state: State) -> Step | StopReason:
        """See `Policy`. The rate is the share of the survivors that the step removes."""
        step = self.levels.next(state)
        if isinstance(step, StopReason):
            return step
        before, draws = state.parent.survivors, self.levels.most(state.parent)
        return Step(1 - (before - draws) / before, draws, step.branches)


def level_draws(survivors: int, pruning_rate: float, most: int) -> int:
    """Weights that a level removes: `floor(pruning_rate * survivors + 0.5)`, at least 1 and at most `most`."""
    return min(max(1, math.floor(pruning_rate * survivors + 0.5)), most)


def removable(parent: Mask, scope: str) -> int:
    """Weights that may still be removed: all but one, or with `scope="layer"` all but one of each layer."""
    if scope == "layer":
        return sum(max(0, count - 1) for count in parent.counts.values())
    return parent.survivors - 1


def missing(parent: Mask, target_sparsity: float) -> int:
    """Weights that must still be removed to reach a sparsity. Negative if it was exceeded."""
    goal = math.floor(target_sparsity * parent.size + 0.5)
    return goal - (parent.size - parent.survivors)


def cubic(target_sparsity: float, share: float) -> float:
    """Sparsity of the cubic schedule: `target_sparsity * (1 - (1 - share) ** 3)`.

    Source: Zhu and Gupta, "To prune, or not to prune" (2017, arXiv:1710.01878).

    Args:
        target_sparsity: Sparsity at the end of the schedule.
        share: Share of the schedule that is done, in [0, 1].

    Example:
        >>> cubic(0.75, 0.5)
        0.65625
    """
    return target_sparsity * (1 - (1 - share) ** 3)
