"""The runtime of ExecuTorch for this machine: what a file computes, and how long it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_roulette.slim.export.executorch.extra import imported
from lightning_roulette.slim.measuring.timing import Latency, latencies


class Loaded:
    """A .pte file for inputs of a batch of one, loaded into the runtime.

    Raises:
        ImportError: If ExecuTorch is not installed.
    """

    def __init__(self, file: bytes) -> None:
        runtime = imported("executorch.runtime").Runtime.get()
        self._program = runtime.load_program(file)  # the method reads it as long as it lives
        self._method: Any = self._program.load_method("forward")

    def __call__(self, inputs: Tensor) -> Tensor:
        """The outputs for inputs of any number, one at a time."""
        rows = inputs.contiguous().split(1)
        return torch.cat([self._method.execute([row.contiguous()])[0].clone() for row in rows])

    def latency(self, shape: tuple[int, ...]) -> Latency:
        """How long one inference takes."""
        zeros = torch.zeros(1, *shape)
        return latencies({"inference": lambda: self._method.execute([zeros])})["inference"]
