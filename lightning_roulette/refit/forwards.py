"""Runs of a network's forward on batches, which stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from lightning_roulette.large.digests import digests_of
from lightning_roulette.network.containers import rebuilt, tensors_of
from lightning_roulette.network.modes import evaluating
from lightning_roulette.refit.runs import Runs


def forwards(module: nn.Module, batches: Sequence[Any]) -> Runs:
    """Return runs of a network's forward, in evaluation mode.

    Args:
        module: The network.
        batches: Inputs of its forward, each a tensor or a tuple of arguments. The network may write to them: if it does
            so in its first run on any batch, all later runs are on copies, too.
    """
    return Runs(len(batches), _Forward(module, batches).run, partial(evaluating, module))


class _Forward:
    """A network's forward on batches of given numbers. After the last one come the first ones again."""

    def __init__(self, module: nn.Module, batches: Sequence[Any]) -> None:
        self._module, self._batches = module, batches
        self._unchanged: set[int] = set()  # batches to which the network did not write
        self._writes = False

    def run(self, number: int) -> object:
        """Run the network on a batch. Copies take memory while a run waits, so there are none if none are needed."""
        number %= len(self._batches)
        batch = self._batches[number]
        if number in self._unchanged and not self._writes:
            return self._result(batch)
        twin = rebuilt(batch, copies=True)
        found = self._result(twin)
        if digests_of(tensors_of(twin)) == digests_of(tensors_of(batch)):
            self._unchanged.add(number)
        else:
            self._writes = True
        return found

    def _result(self, batch: Any) -> object:
        return self._module(*batch) if isinstance(batch, tuple | list) else self._module(batch)


def number_of(batches: Sequence[Any] | int, has_run: bool) -> int:
    """Return how many batches there are.

    Args:
        batches: A list of batches, or their number.
        has_run: Whether there is a function that runs the network on the batch of a number.

    Raises:
        TypeError: If `batches` is neither, or if it is a number and there is no such function.
    """
    if not isinstance(batches, int | Sequence):
        kind = type(batches).__name__
        raise TypeError(f"batches is a {kind}, but must be a list of batches, or a number. Pass list(...) of it.")
    number = batches if isinstance(batches, int) else len(batches)
    if isinstance(batches, int) and not has_run:
        raise TypeError(f"batches is {batches}, but must be a list of inputs if run is None. Pass the inputs, or run.")
    return number
