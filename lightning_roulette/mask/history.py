"""The masks of all accepted levels of a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_roulette.mask.level_numbers import LevelNumbers, levels_in
from lightning_roulette.mask.mask import Mask


class History:
    """The masks of all accepted levels, stored as one small number for each weight.

    Args:
        numbers: Parameter name to the number of the level that pruned each weight.
        level: The winner's level, to which `mask` belongs.
        deepest: The last level. None: the same as `level`.

    Attributes:
        most_levels: Largest number of levels that can be stored.
    """

    most_levels = torch.iinfo(torch.int16).max

    def __init__(self, numbers: Mapping[str, LevelNumbers], level: int = 0, deepest: int | None = None) -> None:
        self._numbers, self.level = numbers, level
        self.deepest = level if deepest is None else deepest

    @classmethod
    def of_dense(cls, weights: Mapping[str, Tensor]) -> History:
        """The history of a dense network."""
        return cls({name: LevelNumbers.of_dense(weight) for name, weight in weights.items()})

    def pruned(self, mask: Mask) -> History:
        """The history with one more level.

        Args:
            mask: The mask of that level, which becomes the winner.
        """
        level = self.deepest + 1
        return History(
            {name: numbers.pruned(mask.flags[name].bits(), level) for name, numbers in self._numbers.items()}, level
        )

    def won_by(self, level: int) -> History:
        """The same levels with another winner."""
        return History(self._numbers, level, self.deepest)

    @property
    def mask(self) -> Mask:
        """The winner's mask."""
        return self.mask_at(self.level)

    def mask_at(self, level: int) -> Mask:
        """The mask of one accepted level; level 0 is the dense network.

        Raises:
            ValueError: If there is no such level.
        """
        if not 0 <= level <= self.deepest:
            raise ValueError(
                f"level is {level}, but must lie between 0 (dense) and {self.deepest} (the last accepted)."
            )
        return Mask({name: numbers.kept_at(level) for name, numbers in self._numbers.items()})

    def cpu(self) -> History:
        """The same history on the CPU."""
        return History({name: numbers.cpu() for name, numbers in self._numbers.items()}, self.level, self.deepest)

    def state(self) -> dict[str, Any]:
        """Plain tensors on the CPU and numbers, for a checkpoint. `from_state` reads them.

        Returns:
            - `"pruned_at"`: parameter name to the level that pruned each weight. Tensors named in `"packed"` hold the
              bits of these numbers instead: one row for each bit, packed as in `Bits`.
            - `"packed"`: names of large parameters to their shapes.
            - `"level"`: the winner's level.
            - `"deepest"`: the last level.
        """
        numbers = self.cpu()._numbers
        dtype = torch.uint8 if self.deepest < 256 else torch.int16
        return {
            "pruned_at": {name: one.state(dtype) for name, one in numbers.items()},
            "packed": {name: list(one.full.shape) for name, one in numbers.items() if not one.is_small},
            "level": self.level,
            "deepest": self.deepest,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        """Read what `state` returned."""
        level = int(state["level"])
        return cls(levels_in(state), level, int(state.get("deepest", level)))
