"""The order in which the tensors of a file are coded, and with which model."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lightning_roulette.slim.files.coder import Coder, Meter
from lightning_roulette.slim.files.floats import LAYOUTS, Bits, Numbers
from lightning_roulette.slim.files.header import Damaged, Entry
from lightning_roulette.slim.files.multiples import Multiples
from lightning_roulette.slim.files.narrowed import Survivors, rows_of
from lightning_roulette.slim.files.positions import Positions
from lightning_roulette.slim.files.symbols import Frequencies
from lightning_roulette.slim.files.tensors import bits_of, bytes_of, from_bits, from_bytes


@dataclass
class Content:
    """The models of a file, and what each tensor takes.

    Attributes:
        coder: Writes or reads.
        spent: Name to the bits that the tensor takes.
        survivors: Name to the number of weights that are stored, for tensors of at least two dimensions.
    """

    coder: Coder
    spent: dict[str, float] = field(default_factory=dict)
    survivors: dict[str, int] = field(default_factory=dict)
    _positions: Positions = field(default_factory=Positions)
    _multiples: Multiples = field(default_factory=Multiples)
    _zeros: Frequencies = field(default_factory=lambda: Frequencies(2))
    _numbers: dict[str, Numbers] = field(default_factory=dict)

    def matrix(self, entry: Entry, given: Survivors | None) -> Survivors:
        """Write or read a tensor of at least two dimensions."""
        before = self.coder.spent
        pruned = self.coder.number(None if given is None else int(given.count < entry.size), 2)
        if pruned:
            kept = self._positions.code(self.coder, None if given is None else given.kept, entry.shape)
        else:
            kept = np.ones(entry.shape, np.bool_)
        found = self._values(entry, kept, given)
        if entry.signed:
            zeros = None if given is None else given.negative
            negative = self._zeros.code(self.coder, zeros, entry.size - found.count)
            found = replace(found, negative=negative.astype(np.bool_))
        self.spent[entry.name], self.survivors[entry.name] = self.coder.spent - before, found.count
        return found

    def vectors(self, entries: Sequence[Entry], given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Write or read tensors of numbers that have one role, one after the other, as if they were one."""
        before, dtype = self.coder.spent, entries[0].dtype
        joined = None
        if given is not None:
            joined = np.concatenate([bits_of(given[one.name]).astype(np.uint64) for one in entries])
        ends = np.cumsum([one.size for one in entries])
        bits = self._of_type(dtype).code(self.coder, joined, int(ends[-1]))
        spent = self.coder.spent - before
        self.spent |= {one.name: spent * one.size / max(len(bits), 1) for one in entries}
        parts: list[Bits] = np.split(bits, ends[:-1])
        return {one.name: from_bits(part, one) for one, part in zip(entries, parts, strict=True)}

    def _values(self, entry: Entry, kept: npt.NDArray[np.bool_], given: Survivors | None) -> Survivors:
        count = int(np.count_nonzero(kept))
        if self.coder.number(None if given is None else int(self._are_multiples(entry, given)), 2) == 0:
            bits = self._of_type(entry.dtype).code(self.coder, None if given is None else given.bits, count)
            return Survivors(kept, bits)
        rows = int(rows_of(kept).any(1).sum())
        scales = self._multiples.scales(self.coder, None if given is None else given.scales, rows)
        multiples = self._multiples.code(self.coder, None if given is None else given.multiples, count)
        return Survivors(kept, multiples=multiples, scales=scales)

    def _are_multiples(self, entry: Entry, given: Survivors) -> bool:
        """Whether multiples are written: where there is nothing else, or where they take fewer bits."""
        if given.bits is None or given.multiples is None or given.scales is None:
            return given.bits is None
        plain, divided, model = Meter(), Meter(), deepcopy(self._multiples)
        deepcopy(self._of_type(entry.dtype)).code(plain, given.bits, given.count)
        model.scales(divided, given.scales, len(given.scales))
        model.code(divided, given.multiples, given.count)
        return divided.spent < plain.spent

    def _of_type(self, dtype: str) -> Numbers:
        return self._numbers.setdefault(dtype, Numbers(LAYOUTS[dtype]))


def by_role(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Yield the groups of tensors of numbers that are coded together."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for one in entries:
        if one.dtype in LAYOUTS and not one.is_matrix:
            groups.setdefault(one.role, []).append(one)
    yield from groups.values()


def others(entries: Sequence[Entry]) -> list[Entry]:
    """The tensors that are stored as they are, those of one type together."""
    return sorted((one for one in entries if one.dtype not in LAYOUTS), key=lambda one: one.dtype)


def deflated(entries: Sequence[Entry], state: Mapping[str, Tensor]) -> bytes:
    """The bytes of tensors that are stored as they are, made smaller."""
    return zlib.compress(b"".join(bytes_of(state[one.name]) for one in entries), 9) if entries else b""


def inflated(entries: Sequence[Entry], content: bytes) -> dict[str, Tensor]:
    """The tensors that are stored as they are.

    Raises:
        Damaged: If the bytes are not theirs.
    """
    if not entries:
        return {}
    size = sum(one.nbytes for one in entries)
    stream = zlib.decompressobj()
    plain = stream.decompress(content, size + 1)
    if len(plain) != size or not stream.eof:
        raise Damaged("its integers are not complete")
    ends = np.cumsum([0, *(one.nbytes for one in entries)]).tolist()
    return {one.name: from_bytes(plain[a:b], one) for one, a, b in zip(entries, ends, ends[1:], strict=False)}
