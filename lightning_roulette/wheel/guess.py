"""The search for the threshold on small wheels: later spins take their bracket from the first spin.

On a small wheel most time goes into the number of operations and into logarithms. All parameters are therefore drawn
as one tensor, and the bracket of the first spin is translated into uniform numbers. A later spin with as many draws
compares its uniform numbers with the bracket, and takes logarithms only of the few numbers inside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from lightning_roulette.large.limits import limits
from lightning_roulette.wheel.arcs import HeldArc
from lightning_roulette.wheel.chance import uniforms
from lightning_roulette.wheel.law import keys_of, smallest_of
from lightning_roulette.wheel.threshold import SampledThreshold, Threshold

# Above `_ALMOST_ONE` the rounding of a uniform number would matter in its logarithm, so the logarithm is taken.
_ALMOST_ONE, _ROUNDING = 1 - 2.0**-20, 1e-6


@dataclass(frozen=True, eq=False)
class JointArc(HeldArc):
    """The survivors of several parameters, one parameter after the other.

    Attributes:
        name: Empty.
        shape: Number of weights of all parameters, as a shape of one dimension.
        index: Index of each survivor among all weights. None: all weights survive.
        terms: The term of each survivor.
        names: Names of the parameters.
        owners: Number of the parameter of each survivor.
        own_index: Index of each survivor in its own flattened parameter.
    """

    names: Sequence[str]
    owners: Tensor
    own_index: Tensor

    @classmethod
    def of(cls, arcs: Sequence[HeldArc]) -> JointArc:
        """Join arcs that lie on one device."""
        device, counts, sizes = arcs[0].device, [arc.count for arc in arcs], [arc.size for arc in arcs]
        owners = torch.arange(len(arcs)).repeat_interleave(torch.tensor(counts)).to(device)
        starts = torch.tensor([0, *accumulate(sizes)][:-1]).to(device)[owners]
        own_index = torch.cat([arc.places(slice(0, arc.count)) for arc in arcs])
        index = None if all(arc.index is None for arc in arcs) else own_index + starts
        terms, names = torch.cat([arc.terms for arc in arcs]), [arc.name for arc in arcs]
        return cls("", torch.Size([sum(sizes)]), index, terms, names, owners, own_index)

    def at(self, positions: Tensor) -> JointArc:
        """Return the survivors at these positions, which are ascending and count from 0."""
        index = positions if self.index is None else self.index[positions]
        owners, own_index = self.owners[positions], self.own_index[positions]
        return JointArc(self.name, self.shape, index, self.terms[positions], self.names, owners, own_index)

    def keys(self, streams: Mapping[str, int], block: slice, places: Tensor) -> Tensor:
        """Return the keys of a block of survivors, float64."""
        each = self.in_order(streams)[self.owners[block]] if streams else None
        return keys_of(self.terms[block], each, self.own_index[block])

    def in_order(self, streams: Mapping[str, int]) -> Tensor:
        """Return the streams in the order of the parameters, int64."""
        return torch.tensor([streams[name] for name in self.names]).to(self.device)


class GuessedThreshold(Threshold):
    """Finds the threshold of few weights, from the second spin on with the bracket of the first.

    It holds at most 48 bytes per survivor.

    Args:
        arcs: Parameter name to arc, all on one device.
    """

    def __init__(self, arcs: Mapping[str, HeldArc]) -> None:
        self._shapes = {name: arc.shape for name, arc in arcs.items()}
        self._counts = [arc.count for arc in arcs.values()]
        self.count = sum(self._counts)
        self._joint = JointArc.of(list(arcs.values()))
        self._sampled = SampledThreshold({"": self._joint})
        self._guess: Guess | None = None

    def spin(self, draws: int, streams: Mapping[str, int]) -> dict[str, Tensor]:
        """Return whether each weight stays when `draws` survivors leave."""
        kept = None
        if streams and self._guess is not None and self._guess.draws == draws:
            kept = self._guess.kept(self._joint, self._each(streams))
        if kept is None:
            kept = self._first(draws, streams)
        parts = kept.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def _first(self, draws: int, streams: Mapping[str, int]) -> Tensor:
        """Return whether each weight stays, and guess the threshold of later spins."""
        (cut,), missing = self._sampled.cuts(draws, streams)
        if streams and self.count > limits().compared_keys:
            self._guess = Guess.of(self._joint.terms, cut.keys.sort().values, missing, draws)
        (drawn,) = smallest_of([cut.keys], missing)
        return cast(Tensor, cut.without(drawn))

    def _each(self, streams: Mapping[str, int]) -> Tensor:
        """Return the stream of each survivor."""
        known = self._joint.in_order(streams)
        return torch.cat([one.expand(count) for one, count in zip(known, self._counts, strict=True)])


@dataclass(frozen=True, eq=False)
class Guess:
    """Two keys between which the threshold of other spins lies with high probability.

    Attributes:
        draws: Number of draws that it is valid for.
        low: The lower key.
        high: The higher key.
        drawn: For each survivor the uniform number above which its key is below `low`.
        stays: For each survivor the uniform number below which its key is above `high`.
    """

    draws: int
    low: float
    high: float
    drawn: Tensor
    stays: Tensor

    @classmethod
    def of(cls, terms: Tensor, ascending: Tensor, rank: int, draws: int) -> Guess | None:
        """Guess from one spin; None if it has too few keys on one side of its threshold.

        The number of keys below a given key differs between spins by about `sqrt(draws)` or less.

        Args:
            terms: The terms of all survivors.
            ascending: The keys around the threshold, in ascending order.
            rank: Rank of the threshold among them, counted from 1.
            draws: Number of draws of the spin.
        """
        margin = math.ceil(8 * math.sqrt(2 * draws)) + 8
        first, last = max(0, rank - 1 - margin), min(len(ascending), rank + margin) - 1
        if not first < rank - 1 < last:
            return None
        low, high = float(ascending[first]), float(ascending[last])
        # key < low  <=>  E < exp(low - term)  <=>  U > exp(-exp(low - term)), as E = -log U
        return cls(draws, low, high, *((key - terms).exp_().neg_().exp_() for key in (low, high)))

    def kept(self, arc: JointArc, streams: Tensor) -> Tensor | None:
        """Return whether each weight stays, flat; None if the threshold lies elsewhere.

        Args:
            arc: The survivors.
            streams: The stream of each survivor.
        """
        kept = torch.zeros(arc.size, dtype=torch.bool, device=arc.device)
        near = []
        for block in arc.blocks():
            chance = uniforms(streams[block], arc.own_index[block])
            stays = (chance <= self.drawn[block]).logical_or_(chance >= _ALMOST_ONE)
            found = stays.logical_and(chance >= self.stays[block]).nonzero().flatten()
            near.append((arc.places(block)[found], chance[found].log_().neg_().log_().add_(arc.terms[block][found])))
            arc.write(kept, block, stays)
        places, keys = (torch.cat(parts) for parts in zip(*near, strict=True))
        missing = self.draws - (arc.count - int(kept.count_nonzero()))
        if not 0 < missing <= len(keys):
            return None
        (drawn,) = smallest_of([keys], missing)
        kept[places[drawn]] = False
        return kept if self.low + _ROUNDING < float(keys[drawn].max()) < self.high - _ROUNDING else None


def are_few(arcs: Mapping[str, HeldArc]) -> bool:
    """Return whether arcs have few weights in all and lie on one device, so that they can be joined."""
    size, devices = sum(arc.size for arc in arcs.values()), {arc.device for arc in arcs.values()}
    return size <= limits().joint_weights and len(devices) == 1
