"""A model of which weights of a tensor are kept, that learns while they are written or read.

A tensor of the shape (outputs, inputs, places) is coded in tiles of outputs and inputs, place by place. The probability
that a weight is kept depends on what came before in the same output, input, place and pair of output and input, and on
how many weights of the layer before feed this input. Each of these says how much its logit is above that of the whole
tensor. They are added with weights that learn as well: Newton's steps of a logistic regression, one for each tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lightning_roulette.slim.files.coder import Coder
from lightning_roulette.slim.files.logits import LARGEST, ONE, UNIT, Integers, logarithm, logit_of, probability

Kept = npt.NDArray[np.bool_]
_STEP = 16  # the logit of a whole tensor is rounded to multiples of this
_FEWEST, _MOST = 144, 4096  # weights in a tile
_TILES = 4096  # more tiles than this are only made for tensors of more than _TILES * _MOST weights
_START = {"output": 0.75, "input": 0.75, "place": 0.5, "pair": 0.5, "near": 0.4, "before": 0.1, "all": 0.0}
_PRIOR = {"output": 16, "input": 16, "place": 16, "pair": 2, "near": 16, "before": 16}  # in weights seen before
_CERTAINTY = 200  # of the weights at the start, as a curvature


@dataclass
class _Tally:
    """How many weights were seen, and how many of them were kept."""

    kept: Integers
    seen: Integers

    @classmethod
    def of(cls, size: int) -> _Tally:
        return cls(np.zeros(size, np.int64), np.zeros(size, np.int64))

    def part(self, which: slice) -> _Tally:
        return _Tally(self.kept[which], self.seen[which])

    def above(self, whole: int, prior: int) -> Integers:
        """How much the logits are above that of the whole tensor, where so many weights like it were seen before."""
        share = int(probability(np.int64(whole)))
        kept, pruned = self.kept * ONE + prior * share, (self.seen - self.kept) * ONE + prior * (ONE - share)
        return logarithm(kept) - logarithm(pruned) - whole


@dataclass
class Positions:
    """What was learnt from the tensors so far.

    Attributes:
        weights: The weight of each reason, in units of 1/65536.
        outputs: The kept weights of each output of the last tensor.
        whole: The logit of that tensor.
    """

    weights: dict[str, int] = field(default_factory=lambda: {name: round(ONE * one) for name, one in _START.items()})
    outputs: _Tally = field(default_factory=lambda: _Tally.of(0))
    whole: int = 0

    def code(self, coder: Coder, kept: Kept | None, shape: tuple[int, ...]) -> Kept:
        """Write or read which weights are kept.

        Args:
            coder: Writes or reads.
            kept: Shape `shape`, True where kept, or None to read it.
            shape: The shape of the tensor, with at least two dimensions.
        """
        found = np.zeros(_as_three(shape), np.bool_)
        if kept is not None:
            found[...] = kept.reshape(found.shape)
        levels = LARGEST // _STEP
        level = logit_of(float(found.mean()), _STEP) // _STEP + levels if kept is not None and found.size else None
        if found.size == 0:
            return found.reshape(shape)
        whole = (coder.number(level, 2 * levels + 1) - levels) * _STEP
        tensor = _Tensor(coder, found, kept is not None, whole, self)
        tensor.code()
        self.outputs, self.whole = tensor.tallies["output"], whole
        return found.reshape(shape)


class _Tensor:
    """A tensor of three dimensions while it is coded."""

    def __init__(self, coder: Coder, found: Kept, given: bool, whole: int, learnt: Positions) -> None:
        self.coder, self.found, self.given, self.whole, self.learnt = coder, found, given, whole, learnt
        outputs, inputs, places = found.shape
        sizes = {"output": outputs, "input": inputs, "place": places}
        self.tallies = {name: _Tally.of(size) for name, size in sizes.items()}
        self._curvatures = dict.fromkeys(_START, _CERTAINTY * ONE)
        self._before = self._of_layer_before(inputs)

    def code(self) -> None:
        """Code every tile."""
        outputs, inputs, places = self.found.shape
        high, wide = _tile(outputs, inputs, self.found.size)
        for first in range(0, outputs, high):
            for left in range(0, inputs, wide):
                rows, columns = slice(first, min(first + high, outputs)), slice(left, min(left + wide, inputs))
                pairs = _Tally(np.zeros((rows.stop - first, columns.stop - left), np.int64), np.int64(0))
                for place in range(places):
                    self._code_tile(rows, columns, place, pairs)

    def _code_tile(self, rows: slice, columns: slice, place: int, pairs: _Tally) -> None:
        reasons = self._reasons(rows, columns, place, pairs)
        mixed = sum(self.learnt.weights[name] * one for name, one in reasons.items())
        logits = np.broadcast_to(self.whole + (mixed >> 16), pairs.kept.shape)
        ones = probability(logits)
        tile = self.found[rows, columns, place]
        bits = self.coder.bits(tile if self.given else None, ones.reshape(-1)).reshape(tile.shape)
        tile[...] = bits
        self._learn(reasons, bits, ones)
        self._count(rows, columns, place, pairs, bits)

    def _reasons(self, rows: slice, columns: slice, place: int, pairs: _Tally) -> dict[str, Integers]:
        parts = {
            "output": self._above("output", rows)[:, None],
            "input": self._above("input", columns)[None, :],
            "all": np.full((1, 1), UNIT, np.int64),
        }
        if self._before is not None:
            parts["before"] = self._before[None, columns]
        if self.found.shape[2] == 1:
            return {**parts, "near": self._near(columns)[None, :]}
        pair = pairs.above(self.whole, _PRIOR["pair"])
        return {**parts, "place": self._above("place", slice(place, place + 1))[:, None], "pair": pair}

    def _above(self, name: str, which: slice) -> Integers:
        return self.tallies[name].part(which).above(self.whole, _PRIOR[name])

    def _near(self, columns: slice) -> Integers:
        """The same for an input together with the two before and the two after it."""
        tally, size = self.tallies["input"], self.found.shape[1]
        first, last = max(columns.start - 2, 0), min(columns.stop + 2, size)
        ends = np.arange(columns.start, columns.stop)
        low, high = np.maximum(ends - 2, 0) - first, np.minimum(ends + 3, size) - first
        sums = [np.concatenate([[0], np.cumsum(one[first:last])]) for one in (tally.kept, tally.seen)]
        return _Tally(*(one[high] - one[low] for one in sums)).above(self.whole, _PRIOR["near"])

    def _of_layer_before(self, inputs: int) -> Integers | None:
        """How much each input is above the others in the tensor before, if its outputs are the inputs of this one."""
        size = len(self.learnt.outputs.kept)
        if size == 0 or inputs % size:
            return None
        return np.repeat(self.learnt.outputs.above(self.learnt.whole, _PRIOR["before"]), inputs // size)

    def _learn(self, reasons: dict[str, Integers], bits: Integers, ones: Integers) -> None:
        """Make one of Newton's steps for each weight."""
        errors, spreads = bits * ONE - ones, ones * (ONE - ones) >> 16
        for name, one in reasons.items():
            slope = int((_summed(errors, one.shape) * one).sum())
            self._curvatures[name] += int((_summed(spreads, one.shape) * one * one).sum()) >> 16
            self.learnt.weights[name] += slope * UNIT // self._curvatures[name]

    def _count(self, rows: slice, columns: slice, place: int, pairs: _Tally, bits: Integers) -> None:
        high, wide = bits.shape
        for name, which, kept, seen in (
            ("output", rows, bits.sum(1), wide),
            ("input", columns, bits.sum(0), high),
            ("place", slice(place, place + 1), bits.sum(), high * wide),
        ):
            self.tallies[name].kept[which] += kept
            self.tallies[name].seen[which] += seen
        pairs.kept += bits
        pairs.seen += 1


def _summed(values: Integers, shape: tuple[int, ...]) -> Integers:
    """The sums of a matrix over the dimensions in which `shape` is 1."""
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    summed: Integers = values.sum(axes, keepdims=True)
    return summed


def _as_three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape as outputs, inputs and places."""
    outputs, inputs, places = shape[0], shape[1], math.prod(shape[2:])
    if places > 64 and outputs * inputs < 256:  # there would be many small tiles
        return outputs * inputs, places, 1
    return outputs, inputs, places


def _tile(outputs: int, inputs: int, weights: int) -> tuple[int, int]:
    """The outputs and inputs of a tile."""
    area = min(max(weights // _TILES, _FEWEST), _MOST)
    wide = min(inputs, math.isqrt(area))
    return min(outputs, max(area // wide, 1)), wide
