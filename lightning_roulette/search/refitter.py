"""What a search does to a pruned network after its mask was drawn: nothing, or a refit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from lightning_roulette.mask.mask import Mask, fill_pruned
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.refit.inputs import Calibration
from lightning_roulette.refit.refitted import Refitted, Survivors
from lightning_roulette.refit_settings import LeastSquares, Refit
from lightning_roulette.report.records import Skipped
from lightning_roulette.values import in_words
from lightning_roulette.wheel.units.units import Units

_STATISTICS = Refit()  # computes running statistics only


@dataclass(frozen=True, eq=False)
class Refitter:
    """What is done to pruned networks, and with which inputs.

    Attributes:
        weights: Weights of the dense network.
        how: Kind of refit. None: no refit.
        calibration: The dense network with inputs. None: no inputs.
        nests: Whether a refit may only keep weights that the parent keeps.
        keeps_statistics: Whether running statistics stay as trained.
        units: What stays or leaves as a whole. None: single weights.
        held: What is held at zero, by name: False where a weight or another parameter stays zero. None: nothing.
    """

    weights: Mapping[str, Tensor]
    how: Refit | None
    calibration: Calibration | None
    nests: bool = False
    keeps_statistics: bool = False
    units: Units | None = None
    held: Mask | None = None

    @cached_property
    def kept(self) -> Mask:
        """The mask of the network before the search: all weights, less those that are held at zero."""
        full = Mask.full(self.weights)
        if self.held is None:
            return full
        flags = {name: self.held.flags[name].to(one.device) for name, one in full.flags.items() if name in self.held}
        return Mask({**full.stored, **{name: one.stored for name, one in flags.items()}})

    @property
    def each_level(self) -> bool:
        """Whether levels are refitted before they are judged."""
        return self.how is not None and self.how.each_level

    @property
    def after_search(self) -> bool:
        """Whether accepted levels are refitted after the search."""
        return self.how is not None and not self.how.each_level

    @property
    def solves(self) -> bool:
        """Whether each level is refitted by least squares."""
        return isinstance(self.how, LeastSquares) and self.how.each_level

    @property
    def finalists(self) -> int:
        """Candidates of a level that are refitted."""
        return self.how.finalists if self.how is not None and self.how.each_level else 0

    @property
    def in_words(self) -> str:
        """What is refitted, and when. Empty without a refit."""
        if (how := self.how) is None:
            return ""
        if self.keeps_statistics and not isinstance(how, LeastSquares):
            return "none (running statistics kept as trained)"
        statistics = "running statistics kept as trained" if self.keeps_statistics else "running statistics"
        what = f"{_solved(how)}, and {statistics}" if isinstance(how, LeastSquares) else statistics
        best = "of the best candidate" if how.finalists == 1 else f"of the best {how.finalists} candidates"
        return f"{what}, {f'{best} of a level' if how.each_level else 'at the end'}"

    @property
    def rounded(self) -> str:
        """To which values weights are rounded, in a sentence. Empty if they are not."""
        if not isinstance(self.how, LeastSquares) or self.how.values == "float32":
            return ""
        near = "; those that are not refitted, to the nearest values" if self.left_alone() else ""
        return f"Weights are rounded to {in_words(self.how.values)} before a level is judged{near}."

    def left_alone(self) -> dict[str, str]:
        """Weights that the refit cannot change, by name, with the reason."""
        if self.how is None or self.calibration is None:
            return {}
        return self.calibration.left_alone(Mask.full(self.weights), self.how)

    def not_refitted(self) -> tuple[Skipped, ...]:
        """These weights grouped by reason, largest group first."""
        groups: dict[str, list[str]] = {}
        for name, why in self.left_alone().items():
            groups.setdefault(why, []).append(name)
        found = [
            Skipped(tuple(names), sum(self.weights[name].numel() for name in names), why)
            for why, names in groups.items()
        ]
        return tuple(sorted(found, key=lambda one: -one.weights))

    def dense(self) -> dict[int, Survivors]:
        """Dense values of everything else that a refit changes, under the key 0. Empty without a refit."""
        if self.how is None or self.calibration is None:
            return {}
        full = Mask.full(self.weights)
        return {0: Survivors.of(full, self.calibration.others(full, self.how))}

    def refit(self, mask: Mask, parent: Mask | None = None) -> Refitted:
        """Refit the network that a mask prunes.

        Args:
            mask: The mask.
            parent: The mask of the parent. Needed if masks must nest.

        Raises:
            RuntimeError: If the refit chose another number of weights than the mask keeps.
        """
        assert self.calibration is not None
        assert self.how is not None
        allowed = parent if self.nests else None if self.held is None else self.kept
        found = self.calibration.refit(mask, self.how, allowed, statistics=not self.keeps_statistics, units=self.units)
        held: Mapping[str, Tensor] = self.held or {}
        fill_pruned(found.values, {name: held[name] for name in held if name in found.values and name not in mask})
        if (kept := found.mask_from(mask).survivors) != mask.survivors:
            raise RuntimeError(
                f"a refit kept {kept} weights, but the level keeps {mask.survivors}. Calibration.refit must return a "
                "mask with as many weights as the mask that it was given."
            )
        return found

    def normalises(self, mask: Mask) -> bool:
        """Whether a refit computes running statistics of batch normalisations."""
        if self.how is None or self.calibration is None or self.keeps_statistics:
            return False
        return bool(self.calibration.others(mask, _STATISTICS))

    def normalised(self, mask: Mask) -> Refitted:
        """The network that a mask prunes, with nothing computed but running statistics."""
        assert self.calibration is not None
        return self.calibration.refit(mask, _STATISTICS)

    def network(self, mask: Mask, refitted: Refitted) -> PrunedWeights:
        """The network that a mask makes of refitted values."""
        return PrunedWeights(mask, self.weights, refitted.values)

    def scales(self, kind: str, mask: Mask, refitted: Refitted) -> Mapping[str, Tensor]:
        """See `Calibration.scales`."""
        assert self.calibration is not None
        return self.calibration.scales(kind, mask, refitted.values)

    def gates(self, units: Units, mask: Mask, refitted: Refitted) -> Tensor:
        """See `Calibration.gates`."""
        assert self.calibration is not None
        return self.calibration.gates(units, mask, refitted.values)


def _solved(how: LeastSquares) -> str:
    words = "survivors chosen and solved by least squares" if how.choose else "survivors by least squares"
    if how.distill:
        return f"{words} and {how.distill} gradient steps"
    return words if how.values == "float32" else f"{words}, rounded to {in_words(how.values)}"
