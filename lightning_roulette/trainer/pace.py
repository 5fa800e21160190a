"""Checks that are made from time to time, so that they take a small share of the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_SHARE = 0.005  # of the time, for the checks of one kind


class PacedCheck:
    """A check that is made from time to time, so that it takes less than 0.5 % of the time. A subclass defines `check`.

    Args:
        by_time: False: no check is due. With several processes it must be False, because each has a clock of its own.

    Attributes:
        by_time: See above.
    """

    def __init__(self, by_time: bool = True) -> None:
        self.by_time = by_time
        self._seconds, self._last = 0.0, time.monotonic()

    def check(self) -> None:
        """Check now, inside `measured`."""
        raise NotImplementedError

    def check_if_due(self) -> None:
        """Do the same as `check`, but only if the last check is long enough ago."""
        if self.by_time and time.monotonic() - self._last > self._seconds / _SHARE:
            self.check()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure a check, which is made inside the block."""
        began = time.monotonic()
        yield
        self._last = time.monotonic()
        self._seconds = self._last - began
