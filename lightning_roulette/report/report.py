"""Frozen records of a search: what was tried, what won, and why it ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from statistics import median
from typing import Any


class Method(Enum):
    """How a p-value arises; the value is a sentence."""

    BETTING = "Exact: a betting bound on the differences between the two networks, sample by sample."
    BOOTSTRAP = "Approximate: a paired bootstrap of the metric over the samples."
    STUDENT = "Approximate: a t-test on the differences between the two networks, batch by batch."


class StopReason(Enum):
    """Why a search ended; the value is a sentence."""

    DECLINED = "As many levels in a row fell below the floor as patience allows."
    RATE_TOO_SMALL = "A level fell below the floor at the smallest pruning rate."
    TARGET_REACHED = "The target sparsity was reached."
    MAX_LEVELS = "The allowed number of levels was reached."
    EXHAUSTED = "No further weight may be pruned."
    INTERRUPTED = "The search was interrupted. The network is dense; the levels up to here had been accepted."
    TRAINING_ENDED = "Training ended."
    FAILED = "An error ended the search. The network is dense; the levels up to here had been accepted."
    BROKEN_OFF = "Training was broken off. The network is as it was then; a training that is resumed prunes on."


@dataclass(frozen=True)
class Scores:
    """What an evaluation found; larger is better throughout, NaN never wins.

    Attributes:
        rank: Orders the branch.
        score: Held against the floor.
        tiebreak: Orders equal ranks.
    """

    rank: float
    score: float
    tiebreak: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """One proposed mask, one level below its parent: a recipe, no tensors.

    Its chance comes from the report's seed, the level and `index` alone: with the parent's weights and mask, the
    settings of the wheel, and the indices of the winners before it (to whose leanings to layers it adds its own) it can
    be drawn again.

    Attributes:
        index: Its number among all candidates of its level, retries included.
        sparsity: Share of all prunable weights that it prunes, in [0, 1].
        score: The monitored metric, in its own units; NaN if it was not finite.
        rank: What ordered the branch, larger is better.
        tiebreak: What ordered equal ranks, larger is better.
        folds: How many of the ranking folds it was judged on: fewer than all if it dropped out of the race. Its scores
            are means over these; the winner's are those on their union.
        same_as: Index of an identical candidate whose scores it shares, None if it was validated itself.
        refitted: Whether its scores are those after a refit.
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
        """An identical candidate."""
        return replace(self, index=index, same_as=self.index)

    def scored(self, scores: Scores, folds: int) -> Candidate:
        """The candidate with its scores on so many folds."""
        return replace(self, score=scores.score, rank=scores.rank, tiebreak=scores.tiebreak, folds=folds)


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
        accepted: Whether the winner kept the floor on the ranking folds and became the next parent.
        error: Paired standard error of `score` less the dense score (with `epoch`, the parent's before the cut); NaN if
            it cannot be told, or if a cut between epochs had one candidate.
        held_out_score: The score on the held-out folds, in the metric's own units; None if the level was not judged
            there. It ranked nothing, but decided where the chain of accepted levels ends, and so is slightly
            optimistic.
        held_out_error: Paired standard error of `held_out_score` less the dense score on the same folds; NaN if it
            cannot be told.
        p_value: Of the null hypothesis that the level's true decline exceeds the tolerance; None without `confidence`.
        held: Whether the level held on the confirmation folds; None if it was not judged there.
        undone: The weights of which a refit was undone, by name, and why.
        epoch: How many epochs were trained when it was cut, for levels that were judged after training on:
            `held_out_score` and `held` are then of the network that training made of it. None for levels of a search.
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

    @property
    def score(self) -> float:
        """The winner's score, NaN if there is no winner."""
        return next((one.score for one in self.candidates if one.index == self.winner), math.nan)

    def negated(self) -> Level:
        """The level with all scores of opposite sign."""
        candidates = tuple(replace(one, score=-one.score) for one in self.candidates)
        return replace(self, candidates=candidates, held_out_score=_negated(self.held_out_score))

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
        dense_score: Score of the network before pruning, on the ranking folds.
        tolerance: How much worse than the dense score a winner may be, in the metric's own units.
        branches: Candidates per level.
        seed: All chance of the search.
        size: Number of prunable weights.
        levels: Every branch in order, failed ones included.
        stop_reason: Why the search ended; None while it goes on.
        validations: The work, in validations of one network on all folds, the dense one's included.
        seconds: Wall time of the search.
        rank_by: What ordered the branches.
        folds: How many folds ranked, and how many confirmed; the latter is 0 if ranking and floor shared all the data.
        undivided_because: Why they did, if that was not asked for; else empty.
        held_out_dense: Score of the network before pruning on the confirmation folds; None if there were none.
        confidence: With this confidence the winner's true decline is at most `tolerance`; None if none was asked for.
        method: What the confidence rests on; None if none was asked for.
        samples: How many samples (or batches, if only those were known) the confirmation folds hold; None if unknown.
        score: The winner's score, measured once more after it was loaded; None if it was not.
        trained_score: The score at the end of the training that followed the search; None if none followed.
        importance: What the wheel drew by, in words.
        refit: What refitted the levels, in words; empty if nothing did.
        left_alone: The prunable weights that it could not refit, by name, and why.
        gradual: Whether the network trained on after each cut, before the level was judged.
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
    validations: float = 0
    seconds: float = 0.0
    rank_by: str = "score"
    folds: tuple[int, int] = (1, 0)
    undivided_because: str = ""
    held_out_dense: float | None = None
    confidence: float | None = None
    method: Method | None = None
    samples: int | None = None
    score: float | None = None
    trained_score: float | None = None
    importance: str = ""
    refit: str = ""
    left_alone: Mapping[str, str] = field(default_factory=dict, hash=False)
    gradual: bool = False

    @property
    def floor(self) -> float:
        """The worst score a winner may have: the dense score less (for `"min"`, plus) the tolerance."""
        return self.dense_score - self.tolerance if self.mode == "max" else self.dense_score + self.tolerance

    @property
    def held_out_floor(self) -> float | None:
        """The floor on the confirmation folds; None if there were none."""
        if self.held_out_dense is None:
            return None
        return self.held_out_dense - self.tolerance if self.mode == "max" else self.held_out_dense + self.tolerance

    @property
    def accepted(self) -> tuple[Level, ...]:
        """The accepted levels, from the densest to the slimmest."""
        return tuple(level for level in self.levels if level.accepted)

    @property
    def winner(self) -> Level | None:
        """The slimmest accepted level that held, None if the network stays dense.

        Until the confirmation begins, and without confirmation folds, every accepted level counts.
        """
        begun = any(level.held is not None for level in self.accepted)
        holding = [level for level in self.accepted if level.held or not begun]
        return holding[-1] if holding else None

    @property
    def sparsity(self) -> float:
        """The winner's sparsity, in [0, 1]; 0 if the network stays dense."""
        return self.winner.sparsity if self.winner else 0.0

    @property
    def survivors(self) -> int:
        """How many weights the winner keeps."""
        return self.winner.survivors if self.winner else self.size

    @property
    def search_score(self) -> float:
        """The winner's score on the ranking folds: seen by the search, and so no unbiased measure of it."""
        return self.winner.score if self.winner else self.dense_score

    @property
    def decline(self) -> float:
        """How much worse than the dense network the winner is, in the metric's own units; negative if it is better.

        With confirmation folds the winner is the last level that held there, chosen for that, so that what it showed is
        too little; the next, chosen for not holding, showed too much. It is halfway between the largest decline that
        the levels up to the winner showed, at least 0, and the decline of the level that did not hold, but no more than
        the tolerance. Where all levels held it is the former. NaN before they were asked. Without confirmation folds,
        the decline on the data that chose the winner.
        """
        if self.held_out_dense is None:
            return self._worse(self.dense_score, self.search_score)
        if self.winner is None:
            return 0.0 if any(level.held is not None for level in self.accepted) or not self.accepted else math.nan
        dense = self.held_out_dense
        held_out = [level.held_out_score for level in self.accepted if level.level <= self.winner.level]
        held = [self._worse(dense, score) for score in held_out if score is not None]
        if len(held) < len(held_out):
            return math.nan
        most = max(0.0, *held)
        missed = [
            self._worse(dense, one.held_out_score)
            for one in self.accepted
            if one.held is False and one.held_out_score is not None
        ]
        return most if not missed or math.isnan(missed[0]) else max(most, min(self.tolerance, (most + missed[0]) / 2))

    def _worse(self, dense: float, score: float) -> float:
        return dense - score if self.mode == "max" else score - dense

    def in_metric(self, monitor: str, mode: str) -> SearchReport:
        """The report of a search over larger-is-better scores, in the units of the metric that they stand for."""
        if mode == "max":
            return replace(self, monitor=monitor)
        return replace(
            self,
            monitor=monitor,
            mode="min",
            dense_score=-self.dense_score,
            held_out_dense=_negated(self.held_out_dense),
            levels=tuple(level.negated() for level in self.levels),
            score=_negated(self.score),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain Python numbers, strings, lists and dicts that survive JSON; NaN and infinities become strings."""
        return _plain_fields(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SearchReport:
        """The report that `to_dict` wrote, in this version or an earlier one."""
        fields = _renamed(fields)
        read = {
            "levels": tuple(_level(level) for level in fields["levels"]),
            "stop_reason": StopReason[fields["stop_reason"]] if fields["stop_reason"] else None,
            "method": Method[fields["method"]] if fields.get("method") else None,
            "folds": tuple(fields["folds"]),
        }
        names = ("dense_score", "tolerance", "score", "trained_score", "held_out_dense")
        return cls(**{**fields, **_numbers(fields, names), **read})

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
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
            f"sparsity {self.sparsity:.2%}, level {self.winner.level if self.winner else 0} of {len(self.accepted)} "
            + ("that were cut." if self.gradual else "accepted ones."),
            *(self._judgements() if self.gradual else self._choice()),
            *self._refits(),
        ]
        if self.trained_score is not None:
            sentences.append(f"{self.monitor} after the training that followed: {self.trained_score:.6g}.")
        reason = self.stop_reason.value if self.stop_reason else "The search goes on."
        return [*sentences, f"{reason} {self.validations:.4g} validations' worth of work in {self.seconds:.1f} s."]

    def _choice(self) -> list[str]:
        """What chose the winner of a search."""
        once_loaded = ")." if self.score is None else f"), {self.score:.6g} once loaded, on all the data."
        return [
            f"{self.monitor}: dense {self.dense_score:.6g}, floor {self.floor:.6g}, "
            f"winner {self.search_score:.6g} (the score that chose it{once_loaded}",
            *self._confirmation(),
        ]

    def _judgements(self) -> list[str]:
        """What was seen of levels after the training that followed their cuts."""
        if self.held_out_dense is None:
            return []
        found = self.winner.held_out_score if self.winner else None
        held_out = self.held_out_dense if found is None else found
        where = "on the confirmation data, which ranked nothing" if self.folds[1] else "on all the data"
        once_loaded = "" if self.score is None else f", {self.score:.6g} once loaded, on all the data"
        return [
            f"{self.monitor}, judged after training went on, {where}: dense {self.held_out_dense:.6g}, floor "
            f"{self.held_out_floor:.6g}, winner {held_out:.6g}{once_loaded}."
        ]

    def _confirmation(self) -> list[str]:
        """What the confirmation folds said."""
        if self.held_out_dense is None:
            why = f" ({self.undivided_because})" if self.undivided_because else ""
            return [f"No data was kept for confirmation{why}: the winner was chosen and judged on the same."]
        held_out = self.winner.held_out_score if self.winner else self.held_out_dense
        if held_out is None:
            return []
        error = self.winner.held_out_error if self.winner else None
        off = f" (s.e. {error:.2g})" if error is not None and not math.isnan(error) else ""
        data = "On the confirmation data, which ranked nothing"
        said = f"{data}: dense {self.held_out_dense:.6g}, winner {held_out:.6g}{off}"
        return [f"{said}; estimated decline {self.decline:.4g}.", *self._certificate()]

    def _refits(self) -> list[str]:
        """What refits did, and where they could not."""
        said = [f"Drawn by {self.importance}."] if self.importance not in ("", "magnitude") else []
        if not self.refit:
            return said
        said.append(f"Refitted: {self.refit}.")
        undone = self.winner.undone if self.winner else {}
        for what, names in (("Not refitted", self.left_alone), ("Refit undone in the winner", undone)):
            if names:
                said.append(f"{what}: {', '.join(f'{name} ({why})' for name, why in names.items())}.")
        return [" ".join(said)]

    def _certificate(self) -> list[str]:
        if self.confidence is None or self.method is None:
            return []
        if self.winner is None:
            return [f"No level could be certified with confidence {self.confidence:g}: the network stays dense."]
        when = " before the training that followed" if self.trained_score is not None else ""
        return [
            f"With confidence {self.confidence:g} the winner's true decline{when} is at most {self.tolerance:g}. "
            f"{self.method.value}"
        ]

    def rows(self) -> list[list[str]]:
        """The table of levels as text, headings first."""
        rows = [list(_HEADINGS), *(_row(level) for level in self.levels)]
        if not self.gradual:
            return rows
        columns = list(zip(*rows, strict=True))
        epochs = ("epoch", *("-" if level.epoch is None else str(level.epoch) for level in self.levels))
        judged = ("judged", *columns[_HELD_OUT][1:])
        shown = columns[1 : _ACCEPTED if self.branches > 1 else _ERROR]
        return [list(row) for row in zip(columns[0], epochs, *shown, judged, columns[-1], strict=True)]


_HEADINGS: tuple[str, ...] = (
    "level",
    "pruning rate",
    "sparsity",
    "weights left",
    "score",
    "s.e.",
    "branch min",
    "median",
    "max",
    "accepted",
)
_HEADINGS += ("held-out", "s.e.", "held")
_ERROR, _ACCEPTED, _HELD_OUT = (_HEADINGS.index(name) for name in ("s.e.", "accepted", "held-out"))


def _row(level: Level) -> list[str]:
    return [
        str(level.level),
        f"{level.pruning_rate:.3g}",
        f"{level.sparsity:.2%}",
        f"{level.survivors:,}",
        f"{level.score:.6g}",
        _known(level.error, ".2g"),
        *(f"{value:.6g}" for value in level.spread),
        "yes" if level.accepted else "no",
        _known(level.held_out_score, ".6g"),
        _known(level.held_out_error, ".2g"),
        "-" if level.held is None else "yes" if level.held else "no",
    ]


def _known(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def _negated(value: float | None) -> float | None:
    return None if value is None else -value


def _plain_fields(record: Any) -> dict[str, Any]:
    return {name: _plain(getattr(record, name)) for name in record.__dataclass_fields__}


def _plain(value: Any) -> Any:
    if isinstance(value, Candidate | Level):
        return _plain_fields(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(member) for member in value]
    return dict(value) if isinstance(value, Mapping) else value


# Keys of dictionaries that earlier versions wrote, and what they are called now.
_FORMER_NAMES = {
    "gated": "held_out_score",
    "gated_error": "held_out_error",
    "gated_dense": "held_out_dense",
    "shared": "undivided_because",
}


def _renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {_FORMER_NAMES.get(name, name): value for name, value in fields.items()}


def _numbers(fields: Mapping[str, Any], names: Sequence[str]) -> dict[str, float | None]:
    return {name: None if (value := fields.get(name)) is None else float(value) for name in names}


def _level(fields: Mapping[str, Any]) -> Level:
    candidates = tuple(_candidate(one) for one in fields["candidates"])
    fields = _renamed(fields)
    numbers = _numbers(fields, ("error", "held_out_score", "held_out_error", "p_value"))
    return Level(**{**fields, **numbers, "candidates": candidates})


def _candidate(fields: Mapping[str, Any]) -> Candidate:
    return Candidate(**{**fields, **_numbers(fields, ("score", "rank", "tiebreak"))})
