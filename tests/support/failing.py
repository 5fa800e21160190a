"""Modules and networks that fail at a given moment, as from a power cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from lightning_roulette.trainer.scores.trainer_evaluator import TrainerEvaluator
from tests.support.modules import Blobs


class Fails(Blobs):
    """An error at the `at`-th candidate that a search judges, in every process; `judged` is their number."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at, self.judged = at, 0


def counting(tell: Callable[[TrainerEvaluator], None] = lambda evaluator: None) -> Callable:
    """What may stand in for `TrainerEvaluator._as`: it counts candidates, the dense network aside, and tells."""
    lend = TrainerEvaluator._as

    def counted(evaluator, candidate):
        module = evaluator._module
        if isinstance(module, Fails) and candidate.mask.survivors < candidate.mask.size:
            module.judged += 1
            if module.judged == module.at:
                raise RuntimeError("power cut")
            tell(evaluator)
        return lend(evaluator, candidate)

    return counted


@contextmanager
def failing_forward(module: nn.Module, nth: int, error: BaseException) -> Iterator[None]:
    """Have `module.net` raise at its nth forward pass within the block."""
    calls = itertools.count(1)

    def count(*_):
        if next(calls) == nth:
            raise error

    handle = module.net.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()
