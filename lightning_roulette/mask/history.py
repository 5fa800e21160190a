"""The masks of all accepted levels of a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_roulette.mask.levels import LevelBits, NestedLevels, levels_in, winner_in
from lightning_roulette.mask.mask import Mask


class History:
    """The masks of all accepted levels, nested or not.

    While every mask lies within the one before, each weight has one small number: the level that pruned it. From the
    first mask on that does not, each weight has one bit for each level. Beyond `limits().copied_bytes` these bits are
    in temporary files.

    Args:
        levels: The masks.
        level: The winner's level, to which `mask` belongs.
        deepest: The last level. None: the same as `level`.

    Attributes:
        most_levels: Largest number of levels that can be stored.
    """

    most_levels = torch.iinfo(torch.int16).max

    def __init__(self, levels: NestedLevels | LevelBits, level: int = 0, deepest: int | None = None) -> None:
        self._levels, self.level = levels, level
        self.deepest = level if deepest is None else deepest

    @classmethod
    def of_dense(cls, weights: Mapping[str, Tensor], kept: Mask | None = None) -> History:
        """The history of a network that no level has pruned yet.

        Args:
            weights: The weights, by name.
            kept: The weights that are kept already. It is the mask of level 0. None: all.
        """
        return cls(NestedLevels.of_dense(weights, None if kept is None else kept.flags))

    def pruned(self, mask: Mask) -> History:
        """The history with one more level.

        Args:
            mask: The mask of that level, which becomes the winner. It need not lie within the last one.
        """
        level = self.deepest + 1
        return History(self._levels.followed_by(mask.flags, level), level)

    def replaced(self, level: int, mask: Mask) -> History:
        """The same levels, with another mask of one of them.

        Args:
            level: The number of the level, at least 1.
            mask: The new mask.
        """
        self._check(level, 1)
        return History(self._levels.as_bits(self.deepest).replaced(level, mask.flags), self.level, self.deepest)

    def won_by(self, level: int) -> History:
        """The same levels with another winner."""
        return History(self._levels, level, self.deepest)

    @property
    def mask(self) -> Mask:
        """The winner's mask."""
        return self.mask_at(self.level)

    def mask_at(self, level: int) -> Mask:
        """The mask of one accepted level; level 0 is the network before the search.

        Raises:
            ValueError: If there is no such level.
        """
        self._check(level, 0)
        return Mask(self._levels.kept_at(level))

    def cpu(self) -> History:
        """The same history on the CPU."""
        return History(self._levels.cpu(), self.level, self.deepest)

    def state(self) -> dict[str, Any]:
        """Plain tensors on the CPU and numbers, for a checkpoint. `from_state` reads them.

        Returns:
            If all masks nest:

            - `"pruned_at"`: parameter name to the level that pruned each weight. Tensors named in `"packed"` hold the
              bits of these numbers instead: one row for each bit, packed as in `Bits`.
            - `"packed"`: names of large parameters to their shapes.
            - `"level"`: the winner's level.
            - `"deepest"`: the last level.
            - `"level_0"`: the mask of level 0, packed as in `Bits`, of each parameter that has zeros there. A weight
              that it prunes has the number 1 in `"pruned_at"`. Without the key, level 0 keeps all weights.

            Otherwise:

            - `"level_bits"`: one tensor for each level from 1 on, uint8 and flat: the masks of all parameters one after
              another, each packed as in `Bits`. Each parameter begins with a new byte.
            - `"shapes"`: parameter names to shapes, in the order of these masks.
            - `"winner_level"`: the winner's level.
            - `"deepest"`: the last level.
            - `"level_0"`: as above.
            - `"pruned_at"` and `"level"`: a sentence, with which versions fail that know only masks that nest.
        """
        return self._levels.state(self.level, self.deepest)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        """Read what `state` of this or an earlier version returned."""
        level = winner_in(state)
        return cls(levels_in(state), level, int(state.get("deepest", level)))

    def _check(self, level: int, least: int) -> None:
        if not least <= level <= self.deepest:
            raise ValueError(
                f"level is {level}, but must lie between {least}{' (dense)' if least == 0 else ''} and {self.deepest} "
                "(the last accepted)."
            )
