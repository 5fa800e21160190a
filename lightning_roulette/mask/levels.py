"""The masks of all levels: one number for each weight while masks nest, then one bit for each weight and level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_roulette.large.bits import Bits, Flags
from lightning_roulette.large.copies import OnDisk, copies_of
from lightning_roulette.mask.level_numbers import LevelNumbers

# versions that know only nested masks read `level` as a number, and fail with this sentence
UNREADABLE_BEFORE = "the masks of these levels do not nest: read this file with a later version of lightning_roulette"


@dataclass(frozen=True, eq=False)
class NestedLevels:
    """The masks of levels that nest: a weight that one level prunes is pruned in all later levels.

    Attributes:
        numbers: Parameter name to the number of the level that pruned each weight.
    """

    numbers: Mapping[str, LevelNumbers]

    @classmethod
    def of_dense(cls, weights: Mapping[str, Tensor], kept: Mapping[str, Flags] | None = None) -> NestedLevels:
        """Level 0 alone.

        Args:
            weights: The weights, by name.
            kept: The mask of level 0. None: all weights are kept.
        """
        known = {} if kept is None else kept
        return cls({name: LevelNumbers.of_dense(weight, known.get(name)) for name, weight in weights.items()})

    def followed_by(self, kept: Mapping[str, Flags], level: int) -> NestedLevels | LevelBits:
        """The levels with one more.

        Args:
            kept: The mask of that level. If it does not nest, all levels are stored as bits.
            level: Its number, one more than the deepest level's.
        """
        if any(numbers.revives(kept[name]) for name, numbers in self.numbers.items()):
            return self.as_bits(level - 1).followed_by(kept, level)
        return NestedLevels({name: numbers.pruned(kept[name].bits(), level) for name, numbers in self.numbers.items()})

    def as_bits(self, deepest: int) -> LevelBits:
        """The same levels as bits.

        Args:
            deepest: Number of the last level.
        """
        found = LevelBits({name: numbers.full for name, numbers in self.numbers.items()})
        for level in range(1, deepest + 1):
            found = found.followed_by(self.kept_at(level), level)
        return found

    def kept_at(self, level: int) -> dict[str, Bits]:
        """The mask of one level."""
        return {name: numbers.kept_at(level) for name, numbers in self.numbers.items()}

    def cpu(self) -> NestedLevels:
        """The same levels on the CPU."""
        return NestedLevels({name: numbers.cpu() for name, numbers in self.numbers.items()})

    def state(self, winner: int, deepest: int) -> dict[str, Any]:
        """See `History.state`."""
        numbers, dtype = self.cpu().numbers, torch.uint8 if deepest < 256 else torch.int16
        return {
            "pruned_at": {name: one.state(dtype) for name, one in numbers.items()},
            "packed": {name: list(one.full.shape) for name, one in numbers.items() if not one.is_small},
            "level": winner,
            "deepest": deepest,
            **_began({name: one.full for name, one in numbers.items()}),
        }


@dataclass(frozen=True, eq=False)
class LevelBits:
    """The masks of any levels, at one bit for each weight and level.

    Attributes:
        full: The mask of level 0.
        packed: For each level from 1, parameter name to packed bits as in `Bits`, on the CPU. All levels together have
            at most `limits().copied_bytes` in memory. Further ones are in temporary files.
    """

    full: Mapping[str, Bits]
    packed: Sequence[Mapping[str, Tensor]] = ()

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LevelBits:
        """Read what `state` returned."""
        shapes = {name: torch.Size(shape) for name, shape in state["shapes"].items()}
        full = {name: Bits.filled(True, shape, torch.device("cpu")) for name, shape in shapes.items()}
        found = cls({name: _level_0(state, name, bits) for name, bits in full.items()})
        sizes = [len(bits.packed) for bits in found.full.values()]
        for row in state["level_bits"]:
            found = found._and(dict(zip(shapes, row.split(sizes), strict=True)))
        return found

    def followed_by(self, kept: Mapping[str, Flags], level: int) -> LevelBits:
        """The levels with one more; see `NestedLevels.followed_by`."""
        return self._and({name: kept[name].bits().packed for name in self.full})

    def replaced(self, level: int, kept: Mapping[str, Flags]) -> LevelBits:
        """The levels with another mask of one of them.

        Args:
            level: The number of the level, at least 1.
            kept: The new mask.
        """
        others = LevelBits(self.full, [one for number, one in enumerate(self.packed, 1) if number != level])
        *rest, new = others.followed_by(kept, level).packed
        return LevelBits(self.full, [*rest[: level - 1], new, *rest[level - 1 :]])

    def as_bits(self, deepest: int) -> LevelBits:
        """These levels."""
        return self

    def kept_at(self, level: int) -> dict[str, Bits]:
        """The mask of one level."""
        if level == 0:
            return dict(self.full)
        packed = self.packed[level - 1]
        return {name: Bits(packed[name].to(bits.device), bits.shape) for name, bits in self.full.items()}

    def cpu(self) -> LevelBits:
        """The same levels, with masks on the CPU."""
        return LevelBits({name: bits.to("cpu") for name, bits in self.full.items()}, self.packed)

    def state(self, winner: int, deepest: int) -> dict[str, Any]:
        """See `History.state`."""
        return {
            "level_bits": [torch.cat([packed[name] for name in self.full]) for packed in self.packed],
            "shapes": {name: list(bits.shape) for name, bits in self.full.items()},
            "winner_level": winner,
            "deepest": deepest,
            "pruned_at": {UNREADABLE_BEFORE: torch.zeros(1, dtype=torch.uint8)},
            "level": UNREADABLE_BEFORE,
            **_began(self.full),
        }

    def _and(self, packed: Mapping[str, Tensor]) -> LevelBits:
        in_memory = [one for one in self.packed if not isinstance(one, OnDisk)]
        held = sum(tensor.nbytes for one in in_memory for tensor in one.values())
        return LevelBits(self.full, [*self.packed, copies_of(packed, held)])


def levels_in(state: Mapping[str, Any]) -> NestedLevels | LevelBits:
    """The levels in what `History.state` of this or an earlier version returned."""
    if "level_bits" in state:
        return LevelBits.from_state(state)
    packed = state.get("packed", {})
    numbers = {name: LevelNumbers.from_state(at, packed.get(name)) for name, at in state["pruned_at"].items()}
    for name in state.get("level_0", {}):
        numbers[name] = numbers[name].begun(_level_0(state, name, numbers[name].full))
    return NestedLevels(numbers)


def _began(full: Mapping[str, Bits]) -> dict[str, Any]:
    """What a state says of level 0; nothing if it keeps all weights."""
    held = {name: bits.to("cpu").packed.clone() for name, bits in full.items() if bits.count() < bits.numel()}
    return {"level_0": held} if held else {}


def _level_0(state: Mapping[str, Any], name: str, full: Bits) -> Bits:
    """The mask of level 0 of one parameter. `full` keeps all its weights."""
    packed = state.get("level_0", {}).get(name)
    return full if packed is None else Bits(packed.to(full.device), full.shape)


def winner_in(state: Mapping[str, Any]) -> int:
    """The winner's level in what `History.state` of this or an earlier version returned."""
    return int(state["winner_level"] if "level_bits" in state else state["level"])
