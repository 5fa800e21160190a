"""How the candidates of a level are drawn: importance of the parent's weights, importance factors, the wheel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from lightning_roulette.large.shards import Shards
from lightning_roulette.mask.mask import Mask
from lightning_roulette.refit.sensitivity import NoGradients
from lightning_roulette.search.refitter import Refitter
from lightning_roulette.search.sectors import NeighbourSectors, Sectors, UnitSectors, WeightSectors
from lightning_roulette.search.state import State
from lightning_roulette.settings import Importance, Wheel
from lightning_roulette.wheel.chance import normal, stream
from lightning_roulette.wheel.importance import importance_of
from lightning_roulette.wheel.units.nofm import Neighbours
from lightning_roulette.wheel.units.unit_wheel import for_their_costs, importance_of_units
from lightning_roulette.wheel.units.units import Units


class Drawing:
    """Draws the candidates of every level of a search.

    Importance is computed once for each parent. All its candidates, and those of retries, share it. They share the
    wheel too, unless each has its own importance factors.

    Args:
        wheel: How candidates are drawn.
        refitter: Gives the networks, and the factors for importances on inputs.
        branches: Candidates per level.
        seed: Source of all chance.
        importance: Importance to use where the wheel names none. None: `"sensitivity"` where each level is refitted
            by least squares and no weight is sharded, else `"magnitude"`.
        units: The units that leave. None: single weights.

    Attributes:
        units: See above.
    """

    def __init__(
        self,
        wheel: Wheel,
        refitter: Refitter,
        branches: int,
        seed: int,
        importance: str | None = None,
        units: Units | None = None,
    ) -> None:
        self.units = units
        self._wheel, self._refitter, self._seed = wheel, refitter, seed
        self._shards = Shards.of(refitter.weights)
        self._kind, self._fallback = _kind(wheel, refitter, importance, self._shards is not None)
        self._allocation = _allocation(wheel, refitter, branches)
        self._parent: Mask | None = None
        self._sectors: Sectors | None = None

    @property
    def names(self) -> Iterable[str]:
        """Names of all that has importance factors: weights, or groups of units."""
        return self._refitter.weights if self.units is None else self.units.groups

    @property
    def in_words(self) -> str:
        """Importance that candidates are drawn by."""
        return self._fallback or (self._kind if isinstance(self._kind, str) else "a function")

    def prepare(self, state: State) -> None:
        """Compute the importance of the parent, unless that was done.

        Raises:
            ValueError: If the importance that the user asked for needs derivatives, and there are none.
        """
        if self._parent is state.parent:
            return
        self._sectors = self._sectors_of(state)
        self._parent = state.parent

    def spin(self, state: State, budget: float, candidate: int, varied: bool = True) -> Mask:
        """Mask of one candidate: the parent's mask without what leaves.

        Args:
            state: Where the search stands; `prepare` was called for it.
            budget: What leaves, see `Step`.
            candidate: Index of the candidate among all of its level.
            varied: Whether it has importance factors of its own. False: those of its parent.
        """
        assert self._sectors is not None
        factors: dict[str, float] | None = None
        if self._allocation:
            factors = {name: math.exp(value) for name, value in self.factors(state, candidate, varied).items()}
        return self._sectors.spin(budget, factors, seed=self._seed, level=state.next_level, candidate=candidate)

    def factors(self, state: State, candidate: int, varied: bool = True) -> Mapping[str, float]:
        """Logarithm of a candidate's importance factor for each of `names`. Takes the arguments of `spin`."""
        if not (self._allocation and varied):
            return state.factors
        return {
            name: before + self._allocation * normal(stream(self._seed, state.next_level, candidate, name))
            for name, before in state.factors.items()
        }

    def _sectors_of(self, state: State) -> Sectors:
        try:
            return self._sectors_by_importance(state)
        except NoGradients as error:
            if self._wheel.importance is not None:
                raise ValueError(f"importance is {self._kind!r}, but {error}. Choose another.") from error
            self._kind, self._fallback = "magnitude", f"magnitude, as {error}"
            return self._sectors_by_importance(state)

    def _sectors_by_importance(self, state: State) -> Sectors:
        units, parent, sharpness = self.units, state.parent, self._wheel.sharpness
        if units is None:
            return WeightSectors(self._importance_of(state), parent, self._wheel, self._shards)
        if isinstance(units, Neighbours):
            return NeighbourSectors(units, self._importance_of(state), parent, sharpness)
        if self._kind == "sensitivity" and units.coupled:
            each = for_their_costs(units, self._refitter.gates(units, parent, state.refitted), parent)
        else:
            each = importance_of_units(units, self._importance_of(state), parent, units.coupled)
        return UnitSectors(units, each, parent, sharpness)

    def _importance_of(self, state: State) -> Mapping[str, Tensor]:
        return importance_of(
            self._weights(state), self._kind, lambda kind: self._refitter.scales(kind, state.parent, state.refitted)
        )

    def _weights(self, state: State) -> Mapping[str, Tensor]:
        """Weights of the parent: zero where pruned, or the dense weights if pruned values do not matter."""
        dense = self._refitter.weights
        if self._shards is not None:
            ours = self._refitter.network(state.parent, state.refitted).weights if state.refitted.values else dense
            return self._shards.own({name: ours[name] for name in dense})
        if self._kind == "magnitude" and not state.refitted.values:
            return {name: weight.detach() for name, weight in dense.items()}
        parent = self._refitter.network(state.parent, state.refitted).weights
        return {name: parent[name] for name in dense}


def _kind(wheel: Wheel, refitter: Refitter, importance: str | None, sharded: bool) -> tuple[str | Importance, str]:
    """The importance, and why it is not the usual one; empty if it is."""
    if (asked := wheel.importance or importance) is not None:
        return asked, ""
    if refitter.solves and sharded:
        return "magnitude", "magnitude, as weights are sharded over processes"
    return "sensitivity" if refitter.solves else "magnitude", ""


def _allocation(wheel: Wheel, refitter: Refitter, branches: int) -> float:
    """Standard deviation of the logarithm of importance factors."""
    if wheel.scope == "layer":
        return 0.0
    if wheel.allocation is None:
        return 0.3 if refitter.solves and branches > 1 else 0.0
    return wheel.allocation
