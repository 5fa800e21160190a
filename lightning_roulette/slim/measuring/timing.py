"""How long forward passes take: the one clock of this room, whatever runs them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

_FEWEST, _MOST = 5, 50  # runs
_SECONDS = 1.0  # for each of the alternatives


@dataclass(frozen=True)
class Latency:
    """How long a forward pass takes.

    Attributes:
        seconds: The median of the runs.
        spread: The distance between the first and the third quartile of the runs, in seconds.
        runs: Their number.
    """

    seconds: float
    spread: float
    runs: int

    def __str__(self) -> str:
        return f"{1000 * self.seconds:.3g} ms (spread {1000 * self.spread:.2g} ms, {self.runs} runs)"


def latencies(
    alternatives: Mapping[str, Callable[[], object]],
    seconds: float = _SECONDS,
    prepare: Callable[[str], object] = lambda name: None,
) -> dict[str, Latency]:
    """Time some calls by turns, so that what else the machine does meets all of them alike.

    Args:
        alternatives: Name to what is called. Gradients are off.
        seconds: The time for each of them.
        prepare: Is called with the name before each run, and not timed.
    """

    def once(name: str) -> float:
        prepare(name)
        return _once(alternatives[name])

    with torch.no_grad():
        first = [max(once(name), once(name)) for name in alternatives]  # these also warm up
        rounds = min(max(int(seconds / max(*first, 1e-9)), _FEWEST), _MOST)
        times: dict[str, list[float]] = {name: [] for name in alternatives}
        for _ in range(rounds):
            for name, known in times.items():
                known.append(once(name))
    return {name: _latency(one) for name, one in times.items()}


def _once(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _latency(times: Sequence[float]) -> Latency:
    low, middle, high = statistics.quantiles(times, n=4)
    return Latency(middle, high - low, len(times))
