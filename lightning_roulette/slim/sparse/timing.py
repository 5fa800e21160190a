"""Times of several ways to compute the same, measured by turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

_SECONDS = 0.2  # of all ways together
_LEAST_ROUNDS = 7
_MOST_ROUNDS = 200


@torch.no_grad()
def medians(ways: Sequence[Callable[[], object]], clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Return the median time of each function in seconds. They run by turns, so that a busy machine slows all alike.

    Args:
        ways: The functions. Each is run once before it is timed.
        clock: Gives the time in seconds.
    """
    for way in ways:
        way()
    times: list[list[float]] = [[] for _ in ways]
    while len(times[0]) < _LEAST_ROUNDS or (len(times[0]) < _MOST_ROUNDS and sum(map(sum, times)) < _SECONDS):
        for way, known in zip(ways, times, strict=True):
            began = clock()
            way()
            known.append(clock() - began)
    return [median(known) for known in times]
