"""What the runtime of TensorFlow Lite Micro computes for a model."""

from __future__ import annotations

import numpy as np

from lightning_roulette.slim.export.tflm.flatbuffer import to_bytes
from lightning_roulette.slim.export.tflm.interpreter import Interpreter, enough
from lightning_roulette.slim.export.tflm.model import Model


def outputs_of(model: Model, inputs: list[np.ndarray]) -> list[list[int]]:
    """The output for each input, flattened."""
    file = to_bytes(model)
    run = Interpreter(file, enough(model, file))
    return [run(one).ravel().tolist() for one in inputs]
