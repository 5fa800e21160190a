"""The modules of `examples/paper`, and small data files for them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "paper"))
import checkpoints
import data
import methods
import networks
import one_shot
import run
import table

__all__ = ["checkpoints", "data", "methods", "networks", "one_shot", "run", "table", "write"]


def write(folder: Path, file: str, *shape: int, train: int = 60, test: int = 20) -> dict[str, np.ndarray]:
    """Write a small file. Scores depend on the first input. The last column of a table is constant."""
    chance, arrays = np.random.default_rng(0), {}
    for part, length in {"train": train, "test": test}.items():
        if len(shape) == 1:
            x = chance.normal(3, 2, (length, *shape)).astype(np.float32)
            x[:, -1] = 0.1
            arrays[f"sd_{part}"] = np.full(length, 0.5, np.float32)
        else:
            x = chance.integers(256, size=(length, *shape), dtype=np.uint8)
        scores = (1 + x.reshape(length, -1)[:, 0] / 9).astype(np.float32)
        classes = (np.arange(length) % 10).astype(np.uint8)
        arrays |= {f"x_{part}": x, f"y_{part}": classes if file in ("mnist.npz", "cifar10.npz") else scores}
    np.savez(folder / file, **arrays)
    return arrays
