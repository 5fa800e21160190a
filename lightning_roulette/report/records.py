"""The frozen records of a search: why it stopped, what was tried, and with which scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from statistics import median

from lightning_roulette.report.former import FormerNames


class Method(Enum):
    """How a p-value is computed; the value is a sentence."""

    BETTING = "Exact: a betting bound on the differences between the two networks, sample by sample."
    BOOTSTRAP = "Approximate: a paired bootstrap of the metric over the samples."
    STUDENT = "Approximate: a t-test on the differences between the two networks, batch by batch."


class StopReason(Enum):
    """Why a search stopped; the value is a sentence. The printed report replaces `patience` by its number."""

    DECLINED = "Stopped: `patience` levels in a row missed the floor."
    RATE_TOO_SMALL = "Stopped: a level missed the floor at the smallest pruning rate."
    TARGET_REACHED = "Stopped: the target sparsity was reached."
    TARGET_NOT_HELD = "Stopped: the search reached the target sparsity, but missed the floor there on held-out data."
    MAX_LEVELS = "Stopped: the maximum number of levels was reached."
    OUT_OF_TIME = "Stopped: a further level would have ended after max_time."
    EXHAUSTED = "Stopped: no further weight can be pruned."
    INTERRUPTED = "Stopped: the search was interrupted. The network stays dense; the report ends at the interruption."
    TRAINING_ENDED = "Stopped: training ended."
    FAILED = "Stopped: an error ended the search. The network stays dense; the report ends at the error."
    BROKEN_OFF = (
        "Stopped: training was interrupted. The network is as it was then. Resumed training continues to prune."
    )


@dataclass(frozen=True)
class Skipped:
    """Parameters that are not prunable, or not refitted, for the same reason.

    Attributes:
        names: Names of the parameters.
        weights: Number of their weights.
        why: The reason, in a few words.
    """

    names: tuple[str, ...]
    weights: int
    why: str


@dataclass(frozen=True)
class Held:
    """What is left of a network before its search, of which some weights are held at zero.

    Attributes:
        sparsity: Share of all prunable weights that is held at zero, in [0, 1].
        survivors: Number of the other prunable weights.
        units: Number of units that are left; None if single weights leave.
        multiply_adds: Multiply-adds of one sample that are left; None if single weights leave, or if it is unknown.
        cost: What is left of what the report's `counted` names; None if single weights leave.
    """

    sparsity: float
    survivors: int
    units: int | None = None
    multiply_adds: int | None = None
    cost: float | None = None


@dataclass(frozen=True)
class Footprint:
    """What a network takes.

    Attributes:
        dense_bytes: Bytes of the tensors in its state dict, zeros included. Tied weights are counted once.
        compressed_bytes: Bytes of a lossless file of `save_compressed`; None if it was not measured.
        dense_multiply_adds: Multiply-adds of layers with weights for one sample, zeros included; None if unknown.
        effective_multiply_adds: Those with weights that are not zero; None if unknown.
    """

    dense_bytes: int
    compressed_bytes: int | None = None
    dense_multiply_adds: int | None = None
    effective_multiply_adds: int | None = None


@dataclass(frozen=True)
class Scores:
    """The scores of one network. Larger is better for all of them, and NaN never wins.

    Attributes:
        rank: Orders the candidates of a branch.
        score: Compared with the floor.
        tiebreak: Orders candidates of equal rank.
    """

    rank: float
    score: float
    tiebreak: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """One proposed mask, one level below its parent. It holds numbers only, no tensors.

    The mask can be drawn again. This needs the parent's weights and mask, the settings of the wheel, the report's seed,
    the level, `index`, and the indices of the earlier winners, because their importance factors are passed on. The
    candidate of a coarse level has the factors of its parent. A refit may keep other weights than those drawn.

    Attributes:
        index: Its number among all candidates of its level, retries included.
        sparsity: Share of all prunable weights that it prunes, in [0, 1].
        score: The monitored metric in its own units; NaN if it was not finite.
        rank: Orders the branch. Larger is better.
        tiebreak: Orders equal ranks. Larger is better.
        folds: Number of search folds that it was judged on. It is smaller than the number of all search folds if the
            candidate dropped out of the race. The scores are means over these folds, corrected for their difficulty.
            The winner's scores are measured on the union of all search folds.
        same_as: Index of an identical candidate with the same scores; None if the candidate was validated itself.
        refitted: Whether the scores were measured after a refit.
    """

    index: int
    sparsity: float
    score: float
    rank: float
    tiebreak: float = 0.0
    folds: int = 1
    same_as: int | None = None
    refitted: bool = False

    def twin(self, index: int) -> Candidate:
        """Return an identical candidate with another index.

        Args:
            index: Its number among all candidates of its level.
        """
        return replace(self, index=index, same_as=self.index)

    def scored(self, scores: Scores, folds: int) -> Candidate:
        """Return the candidate with its scores on this number of folds.

        Args:
            scores: The scores.
            folds: Number of search folds that they were measured on.
        """
        return replace(self, score=scores.score, rank=scores.rank, tiebreak=scores.tiebreak, folds=folds)


@dataclass(frozen=True)
class Level(FormerNames):
    """One branch: its candidates, its winner, and whether the winner kept the floor.

    Attributes:
        level: Depth in the tree, from 1. A failed level is tried again under the same number.
        pruning_rate: Share of the parent's survivors that the level removes.
        sparsity: Share of all prunable weights that the winner prunes, in [0, 1]; without a winner, that the first
            candidate prunes. Single weights leave all candidates in the same number.
        survivors: Number of weights that the same candidate keeps.
        candidates: All candidates, in the order drawn.
        winner: Index of the best candidate; None if no score was a number.
        accepted: Whether the winner kept the floor on the search folds and became the next parent.
        error: Paired standard error of `score` minus the dense score; for levels with an `epoch`, of `score` minus the
            parent's score before the cut. NaN if it is unknown, and for cuts with one candidate.
        held_out_score: Score on the held-out folds, in the metric's own units; None if the level was not judged there.
            It did not rank candidates, but it decided where the chain of accepted levels ends, and is therefore
            slightly optimistic.
        held_out_error: Paired standard error of `held_out_score` minus the dense score on the same folds; NaN if it is
            unknown.
        p_value: p-value of the null hypothesis that the level's true decline exceeds the tolerance; None without
            `confidence`.
        held: Whether the level kept the floor on the held-out folds; None if it was not judged there.
        undone: Reasons why a refit was not kept, by the name of the weight.
        epoch: Number of epochs that were trained before the cut, for levels that are judged after further training.
            `held_out_score` and `held` then belong to the network after this training. None for levels of a search.
        units: Number of units that are left; None if single weights leave.
        multiply_adds: Multiply-adds of one sample that are left; None if single weights leave, or if it is unknown.
        cost: What is left of what the report's `counted` names; None if single weights leave.
    """

    level: int
    pruning_rate: float
    sparsity: float
    survivors: int
    candidates: tuple[Candidate, ...]
    winner: int | None
    accepted: bool
    error: float = math.nan
    held_out_score: float | None = None
    held_out_error: float | None = None
    p_value: float | None = None
    held: bool | None = None
    undone: Mapping[str, str] = field(default_factory=dict, hash=False)
    epoch: int | None = None
    units: int | None = None
    multiply_adds: int | None = None
    cost: float | None = None

    @property
    def score(self) -> float:
        """Score of the winner; NaN if there is no winner."""
        return next((one.score for one in self.candidates if one.index == self.winner), math.nan)

    @property
    def spread(self) -> tuple[float, float, float]:
        """Smallest, median and largest score of the branch. NaN is ignored; all three are NaN if nothing is left."""
        scores = [one.score for one in self.candidates if not math.isnan(one.score)] or [math.nan]
        return min(scores), median(scores), max(scores)

    def negated(self) -> Level:
        """Return the level with the signs of all scores changed."""
        candidates = tuple(replace(one, score=-one.score) for one in self.candidates)
        return replace(self, candidates=candidates, held_out_score=negated(self.held_out_score))


def negated(value: float | None) -> float | None:
    """Return the value with its sign changed; None stays None."""
    return None if value is None else -value
