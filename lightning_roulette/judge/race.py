"""The race of a branch by successive halving: candidates that fall behind on the first folds drop out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TypeAlias

from lightning_roulette.judge.evaluator import Judge
from lightning_roulette.judge.selection import best_few, best_of
from lightning_roulette.large.limits import limits
from lightning_roulette.mask.mask import Mask
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.report.records import Candidate, Scores

Tell: TypeAlias = Callable[[int, Candidate | None], None]


@dataclass(frozen=True)
class Rung:
    """One stage of a race.

    Attributes:
        entrants: Number of candidates that enter it: the best so far.
        parts: Folds that the stage adds. Each part is judged on the union of its folds.
    """

    entrants: int
    parts: tuple[range, ...]


def rungs(branches: int, folds: int, at_once: int, at_least: int = 1, finalists: int = 2) -> list[Rung]:
    """Return the stages of successive halving: each time the number of folds doubles, half of the candidates go on.

    On branches of 20 candidates and 8 folds (two LeNets on MNIST, a perceptron on digits), the loss of the winner was
    within one paired standard error of the best candidate's loss in 96 to 98 % of branches. A race judged 52 of 160
    single folds. Two alternatives did equally well within the noise: a slower taper at the same work, and dropping
    candidates by paired tests.

    Args:
        branches: Number of candidates at the start.
        folds: Number of folds.
        at_once: Largest number of folds of a part.
        at_least: Number of folds that all candidates see.
        finalists: Smallest number of candidates that see all folds.

    Examples:
        >>> [(rung.entrants, rung.parts) for rung in rungs(20, 8, at_once=8)]
        [(20, (range(0, 1),)), (10, (range(1, 2),)), (5, (range(2, 4),)), (3, (range(4, 8),))]
    """
    stages = []
    begin, end, entrants = 0, min(at_least, folds), branches
    while begin < folds:
        parts = tuple(range(fold, min(fold + at_once, end)) for fold in range(begin, end, at_once))
        stages.append(Rung(entrants, parts))
        entrants = min(branches, max(finalists, math.ceil(branches / (2 * end))))
        begin, end = end, min(2 * end, folds)
    return stages


def no_race(branches: int, folds: range) -> list[Rung]:
    """Return one stage in which all candidates are judged on all folds at once."""
    return [Rung(branches, (folds,))]


@dataclass(frozen=True)
class Reference:
    """Scores of the dense network. They show how difficult the folds are that a candidate has seen.

    Attributes:
        parts: Scores on each part of the stages.
        whole: Scores on all search folds.
    """

    parts: Mapping[range, Scores]
    whole: Scores

    def corrected(self, scores: Mapping[range, Scores]) -> Scores:
        """Return the mean of a network's scores on some parts, corrected for the difficulty of these parts.

        The correction is the dense score on all search folds minus the dense score on these parts. The result is closer
        to the network's score on all search folds if the same parts are easy for both networks.
        """
        ours, dense = mean_of(scores), mean_of({part: self.parts[part] for part in scores})
        return Scores(
            rank=ours.rank + self.whole.rank - dense.rank,
            score=ours.score + self.whole.score - dense.score,
            tiebreak=ours.tiebreak + self.whole.tiebreak - dense.tiebreak,
        )


def furthest(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates that saw the most folds. Only they can win."""
    everyone = list(candidates)
    most = max((one.folds for one in everyone), default=0)
    return [one for one in everyone if one.folds == most]


def mean_of(scores: Mapping[range, Scores]) -> Scores:
    """Return the mean of scores on parts, weighted by their numbers of folds."""
    if len(scores) == 1:
        return next(iter(scores.values()))
    folds = sum(len(part) for part in scores)
    return Scores(
        rank=sum(len(part) * one.rank for part, one in scores.items()) / folds,
        score=sum(len(part) * one.score for part, one in scores.items()) / folds,
        tiebreak=sum(len(part) * one.tiebreak for part, one in scores.items()) / folds,
    )


class Masks:
    """Masks of candidates. A mask is drawn when it is first needed, and kept up to `limits().branch_mask_bytes`.

    Args:
        spin: Returns the mask of a candidate, by its index. It may be called again for the same index.
    """

    def __init__(self, spin: Callable[[int], Mask]) -> None:
        self._spin = spin
        self._kept: dict[int, Mask] = {}
        self._last: tuple[int, Mask] | None = None  # the last mask that was drawn, kept even beyond the limit

    def __call__(self, index: int) -> Mask:
        """Return the mask of a candidate."""
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        if index not in self._kept:
            self._last = None  # frees the memory of the earlier mask before the next is drawn
            mask = self._spin(index)
            self._last = index, mask
            if (len(self._kept) + 1) * mask.nbytes > limits().branch_mask_bytes:
                return mask
            self._kept[index] = mask
        return self._kept[index]

    def keep_only(self, indices: Iterable[int]) -> None:
        """Forget the masks of all other candidates."""
        self._kept = {index: self._kept[index] for index in indices if index in self._kept}


@dataclass(frozen=True)
class Runner:
    """A candidate in a race.

    Attributes:
        candidate: The candidate with its scores so far.
        seen: Its scores on each part that it saw.
    """

    candidate: Candidate
    seen: Mapping[range, Scores] = field(default_factory=dict)

    def scored(self, part: range, scores: Scores, dense: Reference | None) -> Runner:
        """Return the runner with its scores on one more part."""
        seen = {**self.seen, part: scores}
        mean = mean_of(seen) if dense is None else dense.corrected(seen)
        return Runner(self.candidate.scored(mean, sum(len(part) for part in seen)), seen)


class Race:
    """The candidates of one level and what is needed to judge them.

    Args:
        candidates: Candidates without scores. Each gets the sparsity of its own mask.
        mask: Returns the mask of a candidate, by its index.
        network: Returns the network of a mask.
        judge: Scores networks.
        dense: Scores of the dense network, by which candidates' scores are corrected for the difficulty of the parts
            that they saw. None: no correction.
        tell: Called after each judgement with the number of judgements so far and the best candidate so far.

    Attributes:
        candidates: See above.
        mask: See above.
        tell: See above.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        mask: Masks,
        network: Callable[[Mask], PrunedWeights],
        judge: Judge,
        dense: Reference | None,
        tell: Tell,
    ) -> None:
        self.candidates, self.mask, self.tell = candidates, mask, tell
        self._network, self._judge, self._dense = network, judge, dense

    def run(self, stages: Sequence[Rung]) -> list[Candidate]:
        """Return the candidates in the order given, with the mean of their scores on the parts that they saw.

        Candidates that saw fewer folds dropped out. A candidate with the mask of an earlier candidate is not judged; it
        gets the scores of the earlier one.
        """
        runners = {one.index: Runner(one) for one in self.candidates}
        owners: dict[bytes, int] = {}  # the first candidate with a mask, by the mask's digest
        done = 0
        for rung in stages:
            entrants = [one.index for one in best_few(_in_the_lead(runners), rung.entrants)]
            self.mask.keep_only(entrants)
            for part, index in product(rung.parts, entrants):
                runners[index] = self._judged(runners[index], part, owners)
                done += 1
                self.tell(done, best_of(_in_the_lead(runners)))
        return [_with_scores(runner.candidate, runners) for runner in runners.values()]

    def _judged(self, runner: Runner, part: range, owners: dict[bytes, int]) -> Runner:
        """Return the runner with its scores on a part. A runner with the mask of another is not judged."""
        candidate = runner.candidate
        if candidate.same_as is not None:
            return runner
        mask = self.mask(candidate.index)
        runner = replace(runner, candidate=replace(candidate, sparsity=mask.sparsity))
        if not runner.seen and (owner := owners.setdefault(mask.digest, candidate.index)) != candidate.index:
            return Runner(replace(runner.candidate, same_as=owner))
        return runner.scored(part, self._judge.scores(self._network(mask), part), self._dense)


def _in_the_lead(runners: Mapping[int, Runner]) -> list[Candidate]:
    """Return the candidates that saw the most folds, without copies of others."""
    return furthest(one.candidate for one in runners.values() if one.candidate.same_as is None)


def _with_scores(candidate: Candidate, runners: Mapping[int, Runner]) -> Candidate:
    """Return the candidate. A copy of another candidate gets the scores of the other."""
    if candidate.same_as is None:
        return candidate
    return runners[candidate.same_as].candidate.twin(candidate.index)
