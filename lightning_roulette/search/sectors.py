"""What is on the wheel of one level: weights or units, with their importance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_roulette.large.shards import Shards
from lightning_roulette.mask.mask import Mask
from lightning_roulette.settings import Wheel
from lightning_roulette.wheel.importance import weighed
from lightning_roulette.wheel.level import LevelWheel
from lightning_roulette.wheel.units.nofm import Neighbours, NofMWheel
from lightning_roulette.wheel.units.unit_wheel import UnitWheel
from lightning_roulette.wheel.units.units import Units


class Sectors(ABC):
    """What one parent puts on the wheel, with its importance."""

    @abstractmethod
    def spin(
        self, budget: float, factors: Mapping[str, float] | None, *, seed: int, level: int, candidate: int
    ) -> Mask:
        """Return the mask of one candidate.

        Args:
            budget: What leaves the parent.
            factors: Factor of the importance, by the name of a weight or a group of units. None: no factors.
            seed: With `level` and `candidate`, the source of all chance.
            level: See `seed`.
            candidate: See `seed`.
        """


class WeightSectors(Sectors):
    """Single weights. Candidates without factors share one wheel.

    Args:
        importance: Importance of every weight.
        parent: Mask of the parent.
        wheel: How candidates are drawn.
        shards: See `LevelWheel`.
    """

    def __init__(self, importance: Mapping[str, Tensor], parent: Mask, wheel: Wheel, shards: Shards | None) -> None:
        self._importance, self._parent, self._wheel, self._shards = importance, parent, wheel, shards
        self._shared: LevelWheel | None = None

    def spin(
        self, budget: float, factors: Mapping[str, float] | None, *, seed: int, level: int, candidate: int
    ) -> Mask:
        """See `Sectors`. The budget is a number of weights."""
        return self._wheel_with(factors).spin(int(budget), seed=seed, level=level, candidate=candidate)

    def _wheel_with(self, factors: Mapping[str, float] | None) -> LevelWheel:
        if factors is not None:
            return self._made(weighed(self._importance, factors))
        self._shared = self._shared or self._made(self._importance)
        return self._shared

    def _made(self, importance: Mapping[str, Tensor]) -> LevelWheel:
        wheel = self._wheel
        return LevelWheel(importance, self._parent, sharpness=wheel.sharpness, scope=wheel.scope, shards=self._shards)


@dataclass(frozen=True, eq=False)
class UnitSectors(Sectors):
    """Units.

    Attributes:
        units: The units.
        importance: See `importance_of_units`.
        parent: Mask of the parent.
        sharpness: Exponent of the odds.
    """

    units: Units
    importance: Tensor
    parent: Mask
    sharpness: float

    def spin(
        self, budget: float, factors: Mapping[str, float] | None, *, seed: int, level: int, candidate: int
    ) -> Mask:
        """See `Sectors`. The budget is a part of the cost."""
        importance = self.importance
        if factors is not None:
            sizes = torch.tensor(list(self.units.groups.values()))
            each = torch.tensor([factors[name] for name in self.units.groups], dtype=torch.float64)
            importance = importance * each.repeat_interleave(sizes)
        wheel = UnitWheel(self.units, importance, self.parent, sharpness=self.sharpness)
        return wheel.spin(budget, seed=seed, level=level, candidate=candidate)


@dataclass(frozen=True, eq=False)
class NeighbourSectors(Sectors):
    """Layers of which each few neighbours keep some.

    Attributes:
        units: The layers.
        importance: Importance of every weight.
        parent: Mask of the parent.
        sharpness: Exponent of the odds.
    """

    units: Neighbours
    importance: Mapping[str, Tensor]
    parent: Mask
    sharpness: float

    def spin(
        self, budget: float, factors: Mapping[str, float] | None, *, seed: int, level: int, candidate: int
    ) -> Mask:
        """See `Sectors`. The budget is a part of the cost."""
        wheel = NofMWheel(self.units, self.importance, self.parent, sharpness=self.sharpness, factors=factors)
        return wheel.spin(budget, seed=seed, level=level, candidate=candidate)
