"""The weights of a package of Core ML, read from its files."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_roulette.slim.export.coreml.extra import imported, quiet

_WEIGHTS = Path("Data/com.apple.CoreML")  # where names of files begin
_ENTRY = struct.Struct("<IIQQ")  # a mark, the type, the bytes, and where they are
_MARK = 0xDEADBEEF
_TYPES: dict[int, type[np.generic]] = {1: np.float16, 2: np.float32, 3: np.uint8}  # in the file of weights
_SUFFIX = "_sparsified"  # of names, by coremltools


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight of a package.

    Attributes:
        name: Its name in the package.
        values: The weight, with its zeros.
        form: "bitmap" if a bit mask and the other values are stored, else "dense".
        stored: Bytes of it in the file of weights.
    """

    name: str
    values: NDArray[Any]
    form: str
    stored: int


def weights_of(package: Path) -> dict[str, Stored]:
    """Return the weights that a package stores in its file of weights, by their names in it.

    Small tensors, which stand among the operations, are left out.

    Args:
        package: The folder.
    """
    with quiet():
        program = imported("coremltools").utils.load_spec(str(package)).mlProgram
    found = [one for function in program.functions.values() for one in _stored(function, package / _WEIGHTS)]
    return {one.name: one for one in found}


def bytes_of(package: Path) -> int:
    """Return the bytes of all files of a package."""
    return sum(one.stat().st_size for one in package.rglob("*") if one.is_file())


def _stored(function: Any, folder: Path) -> Iterator[Stored]:
    for operation in _operations(function.block_specializations[function.opset]):
        given = operation.attributes
        name = operation.outputs[0].name.removesuffix(_SUFFIX)
        shape = [one.constant.size for one in operation.outputs[0].type.tensorType.dimensions]
        if operation.type == "const" and given["val"].WhichOneof("value") == "blobFileValue":
            values = _read(given["val"], folder)
            yield Stored(name, values.reshape(shape), "dense", values.nbytes)
        if operation.type == "constexpr_sparse_to_dense":
            mask, kept = (_read(given[key], folder) for key in ("mask", "nonzero_data"))
            dense = _decoded(mask, kept, math.prod(shape))
            yield Stored(name, dense.reshape(shape), "bitmap", mask.nbytes + kept.nbytes)


def _operations(block: Any) -> Iterator[Any]:
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _operations(inner)


def _decoded(mask: NDArray[Any], kept: NDArray[Any], size: int) -> NDArray[Any]:
    """Return the weights of a bit mask, of which the lowest bit of a byte comes first."""
    dense = np.zeros(size, kept.dtype)
    dense[np.unpackbits(mask, count=size, bitorder="little").astype(bool)] = kept
    return dense


def _read(value: Any, folder: Path) -> NDArray[Any]:
    """Return a tensor that stands in the program or in the file of weights, as one row."""
    if value.WhichOneof("value") == "immediateValue":
        tensor, kind = value.immediateValue.tensor, value.type.tensorType.dataType
        held = getattr(tensor, tensor.WhichOneof("value")).values
        named = imported("coremltools.proto.MIL_pb2").DataType.Name(kind).lower()
        return np.frombuffer(held, named) if isinstance(held, bytes) else np.asarray(held, named)
    blob = value.blobFileValue
    with open(folder / blob.fileName.removeprefix("@model_path/"), "rb") as file:
        file.seek(blob.offset)
        mark, kind, size, start = _ENTRY.unpack(file.read(_ENTRY.size))
        if mark != _MARK or kind not in _TYPES:
            raise ValueError(f"{blob.fileName} has no tensor of a known type at byte {blob.offset:,}.")
        file.seek(start)
        return np.frombuffer(file.read(size), _TYPES[kind])
