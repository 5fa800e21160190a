"""One level of a search: spin a branch, race it, refit the best candidates, judge the winner."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

from lightning_roulette.judge.certificate import paired_error
from lightning_roulette.judge.outcomes import Outcomes, alike
from lightning_roulette.judge.race import Masks, Race, Tell, furthest
from lightning_roulette.judge.selection import best_of, keeps_floor
from lightning_roulette.refit.refitted import Refitted
from lightning_roulette.report.records import Candidate, Level
from lightning_roulette.search.amounts import counts
from lightning_roulette.search.observer import LevelTime
from lightning_roulette.search.policies import Step
from lightning_roulette.search.run import Run
from lightning_roulette.search.state import State


@dataclass(frozen=True, eq=False)
class Branch:
    """The candidates of one level after their race.

    Attributes:
        candidates: Candidates in the order drawn.
        best: The best candidate. None if no score is a number.
        refitted: What a refit gave the best candidate. Without a refit, the values of the parent.
        seconds: Wall time of the refits.
    """

    candidates: list[Candidate]
    best: Candidate | None
    refitted: Refitted = field(default_factory=Refitted)
    seconds: float = 0.0


def try_level(run: Run, state: State, step: Step) -> State:
    """Try one level, and tell the observer about it.

    Args:
        run: What stays the same during the search.
        state: Where the search stands.
        step: The level to try.

    Returns:
        The state after the level.
    """
    began = time.monotonic()
    race = _race(run, state, step)
    judged = _single if _is_single(run, step) else _raced
    branch, error = judged(run, state, race)
    best = branch.best
    mask = race.mask(state.tried) if best is None else branch.refitted.mask_from(race.mask(best.index))
    level = Level(
        state.next_level,
        step.rate,
        mask.sparsity,
        mask.survivors,
        tuple(branch.candidates),
        winner=None if best is None else best.index,
        accepted=_is_accepted(best, state.report.floor),
        error=error,
        undone=branch.refitted.undone,
        **counts(run.drawing.units, mask),
    )
    if level.accepted and best is not None:
        state = state.accepted(level, mask, branch.refitted, run.drawing.factors(state, best.index, not step.coarse))
    else:
        state = state.rejected(level, step.coarse)
    run.observer.on_level(level, so_far := run.winner(state))
    run.observer.on_timed(level, so_far, LevelTime(time.monotonic() - began, branch.seconds))
    return state


def error_of(dense: Outcomes | None, pruned: Outcomes | None) -> float:
    """Paired standard error of a score minus the dense score. NaN if it is unknown."""
    return math.nan if dense is None or pruned is None or not alike(dense, pruned) else paired_error(dense, pruned)


def _is_accepted(best: Candidate | None, floor: float) -> bool:
    return best is not None and not math.isnan(best.rank) and keeps_floor(best.score, floor)


def _is_single(run: Run, step: Step) -> bool:
    """Whether a level has one candidate, which is refitted without a race."""
    return step.branches == 1 and run.refitter.each_level


def _teller(run: Run, state: State, step: Step, sparsity: float) -> Tell:
    """A function that tells the observer how many candidates were judged, and the best so far."""
    planned = 1 if _is_single(run, step) else run.race_length + run.refitter.finalists

    def tell(done: int, best: Candidate | None) -> None:
        run.observer.on_candidate(state.next_level, done, planned, best, sparsity)

    return tell


def _race(run: Run, state: State, step: Step) -> Race:
    """The race of one level's candidates. Retries of a level continue the numbering."""
    run.drawing.prepare(state)
    masks = Masks(lambda index: run.drawing.spin(state, step.budget, index, not step.coarse))
    sparsity = masks(state.tried).sparsity
    return Race(
        [Candidate(state.tried + number, sparsity, math.nan, math.nan, folds=0) for number in range(step.branches)],
        masks,
        lambda mask: run.refitter.network(mask, state.refitted),
        run.judge,
        run.reference,
        _teller(run, state, step, sparsity),
    )


def _single(run: Run, state: State, race: Race) -> tuple[Branch, float]:
    """The branch of a single candidate, which is judged after its refit only, and its paired standard error."""
    (candidate,), folds, began = race.candidates, run.judge.search_folds, time.monotonic()
    found = run.refitter.refit(drawn := race.mask(candidate.index), state.parent)
    seconds = time.monotonic() - began
    network = run.refitter.network(found.mask_from(drawn), found)
    scores, outcomes = run.judge.recorded(network, folds) if run.rejudges else (run.judge.scores(network, folds), None)
    one = replace(candidate.scored(scores, len(folds)), refitted=True)
    race.tell(1, best := best_of([one]))
    return Branch([one], best, found, seconds), error_of(run.dense.outcomes, outcomes)


def _raced(run: Run, state: State, race: Race) -> tuple[Branch, float]:
    """The branch after its race, with its best candidates refitted, and the best one's paired standard error."""
    branch = Branch(raced := race.run(run.stages), best_of(furthest(raced)), Refitted(state.refitted.values))
    if run.refitter.each_level:
        branch = _refitted(run, state, race, branch)
    return _judged_again(run, race, branch)


def _refitted(run: Run, state: State, race: Race, branch: Branch) -> Branch:
    """The branch with its best candidates refitted and judged again. Its `best` is one of these."""
    known = {one.index: one for one in branch.candidates}
    runners = [one for one in furthest(branch.candidates) if one.same_as is None and not math.isnan(one.rank)]
    best: Candidate | None = None
    values, refitted, seconds = Refitted(), 0, 0.0
    while refitted < run.refitter.finalists and (one := best_of(runners)) is not None:
        runners.remove(one)
        began = time.monotonic()
        found = run.refitter.refit(drawn := race.mask(one.index), state.parent)
        seconds += time.monotonic() - began
        scores = run.judge.scores(run.refitter.network(found.mask_from(drawn), found), run.judge.search_folds)
        known[one.index] = one = replace(one.scored(scores, len(run.judge.search_folds)), refitted=True)
        if best is None or best_of([best, one]) is one:
            best, values = one, found
        refitted += 1
        race.tell(run.race_length + refitted, best)
    return Branch(list(known.values()), best, values, seconds)


def _judged_again(run: Run, race: Race, branch: Branch) -> tuple[Branch, float]:
    """The branch with its best candidate judged on all search folds together, and the paired standard error."""
    best, error = branch.best, math.nan
    if best is None:
        return branch, error
    if run.rejudges:
        mask = branch.refitted.mask_from(race.mask(best.index))
        network = run.refitter.network(mask, branch.refitted)
        scores, outcomes = run.judge.recorded(network, run.judge.search_folds)
        best, error = best.scored(scores, len(run.judge.search_folds)), error_of(run.dense.outcomes, outcomes)
    twins = [one.index for one in branch.candidates if one.same_as == best.index]
    shared = {best.index: best} | {index: best.twin(index) for index in twins}
    return replace(branch, candidates=[shared.get(one.index, one) for one in branch.candidates], best=best), error
