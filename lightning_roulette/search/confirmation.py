"""The end of a search: refits of the accepted levels, and their confirmation on the held-out half."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from lightning_roulette.judge.certificate import p_value
from lightning_roulette.judge.outcomes import alike
from lightning_roulette.judge.selection import best_of, keeps_floor
from lightning_roulette.mask.mask import Mask
from lightning_roulette.refit.refitted import Refitted
from lightning_roulette.report.records import Level
from lightning_roulette.search.level import error_of
from lightning_roulette.search.run import Run
from lightning_roulette.search.state import State
from lightning_roulette.search.winner import network_at


def confirm(run: Run, state: State) -> State:
    """Judge the accepted levels on the held-out half, the densest first, up to the first that does not hold.

    Without a held-out half, all accepted levels stand.

    Args:
        run: What stays the same during the search.
        state: Where the search stands after its last level.

    Returns:
        The state whose `history.level` is the winner.
    """
    if run.refitter.after_search:
        state = _refitted(run, state)
    if not run.judge.held_out_folds:
        return state
    levels = state.report.levels
    state = replace(state, history=state.history.won_by(0))
    for place, level in enumerate(levels):
        if level.accepted:
            judged = _held_out(run, state, level)
            state = state.with_levels({place: judged})
            if judged.held:
                state = replace(state, history=state.history.won_by(level.level))
            run.observer.on_confirmed(judged, run.winner(state))
            if not judged.held:
                break
    return state


def _held_out(run: Run, state: State, level: Level) -> Level:
    """An accepted level with its score on the held-out half, and whether it holds there."""
    mask = state.history.mask_at(level.level)
    network = network_at(level.level, mask, run.refitter.weights, state.refits)
    scores, outcomes = run.judge.recorded(network, run.judge.held_out_folds)
    dense, report = run.dense.held_out_outcomes, state.report
    p: float | None = None
    if report.confidence is None:
        held = keeps_floor(scores.score, cast(float, report.held_out_floor))
    else:
        comparable = outcomes is not None and dense is not None and alike(dense, outcomes)
        p = p_value(dense, outcomes, report.tolerance, report.confidence) if comparable else 1.0  # type: ignore[arg-type]
        held = p <= 1 - report.confidence
    error = error_of(dense, outcomes)
    return replace(level, held_out_score=scores.score, held_out_error=error, p_value=p, held=held)


def _refitted(run: Run, state: State) -> State:
    """Refit the accepted levels before they are judged on the held-out half.

    All levels are fixed then, so that they can be tested in order. Their masks need not nest.

    Without a held-out half only the last level is refitted, and its refit is kept if it improves the level.
    """
    for place, level in enumerate(state.report.levels):
        if not level.accepted or not (run.judge.held_out_folds or level.level == state.history.level):
            continue
        mask = state.history.mask_at(level.level)
        refitted = run.refitter.refit(mask)
        if run.judge.held_out_folds or _improves(run, state, level, mask, refitted):
            state = state.with_levels({place: replace(level, undone=refitted.undone)})
            state = state.refitted_later(level.level, mask, refitted)
        else:
            words = f"{state.report.refit}, not kept as it gained nothing"
            state = replace(state, report=replace(state.report, refit=words))
    return state


def _improves(run: Run, state: State, level: Level, mask: Mask, refitted: Refitted) -> bool:
    """Whether a refit improves a level on the data that chose it."""
    before = next(one for one in level.candidates if one.index == level.winner)
    network = run.refitter.network(refitted.mask_from(mask), refitted)
    after = before.scored(run.judge.scores(network, run.judge.search_folds), 0)
    return best_of([before, after]) is after and keeps_floor(after.score, state.report.floor)
