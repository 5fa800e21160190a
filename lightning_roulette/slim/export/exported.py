"""What an export wrote: files, bytes of flash and memory, and how each layer is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lightning_roulette.report.columns import in_columns
from lightning_roulette.slim.export.operations import Final
from lightning_roulette.slim.measuring.timing import Latency


@dataclass(frozen=True)
class StoredLayer:
    """How the weights of one layer are stored.

    Attributes:
        name: Name of the weight in the state dict of the network.
        shape: Shape of the weight.
        survivors: Weights that are not zero.
        form: In which form they are stored, such as "dense" or "bitmap".
        stored: Bytes of the weights, positions included, biases and scales not.
        dense: Bytes of the same weights with all zeros.
    """

    name: str
    shape: tuple[int, ...]
    survivors: int
    form: str
    stored: int
    dense: int


@dataclass(frozen=True)
class FormatScores:
    """A score on validation data: of the network in floating point, and of what the device computes."""

    network: float
    device: float


@dataclass(frozen=True, eq=False)
class Exported:
    """What an export wrote. Printed, it is a table of the layers and the totals.

    Attributes:
        format: Name of the format.
        values: Type of the stored values, "int8" or "float32"; of ONNX, that of the network's weights.
        files: The files.
        flash: Bytes of constants: weights, positions, biases, scales. Code is not included. Of ONNX, of the file, and
            of Core ML, of all files of the package.
        dense_flash: The same if no layer was compressed. Of ONNX and Core ML, if no dead unit was removed either.
        ram: Bytes of memory for all values that are computed, the input and the output included; None if the runtime
            does not tell.
        layers: How the weights are stored.
        run: Computes what the device computes: from inputs in float32, shape `(n, ...)`, outputs in float32. For Core
            ML it raises a RuntimeError.
        final: The function that the network applies last, and that the device does not: see `Program`.
        scores: Scores on the validation data; None if there are none.
        notes: Sentences about this export.
        latency: How long the runtime takes for the example on this machine, with one thread; None if it was not run.
        dense_latency: The same before dead units were removed.
    """

    format: str
    values: str
    files: tuple[Path, ...]
    flash: int
    dense_flash: int
    ram: int | None
    layers: tuple[StoredLayer, ...]
    run: Callable[..., Tensor]
    final: Final | None = None
    scores: FormatScores | None = None
    notes: tuple[str, ...] = ()
    latency: Latency | None = None
    dense_latency: Latency | None = None

    def __str__(self) -> str:
        """Return a table of the layers, and the totals."""
        rows = [("weight", "shape", "not zero", "stored as", "bytes", "dense")]
        rows += [
            (one.name, _shape(one.shape), f"{one.survivors:,}", one.form, f"{one.stored:,}", f"{one.dense:,}")
            for one in self.layers
        ]
        return "\n".join([*in_columns(rows, left=(0, 3)), *self._totals()])

    def _totals(self) -> list[str]:
        """Return sentences about flash, memory and scores."""
        zeros = " and all zeros" if any(one.form != "dense" for one in self.layers) else ""
        lines = [f"File: {self.flash:,} bytes; {self.dense_flash:,} with dead units{zeros}."]
        if self.ram is not None:
            lines = [
                f"Flash: {self.flash:,} bytes of constants; {self.dense_flash:,} with all zeros.",
                f"Memory: {self.ram:,} bytes, with input and output.",
            ]
        if self.latency is not None and self.dense_latency is not None:
            lines.append(f"Time for the example: {self.latency}; with dead units {self.dense_latency}.")
        if self.scores is not None:
            lines.append(f"On the validation data: network {self.scores.network:g}, device {self.scores.device:g}.")
        if self.final is not None:
            lines.append(f"The {self.final} at the end of the network is left out: the largest output is the same.")
        return [*lines, *self.notes, "Written: " + ", ".join(map(str, self.files))]


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
