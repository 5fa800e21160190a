"""What a file of weights holds, as a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_roulette.report.columns import in_columns
from lightning_roulette.slim.files.compressed import read_compressed
from lightning_roulette.slim.files.container import is_compressed
from lightning_roulette.slim.files.weights import read_weights


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: Its name.
        shape: Its shape.
        dtype: Its type, such as `float32`.
        weights: The number of its entries.
        survivors: Those that are stored in a compressed file; those that are not zero in another file.
        bytes: What it takes in the file. Bits of a compressed file are shared with other tensors, so it is no whole
            number.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    weights: int
    survivors: int
    bytes: float

    @property
    def is_layer(self) -> bool:
        """Whether it has at least two dimensions."""
        return len(self.shape) > 1


@dataclass(frozen=True)
class FileContents:
    """What a file of weights holds. As a string it is a table.

    Attributes:
        path: The file.
        kind: What kind of file it is, in words.
        tensors: Its tensors, in their order. Tied weights take bytes under their first name only.
        bytes: The size of the file.
    """

    path: str
    kind: str
    tensors: tuple[StoredTensor, ...]
    bytes: int

    def __str__(self) -> str:
        layers = [one for one in self.tensors if one.is_layer]
        others = [one for one in self.tensors if not one.is_layer]
        rows = [_row(one.name, "x".join(map(str, one.shape)), [one]) for one in layers]
        rows.append(_row(f"{len(others)} vectors and numbers", "", others))
        rest = self.bytes - sum(one.bytes for one in self.tensors)
        rows.append(["header and all else", "", "", "", "", "", f"{rest:,.0f}"])
        whole = _row("file", "", self.tensors)
        whole[-1] = f"{self.bytes:,}"
        heads = ["tensor", "shape", "weights", "survivors", "kept", "bits per survivor", "bytes"]
        columns = in_columns([heads, *rows, whole], left=(0, 1))
        return "\n".join([f"{self.path}: {self.kind}", "", *columns])


def inspect(path: str | os.PathLike[str]) -> FileContents:
    """What a file of weights holds: shapes, survivors and bytes of each tensor.

    Args:
        path: A file of `save_compressed` or `save_weights`, a checkpoint of Lightning, a state dict of `torch.save`, or
            a file of safetensors. No code of the file is run.

    Returns:
        Shape, survivors, bits per survivor and bytes of each tensor, and the bytes of the file. `print` shows them as a
        table.

    Raises:
        ImportError: If the package that reads the file is not installed.
        ValueError: If the file is damaged or of another kind, or if a tensor is sparse or quantised.
        OSError: If there is no such file.
    """
    name = os.fspath(path)
    if is_compressed(path):
        found = read_compressed(path)
        counts = {key: int(one.sum()) for key, one in found.kept.items()}
        tensors = [
            _stored(key, one, counts.get(key, one.numel()), found.spent[key] / 8) for key, one in found.state.items()
        ]
        return FileContents(name, f"compressed file, values {found.values}", tuple(tensors), found.size)
    state = {key: one for key, one in read_weights(path).items() if isinstance(one, Tensor)}
    places: set[tuple[int, int]] = set()
    tensors = []
    for key, one in state.items():
        count = _survivors(key, one)
        place = (one.data_ptr(), one.numel())
        size = 0 if place in places and one.numel() else one.numel() * one.itemsize
        places.add(place)
        tensors.append(_stored(key, one, count, size))
    kind = "file of safetensors" if Path(path).suffix == ".safetensors" else "file of torch"
    return FileContents(name, kind, tuple(tensors), Path(path).stat().st_size)


def _survivors(name: str, tensor: Tensor) -> int:
    """Return the number of entries that are not zero."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "is quantised" if tensor.is_quantized else f"has the layout {tensor.layout}"
        raise ValueError(f"{name} {kind}, but must be a dense tensor. Convert it before it is saved.")
    return int((tensor != 0).sum())  # torch.count_nonzero does not know all types, such as float8 and uint16


def _stored(name: str, tensor: Tensor, survivors: int, size: float) -> StoredTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return StoredTensor(name, tuple(tensor.shape), dtype, tensor.numel(), survivors, size)


def _row(name: str, shape: str, tensors: Sequence[StoredTensor]) -> list[str]:
    weights, survivors = sum(one.weights for one in tensors), sum(one.survivors for one in tensors)
    size = sum(one.bytes for one in tensors)
    share = f"{survivors / weights:.2%}" if weights else ""
    bits = f"{8 * size / survivors:.2f}" if survivors else ""
    return [name, shape, f"{weights:,}", f"{survivors:,}", share, bits, f"{size:,.0f}"]
