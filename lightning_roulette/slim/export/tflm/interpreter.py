"""The runtime of TensorFlow Lite Micro, compiled for this machine: what a file computes, and the memory it takes."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_roulette.slim.export.tflm.extra import runtime
from lightning_roulette.slim.export.tflm.model import Model

ARENA = re.compile(r"Arena allocation total (\d+) bytes")
SPARE = 1 << 16


class Interpreter:
    """A file loaded into the runtime.

    Args:
        file: The bytes of the file.
        arena_size: How many bytes of memory the runtime may use.

    Raises:
        ImportError: If tflite-micro is not installed.
        ValueError: If the runtime refuses the file, or needs more memory; the message holds what it said.
    """

    def __init__(self, file: bytes, arena_size: int) -> None:
        load = runtime().Interpreter.from_bytes
        self._loaded, said = _heard(lambda: load(file, arena_size=arena_size))
        if self._loaded is None:
            raise ValueError(f"the runtime of TensorFlow Lite Micro does not load the file: {said.strip()}")

    def __call__(self, integers: NDArray[np.int8]) -> NDArray[np.int8]:
        """The output for one input, both int8 and with a batch of one; images are channels last."""
        self._loaded.set_input(integers, 0)
        self._loaded.invoke()
        return np.asarray(self._loaded.get_output(0))

    @property
    def arena(self) -> int:
        """How many bytes of memory the runtime uses: tensors that are computed and what it keeps for each operator."""
        _, said = _heard(self._loaded.print_allocations)
        found = ARENA.search(said)
        if found is None:
            raise RuntimeError(f"this version of tflite-micro does not print its memory as expected: {said[:200]!r}")
        return int(found.group(1))


def enough(model: Model, file: bytes) -> int:
    """An arena that is large enough: as if all tensors lived at once, and what depends on channels and operators."""
    return sum(tensor.size for tensor in model.tensors.values()) + 4 * len(file) + SPARE


def _heard(act: Callable[[], Any]) -> tuple[Any, str]:
    """What `act` returns, and what the runtime, which is C++, writes to standard error in the meantime.

    Returns None in place of the result where the runtime raised a RuntimeError.
    """
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            result = act()
        except RuntimeError:
            result = None
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        return result, file.read().decode(errors="replace")
