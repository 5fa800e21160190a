"""What an integer program computes, bit for bit as TensorFlow Lite's reference kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_roulette.slim.export.integers import IntegerProgram
from lightning_roulette.slim.export.multipliers import multiplied
from lightning_roulette.slim.export.operations import (
    Activate,
    Add,
    Conv2d,
    Linear,
    Operation,
    Pad,
    Pool2d,
    Weighted,
    inputs_of,
)
from lightning_roulette.slim.export.reference import around
from lightning_roulette.slim.export.rescaling import (
    ADD_BITS,
    LEAST,
    MOST,
    add_constants,
    bounds,
    output_multipliers,
    to_floats,
    to_integers,
)


def run_integers(program: IntegerProgram, inputs: Tensor) -> Tensor:
    """Return the output of an integer program.

    Args:
        program: The program.
        inputs: int8, shape `(n, *input.shape)`.

    Returns:
        int8, shape `(n, *output.shape)`.
    """
    return every_integer_value(program, inputs)[program.program.output.name]


def run_as_floats(program: IntegerProgram, inputs: Tensor) -> Tensor:
    """Return the output for float32 inputs, as float32. Both have the scales of the program."""
    given, made = (program.scales[one.name] for one in (program.program.input, program.program.output))
    return to_floats(run_integers(program, to_integers(inputs, given)), made)


@torch.no_grad()
def every_integer_value(program: IntegerProgram, inputs: Tensor) -> dict[str, Tensor]:
    """Return the input and the outputs of all operations, int8, by name."""
    values = {program.program.input.name: inputs}
    for operation in program.program.operations:
        used = [values[one.name].long() for one in inputs_of(operation)]
        values[operation.output.name] = _apply(program, operation, used).to(torch.int8)
    return values


def _apply(program: IntegerProgram, operation: Operation, inputs: list[Tensor]) -> Tensor:
    scale = program.scales[operation.output.name]
    if isinstance(operation, (Linear, Conv2d)):
        sums = _weighted(program, operation, inputs[0])
        rescaled = multiplied(sums, output_multipliers(program, operation)) + scale.zero_point
        return rescaled.clamp(*bounds(operation.activation, scale))
    if isinstance(operation, Add):
        return _added(program, operation, *inputs)
    if isinstance(operation, Pool2d):
        return _pooled(operation, inputs[0])
    if isinstance(operation, Pad):
        return around(inputs[0], operation.padding, scale.zero_point)
    if isinstance(operation, Activate):
        return inputs[0].clamp(*bounds(operation.activation, scale))
    return inputs[0].reshape(len(inputs[0]), *operation.output.shape)


def _weighted(program: IntegerProgram, layer: Weighted, inputs: Tensor) -> Tensor:
    """Return the sums of a layer and its bias. float64 is exact here, as all sums are below 2 ** 53."""
    weights = program.weights[layer.output.name]
    given = (inputs - program.scales[layer.input.name].zero_point).double()
    weight, bias = weights.weight.double(), weights.bias.double()
    if isinstance(layer, Linear):
        return F.linear(given, weight, bias).long()
    padded = around(given, layer.padding, 0.0)
    return F.conv2d(padded, weight, bias, layer.stride, 0, layer.dilation, layer.groups).long()


def _added(program: IntegerProgram, add: Add, first: Tensor, second: Tensor) -> Tensor:
    by, scale = add_constants(program, add), program.scales[add.output.name]
    offsets = [program.scales[one.name].zero_point for one in (add.first, add.second)]
    scaled = [
        multiplied((one - offset) << ADD_BITS, factor)
        for one, offset, factor in zip((first, second), offsets, (by.first, by.second), strict=True)
    ]
    return (multiplied(scaled[0] + scaled[1], by.output) + scale.zero_point).clamp(*bounds(add.activation, scale))


def _pooled(pool: Pool2d, image: Tensor) -> Tensor:
    """Pool integers. The mean is rounded to the nearest, and away from zero if there are two."""
    if pool.kind == "max":
        padded = around(image.double(), pool.padding, -torch.inf)
        return F.max_pool2d(padded, pool.kernel, pool.stride, 0, pool.dilation).long()
    sums = _window_sums(pool, image.double()).long()
    counts = _window_sums(pool, torch.ones_like(image[:1]).double()).long()
    half = torch.where(sums > 0, counts // 2, -(counts // 2))
    return torch.div(sums + half, counts, rounding_mode="trunc").clamp(LEAST, MOST)


def _window_sums(pool: Pool2d, image: Tensor) -> Tensor:
    padded = around(image, pool.padding, 0.0)
    return (F.avg_pool2d(padded, pool.kernel, pool.stride) * (pool.kernel[0] * pool.kernel[1])).round()
