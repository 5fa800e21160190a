"""Bool tensors of a mask, plain or packed at one bit an entry, with the same operations."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

from lightning_roulette.large.devices import device_for_bits
from lightning_roulette.large.limits import limits

# Eight bools viewed as one int64. A product with the first number moves their bits into its highest byte. A product
# with `_EIGHT_TIMES` and a bitwise and with the second number move the bits of a byte apart.
_TOGETHER, _APART = 0x0102040810204080, 0x8040201008040201 - 2**64
if sys.byteorder == "big":
    _TOGETHER, _APART = _APART, _TOGETHER
_EIGHT_TIMES = 0x0101010101010101


class Flags:
    """A bool tensor of a mask, stored unpacked. The subclass `Bits` stores it packed and has the same operations.

    Args:
        tensor: The bool tensor, not copied.

    Attributes:
        shape: Shape of the bool tensor.
    """

    shape: torch.Size

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self.shape = tensor, tensor.shape

    @property
    def stored(self) -> Tensor | Bits:
        """The bool tensor, or the `Bits` if it is packed."""
        return self._tensor

    @property
    def device(self) -> torch.device:
        """The device of the entries."""
        return self._tensor.device

    @property
    def nbytes(self) -> int:
        """Memory of the entries in bytes."""
        return self._tensor.nbytes

    def numel(self) -> int:
        """Number of entries."""
        return self.shape.numel()

    def count(self) -> int:
        """Number of True entries."""
        return int(self._tensor.count_nonzero())

    def part(self, start: int, stop: int) -> Tensor:
        """Entries `start` to `stop` of the flattened tensor, bool; a view where it is plain and contiguous."""
        return flat_part(self._tensor, start, stop)

    def span(self, start: int, stop: int) -> Flags:
        """Entries `start` to `stop` of the flattened tensor, packed if this is packed."""
        return Flags(self.part(start, stop))

    def unpacked(self) -> Tensor:
        """The bool tensor."""
        return self._tensor

    def bits(self) -> Bits:
        """The same entries, packed."""
        return Bits.of(self._tensor)

    def to(self, device: torch.device | str) -> Flags:
        """The same entries on another device."""
        return Flags(self._tensor.to(device))

    def equals(self, other: Flags) -> bool:
        """Whether shape and all entries are equal."""
        return torch.equal(self.unpacked(), other.unpacked())

    def within(self, other: Flags) -> bool:
        """Whether every entry that is True here is True in `other`."""
        return bool((~self.unpacked() | other.unpacked()).all())

    def digested(self) -> Any:
        """Bytes to hash. Equal entries give equal bytes if both are plain or both are packed."""
        return numpy.packbits(self._tensor.cpu().numpy()).data


class Bits(Flags):
    """A bool tensor, packed at one bit an entry.

    Args:
        packed: Flat, uint8. Entry `i` of the flattened bool tensor is bit `i % 8` of byte `i // 8`, where bit 0 is the
            lowest. Unused bits of the last byte are zero.
        shape: Shape of the bool tensor.
    """

    def __init__(self, packed: Tensor, shape: torch.Size) -> None:
        self.packed, self.shape = packed, shape

    @classmethod
    def of(cls, tensor: Tensor) -> Bits:
        """Pack a bool tensor."""
        found = cls.empty(tensor.shape, tensor.device)
        for start, stop in found.blocks():
            found.write(start, flat_part(tensor, start, stop))
        return found

    @classmethod
    def empty(cls, shape: torch.Size, device: torch.device) -> Bits:
        """Bits with entries that are not set yet."""
        return cls(torch.empty(-(-shape.numel() // 8), dtype=torch.uint8, device=device), shape)

    @classmethod
    def filled(cls, value: bool, shape: torch.Size, device: torch.device) -> Bits:
        """Bits in which every entry is `value`. They usually share one byte of memory."""
        size = shape.numel()
        packed = torch.full((1,), 255 if value else 0, dtype=torch.uint8, device=device).expand(-(-size // 8))
        if value and size % 8:
            packed = packed.clone()
            packed[-1] = (1 << size % 8) - 1
        return cls(packed, shape)

    @property
    def stored(self) -> Tensor | Bits:
        """These bits."""
        return self

    @property
    def device(self) -> torch.device:
        """The device of the entries."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Memory of the entries in bytes."""
        return self.packed.nbytes

    def count(self, start: int = 0, stop: int | None = None) -> int:
        """Number of True entries between two flat indices.

        Args:
            start: First index, a multiple of 8.
            stop: Index after the last, a multiple of 8; None: all entries from `start` on.
        """
        total = 0
        last = None if stop is None else -(-stop // 8)
        for part in self.packed[start // 8 : last].split(limits().packed_entries):
            # adds neighbouring bits, then pairs, then groups of four
            pairs = part - ((part >> 1) & 0x55)
            fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
            total += int(((fours + (fours >> 4)) & 0x0F).sum(dtype=torch.int64))
        return total

    def blocks(self, size: int | None = None) -> Iterator[tuple[int, int]]:
        """Start and end of consecutive blocks of flat entries.

        Args:
            size: Entries of a block, a multiple of 8; None: `limits().packed_entries`.
        """
        size = limits().packed_entries if size is None else size
        return ((start, min(start + size, self.numel())) for start in range(0, self.numel(), size))

    def part(self, start: int, stop: int) -> Tensor:
        """Entries `start` to `stop` of the flattened tensor, bool, a new tensor."""
        first, last = start // 8, -(-stop // 8)
        spread = torch.empty(last - first, dtype=torch.int64, device=self.device).copy_(self.packed[first:last])
        spread.mul_(_EIGHT_TIMES).bitwise_and_(_APART)
        return spread.view(torch.uint8)[start - 8 * first : stop - 8 * first] != 0

    def write(self, start: int, values: Tensor) -> None:
        """Set flat entries.

        Args:
            start: First index, a multiple of 8.
            values: Flat, bool. Their number is a multiple of 8, unless they are the last entries.
        """
        if len(values) % 8 or values.storage_offset() % 8:
            values = _padded(values, 0)
        bytes_of = _bytes_of(values)
        self.packed[start // 8 : start // 8 + len(bytes_of)] = bytes_of

    def put(self, start: int, values: Tensor) -> None:
        """Set flat entries from any index `start` on. All of them must be False before."""
        bytes_of = _bytes_of(_padded(values, start % 8))
        self.packed[start // 8 : start // 8 + len(bytes_of)] |= bytes_of

    def clear(self, places: Tensor) -> None:
        """Set the entries at distinct flat indices to False. All of them must be True before."""
        self.packed.index_add_(0, places >> 3, (-(1 << (places & 7))).to(torch.uint8))

    def unpacked(self) -> Tensor:
        """The bool tensor."""
        whole = torch.empty(self.numel(), dtype=torch.bool, device=self.device)
        for start, stop in self.blocks():
            whole[start:stop] = self.part(start, stop)
        return whole.view(self.shape)

    def bits(self) -> Bits:
        """These bits."""
        return self

    def to(self, device: torch.device | str) -> Bits:
        """The same entries on another device."""
        return Bits(self.packed.to(device), self.shape)

    def span(self, start: int, stop: int) -> Bits:
        """Entries `start` to `stop` of the flattened tensor, packed."""
        found = Bits.empty(torch.Size([stop - start]), self.device)
        for begin, end in found.blocks():
            found.write(begin, self.part(start + begin, start + end))
        return found

    def __and__(self, other: Bits) -> Bits:
        return Bits(self.packed & other.packed, self.shape)

    def __or__(self, other: Bits) -> Bits:
        return Bits(self.packed | other.packed, self.shape)

    def but(self, other: Bits) -> Bits:
        """True where this is True and `other` is False."""
        return Bits(self.packed & ~other.packed, self.shape)

    def equals(self, other: Flags) -> bool:
        """Whether shape and all entries are equal."""
        if not isinstance(other, Bits):
            return super().equals(other)
        return self.shape == other.shape and torch.equal(self.packed, other.packed)

    def within(self, other: Flags) -> bool:
        """Whether every entry that is True here is True in `other`."""
        return not bool(self.but(other).packed.any()) if isinstance(other, Bits) else super().within(other)

    def digested(self) -> Any:
        """Bytes to hash. Equal packed entries give equal bytes."""
        return self.packed.cpu().contiguous().numpy().data


def as_stored(kept: Tensor | Bits) -> Flags:
    """A bool tensor or bits as `Flags`."""
    return kept if isinstance(kept, Bits) else Flags(kept)


def is_small(tensor: Tensor | Flags) -> bool:
    """Whether a bool tensor of this size is stored plain."""
    return tensor.numel() <= limits().unpacked_entries


def packed_if_large(kept: Flags) -> Flags:
    """The same entries, stored plain if there are at most `limits().unpacked_entries` of them, else packed."""
    if is_small(kept):
        return Flags(kept.unpacked())
    return kept.to(device_for_bits(kept)).bits()


def _padded(values: Tensor, lead: int) -> Tensor:
    """Bools with `lead` times False before them, and with False after them up to a multiple of 8."""
    padded = values.new_zeros(-(-(lead + len(values)) // 8) * 8)
    padded[lead : lead + len(values)] = values
    return padded


def _bytes_of(values: Tensor) -> Tensor:
    return (values.view(torch.int64) * _TOGETHER).bitwise_right_shift_(56).to(torch.uint8)


def flat_part(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Entries `start` to `stop` of the flattened tensor.

    The result is a view if the tensor is contiguous. Otherwise only the rows that hold these entries are copied.
    """
    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop]
    row = tensor[0].numel()
    first = start // row
    return tensor[first : -(-stop // row)].reshape(-1)[start - first * row : stop - first * row]
