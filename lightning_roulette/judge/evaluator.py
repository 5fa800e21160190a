"""What judges pruned networks: scores on folds of validation data, and what a search asks of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from lightning_roulette.judge.certificate import Batches, Outcomes
from lightning_roulette.mask.mask import Mask
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.report.records import Scores


class Evaluator(Protocol):
    """Judges pruned networks on folds of validation data. It puts them into the network; the search does not.

    The folds are parts of one sample, dealt at random: a search ranks on some and confirms on the others. One that can
    tell more than a score of a validation has a method `recorded(candidate, folds)` besides, which returns the scores
    and the `Outcomes` behind the floor score (None if it cannot tell them). It may have numbers `at_once`, the folds
    that it would rather see at a time at most, and `at_least`, those that take it no longer than a single one.
    """

    @property
    def folds(self) -> int:
        """How many folds there are."""
        ...

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        """The candidate's scores on the union of these of the folds 0 to `folds - 1`; all else is left as it was."""
        ...


def divided(folds: int, confirm: float) -> tuple[range, range]:
    """The folds that rank, and a share `confirm` that confirms: at least one of each; a single fold only ranks.

    Example:
        >>> divided(16, 0.25)
        (range(0, 12), range(12, 16))
    """
    kept = min(max(1, math.floor(confirm * folds + 0.5)), folds - 1) if confirm > 0 else 0
    return range(folds - kept), range(folds - kept, folds)


class Judge:
    """An evaluator as a search sees it: its folds divided, its work counted, what is not finite turned into NaN.

    Args:
        evaluate: An `Evaluator`, or a function from a mask to a score, larger is better: an evaluator of one fold.
        confirm: Share of the folds that is kept for confirmation.
    """

    def __init__(self, evaluate: Evaluator | Callable[[Mask], float], confirm: float) -> None:
        self._evaluate = cast(Evaluator, evaluate) if hasattr(evaluate, "folds") else _OneFold(evaluate)
        self.folds = self._evaluate.folds
        self.search_folds, self.held_out_folds = divided(self.folds, confirm)
        self._seen = 0

    @property
    def validations(self) -> float:
        """The work so far, in validations of one network on all folds."""
        return self._seen / self.folds

    @property
    def records(self) -> bool:
        """Whether the evaluator itself tells outcomes."""
        return hasattr(self._evaluate, "recorded")

    @property
    def at_once(self) -> int:
        """How many folds the evaluator would rather see at a time."""
        return min(self.folds, getattr(self._evaluate, "at_once", self.folds))

    @property
    def at_least(self) -> int:
        """How many folds take the evaluator no longer than one."""
        return getattr(self._evaluate, "at_least", 1)

    @property
    def undivided_because(self) -> str:
        """Why the evaluator could not deal its data to folds, if it says so; else empty."""
        return getattr(self._evaluate, "undivided_because", "")

    def scores(self, network: PrunedWeights, folds: Sequence[int]) -> Scores:
        """The scores of a network on the union of some folds."""
        self._seen += len(folds)
        return _finite(self._evaluate(network, folds))

    def recorded(self, network: PrunedWeights, folds: Sequence[int]) -> tuple[Scores, Outcomes | None]:
        """The same with the outcomes behind the floor score: those the evaluator tells, else the score of each fold."""
        if self.records:
            self._seen += len(folds)
            scores, outcomes = self._evaluate.recorded(network, folds)  # type: ignore[attr-defined]
            return _finite(scores), outcomes
        scores = self.scores(network, folds)
        if len(folds) < 2:
            return scores, None
        values = [self.scores(network, [fold]).score for fold in folds]
        return scores, Batches(torch.tensor(values, dtype=torch.float64), torch.ones(len(values), dtype=torch.float64))


@dataclass(frozen=True)
class _OneFold:
    """A plain function of a mask as an evaluator of one fold."""

    score: Callable[[Mask], float]
    folds: int = 1

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        value = float(self.score(candidate.mask))
        return Scores(rank=value, score=value)


def _finite(scores: Scores) -> Scores:
    values = [float(value) for value in (scores.rank, scores.score, scores.tiebreak)]
    return Scores(*(value if math.isfinite(value) else math.nan for value in values))
