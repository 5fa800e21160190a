"""Evaluators of pruned networks, and the judge that a search asks for scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from lightning_roulette.judge.outcomes import Batches, Outcomes
from lightning_roulette.mask.mask import Mask
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.report.records import Scores


class Evaluator:
    """Scores pruned networks on folds of validation data. A subclass sets `folds` and defines `__call__`.

    The folds are parts of one random sample: a search ranks candidates on some folds and confirms its result on the
    others. The evaluator puts the weights of a candidate into the network, and takes them out again.

    An object of another class can be used too, if it has `folds` and is callable with the same arguments. Its
    `at_once`, `at_least`, `undivided_because`, `gain` and `recorded` are used if it has them.

    Attributes:
        folds: Number of folds.
        at_once: Largest number of folds that the evaluator prefers to see in one call; None if there is no limit.
        at_least: Number of folds that take no longer to validate than one fold.
        undivided_because: Why the data could not be divided into folds; empty if it was divided.
        gain: By how much the score of the dense network exceeds that of a network without its prunable weights; None if
            it is unknown. A default tolerance is at most a tenth of it.
        sees_weights: Whether scores depend on the candidate's weights; False if they depend on its mask alone.

    Examples:
        >>> class CountsWeights(Evaluator):
        ...     folds = 1
        ...
        ...     def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        ...         kept = candidate.mask.survivors
        ...         return Scores(rank=kept, score=kept)
    """

    folds: int = 1
    at_once: int | None = None
    at_least: int = 1
    undivided_because: str = ""
    gain: float | None = None
    sees_weights: bool = True

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        """Return the candidate's scores on the union of these folds, and leave everything else unchanged.

        Args:
            candidate: Mask and weights of the network.
            folds: Some of the numbers from 0 to `self.folds - 1`.
        """
        raise NotImplementedError

    def recorded(self, candidate: PrunedWeights, folds: Sequence[int]) -> tuple[Scores, Outcomes | None]:
        """Return the scores, and the outcomes behind `Scores.score` (None if they are unknown).

        Outcomes are `Singles`, `Batches` or `Resamples`. Override this method in an evaluator that knows them. If it is
        not overridden, a search validates the folds one by one, and takes the score of each fold as an outcome.

        Args:
            candidate: Mask and weights of the network.
            folds: Some of the numbers from 0 to `self.folds - 1`.
        """
        return self(candidate, folds), None

    def in_any_process(self, here: bool) -> bool:
        """Return whether something is true in at least one of the processes that search together.

        Override this method if several processes search the same network. `Tree.max_time` ends the search in all of
        them.

        Args:
            here: Whether it is true in this process.
        """
        return here

    @property
    def records(self) -> bool:
        """Whether `recorded` is overridden."""
        return type(self).recorded is not Evaluator.recorded


def as_evaluator(evaluate: Evaluator | Callable[[Mask], float]) -> Evaluator:
    """Return an `Evaluator` for anything that can score networks.

    - An `Evaluator` is returned as it is.
    - An object with an attribute `folds` is used like an `Evaluator`.
    - A function from a mask to a score, larger is better, becomes an evaluator with one fold.
    """
    if isinstance(evaluate, Evaluator):
        return evaluate
    return _Foreign(evaluate) if hasattr(evaluate, "folds") else _OneFold(evaluate)


class _OneFold(Evaluator):
    """A function of a mask as an evaluator with one fold."""

    sees_weights = False

    def __init__(self, score: Callable[[Mask], float]) -> None:
        self._score = score

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        value = float(self._score(candidate.mask))
        return Scores(rank=value, score=value)


class _Foreign(Evaluator):
    """An object with the methods of an `Evaluator` that is not derived from it."""

    def __init__(self, evaluate: Any) -> None:
        self._evaluate = evaluate
        self.folds = evaluate.folds
        self.at_once = getattr(evaluate, "at_once", None)
        self.at_least = getattr(evaluate, "at_least", 1)
        self.undivided_because = getattr(evaluate, "undivided_because", "")
        self.gain = getattr(evaluate, "gain", None)

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        return cast(Scores, self._evaluate(candidate, folds))

    def recorded(self, candidate: PrunedWeights, folds: Sequence[int]) -> tuple[Scores, Outcomes | None]:
        return cast("tuple[Scores, Outcomes | None]", self._evaluate.recorded(candidate, folds))

    def in_any_process(self, here: bool) -> bool:
        agree = getattr(self._evaluate, "in_any_process", None)
        return here if agree is None else bool(agree(here))

    @property
    def records(self) -> bool:
        return hasattr(self._evaluate, "recorded")


def divided(folds: int, confirm: float) -> tuple[range, range]:
    """Return the search folds and the held-out folds, which are a share `confirm` of all folds.

    With `confirm > 0` there is at least one of each. A single fold is a search fold.

    Examples:
        >>> divided(16, 0.25)
        (range(0, 12), range(12, 16))
    """
    kept = min(max(1, math.floor(confirm * folds + 0.5)), folds - 1) if confirm > 0 else 0
    return range(folds - kept), range(folds - kept, folds)


class Judge:
    """An evaluator with its folds divided and its work counted. Scores that are not finite become NaN.

    Args:
        evaluate: An `Evaluator`, or anything else that `as_evaluator` accepts.
        confirm: Share of the folds that is held out.

    Attributes:
        evaluate: The evaluator.
        search_folds: Folds that rank candidates.
        held_out_folds: Folds that confirm the result of the search.
    """

    def __init__(self, evaluate: Evaluator | Callable[[Mask], float], confirm: float) -> None:
        self.evaluate = as_evaluator(evaluate)
        self.search_folds, self.held_out_folds = divided(self.evaluate.folds, confirm)
        self._seen = 0

    @property
    def folds(self) -> int:
        """Number of all folds."""
        return self.evaluate.folds

    @property
    def validations(self) -> float:
        """Work so far, in validations of one network on all folds."""
        return self._seen / self.folds

    @property
    def records(self) -> bool:
        """Whether the evaluator itself returns outcomes."""
        return self.evaluate.records

    @property
    def at_once(self) -> int:
        """Largest number of folds that the evaluator prefers to see in one call."""
        most = self.evaluate.at_once
        return self.folds if most is None else min(self.folds, most)

    @property
    def at_least(self) -> int:
        """Number of folds that take no longer to validate than one fold."""
        return self.evaluate.at_least

    @property
    def undivided_because(self) -> str:
        """Why the evaluator could not divide its data into folds; empty if it did."""
        return self.evaluate.undivided_because

    @property
    def gain(self) -> float | None:
        """See `Evaluator`."""
        return self.evaluate.gain

    def scores(self, network: PrunedWeights, folds: Sequence[int]) -> Scores:
        """Return the scores of a network on the union of these folds."""
        self._seen += len(folds)
        return _finite(self.evaluate(network, folds))

    def recorded(self, network: PrunedWeights, folds: Sequence[int]) -> tuple[Scores, Outcomes | None]:
        """Return the scores and the outcomes behind them. Without recorded outcomes, each fold is one outcome."""
        if self.records:
            self._seen += len(folds)
            scores, outcomes = self.evaluate.recorded(network, folds)
            return _finite(scores), outcomes
        scores = self.scores(network, folds)
        if len(folds) < 2:
            return scores, None
        values = [self.scores(network, [fold]).score for fold in folds]
        return scores, Batches(torch.tensor(values, dtype=torch.float64), torch.ones(len(values), dtype=torch.float64))


def _finite(scores: Scores) -> Scores:
    values = [float(value) for value in (scores.rank, scores.score, scores.tiebreak)]
    return Scores(*(value if math.isfinite(value) else math.nan for value in values))
