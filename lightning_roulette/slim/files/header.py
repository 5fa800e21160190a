"""The readable header of a compressed file: which tensors it holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_roulette.slim.files.floats import LAYOUTS

FORMAT = 1
LARGEST_HEADER = 64 * 2**20  # bytes
_DIMENSIONS = 16
_DEEPEST = 64  # parts of a name
_SIGNED = "-"  # before the type of a tensor some of whose zeros are -0.0
_USUAL = "float32"  # the type of tensors for which the header names none
# bytes of one entry of the types that are stored as they are
OTHERS: Mapping[str, int] = {
    **dict.fromkeys(("bool", "int8", "uint8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("int16", "uint16"), 2),
    **dict.fromkeys(("int32", "uint32"), 4),
    **dict.fromkeys(("int64", "uint64", "complex64"), 8),
    "complex128": 16,
}


class Damaged(ValueError):
    """A file is no compressed file, or not as it was written; the message is the reason."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        name: Its name in the state dict.
        dtype: Its type, by torch's name.
        shape: Its shape.
        signed: Whether the signs of its zeros are stored, as some are -0.0.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    signed: bool = False

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.size * (LAYOUTS[self.dtype].width // 8 if self.dtype in LAYOUTS else OTHERS[self.dtype])

    @property
    def is_matrix(self) -> bool:
        """Whether it has at least two dimensions and floating-point numbers, so that it may be pruned."""
        return len(self.shape) > 1 and self.dtype in LAYOUTS

    @property
    def role(self) -> tuple[str, str]:
        """What tensors that are coded together have in common: the last part of the name, and the type."""
        return self.name.rpartition(".")[2], self.dtype


@dataclass(frozen=True)
class Header:
    """What a file holds.

    Attributes:
        values: How the survivors were stored, in words.
        entries: The tensors, in the order of the state dict.
        tied: Names that stand for the tensor of another name.
        names: All names, in the order of the state dict.
        sections: The bytes of each section that follows.
    """

    values: str
    entries: tuple[Entry, ...]
    tied: Mapping[str, str]
    names: tuple[str, ...]
    sections: tuple[int, ...]

    def written(self) -> bytes:
        """The header as JSON."""
        tensors: dict[str, Any] = {one.name: _plain(one) for one in self.entries}
        tensors |= self.tied
        plain = {
            "format": FORMAT,
            "values": self.values,
            "sections": self.sections,
            "tensors": nested({name: tensors[name] for name in self.names}),
        }
        return json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def read(cls, text: bytes) -> Header:
        """Read a header.

        Raises:
            Damaged: If it is not one that this version writes.
        """
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Damaged("its header is not JSON") from error
        if not isinstance(plain, dict) or plain.get("format") != FORMAT:
            found = plain.get("format") if isinstance(plain, dict) else None
            raise Damaged(f"its format is {found!r}, but this version reads format {FORMAT}")
        tensors, sections = plain.get("tensors"), plain.get("sections")
        if not isinstance(tensors, dict) or not isinstance(sections, list) or not all(map(_is_size, sections)):
            raise Damaged("its header lacks the tensors or the sections")
        tensors = flat(tensors)
        tied = {name: one for name, one in tensors.items() if isinstance(one, str)}
        entries = tuple(_entry(name, one) for name, one in tensors.items() if name not in tied)
        if not set(tied.values()) <= {one.name for one in entries}:
            raise Damaged("a tensor in its header is tied to one that is not there")
        return cls(str(plain.get("values")), entries, tied, tuple(tensors), tuple(sections))


def nested(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same mapping with the parts of the names in mappings of their own, so that none is repeated.

    Examples:
        >>> nested({"conv.weight": [3, 3], "conv.bias": [3]})
        {'conv': {'weight': [3, 3], 'bias': [3]}}
    """
    parts = {name: name.split(".") for name in tensors}
    outer = {".".join(one[:end]) for one in parts.values() for end in range(1, len(one))}
    if not outer.isdisjoint(tensors) or max(map(len, parts.values()), default=0) > _DEEPEST:
        return dict(tensors)
    found: dict[str, Any] = {}
    for name, one in tensors.items():
        inner = found
        for part in parts[name][:-1]:
            inner = inner.setdefault(part, {})
        inner[parts[name][-1]] = one
    return found


def flat(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping that `nested` changed, in the order in which the names are there.

    Examples:
        >>> flat({"conv": {"weight": [3, 3], "bias": [3]}})
        {'conv.weight': [3, 3], 'conv.bias': [3]}
    """
    found: dict[str, Any] = {}
    for name, one in tensors.items():
        inner = {"": one} if not isinstance(one, dict) else {f".{key}": each for key, each in flat(one).items()}
        found |= {f"{name}{key}": each for key, each in inner.items()}
    return found


def _plain(entry: Entry) -> list[Any]:
    if entry.signed:
        return [f"{_SIGNED}{entry.dtype}", *entry.shape]
    return [*entry.shape] if entry.dtype == _USUAL else [entry.dtype, *entry.shape]


def _entry(name: str, plain: Any) -> Entry:
    if not isinstance(plain, list):
        raise Damaged(f"the tensor {name!r} in its header has no shape")
    whole = plain if plain and isinstance(plain[0], str) else [_USUAL, *plain]
    dtype = whole[0].removeprefix(_SIGNED)
    signed = dtype != whole[0]
    known = (dtype in LAYOUTS and len(whole) > 2) if signed else dtype in LAYOUTS or dtype in OTHERS
    if not known or not all(map(_is_size, whole[1:])) or len(whole) > _DIMENSIONS + 1:
        raise Damaged(f"the tensor {name!r} in its header has no type and shape")
    return Entry(name, dtype, tuple(whole[1:]), signed)


def _is_size(one: Any) -> bool:
    return type(one) is int and 0 <= one < 2**48
