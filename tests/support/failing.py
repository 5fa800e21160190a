"""A module whose search fails at a candidate, as from a power cut."""

from __future__ import annotations

from collections.abc import Callable

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
