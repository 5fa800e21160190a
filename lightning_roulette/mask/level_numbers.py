"""For each weight, the number of the level that pruned it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_roulette.large.bits import Bits, Flags, is_small
from lightning_roulette.large.devices import device_for_bits


@dataclass(frozen=True, eq=False)
class LevelNumbers:
    """For each weight of one parameter, the number of the level that pruned it; 0 while it is kept.

    As long as masks nest, these numbers hold the masks of all levels. A number takes as many bits as the number of the
    deepest level has. A weight that was zero before the first level has the number 1.

    Attributes:
        planes: Entry `i` holds bit `i` of every number, where bit 0 is the lowest.
        full: The mask of level 0: bits of the parameter's shape, False where a weight was zero before the first level.
    """

    planes: Sequence[Bits]
    full: Bits

    @classmethod
    def of_dense(cls, weight: Tensor, kept: Flags | None = None) -> LevelNumbers:
        """Numbers of a parameter before the first level.

        Args:
            weight: The parameter.
            kept: Which of its weights are kept. None: all, and all numbers are 0.
        """
        full = Bits.filled(True, weight.shape, device_for_bits(weight))
        return cls((), full) if kept is None else cls((), full).begun(kept.bits().to(full.device))

    def begun(self, kept: Bits) -> LevelNumbers:
        """The same numbers, with another mask of level 0.

        Args:
            kept: The mask of level 0.
        """
        gone = self.full.but(kept)
        first = self.planes[0] | gone if self.planes else gone
        return LevelNumbers([first, *self.planes[1:]], kept)

    @classmethod
    def from_state(cls, stored: Tensor, packed_shape: Sequence[int] | None) -> LevelNumbers:
        """Read what `state` returned.

        Args:
            stored: The tensor that `state` returned.
            packed_shape: Shape of the parameter if the numbers are stored as bits, else None.
        """
        if packed_shape is None:
            shape, planes = stored.shape, _planes_of(stored)
        else:
            shape = torch.Size(packed_shape)
            planes = [Bits(row, shape) for row in stored]
        return cls(planes, Bits.filled(True, shape, stored.device))

    @property
    def is_small(self) -> bool:
        """Whether `state` stores one number per weight; otherwise it stores bits."""
        return is_small(self.full)

    def pruned(self, kept: Bits, level: int) -> LevelNumbers:
        """The numbers after one more level.

        Args:
            kept: The mask of that level.
            level: Its number, larger than all numbers so far.
        """
        now = self.full.but(kept.to(self.full.device)).but(self._any())
        known = [*self.planes, *[self._none()] * (level.bit_length() - len(self.planes))]
        return LevelNumbers(
            [plane | now if level >> place & 1 else plane for place, plane in enumerate(known)], self.full
        )

    def revives(self, kept: Flags) -> bool:
        """Whether a mask keeps a weight that an earlier level pruned."""
        return not kept.to(self.full.device).bits().within(self.full.but(self._any()))

    def kept_at(self, level: int) -> Bits:
        """The mask of one level."""
        above, same = self._none(), self.full  # numbers above `level`; numbers equal to it in all bits so far
        for place in reversed(range(max(level.bit_length(), len(self.planes)))):
            plane = self.planes[place] if place < len(self.planes) else self._none()
            if level >> place & 1:
                same = same & plane
            else:
                above, same = above | (same & plane), same.but(plane)
        return self.full.but(self._any().but(above))

    def cpu(self) -> LevelNumbers:
        """The same numbers on the CPU."""
        return LevelNumbers([plane.to("cpu") for plane in self.planes], self.full.to("cpu"))

    def state(self, dtype: torch.dtype) -> Tensor:
        """One tensor that holds the numbers, which must be on the CPU.

        Returns:
            - For a small parameter: the numbers, of type `dtype` and of the parameter's shape.
            - For a large parameter: the planes, uint8, shape `(planes, bytes)`.
        """
        if not self.is_small:
            rows = torch.empty(len(self.planes), len(self.full.packed), dtype=torch.uint8)
            for row, plane in zip(rows, self.planes, strict=True):
                row.copy_(plane.packed)
            return rows
        numbers = torch.zeros(self.full.shape, dtype=torch.int16)
        for place, plane in enumerate(self.planes):
            numbers += plane.unpacked().to(torch.int16) << place
        return numbers.to(dtype)

    def _none(self) -> Bits:
        return Bits.filled(False, self.full.shape, self.full.device)

    def _any(self) -> Bits:
        """True where the number is not zero."""
        found = self._none()
        for plane in self.planes:
            found = found | plane
        return found


def _planes_of(numbers: Tensor) -> list[Bits]:
    highest = int(numbers.max()) if numbers.numel() else 0
    return [Bits.of((numbers & (1 << place)) != 0) for place in range(highest.bit_length())]
