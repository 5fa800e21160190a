"""What is done to a pruned network after its mask was drawn: nothing, or a refit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_roulette.mask.mask import Mask
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.refit.calibration import Calibration, Refitted, Survivors
from lightning_roulette.search.winner import network_at
from lightning_roulette.settings import LeastSquares, Refit


class Refitting:
    """What is done to a network after its mask was drawn: nothing, or a refit.

    Attributes:
        how: None: nothing.
        kept: What was done to accepted levels.
    """

    def __init__(self, weights: Mapping[str, Tensor], how: Refit | None, calibration: Calibration | None) -> None:
        self._weights, self.how, self._calibration = weights, how, calibration
        self.kept: dict[int, Survivors] = {}
        self.now = Refitted()
        if how is not None and calibration is not None:
            dense = Mask.full(weights)
            self.kept[0] = Survivors.of(dense, calibration.others(dense, how))

    @property
    def each_level(self) -> bool:
        """Whether levels are refitted before they are judged."""
        return self.how is not None and self.how.each_level

    @property
    def finalists(self) -> int:
        """How many candidates of a level are refitted."""
        return self.how.finalists if self.how is not None and self.how.each_level else 0

    @property
    def left_alone(self) -> dict[str, str]:
        """The weights that no refit changes, and why."""
        if self.how is None or self._calibration is None:
            return {}
        return self._calibration.left_alone(Mask.full(self._weights), self.how)

    @property
    def in_words(self) -> str:
        """What is refitted, and when; empty: nothing."""
        if (how := self.how) is None:
            return ""
        least_squares = isinstance(how, LeastSquares)
        what = "survivors by least squares, and running statistics" if least_squares else "running statistics"
        best = "of the best candidate" if how.finalists == 1 else f"of the best {how.finalists} candidates"
        return f"{what}, {f'{best} of a level' if how.each_level else 'at the end'}"

    def refitted(self, mask: Mask) -> Refitted:
        """The network of a mask, refitted."""
        assert self._calibration is not None
        assert self.how is not None
        return self._calibration.refit(mask, self.how)

    def network(self, mask: Mask, refitted: Refitted | None = None) -> PrunedWeights:
        """The network of a mask over refitted values: over those of the parent if they are not given."""
        return PrunedWeights(mask, self._weights, (refitted or self.now).values)

    def keep(self, level: int, mask: Mask, refitted: Refitted) -> None:
        """Keep what makes a level's weights."""
        if refitted.values:
            self.kept[level] = Survivors.of(mask, refitted.values)

    def at(self, level: int, mask: Mask) -> PrunedWeights:
        """The network of an accepted level."""
        return network_at(level, mask, self._weights, self.kept)

    def scales(self, kind: str, mask: Mask) -> Mapping[str, Tensor]:
        """See `Calibration.scales`."""
        assert self._calibration is not None
        return self._calibration.scales(kind, mask, self.now.values)
