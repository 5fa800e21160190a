"""What a search counts: weights, or what units cost. Policies decide by these numbers how much leaves."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from lightning_roulette.mask.mask import Mask
from lightning_roulette.report.target import over_target
from lightning_roulette.unit import Reduction
from lightning_roulette.wheel.units.units import Units


class Amounts(ABC):
    """Counts what masks keep."""

    @abstractmethod
    def left(self, parent: Mask) -> float:
        """Return how much a parent keeps."""

    @abstractmethod
    def removable(self, parent: Mask) -> float:
        """Return how much of it may still be removed at most; 0 if nothing may be."""

    @abstractmethod
    def missing(self, parent: Mask) -> float:
        """Return how much must still be removed to reach the target. Negative if it was exceeded.

        Without a target it is infinite.
        """

    @abstractmethod
    def share(self, parent: Mask, rate: float, most: float) -> float:
        """Return what a level of a pruning rate removes from a parent, at most `most`."""


@dataclass(frozen=True)
class Weights(Amounts):
    """Counts weights.

    Attributes:
        scope: `"global"` or `"layer"`, see `Wheel`. With `"layer"` every layer keeps at least one weight.
        target_sparsity: Sparsity that is the target. None: no target.
    """

    scope: str = "global"
    target_sparsity: float | None = None

    def left(self, parent: Mask) -> int:
        """Return the number of survivors."""
        return parent.survivors

    def removable(self, parent: Mask) -> int:
        """Return the number of all survivors but one, or with `scope="layer"` of all but one of each layer."""
        return removable(parent, self.scope)

    def missing(self, parent: Mask) -> float:
        """See `Amounts`."""
        return math.inf if self.target_sparsity is None else missing(parent, self.target_sparsity)

    def share(self, parent: Mask, rate: float, most: float) -> float:
        """See `level_draws`."""
        return level_draws(parent.survivors, rate, most)


@dataclass(frozen=True)
class UnitCosts(Amounts):
    """Counts what units cost, or the weights of the network if the target is a sparsity.

    Attributes:
        units: The units.
        target: How much of the cost is to leave. None: no such target.
        target_sparsity: Sparsity that is the target, if units cost their weights. None: no such target.
    """

    units: Units
    target: Reduction | None = None
    target_sparsity: float | None = None

    def left(self, parent: Mask) -> float:
        """Return what the network of a parent costs."""
        return self.units.left(parent)

    def removable(self, parent: Mask) -> float:
        """Return what the network costs; 0 if each group has a single unit. How much may leave is not known before."""
        return self.left(parent) if self.units.removable(parent) else 0.0

    def missing(self, parent: Mask) -> float:
        """See `Amounts`."""
        if self.target_sparsity is not None:
            return missing(parent, self.target_sparsity)
        if self.target is None:
            return math.inf
        return over_target(self.left(parent), self.units.whole(parent), self.target.share)

    def share(self, parent: Mask, rate: float, most: float) -> float:
        """Return the share of what the network costs. The last unit that leaves may exceed it."""
        return min(rate * self.left(parent), most)


def counts(units: Units | None, mask: Mask) -> dict[str, Any]:
    """Return what the report says of the units that a mask keeps, by field of `Level`. Empty without units."""
    if units is None:
        return {}
    multiply_adds = None if units.multiply_adds is None else round(units.left(mask, units.multiply_adds))
    return {"units": int(units.alive(mask).sum()), "multiply_adds": multiply_adds, "cost": units.left(mask)}


def level_draws(survivors: int, pruning_rate: float, most: float) -> int:
    """Weights that a level removes: `floor(pruning_rate * survivors + 0.5)`, at least 1 and at most `most`."""
    return int(min(max(1, math.floor(pruning_rate * survivors + 0.5)), most))


def removable(parent: Mask, scope: str) -> int:
    """Weights that may still be removed: all but one, or with `scope="layer"` all but one of each layer."""
    if scope == "layer":
        return sum(max(0, count - 1) for count in parent.counts.values())
    return parent.survivors - 1


def missing(parent: Mask, target_sparsity: float) -> int:
    """Weights that must still be removed to reach a sparsity. Negative if it was exceeded."""
    goal = math.floor(target_sparsity * parent.size + 0.5)
    return goal - (parent.size - parent.survivors)
