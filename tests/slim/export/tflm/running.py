"""What the runtime of TensorFlow Lite Micro computes for a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from lightning_roulette.slim.export.tflm.flatbuffer import to_bytes
from lightning_roulette.slim.export.tflm.interpreter import load
from lightning_roulette.slim.export.tflm.model import Model


def outputs_of(model: Model, inputs: list[np.ndarray]) -> list[list[int]]:
    """The output for each input, flattened."""
    run = load(model, to_bytes(model))
    return [run(one).ravel().tolist() for one in inputs]


def loads(path: Path, size: int) -> bool:
    """Whether the runtime loads a file with an arena of this size. It may end the process where it does not."""
    code = f"from tflite_micro import runtime; runtime.Interpreter.from_file({str(path)!r}, arena_size={size})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
