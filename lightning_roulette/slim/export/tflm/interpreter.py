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
from lightning_roulette.slim.export.tflm.model import Model, Operator

USED = re.compile(r"allocation total (?P<total>\d+) bytes.*allocation tail (?P<tail>\d+) bytes", re.DOTALL)
ALIGNMENT = 16
FOR_TENSOR, SPARE_TENSORS = 48, 128  # bytes while the runtime plans where tensors live
FOR_CHANNEL, SPARE_CHANNELS = 4, 384  # bytes while it prepares an operator
SPARE = 1 << 16


class Interpreter:
    """A file loaded into the runtime.

    Args:
        file: The bytes of the file.
        arena_size: How many bytes of memory the runtime may use. With too few it may end the process.

    Raises:
        ImportError: If tflite-micro is not installed.
        ValueError: If the runtime refuses the file; the message holds what it said.
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
    def used(self) -> tuple[int, int]:
        """How many bytes the runtime uses, and how many of them are for operators, not for computed tensors."""
        _, said = _heard(self._loaded.print_allocations)
        found = USED.search(said)
        if found is None:
            raise RuntimeError(f"this version of tflite-micro does not print its memory as expected: {said[:200]!r}")
        return int(found["total"]), int(found["tail"])


def load(model: Model, file: bytes) -> Interpreter:
    """The file of a model in the runtime, with more memory than it needs."""
    return Interpreter(file, _enough(model, file))


def arena(model: Model, file: bytes) -> int:
    """The size of the arena that the runtime needs, in bytes.

    It is what the runtime uses, measured. Where the computed tensors are small, it is more: while it loads a file, the
    runtime takes memory in their place and gives it back. For that this is a bound, as measured with many models.
    Smaller sizes cannot be tried, because the runtime may then write outside its memory.
    """
    total, tail = load(model, file).used
    preparing = max(_preparing(model, one) for one in model.operators)
    loading = max(FOR_TENSOR * len(model.tensors) + SPARE_TENSORS, preparing)
    return -(-max(total, tail + loading) // ALIGNMENT) * ALIGNMENT


def _preparing(model: Model, one: Operator) -> int:
    """The bytes that the runtime takes while it prepares an operator: it reads the weight of a convolution twice."""
    scales = [model.tensors[name].scales for name in (*one.inputs, *one.outputs)]
    channels = max((len(known.values) for known in scales if known is not None), default=1)
    times = 2 if one.code in {"CONV_2D", "DEPTHWISE_CONV_2D"} else 1
    return times * (FOR_CHANNEL * channels + SPARE_CHANNELS)


def _enough(model: Model, file: bytes) -> int:
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
