"""The choice of scales: a program in floating point becomes one in 8-bit integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_roulette.slim.export.integers import IntegerProgram, IntegerWeights, Scale
from lightning_roulette.slim.export.operations import (
    Activate,
    Add,
    Conv2d,
    Linear,
    Operation,
    Pad,
    Pool2d,
    Program,
    Reshape,
    Value,
)
from lightning_roulette.slim.export.reference import every_value

_ROWS = 256  # inputs that are run at once
_LARGEST_BIAS = 2**24  # of the units of a bias, so that sums keep within 32 bits
_LARGEST_TOTAL = 2**30  # of the products of an output, so that sums of many inputs keep within 32 bits, too
_LARGEST_SUM = 2**29  # so that what a sum is shifted to the left by stays within 32 bits
KEEP_SCALE = (Pool2d, Pad, Reshape, Activate)  # operations whose output has the scale of their input


def quantise(program: Program, calibration: Tensor) -> IntegerProgram:
    """Return a program in 8-bit integers, as TensorFlow Lite defines them.

    Values: asymmetric, one scale each, from the smallest and the largest entry over the calibration inputs. Zero is
    always exact. Weights: symmetric, one scale for each output, so that a weight of zero stays zero. Biases: 32 bits.
    A mean over a whole image becomes a depthwise convolution where it is much smaller than its inputs: a pooling has
    one scale on both sides, in which such a mean would have few steps.

    Args:
        program: The program.
        calibration: Inputs as in use, float32, shape `(n, *program.input.shape)`. A few hundred are enough.

    Raises:
        ValueError: If a value or a weight is not finite.
    """
    ranges = _ranges(program, calibration)
    program = _with_fine_means(program, ranges)
    scales = {program.input.name: _scale(*ranges[program.input.name])}
    weights: dict[str, IntegerWeights] = {}
    for one in program.operations:
        name = one.output.name
        if isinstance(one, KEEP_SCALE):
            scales[name] = scales[one.input.name]
        elif isinstance(one, Add):
            most = max(scales[one.first.name].scale, scales[one.second.name].scale)
            scales[name] = _scale(*ranges[name], at_least=most * 2**-12)
        else:
            weights[name] = _weights(one, scales[one.input.name].scale)
            scales[name] = _scale(*ranges[name], at_least=_least(weights[name], scales[one.input.name].scale))
    return IntegerProgram(program, scales, weights)


def _with_fine_means(program: Program, ranges: Mapping[str, tuple[float, float]]) -> Program:
    """Return a program in which means over images have a scale of their own where it is finer by more than half."""

    def width(value: Value) -> float:
        return ranges[value.name][1] - ranges[value.name][0]

    def fine(one: Operation) -> Operation:
        if isinstance(one, Pool2d) and _whole_mean(one) and 2 * width(one.output) < width(one.input):
            return _as_conv(one)
        return one

    return replace(program, operations=tuple(map(fine, program.operations)))


def _whole_mean(pool: Pool2d) -> bool:
    return pool.kind == "mean" and pool.kernel == pool.input.shape[1:] and not any(pool.padding)


def _as_conv(mean: Pool2d) -> Conv2d:
    channels, height, width = mean.input.shape
    weight = torch.full((channels, 1, height, width), 1 / (height * width))
    return Conv2d(mean.input, mean.output, mean.output.name, weight, torch.zeros(channels), groups=channels)


def _ranges(program: Program, calibration: Tensor) -> dict[str, tuple[float, float]]:
    """Return the smallest and the largest entry of each value."""
    found: dict[str, tuple[float, float]] = {}
    for rows in calibration.split(_ROWS):
        for name, value in every_value(program, rows).items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"the value {name!r} of the network is not finite on the calibration inputs.")
            least, most = found.get(name, (0.0, 0.0))
            found[name] = (min(least, float(value.min())), max(most, float(value.max())))
    return found


def _scale(least: float, most: float, at_least: float = 0.0) -> Scale:
    """Return the scale of a range that includes zero."""
    scale = float(torch.tensor(max((most - least) / 255, at_least), dtype=torch.float32))
    if scale == 0.0:
        return Scale(1.0, 0)  # the value is always zero
    return Scale(scale, min(127, max(-128, round(-128 - least / scale))))


def _weights(layer: Linear | Conv2d, given: float) -> IntegerWeights:
    """Return the integers of a layer whose input has the scale `given`."""
    rows = layer.weight.flatten(1).double()
    bias = layer.bias.double()
    if not bool(rows.isfinite().all() and bias.isfinite().all()):
        raise ValueError(f"{layer.name} has weights or a bias that are not finite.")
    sizes = rows.abs()
    of_rows = torch.maximum(sizes.amax(1) / 127, 255 * sizes.sum(1) / _LARGEST_TOTAL)
    wanted = torch.maximum(of_rows, bias.abs() / (given * _LARGEST_BIAS))
    least = float(torch.finfo(torch.float32).tiny)
    scales = torch.where(wanted == 0, float(wanted.max()) or 1.0, wanted).clamp(min=least).to(torch.float32)
    units = scales.double()
    weight = (rows / units[:, None]).round().clamp(-127, 127).to(torch.int8).reshape(layer.weight.shape)
    return IntegerWeights(weight, scales, (bias / (given * units)).round().to(torch.int32))


def _least(weights: IntegerWeights, given: float) -> float:
    """Return the smallest scale of an output with which no sum can leave 32 bits when it is rescaled."""
    largest = 255 * weights.weight.flatten(1).double().abs().sum(1) + weights.bias.double().abs()
    return float((largest * weights.scales.double()).max()) * given / _LARGEST_SUM
