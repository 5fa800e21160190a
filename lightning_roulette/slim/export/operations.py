"""A network as a list of operations, without a framework.

Shapes have no batch dimension. Images are `(channels, height, width)` and vectors `(features,)`, as in PyTorch. A
format with another layout permutes weights, and the columns of a `Linear` that follows a `Reshape`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

Activation = Literal["none", "relu", "relu6"]
"""What is applied to each output: nothing, `max(x, 0)`, or `min(max(x, 0), 6)`."""

Final = Literal["softmax", "log_softmax", "sigmoid"]
"""A function of the network's output that a program leaves to its user. It does not change which output is largest."""

Pair = tuple[int, int]
"""Height and width."""

Padding = tuple[int, int, int, int]
"""Rows above and below, columns on the left and on the right."""


@dataclass(frozen=True)
class Value:
    """A tensor that is computed: its name, unique in the program, and its shape without the batch."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Linear:
    """`activation(weight @ input + bias)`.

    Attributes:
        input: Shape `(inputs,)`.
        output: Shape `(outputs,)`.
        name: Name of the weight in the state dict of the network.
        weight: Shape `(outputs, inputs)`, float32.
        bias: Shape `(outputs,)`, float32. Zeros where the network has none.
        activation: Applied last.
    """

    input: Value
    output: Value
    name: str
    weight: Tensor
    bias: Tensor
    activation: Activation = "none"


@dataclass(frozen=True, eq=False)
class Conv2d:
    """A convolution with zero padding, as `torch.nn.functional.conv2d`, and an activation.

    It is depthwise if `groups` is the number of input channels.

    Attributes:
        input: Shape `(channels, height, width)`.
        output: Likewise.
        name: Name of the weight in the state dict of the network.
        weight: Shape `(output channels, input channels / groups, kernel height, kernel width)`, float32.
        bias: Shape `(output channels,)`, float32. Zeros where the network has none.
        stride: Step between windows.
        padding: Zeros around the input. The two sides may differ.
        dilation: Step between the inputs of a window.
        groups: Number of groups of channels.
        activation: Applied last.
    """

    input: Value
    output: Value
    name: str
    weight: Tensor
    bias: Tensor
    stride: Pair = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    activation: Activation = "none"

    @property
    def kernel(self) -> Pair:
        """Height and width of a window."""
        return (self.weight.shape[2], self.weight.shape[3])

    @property
    def depthwise(self) -> bool:
        """Whether each output channel has one input channel."""
        return self.groups == self.input.shape[0]


@dataclass(frozen=True)
class Pool2d:
    """The largest or the mean input of each window. Padding never counts: it neither is the largest nor in the mean.

    A mean over the whole image has a kernel of the image's size.
    """

    input: Value
    output: Value
    kind: Literal["max", "mean"]
    kernel: Pair
    stride: Pair
    padding: Padding = (0, 0, 0, 0)
    dilation: Pair = (1, 1)


@dataclass(frozen=True)
class Add:
    """`activation(first + second)`, of two values of one shape."""

    first: Value
    second: Value
    output: Value
    activation: Activation = "none"


@dataclass(frozen=True)
class Pad:
    """Zeros around each channel of an image."""

    input: Value
    output: Value
    padding: Padding


@dataclass(frozen=True)
class Reshape:
    """The same elements in the same order, as PyTorch stores them, in another shape."""

    input: Value
    output: Value


@dataclass(frozen=True)
class Activate:
    """An activation alone: one that follows no `Linear`, `Conv2d` or `Add`, or whose input is used elsewhere too."""

    input: Value
    output: Value
    activation: Activation


Weighted: TypeAlias = Linear | Conv2d
Operation: TypeAlias = Linear | Conv2d | Pool2d | Add | Pad | Reshape | Activate


@dataclass(frozen=True, eq=False)
class Program:
    """Operations in an order in which they can run, with one input and one output.

    Attributes:
        input: What the program is given.
        operations: Each uses the input or outputs of operations before it.
        output: What the program returns.
        final: What the network applies to its output beyond this program. None: the outputs are equal.
    """

    input: Value
    operations: tuple[Operation, ...]
    output: Value
    final: Final | None = None

    @property
    def values(self) -> dict[str, Value]:
        """The input and all outputs of operations, by name."""
        return {self.input.name: self.input} | {one.output.name: one.output for one in self.operations}


def inputs_of(operation: Operation) -> tuple[Value, ...]:
    """Return what an operation uses, weights aside."""
    return (operation.first, operation.second) if isinstance(operation, Add) else (operation.input,)
