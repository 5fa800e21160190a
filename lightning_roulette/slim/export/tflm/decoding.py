"""Pruned tensors stored as a bitmap and the values that are not zero, which the runtime's operator DECODE expands.

The encoding is that of TensorFlow Lite Micro's DECODE operator, type prune (`decode_state_prune.cc`, version 1): a
tensor with a bit for each value in row order, the most significant bit of a byte first, 1 where the value is not zero,
and a second tensor with a header of 16 bytes followed by these values.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_roulette.slim.export.tflm.model import Model, Operator, StoredTensor

CODE = "TFLM_DECODE"
DECODED = ":decoded"  # added to the name of a tensor
PRUNE = 2
VERSION = 1  # of the header, and of the encoding within it
HEADER = bytes([PRUNE, VERSION, 0, 0, VERSION, *[0] * 11])
COST = 200  # about how many bytes of the file describe one more operator and its two more tensors
PART_COST = 500  # likewise one more part of a layer


def encoded(values: NDArray[np.int8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The bitmap of `values`, and the header followed by the values that are not zero.

    Returns:
        Shapes `(ceil(n / 8),)` and `(16 + count of values that are not zero,)` for `n` values.
    """
    flat = values.reshape(-1)
    kept = flat != 0
    table = np.frombuffer(HEADER + flat[kept].tobytes(), np.uint8)
    return np.packbits(kept), table


def encoded_size(values: NDArray[Any]) -> int:
    """How many bytes of the file the encoded values take, their operator included."""
    return -(-values.size // 8) + len(HEADER) + int(np.count_nonzero(values)) + COST


def gets_smaller(tensor: StoredTensor, parts: int = 1) -> bool:
    """Whether the tensor is a constant of int8 whose encoding, in so many parts, is smaller than its values."""
    if tensor.data is None or tensor.kind != "int8":
        return False
    return encoded_size(tensor.data) + (parts - 1) * PART_COST < tensor.size


def decoding(model: Model, names: Collection[str]) -> Model:
    """The model with the named constants encoded, and a DECODE before each operator that reads one."""
    operators = []
    added: dict[str, StoredTensor] = {}
    for one in model.operators:
        for name in [name for name in one.inputs if name in names]:
            tensors = _tensors(model.tensors[name])
            added.update({tensor.name: tensor for tensor in tensors})
            operators.append(Operator(CODE, (tensors[0].name, tensors[1].name), (tensors[2].name,)))
        operators.append(replace(one, inputs=tuple(_decoded(name) if name in names else name for name in one.inputs)))
    return model.with_operators(operators, list(added.values()))


def _decoded(name: str) -> str:
    return name + DECODED


def _tensors(tensor: StoredTensor) -> tuple[StoredTensor, StoredTensor, StoredTensor]:
    """The bitmap, the values, and the tensor that DECODE writes."""
    assert tensor.data is not None
    bitmap, table = encoded(tensor.data)
    return (
        StoredTensor(f"{tensor.name}:bitmap", bitmap.shape, "uint8", bitmap),
        StoredTensor(f"{tensor.name}:values", table.shape, "uint8", table),
        replace(tensor, name=_decoded(tensor.name), data=None),
    )
