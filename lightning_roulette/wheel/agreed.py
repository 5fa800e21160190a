"""The search for the threshold when the weights lie in several processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_roulette.large.limits import limits
from lightning_roulette.large.shards import Shards
from lightning_roulette.mask.mask import Mask
from lightning_roulette.wheel.arcs import Arc, Kept, held_arcs
from lightning_roulette.wheel.chance import moved
from lightning_roulette.wheel.law import check_importance
from lightning_roulette.wheel.long_arcs import long_arcs
from lightning_roulette.wheel.threshold import Threshold


class AgreedThreshold(Threshold):
    """Finds the threshold that all processes agree on, digit by digit.

    Each process makes the keys of its own weights. A single process would make the same keys, because chance depends on
    the index of a weight alone. All processes sum a histogram of the first 16 bits of all keys, which gives
    the first 16 bits of the threshold. Histograms of the few keys with these bits give the further bits. Keys equal to
    the threshold are drawn in order of parameter and index.

    All processes must make the same spins.

    Args:
        arcs: Parameter name to arc: the survivors that this process owns.
        shards: The weights that this process owns.
    """

    def __init__(self, arcs: Mapping[str, Arc], shards: Shards) -> None:
        self._arcs, self._shards = arcs, shards
        self.count = int(shards.add(torch.tensor(sum(arc.count for arc in arcs.values()))))

    def spin(self, draws: int, streams: Mapping[str, int]) -> dict[str, Kept]:
        """Return whether each weight that this process owns stays, flat."""
        if draws == 0:
            return {name: arc.cut({}, -math.inf, -math.inf).kept for name, arc in self._arcs.items()}
        ours = {name: moved(one, self._shards.spans[name][0]) for name, one in streams.items()}
        blocks = (keys for arc in self._arcs.values() for keys in arc.all_keys(ours))
        digit, missing = self._digit(map(_ordered, blocks), 48, draws)
        low, high = (digit << 48) - 2**63, ((digit + 1) << 48) - 1 - 2**63
        cuts = [arc.cut(ours, _unordered(low), _unordered(high)) for arc in self._arcs.values()]
        near = [_ordered(cut.keys) for cut in cuts]
        threshold, missing = self._threshold(near, missing)
        drawn = [keys < threshold for keys in near]
        tied = [(keys == threshold).nonzero().flatten() for keys in near]
        for one, where, count in zip(drawn, tied, self._shares_of_ties(tied, missing), strict=True):
            one[where[:count]] = True
        return {name: cut.without(one) for name, cut, one in zip(self._arcs, cuts, drawn, strict=True)}

    def _threshold(self, near: Sequence[Tensor], rank: int) -> tuple[int, int]:
        """Return the key of this rank among `near`, and how many keys equal to it are drawn."""
        threshold = 0
        for shift in (48, 32, 16, 0):
            digit, rank = self._digit(near, shift, rank)
            threshold = threshold << 16 | digit
            near = [keys[_digits(keys, shift) == digit] for keys in near]
        return threshold - 2**63, rank

    def _digit(self, blocks: Iterable[Tensor], shift: int, rank: int) -> tuple[int, int]:
        """Return the digit of the key of this rank, and the rank of this key among the keys with the same digit."""
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for keys in blocks:
            counts += _digits(keys, shift).bincount(minlength=1 << 16).cpu()
        counts = self._shards.add(counts)
        up_to = counts.cumsum(0)
        digit = int((up_to < rank).count_nonzero())
        return digit, rank - int(up_to[digit] - counts[digit])

    def _shares_of_ties(self, tied: Sequence[Tensor], most: int) -> list[int]:
        """Return how many ties of each parameter this process draws; parameters come first, then processes."""
        table = self._shards.each(torch.tensor([len(one) for one in tied]))
        by_order = table.T.flatten()
        earlier = (by_order.cumsum(0) - by_order).view(table.T.shape)[:, self._shards.rank]
        return [min(len(one), max(0, most - before)) for one, before in zip(tied, earlier.tolist(), strict=True)]


def agreed_arcs(importance: Mapping[str, Tensor], parent: Mask, sharpness: float, shards: Shards) -> Mapping[str, Arc]:
    """Make the arcs of the weights that this process owns.

    Args:
        importance: Importance of these weights alone, flat.
        parent: The mask of the whole network.
        sharpness: Exponent of the odds.
        shards: The weights that this process owns.

    Raises:
        ValueError: In all processes, if an importance is negative or not finite in one of them.
    """
    _check_everywhere(importance, shards)
    own, large = Mask(shards.own_mask(parent.stored)), parent.size > limits().held_weights
    return (long_arcs if large else held_arcs)(importance, own, sharpness, shards.least)


def _check_everywhere(importance: Mapping[str, Tensor], shards: Shards) -> None:
    found: ValueError | None = None
    try:
        for name, values in importance.items():
            check_importance(name, values)
    except ValueError as error:
        found = error
    if shards.anywhere(found is not None):
        raise found or ValueError("importance has negative, infinite or NaN entries in another process.")


def _ordered(keys: Tensor) -> Tensor:
    """Return float64 numbers, none of them NaN, as int64 in the same order; 0 and -0 are equal."""
    bits = (keys + 0.0).view(torch.int64)
    return bits ^ ((bits >> 63) & (2**63 - 1))


def _unordered(number: int) -> float:
    """Return the float64 that `_ordered` maps to this number."""
    bits = torch.tensor(number)
    return float((bits ^ ((bits >> 63) & (2**63 - 1))).view(torch.float64))


def _digits(ordered: Tensor, shift: int) -> Tensor:
    """Return 16 bits of each number, in the same order: the sign bit is inverted."""
    return ((ordered ^ -(2**63)) >> shift) & 0xFFFF
