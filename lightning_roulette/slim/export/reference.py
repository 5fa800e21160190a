"""What a program computes, with PyTorch's functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_roulette.slim.export.operations import (
    Activate,
    Activation,
    Add,
    Conv2d,
    Final,
    Linear,
    Operation,
    Pad,
    Padding,
    Pool2d,
    Program,
    inputs_of,
)


def run(program: Program, inputs: Tensor) -> Tensor:
    """Return the output of a program.

    Args:
        program: The program.
        inputs: float32, shape `(n, *program.input.shape)`.

    Returns:
        float32, shape `(n, *program.output.shape)`. What `program.final` names is not applied.
    """
    return every_value(program, inputs)[program.output.name]


@torch.no_grad()
def every_value(program: Program, inputs: Tensor) -> dict[str, Tensor]:
    """Return the input and the outputs of all operations, by name."""
    values = {program.input.name: inputs}
    for operation in program.operations:
        used = [values[one.name] for one in inputs_of(operation)]
        values[operation.output.name] = _apply(operation, used)
    return values


def finish(outputs: Tensor, final: Final | None) -> Tensor:
    """Return what the network makes of the outputs of its program."""
    if final is None:
        return outputs
    return outputs.sigmoid() if final == "sigmoid" else getattr(outputs, final)(1)


def around(image: Tensor, padding: Padding, filling: float) -> Tensor:
    """Return images with a border of one value."""
    above, below, left, right = padding
    return F.pad(image, (left, right, above, below), value=filling)


def _apply(operation: Operation, inputs: list[Tensor]) -> Tensor:
    first = inputs[0]
    if isinstance(operation, Linear):
        return _activated(F.linear(first, operation.weight, operation.bias), operation.activation)
    if isinstance(operation, Conv2d):
        return _activated(_convolved(operation, first), operation.activation)
    if isinstance(operation, Add):
        return _activated(first + inputs[1], operation.activation)
    if isinstance(operation, Pool2d):
        return _pooled(operation, first)
    if isinstance(operation, Pad):
        return around(first, operation.padding, 0.0)
    if isinstance(operation, Activate):
        return _activated(first, operation.activation)
    return first.reshape(len(first), *operation.output.shape)


def _convolved(conv: Conv2d, image: Tensor) -> Tensor:
    padded = around(image, conv.padding, 0.0)
    return F.conv2d(padded, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


def _pooled(pool: Pool2d, image: Tensor) -> Tensor:
    if pool.kind == "max":
        return F.max_pool2d(around(image, pool.padding, -torch.inf), pool.kernel, pool.stride, 0, pool.dilation)
    counted = F.avg_pool2d(around(torch.ones_like(image[:1]), pool.padding, 0.0), pool.kernel, pool.stride)
    return F.avg_pool2d(around(image, pool.padding, 0.0), pool.kernel, pool.stride) / counted


def _activated(values: Tensor, activation: Activation) -> Tensor:
    if activation == "none":
        return values
    return values.relu() if activation == "relu" else F.relu6(values)
