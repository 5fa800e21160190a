"""Where a search stands: one frozen object. Every step makes a new one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lightning_roulette.mask.history import History
from lightning_roulette.mask.mask import Mask
from lightning_roulette.refit.refitted import Refitted, Survivors
from lightning_roulette.report.records import Level
from lightning_roulette.report.report import SearchReport


@dataclass(frozen=True, eq=False)
class State:
    """Where a search stands.

    Attributes:
        report: Numbers of the search, with every level that was tried.
        history: Masks of all accepted levels. Its `level` is the current winner.
        parent: Mask of the deepest accepted level. The next level is cut from it.
        refitted: Values that a refit gave the parent.
        factors: Logarithm of the parent's importance factor, by parameter name.
        refits: Values that refits gave the accepted levels, by level number. The key 0 has the dense values of
            everything else that a refit changes.
        failures: Failed levels since the last accepted one.
        halvings: How often the pruning rate was halved.
        fine: Whether a coarse level failed, so that no further level is coarse.
    """

    report: SearchReport
    history: History
    parent: Mask
    refitted: Refitted
    factors: Mapping[str, float]
    refits: Mapping[int, Survivors]
    failures: int = 0
    halvings: int = 0
    fine: bool = False

    @property
    def next_level(self) -> int:
        """Number of the next level. A failed level is tried again under the same number."""
        return self.history.level + 1

    def accepted(self, level: Level, mask: Mask, refitted: Refitted, factors: Mapping[str, float]) -> State:
        """The state after a level that kept the floor: its winner is the next parent.

        One step of a policy may add several levels. Levels are numbered in the order in which they are accepted.

        Args:
            level: The level, with the number `next_level`.
            mask: The mask of the network that was judged, which need not lie within the parent's.
            refitted: Values that a refit gave this network.
            factors: See `State`.
        """
        return replace(
            self._with(level),
            history=self.history.pruned(mask),
            parent=mask,
            refitted=refitted,
            factors=factors,
            refits=kept(self.refits, level.level, mask, refitted),
            failures=0,
        )

    @property
    def tried(self) -> int:
        """Candidates that were drawn for the next level: those of failed levels with the same number."""
        return sum(len(one.candidates) for one in self.report.levels if one.level == self.next_level)

    def rejected(self, level: Level, coarse: bool = False) -> State:
        """The state after a level that missed the floor: the parent stays, and the rate is halved.

        Args:
            level: The level.
            coarse: Whether it was coarse. Then the rate stays, and the failure does not count.
        """
        if coarse:
            return replace(self._with(level), fine=True)
        return replace(self._with(level), failures=self.failures + 1, halvings=self.halvings + 1)

    def refitted_later(self, level: int, mask: Mask, refitted: Refitted) -> State:
        """The state with an accepted level refitted after the search.

        Args:
            level: The number of the level.
            mask: Its mask, which the refit was given.
            refitted: What the refit returned.
        """
        refits, chosen = kept(self.refits, level, refitted.mask_from(mask), refitted), refitted.mask
        if chosen is None:
            return replace(self, refits=refits)
        parent = chosen if level == self.history.deepest else self.parent
        return replace(self, refits=refits, parent=parent, history=self.history.replaced(level, chosen))

    def with_levels(self, levels: Mapping[int, Level]) -> State:
        """The same state with some levels replaced, by their place in `report.levels`."""
        changed = tuple(levels.get(place, level) for place, level in enumerate(self.report.levels))
        return replace(self, report=replace(self.report, levels=changed))

    def _with(self, level: Level) -> State:
        return replace(self, report=replace(self.report, levels=(*self.report.levels, level)))


def kept(refits: Mapping[int, Survivors], level: int, mask: Mask, refitted: Refitted) -> Mapping[int, Survivors]:
    """The refits of accepted levels, with one more level if a refit changed anything there."""
    return {**refits, level: Survivors.of(mask, refitted.values)} if refitted.values else refits
