"""From a program in integers to the tensors and operators of a TensorFlow Lite file.

Images are channels last there. Weights are permuted here, once, and so are the columns of a Linear that reads a
flattened image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_roulette.slim.export.integers import IntegerProgram, Scale
from lightning_roulette.slim.export.operations import (
    Activate,
    Activation,
    Add,
    Conv2d,
    Linear,
    Operation,
    Pad,
    Pool2d,
    Reshape,
    Value,
    inputs_of,
)
from lightning_roulette.slim.export.tflm.model import Model, Operator, Scales, StoredTensor
from lightning_roulette.slim.export.tflm.windows import is_plain, is_same, paddings, windowed

ACTIVATIONS: dict[Activation, int] = {"none": 0, "relu": 1, "relu6": 3}
CHANNELS_LAST = (0, 2, 3, 1)
CHANNELS_FIRST = (0, 3, 1, 2)

Lowered = tuple[list[Operator], list[StoredTensor]]


@dataclass(frozen=True)
class Context:
    """The program, and which flattened images stay images: those that only Linear reads.

    Attributes:
        whole: The program in integers.
        images: By the name of such a flattened value, the image.
    """

    whole: IntegerProgram
    images: dict[str, Value]

    def source(self, value: Value) -> Value:
        """The value that an operator reads in place of `value`."""
        return self.images.get(value.name, value)

    def tensor(self, value: Value) -> StoredTensor:
        """The tensor of a computed value."""
        return StoredTensor(value.name, stored_shape(value), scales=self.scales(value))

    def scales(self, value: Value) -> Scales:
        """The scale of a computed value."""
        return _scales(self.whole.scales[value.name])


def stored_shape(value: Value) -> tuple[int, ...]:
    """The shape in the file: a batch of one, and channels last."""
    if len(value.shape) == 3:
        channels, height, width = value.shape
        return (1, height, width, channels)
    return (1, *value.shape)


def lowered(whole: IntegerProgram) -> Model:
    """The program as a model of a TensorFlow Lite file, no tensor of which is encoded.

    Raises:
        ValueError: If TensorFlow Lite Micro has no operator for some of its operations; all are named.
    """
    program = whole.program
    refuse(program.operations)
    context = Context(whole, _flattened_for_linear(program.operations, program.output))
    tensors = [context.tensor(program.input)]
    operators: list[Operator] = []
    for one in program.operations:
        more, added = lower(one, context)
        operators += more
        tensors += added
    empty = Model({}, (), (program.input.name,), (program.output.name,))
    return empty.with_operators(operators, tensors)


def weight_name(one: Linear | Conv2d, operations: Sequence[Operation]) -> str:
    """The name of the tensor of a weight: that of no value, and another for each of the layers that share it."""
    shared = [other for other in operations if isinstance(other, Linear | Conv2d) and other.name == one.name]
    values = {value.name for other in operations for value in (*inputs_of(other), other.output)}
    name = one.name if len(shared) == 1 else f"{one.name}:{one.output.name}"
    return f"{name}:weight" if name in values else name


def refuse(operations: Sequence[Operation]) -> None:
    """Raise an error that names each operation that TensorFlow Lite Micro has no operator for."""
    unknown = [reason for one in operations for reason in _reasons(one)]
    if not operations:
        unknown = ["it returns its input"]
    if unknown:
        raise ValueError(
            "format='tflm' cannot express this network: " + "; ".join(unknown) + ". format='c' has no such limits."
        )


def _reasons(one: Operation) -> list[str]:
    reasons = []
    if isinstance(one, Pool2d) and one.dilation != (1, 1):
        reasons.append(f"{one.output.name} pools with a dilation of {one.dilation}")
    if isinstance(one, Pool2d) and one.kind == "mean" and not is_plain(one.padding) and not is_same(one):
        reasons.append(
            f"{one.output.name} is a mean over windows with a padding of {one.padding} that does not count, "
            "where the operator pads as TensorFlow's SAME does"
        )
    return reasons


def _flattened_for_linear(operations: Sequence[Operation], output: Value) -> dict[str, Value]:
    flat = {
        one.output.name: one.input
        for one in operations
        if isinstance(one, Reshape) and len(one.input.shape) == 3 and len(one.output.shape) == 1
    }
    kept = {value.name for one in operations if not isinstance(one, Linear) for value in inputs_of(one)}
    return {name: image for name, image in flat.items() if name not in kept | {output.name}}


@singledispatch
def lower(one: Operation, context: Context) -> Lowered:
    """The operators and tensors of one operation."""
    raise TypeError(f"an operation of kind {type(one).__name__} has no operator of TensorFlow Lite Micro")


@lower.register
def _(one: Linear, context: Context) -> Lowered:
    source = context.source(one.input)
    weight = _array(context.whole.weights[one.output.name].weight)
    if len(source.shape) == 3:
        weight = weight.reshape(-1, *source.shape).transpose(CHANNELS_LAST).reshape(weight.shape)
    constants = _constants(one, context, weight, axis=0)
    options = {"fusedActivationFunction": ACTIVATIONS[one.activation]}
    inputs = (source.name, *(tensor.name for tensor in constants))
    operator = Operator("FULLY_CONNECTED", inputs, (one.output.name,), "FullyConnected", options)
    return [operator], [*constants, context.tensor(one.output)]


@lower.register
def _(one: Conv2d, context: Context) -> Lowered:
    depthwise = one.depthwise and one.groups > 1
    weight = _array(context.whole.weights[one.output.name].weight)
    weight = weight.transpose((1, 2, 3, 0) if depthwise else CHANNELS_LAST)
    constants = _constants(one, context, np.ascontiguousarray(weight), axis=3 if depthwise else 0)
    source, before, tensors, padding = windowed(one, context.scales(one.input))
    options = {
        "padding": padding,
        "strideH": one.stride[0],
        "strideW": one.stride[1],
        "dilationHFactor": one.dilation[0],
        "dilationWFactor": one.dilation[1],
        "fusedActivationFunction": ACTIVATIONS[one.activation],
    }
    if depthwise:
        options["depthMultiplier"] = one.output.shape[0] // one.groups
    inputs = (source, *(tensor.name for tensor in constants))
    code, kind = ("DEPTHWISE_CONV_2D", "DepthwiseConv2D") if depthwise else ("CONV_2D", "Conv2D")
    operator = Operator(code, inputs, (one.output.name,), kind, options)
    return [*before, operator], [*tensors, *constants, context.tensor(one.output)]


@lower.register
def _(one: Pool2d, context: Context) -> Lowered:
    source, before, tensors, padding = windowed(one, context.scales(one.input))
    options = {
        "padding": padding,
        "strideH": one.stride[0],
        "strideW": one.stride[1],
        "filterHeight": one.kernel[0],
        "filterWidth": one.kernel[1],
    }
    code = "MAX_POOL_2D" if one.kind == "max" else "AVERAGE_POOL_2D"
    operator = Operator(code, (source,), (one.output.name,), "Pool2D", options)
    return [*before, operator], [*tensors, context.tensor(one.output)]


@lower.register
def _(one: Add, context: Context) -> Lowered:
    options = {"fusedActivationFunction": ACTIVATIONS[one.activation]}
    operator = Operator("ADD", (one.first.name, one.second.name), (one.output.name,), "Add", options)
    return [operator], [context.tensor(one.output)]


@lower.register
def _(one: Pad, context: Context) -> Lowered:
    rows = paddings(f"{one.output.name}:rows", one.padding)
    return [Operator("PAD", (one.input.name, rows.name), (one.output.name,), "Pad")], [rows, context.tensor(one.output)]


@lower.register
def _(one: Reshape, context: Context) -> Lowered:
    if one.output.name in context.images:
        return [], []
    output = context.tensor(one.output)
    if _alike(one.input, one.output):
        return [Operator("RESHAPE", (one.input.name,), (one.output.name,))], [output]
    return _reordered(one, output)


@lower.register
def _(one: Activate, context: Context) -> Lowered:
    code = {"relu": "RELU", "relu6": "RELU6"}[one.activation]
    return [Operator(code, (one.input.name,), (one.output.name,))], [context.tensor(one.output)]


def _reordered(one: Reshape, output: StoredTensor) -> Lowered:
    """A reshape in PyTorch's order of the elements, which is that of channels first."""
    source, target = one.input.name, output.name
    operators: list[Operator] = []
    tensors = [output]
    if _needs_order(one.input):
        source = f"{output.name}:given"
        moved, order = _transposed(one.input.name, source, CHANNELS_FIRST)
        operators.append(moved)
        tensors += [order, StoredTensor(source, (1, *one.input.shape), scales=output.scales)]
    if _needs_order(one.output):
        target = f"{output.name}:channels_first"
        tensors.append(StoredTensor(target, (1, *one.output.shape), scales=output.scales))
    operators.append(Operator("RESHAPE", (source,), (target,)))
    if target != output.name:
        moved, order = _transposed(target, output.name, CHANNELS_LAST)
        operators.append(moved)
        tensors.append(order)
    return operators, tensors


def _alike(first: Value, second: Value) -> bool:
    """Whether a reshape is the same with channels last: of images with the same channels, or without an order."""
    if len(first.shape) == len(second.shape) == 3 and first.shape[0] == second.shape[0]:
        return True
    return not _needs_order(first) and not _needs_order(second)


def _needs_order(value: Value) -> bool:
    """Whether the elements stand in another order with channels last."""
    return len(value.shape) == 3 and value.shape[0] > 1 and value.shape[1] * value.shape[2] > 1


def _transposed(source: str, target: str, order: tuple[int, ...]) -> tuple[Operator, StoredTensor]:
    axes = StoredTensor(f"{target}:order", (4,), "int32", np.array(order, np.int32))
    return Operator("TRANSPOSE", (source, axes.name), (target,), "Transpose"), axes


def _constants(one: Linear | Conv2d, context: Context, weight: NDArray[np.int8], axis: int) -> list[StoredTensor]:
    """Weight and bias. A bias without scales takes that of the input times that of the weight."""
    integers = context.whole.weights[one.output.name]
    values = _array(integers.scales)
    scales = None
    if len(values) == 1:  # then FULLY_CONNECTED checks the scale of the bias
        scales = Scales(np.float32(context.whole.scales[one.input.name].scale) * values)
    bias, name = _array(integers.bias), weight_name(one, context.whole.program.operations)
    return [
        StoredTensor(name, weight.shape, "int8", weight, Scales(values, axis=axis)),
        StoredTensor(f"{name}:bias", bias.shape, "int32", bias, scales),
    ]


def _scales(scale: Scale) -> Scales:
    return Scales(np.array([scale.scale], np.float32), scale.zero_point)


def _array(tensor: Any) -> NDArray[Any]:
    return np.asarray(tensor.detach().cpu().numpy())
