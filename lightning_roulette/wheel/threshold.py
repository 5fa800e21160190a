"""The fast search for the threshold: all keys are made once, block by block, and few are stored."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lightning_roulette.large.limits import limits
from lightning_roulette.wheel.arcs import EVERY, Arc, Cut, HeldArc, Kept
from lightning_roulette.wheel.chance import random_bits
from lightning_roulette.wheel.law import smallest_of

SIGMAS = 5.0  # the first bracket reaches this many standard deviations to either side


class Threshold(ABC):
    """Parameters that share their draws, and a way to find the threshold of their keys.

    The threshold of a spin for `draws` weights is the key of rank `draws` in ascending order.

    Attributes:
        count: Number of survivors of all parameters, in all processes.
    """

    count: int

    @abstractmethod
    def spin(self, draws: int, streams: Mapping[str, int]) -> Mapping[str, Kept]:
        """Return whether each weight stays when `draws` survivors leave.

        Args:
            draws: Number of survivors to draw, at most `count`.
            streams: Parameter name to its stream of chance. Empty if the sharpness is infinite.
        """


class SampledThreshold(Threshold):
    """Finds the threshold between two keys that a sample of the survivors gives.

    1. A sample of the keys gives two numbers, between which the threshold lies with high probability.
    2. All keys are made, block by block. Weights with keys below both numbers are drawn. Weights with keys above both
       stay. Only the few keys between them are stored.
    3. The stored keys are compared with one another.

    If the threshold lies elsewhere, the counts show it, and step 2 is done again with the two numbers further apart.
    The result therefore does not depend on the sample.

    Args:
        arcs: Parameter name to arc.
    """

    def __init__(self, arcs: Mapping[str, Arc]) -> None:
        self._arcs = arcs
        self.count = sum(arc.count for arc in arcs.values())
        self._sample = sample_of(arcs) if self.count > limits().compared_keys else []

    def spin(self, draws: int, streams: Mapping[str, int]) -> dict[str, Kept]:
        """Return whether each weight stays when `draws` survivors leave."""
        cuts, missing = self.cuts(draws, streams)
        drawn = smallest_of([cut.keys for cut in cuts], missing)
        return {name: cut.without(near) for name, cut, near in zip(self._arcs, cuts, drawn, strict=True)}

    def cuts(self, draws: int, streams: Mapping[str, int]) -> tuple[list[Cut], int]:
        """Return the cut of each arc, and how many of the keys stored in the cuts are drawn."""
        sampled = [arc.keys(streams, EVERY, arc.places(EVERY)) for arc in self._sample]
        cuts: list[Cut] = []
        sigmas, missing = SIGMAS, -1
        while not 0 <= missing <= sum(len(cut.keys) for cut in cuts):
            cuts.clear()  # frees the masks before new ones are made
            low, high = bracket(sampled, draws / max(1, self.count), sigmas)
            cuts += (arc.cut(streams, low, high) for arc in self._arcs.values())
            sigmas, missing = 2 * sigmas, draws - (self.count - sum(cut.staying for cut in cuts))
        return cuts, missing


def sample_of(arcs: Mapping[str, Arc]) -> list[HeldArc]:
    """Return survivors chosen at random with replacement: `2 * count ** (2 / 3)` of them."""
    ends = list(accumulate(arc.count for arc in arcs.values()))
    chosen = random_bits(0, torch.arange(int(2 * ends[-1] ** (2 / 3)))).remainder_(ends[-1]).sort().values
    parts = chosen.tensor_split(torch.searchsorted(chosen, torch.tensor(ends[:-1], dtype=torch.int64)).tolist())
    starts = zip(arcs.values(), parts, [0, *ends], strict=False)
    return [arc.at((part - start).to(arc.device)) for arc, part, start in starts]


def bracket(sampled: Sequence[Tensor], share: float, sigmas: float) -> tuple[float, float]:
    """Return two numbers between which the end of the smallest `share` of all keys lies with high probability.

    In the sample, the rank of this end is binomial. The numbers lie `sigmas` standard deviations of the rank, and
    `sigmas` ranks more, to either side. Without a sample they are minus and plus infinity.
    """
    if not sampled:
        return -math.inf, math.inf
    keys = torch.cat([values.to(sampled[0].device) for values in sampled])
    rank, margin = share * len(keys), sigmas * (1 + math.sqrt(len(keys) * share * (1 - share)))
    first, last = math.floor(rank - margin), math.ceil(rank + margin)
    low = float(keys.kthvalue(first).values) if first >= 1 else -math.inf
    return low, float(keys.kthvalue(last).values) if last <= len(keys) else math.inf
