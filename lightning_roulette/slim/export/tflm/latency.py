"""How much longer an inference takes with decoded weights, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from lightning_roulette.slim.export.tflm.interpreter import load
from lightning_roulette.slim.export.tflm.memory import Packed

ROUNDS = 7
SECONDS = 1.0  # after which no further round starts


def slowdown(plain: Packed, found: Packed, clock: Callable[[], float] = time.process_time) -> float:
    """The time of an inference of one model over that of the other: each the least of several runs by turns."""
    runs = [(load(one.model, one.file), _zeros(one)) for one in (plain, found)]
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        if sum(map(sum, times)) > SECONDS:
            break
        for (run, inputs), known in zip(runs, times, strict=True):
            start = clock()
            run(inputs)
            known.append(clock() - start)
    return min(times[1]) / min(times[0])


def _zeros(packed: Packed) -> np.ndarray[tuple[int, ...], np.dtype[np.int8]]:
    return np.zeros(packed.model.tensors[packed.model.inputs[0]].shape, np.int8)
