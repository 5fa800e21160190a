"""What a network takes on a microcontroller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_roulette.slim.export.c.kernels import Values
from lightning_roulette.slim.export.c.writing import sizes
from lightning_roulette.slim.export.idle import slimmed
from lightning_roulette.slim.export.trace import trace

VALUES: tuple[Values, ...] = ("int8", "float32")


@dataclass(frozen=True)
class OnDevice:
    """What the C source takes that `export` writes.

    Attributes:
        flash: Bytes of constants: weights, positions, biases, scales. Code is not included.
        ram: Bytes of memory for all values that are computed, the input and the output included.
    """

    flash: int
    ram: int

    def __str__(self) -> str:
        return f"{self.flash:,} bytes of flash without code, {self.ram:,} of RAM"


def on_device(model: nn.Module, example_input: Any) -> Mapping[str, OnDevice]:
    """Return what a network takes with each type of values.

    The ranges of 8-bit integers are those of the example. Others would hardly change the bytes.

    Raises:
        TypeError: If the network, or its input, cannot be exported. The message is the reason.
        ValueError: Likewise.
    """
    program = slimmed(trace(model, example_input), example_input.cpu())
    calibration = example_input.detach().cpu()
    return {values: OnDevice(*sizes(program, calibration, values)) for values in VALUES}
