"""The constants with which the operations of an integer program return to 8 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_roulette.slim.export.integers import IntegerProgram, Scale
from lightning_roulette.slim.export.multipliers import Multipliers, multipliers
from lightning_roulette.slim.export.operations import Activation, Add, Linear, Weighted

LEAST, MOST = -128, 127
ADD_BITS = 20  # by which the inputs of a sum are shifted to the left before they are rescaled


def output_multipliers(program: IntegerProgram, layer: Weighted) -> Multipliers:
    """Return what the sums of a layer are multiplied with, one number for each output."""
    given, made = program.scales[layer.input.name].scale, program.scales[layer.output.name].scale
    weights = program.weights[layer.output.name].scales
    if isinstance(layer, Linear) and len(weights) == 1:  # the runtime multiplies in float32 here
        return multipliers([float(_float32(given) * weights[0]) / made])
    return multipliers([given * float(one) / made for one in weights])


@dataclass(frozen=True)
class AddConstants:
    """Multipliers of the two inputs of a sum and of its output."""

    first: Multipliers
    second: Multipliers
    output: Multipliers


def add_constants(program: IntegerProgram, add: Add) -> AddConstants:
    """Return the multipliers of a sum."""
    first, second, made = (program.scales[one.name].scale for one in (add.first, add.second, add.output))
    common = 2 * max(first, second)
    factors = (first / common, second / common, common / ((1 << ADD_BITS) * made))
    return AddConstants(*(multipliers([one]) for one in factors))


def bounds(activation: Activation, scale: Scale) -> tuple[int, int]:
    """Return the smallest and the largest integer that an activation gives."""
    if activation == "none":
        return (LEAST, MOST)
    six = MOST if activation == "relu" else scale.zero_point + round_away(float(_float32(6.0) / _float32(scale.scale)))
    return (max(LEAST, scale.zero_point), min(MOST, six))


def round_away(number: float) -> int:
    """Return the nearest whole number; of two, the one farther from zero."""
    return int(math.copysign(math.floor(abs(number) + 0.5), number))


def to_integers(values: Tensor, scale: Scale) -> Tensor:
    """Return float32 values as int8. Those beyond the range become its ends."""
    scaled = values / _float32(scale.scale)
    rounded = (scaled.abs() + 0.5).floor().copysign(scaled)
    return (rounded + scale.zero_point).clamp(LEAST, MOST).to(torch.int8)


def to_floats(integers: Tensor, scale: Scale) -> Tensor:
    """Return what integers stand for, float32."""
    return _float32(scale.scale) * (integers.to(torch.float32) - scale.zero_point)


def _float32(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float32)
