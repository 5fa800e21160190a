"""How long an inference takes with plain and with decoded weights, on this machine."""

from __future__ import annotations

from functools import partial

import numpy as np

from lightning_roulette.slim.export.tflm.interpreter import load
from lightning_roulette.slim.export.tflm.memory import Packed
from lightning_roulette.slim.measuring.timing import Latency, latencies


def times_of(plain: Packed, found: Packed) -> tuple[Latency, Latency]:
    """The time of an inference of each of two models, by turns."""
    runs = {name: partial(load(one.model, one.file), _zeros(one)) for name, one in (("plain", plain), ("found", found))}
    times = latencies(runs)
    return times["plain"], times["found"]


def _zeros(packed: Packed) -> np.ndarray[tuple[int, ...], np.dtype[np.int8]]:
    return np.zeros(packed.model.tensors[packed.model.inputs[0]].shape, np.int8)
