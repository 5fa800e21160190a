"""Windows over an image: padding as TensorFlow's SAME where it is that, and an operator that pads where it is not."""

from __future__ import annotations

import numpy as np

from lightning_roulette.slim.export.operations import Conv2d, Padding, Pool2d, Value
from lightning_roulette.slim.export.tflm.model import Operator, Scales, StoredTensor

SAME, VALID = 0, 1
LEAST = -128


def windowed(one: Conv2d | Pool2d, scales: Scales) -> tuple[str, list[Operator], list[StoredTensor], int]:
    """What a windowed operator reads, the operators and tensors before it, and its padding.

    Args:
        one: The operation.
        scales: Those of its input.
    """
    if is_plain(one.padding):
        return one.input.name, [], [], VALID
    if is_same(one):
        return one.input.name, [], [], SAME
    padded, operator, tensors = _padded(one, scales)
    return padded, [operator], tensors, VALID


def _padded(one: Conv2d | Pool2d, scales: Scales) -> tuple[str, Operator, list[StoredTensor]]:
    """The value with explicit padding: zeros for a convolution, the least integer for the largest of a window."""
    channels, height, width = one.input.shape
    above, below, left, right = one.padding
    name = f"{one.output.name}:padded"
    rows = paddings(f"{name}:rows", one.padding)
    padded = StoredTensor(name, (1, height + above + below, width + left + right, channels), scales=scales)
    if isinstance(one, Conv2d):
        return name, Operator("PAD", (one.input.name, rows.name), (name,), "Pad"), [rows, padded]
    least = StoredTensor(f"{name}:least", (1,), "int8", np.array([LEAST], np.int8), scales)
    return name, Operator("PADV2", (one.input.name, rows.name, least.name), (name,), "PadV2"), [rows, least, padded]


def is_plain(padding: Padding) -> bool:
    """Whether there is no padding."""
    return padding == (0, 0, 0, 0)


def is_same(one: Conv2d | Pool2d) -> bool:
    """Whether the padding is that of TensorFlow's SAME."""
    return _same(one.input, one.output, one.kernel, one.stride, one.dilation) == one.padding


def _same(
    value: Value, output: Value, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> Padding | None:
    """The padding of TensorFlow's SAME; None where it gives an output of another size."""
    sides: list[int] = []
    for axis in (0, 1):
        size, count = value.shape[1 + axis], output.shape[1 + axis]
        if count != -(-size // stride[axis]):
            return None
        total = max((count - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1 - size, 0)
        sides += [total // 2, total - total // 2]
    return (sides[0], sides[1], sides[2], sides[3])


def paddings(name: str, padding: Padding) -> StoredTensor:
    """The constant that the operators PAD read."""
    above, below, left, right = padding
    rows = np.array([[0, 0], [above, below], [left, right], [0, 0]], np.int32)
    return StoredTensor(name, rows.shape, "int32", rows)
