"""A program in 8-bit integers: what a number stands for, and the integers of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_roulette.slim.export.operations import Program


@dataclass(frozen=True)
class Scale:
    """The integer `i` of a value stands for `scale * (i - zero_point)`.

    Attributes:
        scale: Positive; a number of float32.
        zero_point: The integer that stands for zero, from -128 to 127.
    """

    scale: float
    zero_point: int


@dataclass(frozen=True, eq=False)
class IntegerWeights:
    """The weights of one layer. A weight of zero is the integer zero, so that what is pruned stays pruned.

    Attributes:
        weight: int8, from -127 to 127, shaped as the float weight.
        scales: float32, shape `(outputs,)`. The integer `i` of output `o` stands for `scales[o] * i`.
        bias: int32, shape `(outputs,)`. Its scale is that of the layer's input times `scales`.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False)
class IntegerProgram:
    """A program whose values and weights are 8-bit integers, as TensorFlow Lite defines them.

    Attributes:
        program: The program in floating point.
        scales: The scale of each value, by its name. Pool2d, Pad, Reshape and Activate have one scale on both
            sides.
        weights: The weights of each Linear and Conv2d, by the name of its output.
    """

    program: Program
    scales: Mapping[str, Scale]
    weights: Mapping[str, IntegerWeights]
