"""What sparse weights are worth in each layer of a network."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_roulette.report.columns import in_columns


@dataclass(frozen=True)
class SparseLayer:
    """One layer of a network.

    Attributes:
        name: Its name.
        shape: Shape of its weight.
        sparsity: Share of zeros in its weight.
        dense: Median time with a dense weight, in seconds. None if it was not measured.
        sparse: The same with a sparse weight, in the faster way.
        converted: Whether its weight is sparse now.
        reason: Why it was not measured, or why it stays dense. Empty if it is sparse.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    dense: float | None = None
    sparse: float | None = None
    converted: bool = False
    reason: str = ""

    @property
    def speedup(self) -> float | None:
        """`dense / sparse`; None if it was not measured."""
        return self.dense / self.sparse if self.dense and self.sparse else None


@dataclass(frozen=True)
class SparseNetwork:
    """The layers of a network, and the time of all. Printed, it is a table.

    Attributes:
        layers: The linear layers and convolutions.
        dense: Median time of the dense network on the example input, in seconds.
        sparse: The same after the conversion.
    """

    layers: tuple[SparseLayer, ...]
    dense: float
    sparse: float

    @property
    def converted(self) -> tuple[str, ...]:
        """Names of the layers whose weights are sparse now."""
        return tuple(layer.name for layer in self.layers if layer.converted)

    @property
    def speedup(self) -> float:
        """`dense / sparse` of the network."""
        return self.dense / self.sparse

    def __str__(self) -> str:
        """Return a table of the layers, and a line about the network."""
        heads = ("layer", "shape", "zeros", "dense, us", "sparse, us", "speed-up", "")
        rows = [heads, *map(_row, self.layers)]
        number = f"{len(self.converted)} of {len(self.layers)} layers are sparse now."
        times = f"The network takes {1e6 * self.sparse:,.0f} us instead of {1e6 * self.dense:,.0f} us"
        return "\n".join([*in_columns(rows, left=(0, 6)), f"{number} {times} ({self.speedup:.2f} times as fast)."])


def _row(layer: SparseLayer) -> tuple[str, ...]:
    times = ["" if one is None else f"{1e6 * one:,.1f}" for one in (layer.dense, layer.sparse)]
    speedup = "" if layer.speedup is None else f"{layer.speedup:.2f}"
    words = "sparse" if layer.converted else layer.reason
    return (layer.name, " x ".join(map(str, layer.shape)), f"{100 * layer.sparsity:.1f} %", *times, speedup, words)
