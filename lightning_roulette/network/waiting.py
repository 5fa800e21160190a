"""A function that runs in a thread of its own and waits where it is told to."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from queue import Empty, SimpleQueue
from threading import Thread

import torch

from lightning_roulette.network.hooks import Enough
from lightning_roulette.network.modes import ThreadModes

_GLANCE = 0.1  # seconds


class WaitingRun:
    """A run of a function in a thread of its own. It runs while `go_on` waits for it, and at no other time.

    The run has a default dtype of its own, because precision plugins set it around a forward.

    Args:
        run: The function. It calls `wait` of this object in its thread.
        modes: Modes of the thread.

    Attributes:
        waits: Whether the function waits.
        ended: Whether the function has returned or raised.
    """

    def __init__(self, run: Callable[[], object], modes: ThreadModes) -> None:
        self._run, self._modes, self._context = run, modes, copy_context()
        # Ctrl-C while a thread gets from these queues cannot leave them locked, as it can with other locks
        self._turn: SimpleQueue[None] = SimpleQueue()
        self._stopped: SimpleQueue[None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="calibration run")
        self._told_to_end = self.waits = self.ended = False
        self._error: BaseException | None = None
        self._callers_dtype = torch.get_default_dtype()

    def go_on(self, seconds: float | None = None) -> None:
        """Let the function run until it waits or ends, and raise what it raises.

        Args:
            seconds: The longest time.

        Raises:
            TimeoutError: If it takes longer. It still runs then.
        """
        if self._thread.ident is None:
            self._thread.start()
        self._turn.put(None)
        try:
            self._stopped.get(timeout=seconds)
        except Empty:
            raise TimeoutError(f"a forward that waited did not go on within {seconds:.0f} s") from None
        if self.ended:
            self._joined()

    def wait(self) -> None:
        """Wait in the function's thread until `go_on` is called again.

        Raises:
            Enough: If the function is to end.
        """
        self.check()
        mine = torch.get_default_dtype()
        torch.set_default_dtype(self._callers_dtype)
        self.waits = True
        self._stopped.put(None)
        self._turn.get()
        self.waits = False
        self._callers_dtype = torch.get_default_dtype()
        torch.set_default_dtype(mine)
        self.check()

    def check(self) -> None:
        """Raise `Enough` if the function is to end."""
        if self._told_to_end:
            raise Enough

    def close(self) -> None:
        """End the thread, and return after its end also if Ctrl-C is pressed. Raise what the function raises."""
        self._told_to_end = True
        self._turn.put(None)
        if self._thread.ident is not None:
            self._joined()

    def _joined(self) -> None:
        interrupt: KeyboardInterrupt | None = None
        while not self.ended:  # an interrupted join takes a thread for ended that is not
            try:
                self._stopped.get(timeout=_GLANCE)
            except Empty:
                pass
            except KeyboardInterrupt as error:
                interrupt = error
        self._thread.join()
        raised, self._error = interrupt or self._error, None
        if raised is not None:
            raise raised

    def _work(self) -> None:
        self._turn.get()
        self._callers_dtype = torch.get_default_dtype()
        try:
            self.check()
            self._context.run(self._with_modes)
        except Enough:
            pass
        except BaseException as error:
            self._error = error
        finally:
            torch.set_default_dtype(self._callers_dtype)
            self.ended = True
            self._stopped.put(None)

    def _with_modes(self) -> None:
        with self._modes.entered():
            self._run()
