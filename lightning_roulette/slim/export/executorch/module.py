"""A program as a module of PyTorch, in the functions that XNNPACK has kernels for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_roulette.slim.export.operations import (
    Activate,
    Activation,
    Add,
    Conv2d,
    Linear,
    Operation,
    Pad,
    Padding,
    Pool2d,
    Program,
    inputs_of,
)


class ProgramModule(nn.Module):
    """Computes what a program computes, `program.final` left out.

    Args:
        program: The program. Its weights and biases are the buffers of the module.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        for number, one in enumerate(program.operations):
            if isinstance(one, Linear | Conv2d):
                self.register_buffer(f"weight{number}", one.weight.clone())
                self.register_buffer(f"bias{number}", one.bias.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """The output for inputs of shape `(n, *program.input.shape)`."""
        values = {self.program.input.name: inputs}
        for number, one in enumerate(self.program.operations):
            used = [values[value.name] for value in inputs_of(one)]
            values[one.output.name] = self._computed(number, one, used)
        return values[self.program.output.name]

    def _computed(self, number: int, one: Operation, used: list[Tensor]) -> Tensor:
        if isinstance(one, Linear | Conv2d):
            weight, bias = self.get_buffer(f"weight{number}"), self.get_buffer(f"bias{number}")
            return _activated(_weighted(one, used[0], weight, bias), one.activation)
        if isinstance(one, Pool2d):
            return _pooled(one, used[0])
        if isinstance(one, Add):
            return _activated(used[0] + used[1], one.activation)
        if isinstance(one, Pad):
            return _around(used[0], one.padding, 0.0)
        if isinstance(one, Activate):
            return _activated(used[0], one.activation)
        return used[0].reshape(len(used[0]), *one.output.shape)


def _weighted(one: Linear | Conv2d, values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if isinstance(one, Linear):
        return F.linear(values, weight, bias)
    values, padding = _symmetric(values, one.padding, 0.0)
    return F.conv2d(values, weight, bias, one.stride, padding, one.dilation, one.groups)


def _pooled(one: Pool2d, image: Tensor) -> Tensor:
    if one.kind == "max":
        filled = _around(image, one.padding, -torch.inf)
        return F.max_pool2d(filled, one.kernel, one.stride, 0, one.dilation)
    if one.kernel == tuple(image.shape[2:]):
        return image.mean((2, 3), keepdim=True)
    sums = F.avg_pool2d(_around(image, one.padding, 0.0), one.kernel, one.stride)
    if one.padding == (0, 0, 0, 0):
        return sums
    return sums / F.avg_pool2d(_around(torch.ones_like(image[:1]), one.padding, 0.0), one.kernel, one.stride)


def _symmetric(image: Tensor, padding: Padding, filling: float) -> tuple[Tensor, tuple[int, int]]:
    """The image and the padding that is left for a convolution, which pads both sides alike."""
    above, below, left, right = padding
    if above == below and left == right:
        return image, (above, left)
    return _around(image, padding, filling), (0, 0)


def _around(image: Tensor, padding: Padding, filling: float) -> Tensor:
    above, below, left, right = padding
    return image if padding == (0, 0, 0, 0) else F.pad(image, (left, right, above, below), value=filling)


def _activated(values: Tensor, activation: Activation) -> Tensor:
    if activation == "none":
        return values
    return F.relu(values) if activation == "relu" else F.relu6(values)
