"""Frozen records of a search: what was tried, what won, and why it ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from statistics import median
from typing import Any


class StopReason(Enum):
    """Why a search ended; the value is a sentence."""

    DECLINED = "As many levels in a row fell below the floor as patience allows."
    RATE_TOO_SMALL = "A level fell below the floor at the smallest pruning rate."
    TARGET_REACHED = "The target sparsity was reached."
    MAX_LEVELS = "The allowed number of levels was reached."
    EXHAUSTED = "No further weight may be pruned."
    INTERRUPTED = "The search was interrupted. The network is dense; the levels up to here had been accepted."
    FAILED = "An error ended the search. The network is dense; the levels up to here had been accepted."


@dataclass(frozen=True)
class Candidate:
    """One proposed mask, one level below its parent: a recipe, no tensors.

    Its chance comes from the report's seed, the level and `index` alone: with the dense weights, the parent's mask and
    the settings of the wheel it can be drawn again.

    Attributes:
        index: Its number among all candidates of its level, retries included.
        sparsity: Share of all prunable weights that it prunes, in [0, 1].
        score: The monitored metric, in its own units; NaN if it was not finite.
        rank: What ordered the branch, larger is better.
        tiebreak: What ordered equal ranks, larger is better.
        same_as: Index of an identical candidate whose scores it shares, None if it was validated itself.
    """

    index: int
    sparsity: float
    score: float
    rank: float
    tiebreak: float = 0.0
    same_as: int | None = None


@dataclass(frozen=True)
class Level:
    """One branch: its candidates, its winner, and whether that kept the floor.

    Attributes:
        level: Depth in the tree, from 1. A failed level is tried again under the same number.
        pruning_rate: Share of the parent's survivors that was to go.
        sparsity: Share of all prunable weights that each candidate prunes, in [0, 1].
        survivors: Weights that each candidate keeps.
        candidates: In the order drawn.
        winner: Index of the best candidate, None if no score was a number.
        accepted: Whether the winner kept the floor and became the next parent.
    """

    level: int
    pruning_rate: float
    sparsity: float
    survivors: int
    candidates: tuple[Candidate, ...]
    winner: int | None
    accepted: bool

    @property
    def score(self) -> float:
        """The winner's score, NaN if there is no winner."""
        return next((one.score for one in self.candidates if one.index == self.winner), math.nan)

    @property
    def spread(self) -> tuple[float, float, float]:
        """Smallest, median and largest score of the branch, NaN left out (all NaN if there is none)."""
        scores = [one.score for one in self.candidates if not math.isnan(one.score)] or [math.nan]
        return min(scores), median(scores), max(scores)


@dataclass(frozen=True)
class SearchReport:
    """What a search did, in numbers.

    Attributes:
        monitor: Name of the metric that scores are.
        mode: `"max"` if larger scores are better, else `"min"`.
        dense_score: Score of the network before pruning.
        tolerance: How much worse than the dense score a winner may be, in the metric's own units.
        branches: Candidates per level.
        seed: All chance of the search.
        size: Number of prunable weights.
        levels: Every branch in order, failed ones included.
        stop_reason: Why the search ended; None while it goes on.
        validations: How many networks were validated, the dense one included.
        seconds: Wall time of the search.
        score: The winner's score, measured once more after it was loaded; None if it was not.
        trained_score: The score at the end of the training that followed the search; None if none followed.
    """

    monitor: str
    mode: str
    dense_score: float
    tolerance: float
    branches: int
    seed: int
    size: int
    levels: tuple[Level, ...] = ()
    stop_reason: StopReason | None = None
    validations: int = 0
    seconds: float = 0.0
    score: float | None = None
    trained_score: float | None = None

    @property
    def floor(self) -> float:
        """The worst score a winner may have: the dense score less (for `"min"`, plus) the tolerance."""
        return self.dense_score - self.tolerance if self.mode == "max" else self.dense_score + self.tolerance

    @property
    def accepted(self) -> tuple[Level, ...]:
        """The accepted levels, from the densest to the winner."""
        return tuple(level for level in self.levels if level.accepted)

    @property
    def winner(self) -> Level | None:
        """The slimmest accepted level, None if the network stays dense."""
        return self.accepted[-1] if self.accepted else None

    @property
    def sparsity(self) -> float:
        """The winner's sparsity, in [0, 1]; 0 if the network stays dense."""
        return self.winner.sparsity if self.winner else 0.0

    @property
    def survivors(self) -> int:
        """How many weights the winner keeps."""
        return self.winner.survivors if self.winner else self.size

    @property
    def chosen_by(self) -> float:
        """The score that chose the winner: seen by the search, and so no unbiased measure of it."""
        return self.winner.score if self.winner else self.dense_score

    def in_metric(self, monitor: str, mode: str) -> SearchReport:
        """The report of a search over larger-is-better scores, in the units of the metric that they stand for."""
        if mode == "max":
            return replace(self, monitor=monitor)
        score = None if self.score is None else -self.score
        levels = tuple(
            replace(level, candidates=tuple(replace(one, score=-one.score) for one in level.candidates))
            for level in self.levels
        )
        return replace(self, monitor=monitor, mode="min", dense_score=-self.dense_score, levels=levels, score=score)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python numbers, strings, lists and dicts that survive JSON; NaN and infinities become strings."""
        fields = {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}
        fields["levels"] = [
            {**{name: _plain(getattr(level, name)) for name in level.__dataclass_fields__}, "candidates": candidates}
            for level in self.levels
            for candidates in [[{k: _plain(v) for k, v in vars(one).items()} for one in level.candidates]]
        ]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SearchReport:
        """The report that `to_dict` wrote."""
        levels = tuple(
            Level(**{**level, "candidates": tuple(_candidate(one) for one in level["candidates"])})
            for level in fields["levels"]
        )
        stop_reason = StopReason[fields["stop_reason"]] if fields["stop_reason"] else None
        names = ("dense_score", "tolerance", "score", "trained_score")
        numbers = {name: None if fields[name] is None else float(fields[name]) for name in names}
        return cls(**{**fields, **numbers, "levels": levels, "stop_reason": stop_reason})

    def __str__(self) -> str:
        widths = [max(len(row[i]) for row in self.rows()) for i in range(len(_HEADINGS))]
        table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in self.rows()]
        return "\n".join([*self.summary(), "", *table])

    def markdown(self) -> str:
        """The summary and the table of levels in Markdown."""
        head, *body = self.rows()
        lines = [head, ["---:"] * len(head), *body]
        return "\n\n".join(self.summary()) + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def summary(self) -> list[str]:
        """What came out, in a few sentences."""
        sentences = [
            f"{self.survivors:,} of {self.size:,} prunable weights kept ({1 - self.sparsity:.2%}): "
            f"sparsity {self.sparsity:.2%} after {len(self.accepted)} accepted levels.",
            f"{self.monitor}: dense {self.dense_score:.6g}, floor {self.floor:.6g}, "
            f"winner {self.chosen_by:.6g} (the score that chose it"
            + (")." if self.score is None else f"), {self.score:.6g} once loaded."),
        ]
        if self.trained_score is not None:
            sentences.append(f"{self.monitor} after the training that followed: {self.trained_score:.6g}.")
        reason = self.stop_reason.value if self.stop_reason else "The search goes on."
        return [*sentences, f"{reason} {self.validations} validations in {self.seconds:.1f} s."]

    def rows(self) -> list[list[str]]:
        """The table of levels as text, headings first."""
        return [list(_HEADINGS), *(_row(level) for level in self.levels)]


_HEADINGS = ("level", "pruning rate", "sparsity", "weights left", "score", "branch min", "median", "max", "accepted")


def _row(level: Level) -> list[str]:
    numbers = [f"{value:.6g}" for value in (level.score, *level.spread)]
    return [
        str(level.level),
        f"{level.pruning_rate:.3g}",
        f"{level.sparsity:.2%}",
        f"{level.survivors:,}",
        *numbers,
        "yes" if level.accepted else "no",
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _candidate(fields: Mapping[str, Any]) -> Candidate:
    numbers = {name: float(fields[name]) for name in ("score", "rank", "tiebreak")}
    return Candidate(**{**fields, **numbers})
