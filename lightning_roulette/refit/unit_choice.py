"""Which neurons and heads stay: as many of each group as are given, chosen on the inputs of what reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_roulette.large.processes import ONE_PROCESS, Processes
from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.layers import Layer
from lightning_roulette.refit.competing import labels_in
from lightning_roulette.refit.gram import LayerSums
from lightning_roulette.refit.layerwise import Layerwise
from lightning_roulette.refit.matrices import kept_in_matrix, matrix_of
from lightning_roulette.refit.solvers.cholesky import DampedGram
from lightning_roulette.refit.solvers.elimination import Reader, staying
from lightning_roulette.refit_settings import LeastSquares, Refit
from lightning_roulette.wheel.units.units import Part, Units

_LEAST_DAMPING = 1e-6  # with less, an inverse in float64 is not exact enough to be changed unit by unit


class UnitChoices:
    """Chooses which neurons or heads of a network stay in a refit.

    It keeps the Gram sums of the layers that read them, which do not depend on masks.

    Args:
        processes: Those that refit the network together.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._sums: dict[tuple[Layerwise, tuple[str, ...]], Mapping[Layer, LayerSums]] = {}

    def chosen(
        self,
        layerwise: Layerwise,
        mask: Mask,
        how: Refit | None,
        allowed: Mask | None,
        units: Units | None,
        dense: Mapping[str, Tensor],
    ) -> Mask:
        """Return the mask with the units that are chosen; the mask itself if no units are.

        Args:
            layerwise: The network, which must be dense.
            mask: The mask that is given.
            how: The refit. Units are chosen if it is a `LeastSquares` with `choose`.
            allowed: What may stay. None: everything.
            units: The units of the network. None: single weights.
            dense: The weights and biases of the network.
        """
        if not isinstance(how, LeastSquares) or not how.choose or units is None or not units.coupled:
            return mask
        key = layerwise, tuple(dict.fromkeys(part.name for part in units.parts if part.reads))
        if key not in self._sums:
            self._sums[key] = layerwise.sums(key[1])
        choice = UnitChoice(units, self._sums[key], dense, how.damping, self._processes)
        return choice.chosen(mask, Mask.full({name: dense[name] for name in mask}) if allowed is None else allowed)


@dataclass(frozen=True, eq=False)
class UnitChoice:
    """Chooses which units stay.

    Attributes:
        units: The units.
        sums: Gram sums of the layers that read units, in the dense network.
        dense: The weights and biases of the dense network.
        damping: See `Cholesky`.
        processes: Those that have the same sums. What the first one chooses counts.
    """

    units: Units
    sums: Mapping[Layer, LayerSums]
    dense: Mapping[str, Tensor]
    damping: float
    processes: Processes = field(default=ONE_PROCESS, repr=False)

    def chosen(self, mask: Mask, allowed: Mask) -> Mask:
        """Return a mask with as many units of each group as a mask keeps.

        Groups are looked at from the last one on. What is minimised is the sum over the layers that read the group: of
        the squared error of the outputs that are left, as a share of their power, with the inputs from other groups
        that are left. A group keeps the units of the mask if another choice is not better, or if the inputs of a layer
        that reads it are not known. All groups do if only parts of some units may stay, because other units would then
        have other numbers of weights.

        Args:
            mask: The mask that is given.
            allowed: What may stay.
        """
        may, kept = self.units.alive(allowed), self.units.alive(mask)
        whole = self.units.without(Mask.full({name: self.dense[name] for name in mask}), ~may)
        if self.units.without(allowed, ~kept) != mask or not torch.equal(*map(self.units.totals, (allowed, whole))):
            return mask  # it keeps parts of units, or only parts of units may stay
        found = mask
        for _, start, stop in reversed(list(self.units.ranges())):
            parts = [part for part in self.units.parts if _has(part, start, stop)]
            if readers := self._readers(parts, start, stop, found):
                kinds = _kinds(self.units, parts, start, stop)
                kept[start:stop] = staying(readers, may[start:stop], kept[start:stop], kinds)
                found = self.units.without(allowed, ~kept)
        found = self.units.without(allowed, ~self.processes.first(kept))
        return mask if found == mask else found

    def _readers(self, parts: Sequence[Part], start: int, stop: int, mask: Mask) -> list[Reader]:
        """Return the layers that read a group; none if one of them cannot be solved."""
        reading = [part for part in parts if part.reads]
        names = {part.name for part in reading}
        layers = [layer for layer in self.sums if names & {*layer.names}]
        if names - {name for layer in layers for name in layer.names}:
            return []
        found = [self._reader(layer, reading, start, stop, mask) for layer in layers]
        known = [one for one in found if one is not None]
        return known if len(known) == len(found) else []

    def _reader(self, layer: Layer, reading: Sequence[Part], start: int, stop: int, mask: Mask) -> Reader | None:
        """Return a layer that reads a group; None if it cannot be solved."""
        labels, sums = labels_in(layer, self.dense, reading), self.sums[layer].fit
        labels = torch.where((labels >= start) & (labels < stop), labels - start, -1)
        if not sums.finite or bool((labels != labels[:1, :1]).any()):
            return None
        matrix = DampedGram(sums.gram, max(self.damping, _LEAST_DAMPING))
        right = sums.cross.mT + matrix.ridges.view(-1, 1, 1) * matrix_of(layer, self.dense)
        left = layer.matrices({name: mask[name] for name in layer.names}).any(2)
        power = (sums.power * left).sum().clamp(min=torch.finfo(torch.float64).tiny)
        right = right * (left / power).sqrt().unsqueeze(2)
        gone = ~kept_in_matrix(layer, mask).any(1) & (labels[:, 0] < 0)  # lost inputs of other groups
        damped = matrix.damped.masked_fill(gone.unsqueeze(2) | gone.unsqueeze(1), 0.0)
        damped.diagonal(dim1=1, dim2=2).masked_fill_(gone, 1.0)
        return Reader(damped, right.masked_fill(gone.unsqueeze(1), 0.0), _columns(labels[0, 0], stop - start))


def _has(part: Part, start: int, stop: int) -> bool:
    return bool(((part.labels >= start) & (part.labels < stop)).any())


def _columns(labels: Tensor, units: int) -> Tensor:
    """Return the inputs of each unit, int64, shape `(units, most)`, padded with -1.

    Args:
        labels: The unit of each input, shape `(inputs,)`; -1 for inputs of no unit.
        units: Number of units.
    """
    order, counts = labels.argsort(stable=True), torch.bincount(labels + 1, minlength=units + 1)
    _, *each = order.split(counts.tolist())
    return torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=-1)


def _kinds(units: Units, parts: Sequence[Part], start: int, stop: int) -> Tensor:
    """Return the kind of each unit of a group. Units of one kind cost as much and have equal numbers of entries."""
    own = torch.zeros(units.count) if units.cost.own is None else units.cost.own
    each = [own[start:stop].double()]
    for part in parts:
        labels = part.labels[(part.labels >= start) & (part.labels < stop)]
        each.append(torch.bincount(labels - start, minlength=stop - start).double())
    kinds: Tensor = torch.stack(each, 1).unique(dim=0, return_inverse=True)[1]
    return kinds
