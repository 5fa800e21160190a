"""Bool tensors at a bit an entry, and large tensors a part at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_roulette.large.limits import limits

# Eight bools seen as one int64: a product brings their bits together in its topmost byte, or a byte's bits apart.
_TOGETHER, _APART = 0x0102040810204080, 0x8040201008040201 - 2**64
if sys.byteorder == "big":
    _TOGETHER, _APART = _APART, _TOGETHER
_EIGHT_TIMES = 0x0101010101010101


class Bits:
    """A bool tensor that nobody looks at just now, packed.

    Args:
        packed: uint8, flat: entry `i` of the flattened tensor is bit `i % 8` of byte `i // 8`, the lowest being bit 0;
            what is left of the last byte is zero.
        shape: Of the tensor.
    """

    def __init__(self, packed: Tensor, shape: torch.Size) -> None:
        self.packed, self.shape = packed, shape

    @classmethod
    def of(cls, tensor: Tensor) -> Bits:
        """A bool tensor, packed."""
        found = cls.empty(tensor.shape, tensor.device)
        for start, stop in found.blocks():
            found.write(start, flat_part(tensor, start, stop))
        return found

    @classmethod
    def empty(cls, shape: torch.Size, device: torch.device) -> Bits:
        """Of that shape, with nothing written yet."""
        return cls(torch.empty(-(-shape.numel() // 8), dtype=torch.uint8, device=device), shape)

    @classmethod
    def filled(cls, value: bool, shape: torch.Size, device: torch.device) -> Bits:
        """Every entry of one value: as a rule in a single byte."""
        size = shape.numel()
        packed = torch.full((1,), 255 if value else 0, dtype=torch.uint8, device=device).expand(-(-size // 8))
        if value and size % 8:
            packed = packed.clone()
            packed[-1] = (1 << size % 8) - 1
        return cls(packed, shape)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.packed.device

    def numel(self) -> int:
        """How many entries there are."""
        return self.shape.numel()

    def count(self, start: int = 0, stop: int | None = None) -> int:
        """How many are True, from one that is a multiple of 8 to another, or to the last."""
        total = 0
        last = None if stop is None else -(-stop // 8)
        for part in self.packed[start // 8 : last].split(
            limits().packed_entries
        ):  # neighbouring bits are added, then pairs, then fours
            pairs = part - ((part >> 1) & 0x55)
            fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
            total += int(((fours + (fours >> 4)) & 0x0F).sum(dtype=torch.int64))
        return total

    def blocks(self, size: int | None = None) -> Iterator[tuple[int, int]]:
        """Start and end of each stretch of `size` entries, a multiple of 8; by default `limits().packed_entries`."""
        size = limits().packed_entries if size is None else size
        return ((start, min(start + size, self.numel())) for start in range(0, self.numel(), size))

    def part(self, start: int, stop: int) -> Tensor:
        """Entries of the flattened tensor, bool."""
        first, last = start // 8, -(-stop // 8)
        spread = torch.empty(last - first, dtype=torch.int64, device=self.device).copy_(self.packed[first:last])
        spread.mul_(_EIGHT_TIMES).bitwise_and_(_APART)
        return spread.view(torch.uint8)[start - 8 * first : stop - 8 * first] != 0

    def write(self, start: int, values: Tensor) -> None:
        """Set flat entries from `start` on, which is a multiple of 8 as is their number, unless they are the last."""
        if len(values) % 8 or values.storage_offset() % 8:
            values = _padded(values, 0)
        bytes_of = _bytes_of(values)
        self.packed[start // 8 : start // 8 + len(bytes_of)] = bytes_of

    def put(self, start: int, values: Tensor) -> None:
        """Set flat entries, all of which are False, from any one on."""
        bytes_of = _bytes_of(_padded(values, start % 8))
        self.packed[start // 8 : start // 8 + len(bytes_of)] |= bytes_of

    def clear(self, places: Tensor) -> None:
        """Set flat entries, all of which are True and each named once, to False."""
        self.packed.index_add_(0, places >> 3, (-(1 << (places & 7))).to(torch.uint8))

    def unpacked(self) -> Tensor:
        """The bool tensor."""
        whole = torch.empty(self.numel(), dtype=torch.bool, device=self.device)
        for start, stop in self.blocks():
            whole[start:stop] = self.part(start, stop)
        return whole.view(self.shape)

    def to(self, device: torch.device | str) -> Bits:
        """The same on a device."""
        return Bits(self.packed.to(device), self.shape)

    def __and__(self, other: Bits) -> Bits:
        return Bits(self.packed & other.packed, self.shape)

    def __or__(self, other: Bits) -> Bits:
        return Bits(self.packed | other.packed, self.shape)

    def but(self, other: Bits) -> Bits:
        """True where this is and the other is not."""
        return Bits(self.packed & ~other.packed, self.shape)

    def equals(self, other: Bits) -> bool:
        """Whether shape and all entries are the same."""
        return self.shape == other.shape and torch.equal(self.packed, other.packed)


def _padded(values: Tensor, lead: int) -> Tensor:
    """Bools after so many False, and before so many that their number is a multiple of 8."""
    padded = values.new_zeros(-(-(lead + len(values)) // 8) * 8)
    padded[lead : lead + len(values)] = values
    return padded


def _bytes_of(values: Tensor) -> Tensor:
    return (values.view(torch.int64) * _TOGETHER).bitwise_right_shift_(56).to(torch.uint8)


def flat_part(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Entries of the flattened tensor; of one in another memory format only the rows that they lie in are copied."""
    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop]
    row = tensor[0].numel()
    first = start // row
    return tensor[first : -(-stop // row)].reshape(-1)[start - first * row : stop - first * row]
