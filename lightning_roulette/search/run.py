"""What stays the same during one search, and the dense network that every level is compared with."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_roulette.judge.certificate import method_of, too_few
from lightning_roulette.judge.evaluator import Judge
from lightning_roulette.judge.outcomes import Outcomes, Singles, size_of
from lightning_roulette.judge.race import Reference, Rung, no_race, rungs
from lightning_roulette.mask.history import History
from lightning_roulette.mask.mask import Mask
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.refit.refitted import Refitted
from lightning_roulette.report.records import Held, Scores, StopReason
from lightning_roulette.report.report import SearchReport
from lightning_roulette.search.amounts import counts
from lightning_roulette.search.calibration_fit import misfit
from lightning_roulette.search.drawing import Drawing
from lightning_roulette.search.observer import Observer
from lightning_roulette.search.refitter import Refitter
from lightning_roulette.search.state import State
from lightning_roulette.search.tolerance import Tolerance, default_tolerance
from lightning_roulette.search.winner import Winner
from lightning_roulette.unit import Reduction


@dataclass(frozen=True, eq=False)
class Dense:
    """The dense network as it was validated.

    Attributes:
        scores: Scores on the search half.
        outcomes: Outcomes behind the score on the search half. None if they are unknown.
        held_out: Score on the held-out half. None if there is no held-out half.
        held_out_outcomes: Outcomes behind the score on the held-out half. None if they are unknown.
    """

    scores: Scores
    outcomes: Outcomes | None
    held_out: float | None = None
    held_out_outcomes: Outcomes | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """What stays the same during one search.

    Attributes:
        judge: Scores networks, and counts the work.
        refitter: What is done to a network after its mask was drawn.
        drawing: Draws candidates.
        observer: Is told of each step.
        dense: The dense network as it was validated.
        stages: Rungs of the race of every level.
        reference: Dense scores that candidates on few folds are corrected by. None: no correction.
        began: When the search began, in seconds of a monotonic clock.
    """

    judge: Judge
    refitter: Refitter
    drawing: Drawing
    observer: Observer
    dense: Dense
    stages: Sequence[Rung]
    reference: Reference | None
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the search began."""
        return time.monotonic() - self.began

    @property
    def rejudges(self) -> bool:
        """Whether the best candidate is judged again, on all search folds together and with its outcomes."""
        return self.judge.records or len(self.judge.search_folds) > 1

    @property
    def race_length(self) -> int:
        """Validations of candidates in the race of one level."""
        return sum(rung.entrants * len(rung.parts) for rung in self.stages)

    @property
    def work(self) -> float:
        """Work of one level, in validations of one network on all folds."""
        folds = sum(rung.entrants * len(part) for rung in self.stages for part in rung.parts)
        again = len(self.judge.search_folds) if self.rejudges else 0
        return (folds + again * (1 if self.judge.records else 2)) / self.judge.folds

    def report(self, state: State, reason: StopReason | None = None) -> SearchReport:
        """The report so far.

        Args:
            state: Where the search stands.
            reason: Why it ended. None while it goes on.
        """
        return replace(
            state.report,
            importance=self.drawing.in_words,
            stop_reason=reason,
            validations=self.judge.validations,
            seconds=self.seconds,
        )

    def winner(self, state: State, reason: StopReason | None = None) -> Winner:
        """The winner so far. Takes the arguments of `report`."""
        history = state.history
        mask = state.parent if history.level == history.deepest else history.mask
        return Winner(mask, self.report(state, reason), self.refitter.weights, history, state.refits)


def begin(
    judge: Judge,
    refitter: Refitter,
    drawing: Drawing,
    observer: Observer,
    *,
    branches: int,
    tolerance: float | None,
    confidence: float | None,
    race: bool,
    seed: int,
    history: History | None = None,
    factors: Mapping[str, float] | None = None,
    refuse_nan: bool = True,
    target_sparsity: float | None = None,
    target: Reduction | None = None,
) -> tuple[Run, State]:
    """Validate the network as it is, and make the first state from it.

    Args:
        judge: Scores networks.
        refitter: What is done to a network after its mask was drawn.
        drawing: Draws candidates.
        observer: Is told of the dense network.
        branches: Candidates per level.
        tolerance: See `search`.
        confidence: See `search`.
        race: See `Validation`.
        seed: See `search`.
        history: Levels that the network already has. None: none, and only what is held is zero.
        factors: Logarithms of its importance factors. Parameters that are not named have 0.
        refuse_nan: Whether a dense score that is not finite is an error.
        target_sparsity: See `search`. It is only noted in the report.
        target: See `Tree`. It is only noted in the report.

    Raises:
        ValueError: If the dense score is not finite, or `confidence` cannot be certified on the held-out half.
    """
    began, weights = time.monotonic(), refitter.weights
    history = history or History.of_dense(weights, None if refitter.held is None else refitter.kept)
    refits = refitter.dense()
    network = refitter.network(parent := history.mask, Refitted())
    dense = _validated(judge, network, refuse_nan)
    outcomes = dense.held_out_outcomes if judge.held_out_folds else dense.outcomes
    allowed = default_tolerance(judge, network, outcomes) if tolerance is None else Tolerance(tolerance)
    report = SearchReport(
        "score",
        "max",
        dense.scores.score,
        allowed.value,
        branches,
        seed,
        parent.size,
        folds=(len(judge.search_folds), len(judge.held_out_folds)),
        undivided_because=judge.undivided_because,
        refit=refitter.in_words,
        left_alone=refitter.left_alone(),
        not_refitted=refitter.not_refitted(),
        importance=drawing.in_words,
        held_out_dense=dense.held_out,
        samples=None if dense.held_out_outcomes is None else size_of(dense.held_out_outcomes),
        target_sparsity=target_sparsity,
        tolerance_why=allowed.why,
        notes=tuple(one for one in [refitter.rounded] if one),
        target_reduction=None if target is None else target.share,
        held=_held(refitter, drawing),
        **_of_units(drawing, parent),
    )
    if note := misfit(judge, refitter, parent, dense.scores, dense.outcomes):
        if not history.deepest:
            warnings.warn(note, stacklevel=3)
        refitter = replace(refitter, keeps_statistics=True)
        report = replace(report, notes=(*report.notes, note), refit=refitter.in_words)
    if confidence is not None:
        report = _promised(report, judge, dense, float(confidence))
    stages, reference = _stages(judge, network, dense.scores, branches, refitter.finalists, race)
    run = Run(judge, refitter, drawing, observer, dense, stages, reference, began)
    state = State(report, history, parent, Refitted(), {**dict.fromkeys(drawing.names, 0.0), **(factors or {})}, refits)
    observer.on_dense(run.winner(state), run.work)
    return run, state


def _of_units(drawing: Drawing, parent: Mask) -> dict[str, Any]:
    """What the report says of the units of a network, by field. Empty without units."""
    if (units := drawing.units) is None:
        return {}
    known = {} if units.multiply_adds is None else {"multiply_adds": round(units.whole(parent, units.multiply_adds))}
    cost = {"counted": units.cost.counted, "cost": units.whole(parent)}
    return {"unit": units.kind, "units": units.count, **cost, **known}


def _held(refitter: Refitter, drawing: Drawing) -> Held | None:
    """What is left of the network before the search, if weights of it are held at zero."""
    if refitter.held is None or (kept := refitter.kept).survivors == kept.size:
        return None
    return Held(kept.sparsity, kept.survivors, **counts(drawing.units, kept))


def _validated(judge: Judge, network: PrunedWeights, refuse_nan: bool) -> Dense:
    """Validate the dense network on both halves."""
    scores, outcomes = judge.recorded(network, judge.search_folds)
    _check_finite(scores.score, refuse_nan)
    if not judge.held_out_folds:
        return Dense(scores, outcomes)
    held_out, held_out_outcomes = judge.recorded(network, judge.held_out_folds)
    _check_finite(held_out.score, refuse_nan)
    return Dense(scores, outcomes, held_out.score, held_out_outcomes)


def _check_finite(score: float, refuse_nan: bool) -> None:
    if refuse_nan and math.isnan(score):
        raise ValueError(
            "the score of the dense network is NaN or infinite, so there is no floor. Nothing was pruned. Check that "
            "the network gives finite outputs on the validation data."
        )


def _promised(report: SearchReport, judge: Judge, dense: Dense, confidence: float) -> SearchReport:
    """The report with the confidence and its method. Raises if nothing could be certified."""
    outcomes = dense.held_out_outcomes
    if outcomes is None:
        why = f" ({report.undivided_because})" if report.undivided_because else ""
        raise ValueError(
            f"confidence is {confidence}, but the held-out half has no scores of single samples or batches{why}. Log "
            "a torchmetrics object or a value for each batch in validation, or pass confidence=None."
        )
    share = len(judge.held_out_folds) / judge.folds
    width = outcomes.high - outcomes.low if isinstance(outcomes, Singles) else None
    if why := too_few(size_of(outcomes), width, confidence, report.tolerance, share):
        raise ValueError(why)
    return replace(report, confidence=confidence, method=method_of(outcomes))


def _stages(
    judge: Judge, network: PrunedWeights, whole: Scores, branches: int, finalists: int, race: bool
) -> tuple[Sequence[Rung], Reference | None]:
    """Rungs of every level, and the dense scores on their parts. No race if the dense network has no score there."""
    folds = judge.search_folds
    if race and len(folds) > 1 and branches > 1:
        stages = rungs(branches, len(folds), judge.at_once, judge.at_least, max(2, finalists))
        scores = {part: judge.scores(network, part) for rung in stages for part in rung.parts}
        if not any(math.isnan(one.rank + one.score) for one in (whole, *scores.values())):
            return stages, Reference(scores, whole)
    return no_race(branches, folds), None
