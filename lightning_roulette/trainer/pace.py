"""Decides when a check is due, so that checks take a small share of the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Decides when a check is due, so that checks take less than a share of the time.

    Args:
        share: The share of the time, in (0, 1).
        by_time: False: no check is due. With several processes it must be False, because each has a clock of its own.
    """

    def __init__(self, share: float, by_time: bool = True) -> None:
        self._share, self.by_time = share, by_time
        self._seconds, self._last = 0.0, time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the last check is long enough ago."""
        return self.by_time and time.monotonic() - self._last > self._seconds / self._share

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure a check, which is made inside the block."""
        began = time.monotonic()
        yield
        self._last = time.monotonic()
        self._seconds = self._last - began
