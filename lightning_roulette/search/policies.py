"""Policies: what a search tries next, decided from its state alone."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_roulette.mask.history import History
from lightning_roulette.mask.mask import Mask
from lightning_roulette.report.records import StopReason
from lightning_roulette.search.amounts import Amounts, UnitCosts, Weights
from lightning_roulette.search.state import State
from lightning_roulette.settings import Tree
from lightning_roulette.wheel.units.units import Units


@dataclass(frozen=True)
class Step:
    """One decision of a policy: the level to try next.

    Attributes:
        rate: Pruning rate, as the report gives it.
        budget: What the level removes from its parent: weights, or what units cost. The last unit may exceed it.
        branches: Candidates of the level.
        coarse: Whether the level is coarse. Its candidates share the importance factors of their parent, and its
            failure does not count: it makes all later levels fine.
    """

    rate: float
    budget: float
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
        units: The units that leave. The share is then one of their cost, and `tree` may have a target. None: weights.
    """

    tree: Tree
    branches: int
    scope: str = "global"
    target_sparsity: float | None = None
    units: Units | None = None

    @property
    def amounts(self) -> Amounts:
        """What is counted."""
        if self.units is None:
            return Weights(self.scope, self.target_sparsity)
        return UnitCosts(self.units, self.tree.target, self.target_sparsity)

    def next(self, state: State) -> Step | StopReason:
        """See `Policy`."""
        rate = float(self.tree.pruning_rate) / 2.0**state.halvings
        if (reason := self._end(state, rate)) is not None:
            return reason
        return self.step(state.parent, rate)

    def step(self, parent: Mask, rate: float, *, coarse: bool = False) -> Step:
        """The step that removes a share of what a parent keeps. A coarse step has one candidate."""
        budget = self.amounts.share(parent, rate, self.most(parent))
        return Step(rate, budget, 1 if coarse else self.branches, coarse)

    def most(self, parent: Mask) -> float:
        """The most that may be removed from a parent."""
        return min(self.amounts.removable(parent), self.amounts.missing(parent))

    def _end(self, state: State, rate: float) -> StopReason | None:
        tree, deepest = self.tree, History.most_levels
        if state.failures >= tree.patience:
            return StopReason.DECLINED
        if state.halvings > 0 and rate < tree.smallest_rate:
            return StopReason.RATE_TOO_SMALL
        if self.amounts.missing(state.parent) <= 0:
            return StopReason.TARGET_REACHED
        if state.history.level >= min(tree.max_levels or deepest, deepest):
            return StopReason.MAX_LEVELS
        return StopReason.EXHAUSTED if self.amounts.removable(state.parent) <= 0 else None


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
        coarse = self.fine.step(state.parent, rate, coarse=True)
        return step if 2 * coarse.budget > self.fine.amounts.missing(state.parent) else coarse


@dataclass(frozen=True)
class OneLevel(Policy):
    """A single level reaches the target sparsity.

    Attributes:
        levels: Gives the target, and when there is nothing to do.
    """

    levels: Levels

    def next(self, state: State) -> Step | StopReason:
        """See `Policy`. The rate is the share that the step removes of what is left."""
        step = self.levels.next(state)
        if isinstance(step, StopReason):
            return step
        before, budget = self.levels.amounts.left(state.parent), self.levels.most(state.parent)
        return Step(1 - (before - budget) / before, budget, step.branches)


def cubic(target_sparsity: float, share: float) -> float:
    """Sparsity of the cubic schedule: `target_sparsity * (1 - (1 - share) ** 3)`.

    Source: Zhu and Gupta, "To prune, or not to prune" (2017, arXiv:1710.01878).

    Args:
        target_sparsity: Sparsity at the end of the schedule.
        share: Share of the schedule that is done, in [0, 1].

    Examples:
        >>> cubic(0.75, 0.5)
        0.65625
    """
    return target_sparsity * (1 - (1 - share) ** 3)
