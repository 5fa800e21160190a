"""Compressed files as bytes: a mark, the header, the sections and a checksum; and writing them whole or not at all."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import IO

from lightning_roulette.slim.files.header import LARGEST_HEADER, Damaged, Header

MARK = b"\x89LRW\r\n\x1a\n"  # not text, and changed by transfers that change ends of lines, as PNG's
_LENGTH = struct.Struct("<I")
_CHECKSUM = 8
_START = len(MARK) + _LENGTH.size
# A bit that is almost certain takes log2(1 / (1 - 2^-12)) bits, so so many entries fit into a byte
_ENTRIES_IN_A_BYTE = 24_000
_FREE_ENTRIES = 100_000


def packed(header: Header, sections: Sequence[bytes]) -> bytes:
    """A file of a header and its sections."""
    text = header.written()
    if len(text) > LARGEST_HEADER:
        raise ValueError(f"the header takes {len(text):,} bytes, but at most {LARGEST_HEADER:,} are allowed.")
    content = b"".join([MARK, _LENGTH.pack(len(text)), text, *sections])
    return content + _checksum(content)


def unpacked(content: bytes) -> tuple[Header, list[bytes]]:
    """The header and the sections of a file.

    Raises:
        Damaged: If it is not whole.
    """
    if not content.startswith(MARK):
        raise Damaged("it does not begin as a file of save_compressed does")
    if len(content) < _START + _CHECKSUM:
        raise Damaged("it is too short")
    body = content[:-_CHECKSUM]
    if _checksum(body) != content[-_CHECKSUM:]:
        raise Damaged("its checksum is wrong: it was altered, or is not complete")
    end = _START + _LENGTH.unpack_from(body, len(MARK))[0]
    if end > min(len(body), _START + LARGEST_HEADER):
        raise Damaged("its header is longer than the file")
    header = Header.read(body[_START:end])
    if end + sum(header.sections) != len(body):
        raise Damaged("its sections are not as long as its header says")
    _check_sizes(header)
    sections = []
    for size in header.sections:
        sections.append(body[end : end + size])
        end += size
    return header, sections


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as a compressed one does."""
    with open(path, "rb") as file:
        return file.read(len(MARK)) == MARK


def write_whole(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> int:
    """Write a file beside its place, and then move it there. So the file is complete, or as it was before.

    Args:
        path: Where the file shall be.
        write: Writes to an open file.

    Returns:
        Its size in bytes.

    Raises:
        OSError: If it cannot be written.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path is {str(target)!r}, but its folder does not exist. Create it first.")
    if target.is_dir():
        raise IsADirectoryError(f"path is {str(target)!r}, which is a folder, but must be a file.")
    handle, unfinished = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.chmod(unfinished, _permissions(target))
        os.replace(unfinished, target)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    return size


def _permissions(target: Path) -> int:
    """The permissions of the file that is replaced, or those of a new file."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _checksum(content: bytes) -> bytes:
    return blake2b(content, digest_size=_CHECKSUM).digest()


def _check_sizes(header: Header) -> None:
    """Check that the tensors can be in the sections, before memory is taken for them."""
    entries = sum(one.size for one in header.entries)
    most = _ENTRIES_IN_A_BYTE * sum(header.sections) + _FREE_ENTRIES
    if entries > most:
        raise Damaged(f"its header promises {entries:,} numbers, but {sum(header.sections):,} bytes cannot hold them")
