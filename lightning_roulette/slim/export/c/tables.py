"""Constants of the C source: arrays, and the structures that name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_roulette.slim.export.c.kernels import Values
from lightning_roulette.slim.export.c.packing import Packed, dense, packed
from lightning_roulette.slim.export.integers import IntegerProgram
from lightning_roulette.slim.export.operations import Activation, Add, Conv2d, Linear, Pad, Pool2d, Program, Weighted
from lightning_roulette.slim.export.rescaling import add_constants, bounds, output_multipliers

_C_TYPES = {"int8": "int8_t", "uint8": "uint8_t", "int32": "int32_t", "float32": "float"}
_WIDTH = 116  # characters of a line of numbers


@dataclass(frozen=True, eq=False)
class Table:
    """The constants of one operation.

    Attributes:
        text: Their definitions.
        size: Bytes of the arrays and of the structures, on a device with pointers of 32 bits.
        weights: The stored weights; None if the operation has none.
    """

    text: str
    size: int
    weights: Packed | None = None


@dataclass(frozen=True, eq=False)
class Source:
    """What is written as C.

    Attributes:
        program: The program in floating point.
        integers: The program in integers; None if the source is to compute in floating point.
    """

    program: Program
    integers: IntegerProgram | None

    @property
    def values(self) -> Values:
        """The type of the values."""
        return "float32" if self.integers is None else "int8"

    def weight(self, layer: Weighted) -> NDArray[np.generic]:
        """Return the weights of a layer as they are stored."""
        kept = layer.weight if self.integers is None else self.integers.weights[layer.output.name].weight
        array: NDArray[np.generic] = kept.numpy()
        return array

    def stored(self, layer: Weighted) -> Packed:
        """Return the weights of a layer in their smallest form."""
        return packed(self.weight(layer))

    def limits(self, name: str, activation: Activation) -> tuple[str, str]:
        """Return the smallest and the largest value that an activation gives, as C."""
        if self.integers is not None:
            least, most = bounds(activation, self.integers.scales[name])
            return (str(least), str(most))
        return ("-FLT_MAX" if activation == "none" else "0.0f", "6.0f" if activation == "relu6" else "FLT_MAX")


def layer_table(source: Source, layer: Weighted, number: int) -> Table:
    """Return the constants of a linear layer or of a convolution."""
    weights = source.stored(layer)
    arrays = {"values": weights.values, "positions": weights.positions, **_outputs(source, layer)}
    named = {key: array for key, array in arrays.items() if array.size or key == "values"}
    fields = {key: f"{key}_{number}" if key in named else "0" for key in arrays} | _layer_fields(source, layer, weights)
    text = [f"/* {readable(layer.name)}: {_counted(source.weight(layer))}, stored as {weights.form} */\n"]
    text += [array_text(f"{key}_{number}", array) for key, array in named.items()]
    size = sum(array.nbytes for array in named.values()) + 4 * len(fields)
    if isinstance(layer, Linear):
        text.append(f"static const struct layer layer_{number} = {structure(fields)};\n")
    else:
        windows = window_fields(layer)
        per_group = (len(layer.weight) // layer.groups, layer.weight.shape[1])
        inner = f"{structure(fields)}, {structure(windows)}, {per_group[0]}, {per_group[1]}"
        text.append(f"static const struct conv layer_{number} = {{{inner}}};\n")
        size += 4 * (len(windows) + 2)
    return Table("".join(text), size, weights)


def dense_size(source: Source, layer: Weighted) -> int:
    """Return the bytes of the weights of a layer with all zeros."""
    return dense(source.weight(layer)).size


def add_table(source: Source, add: Add, number: int) -> Table:
    """Return the constants of a sum."""
    fields: dict[str, object] = {"size": add.output.size}
    if source.integers is not None:
        by = add_constants(source.integers, add)
        for key, value, factor in zip(
            ("first", "second", "out"),
            (add.first, add.second, add.output),
            (by.first, by.second, by.output),
            strict=True,
        ):
            fields[f"{key}_zero"] = source.integers.scales[value.name].zero_point
            fields |= {f"{key}_multiplier": factor.multipliers[0], f"{key}_shift": factor.shifts[0]}
    fields["least"], fields["most"] = source.limits(add.output.name, add.activation)
    return Table(f"static const struct add add_{number} = {structure(fields)};\n", 4 * len(fields))


def windows_table(operation: Pool2d | Pad, number: int) -> Table:
    """Return the windows of a pooling, or of a padding with windows of one element."""
    fields = window_fields(operation)
    return Table(f"static const struct windows windows_{number} = {structure(fields)};\n", 4 * len(fields))


def window_fields(operation: Conv2d | Pool2d | Pad) -> dict[str, object]:
    """Return the fields of `struct windows`."""
    kernel, stride, dilation = (
        ((1, 1),) * 3 if isinstance(operation, Pad) else (operation.kernel, operation.stride, operation.dilation)
    )
    _, height, width = operation.input.shape
    return {
        "height": height,
        "width": width,
        "out_height": operation.output.shape[1],
        "out_width": operation.output.shape[2],
        "kernel_height": kernel[0],
        "kernel_width": kernel[1],
        "stride_y": stride[0],
        "stride_x": stride[1],
        "dilation_y": dilation[0],
        "dilation_x": dilation[1],
        "above": operation.padding[0],
        "left": operation.padding[2],
    }


def structure(fields: Mapping[str, object]) -> str:
    """Return the initialiser of a structure."""
    return "{" + ", ".join(f".{key} = {value}" for key, value in fields.items()) + "}"


def array_text(name: str, array: NDArray[np.generic]) -> str:
    """Return the definition of an array. C has none without elements: it then gets one that is never read."""
    filled = array.reshape(-1) if array.size else np.zeros(1, array.dtype)
    numbers = [number_text(one) for one in filled.tolist()] if array.dtype != np.float32 else _floats(filled)
    kind = _C_TYPES[array.dtype.name]
    return f"static const {kind} {name}[{len(numbers)}] = {{\n{_lines(numbers)}}};\n"


def number_text(number: int) -> str:
    """Return a whole number as C. The smallest of 32 bits has no literal."""
    return "(-2147483647 - 1)" if number == -(2**31) else str(number)


def float_text(number: float) -> str:
    """Return the literal of a number of float32, exactly."""
    text = f"{number:.9g}"
    return (text if any(one in text for one in ".en") else f"{text}.0") + "f"


def readable(name: str) -> str:
    """Return a name that may stand in a comment."""
    return name.replace("*/", "* /")


def _outputs(source: Source, layer: Weighted) -> dict[str, NDArray[np.generic]]:
    """Return what a layer stores for each output."""
    if source.integers is None:
        return {"bias": layer.bias.numpy()}
    by = output_multipliers(source.integers, layer)
    return {
        "bias": source.integers.weights[layer.output.name].bias.numpy(),
        "multipliers": np.array(by.multipliers, np.int32),
        "shifts": np.array(by.shifts, np.int8),
    }


def _layer_fields(source: Source, layer: Weighted, weights: Packed) -> dict[str, object]:
    fields: dict[str, object] = {"rows": len(layer.weight), "columns": layer.weight[0].numel()}
    fields |= {"count_bits": weights.count_bits, "gap_bits": weights.gap_bits}
    if source.integers is not None:
        scales = source.integers.scales
        fields["in_zero"] = scales[layer.input.name].zero_point
        fields["out_zero"] = scales[layer.output.name].zero_point
    fields["least"], fields["most"] = source.limits(layer.output.name, layer.activation)
    return fields


def _counted(weight: NDArray[np.generic]) -> str:
    return f"{np.count_nonzero(weight):,} of {weight.size:,} weights"


def _floats(array: NDArray[np.generic]) -> list[str]:
    return [float_text(one) for one in array.tolist()]


def _lines(numbers: Sequence[str]) -> str:
    lines, line = [], "    "
    for number in numbers:
        if len(line) + len(number) + 1 > _WIDTH:
            lines.append(line.rstrip() + "\n")
            line = "    "
        line += f"{number}, "
    return "".join([*lines, line.rstrip() + "\n"])
