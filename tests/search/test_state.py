"""The state of a search when levels are accepted, several of them in one step too."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_roulette import Candidate, Level, Mask, SearchReport
from lightning_roulette.mask.history import History
from lightning_roulette.refit.refitted import Refitted
from lightning_roulette.search.state import State
from lightning_roulette.search.winner import network_at
from lightning_roulette.trainer.show.forecast import levels_left

WEIGHTS = {"a": torch.arange(1.0, 13.0).view(3, 4), "b": torch.arange(13.0, 21.0)}


def start() -> State:
    report = SearchReport("score", "max", 1.0, math.inf, 4, 0, 20, target_sparsity=0.9)
    return State(report, History.of_dense(WEIGHTS), Mask.full(WEIGHTS), Refitted(), {"a": 0.0, "b": 0.0}, {})


def mask_of(*kept: int) -> Mask:
    flags = torch.zeros(20, dtype=torch.bool)
    flags[list(kept)] = True
    return Mask({"a": flags[:12].view(3, 4), "b": flags[12:]})


def one(state: State, mask: Mask, accepted: bool = True) -> Level:
    candidate = Candidate(0, mask.sparsity, 1.0, 1.0)
    return Level(state.next_level, 0.5, mask.sparsity, mask.survivors, (candidate,), 0, accepted)


def refitted(mask: Mask, factor: float) -> Refitted:
    return Refitted({name: factor * weight * mask[name] for name, weight in WEIGHTS.items()}, mask=mask)


RUNGS = [mask_of(*range(0, 16)), mask_of(*range(5, 17)), mask_of(0, 2, 3, 9, 17, 18, 19)]


def test_levels_that_one_step_adds_are_numbered_in_the_order_in_which_they_are_accepted():
    state = start()
    state = state.rejected(one(state, RUNGS[2], accepted=False))
    assert (state.next_level, state.failures, state.halvings) == (1, 1, 1)
    for number, mask in enumerate(RUNGS, 1):
        assert state.next_level == number
        state = state.accepted(one(state, mask), mask, refitted(mask, number), {"a": float(number), "b": 0.0})
    report = state.report
    assert [level.level for level in report.levels] == [1, 1, 2, 3]
    assert [level.survivors for level in report.accepted] == [16, 12, 7]
    assert [state.history.mask_at(level) for level in range(4)] == [Mask.full(WEIGHTS), *RUNGS]
    assert (state.history.level, state.next_level, state.failures, state.parent) == (3, 4, 0, RUNGS[2])
    assert (report.winner.level, report.survivors, report.sparsity) == (3, 7, RUNGS[2].sparsity)
    assert levels_left(report) == math.ceil(math.log(2 / 7, 0.5))
    for number, mask in enumerate(RUNGS, 1):
        found = network_at(number, mask, WEIGHTS, state.refits).weights
        assert all(torch.equal(found[name], number * weight * mask[name]) for name, weight in WEIGHTS.items())
    assert [row[0] for row in report.rows()[1:]] == ["1", "1", "2", "3"]


@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_level_that_is_refitted_later_gets_the_mask_that_the_refit_chose(place):
    state = start()
    for mask in RUNGS:
        state = state.accepted(one(state, mask), mask, Refitted(), state.factors)
    given, other = RUNGS[place - 1], mask_of(*range(20 - RUNGS[place - 1].survivors, 20))
    same = state.refitted_later(place, given, Refitted(refitted(given, 2.0).values))
    assert [same.history.mask_at(level + 1) for level in range(3)] == RUNGS
    assert same.parent == RUNGS[2]
    after = state.refitted_later(place, given, refitted(other, 2.0))
    expected = [other if level == place else mask for level, mask in enumerate(RUNGS, 1)]
    assert [after.history.mask_at(level + 1) for level in range(3)] == expected
    assert after.parent == expected[2]
    found = network_at(place, other, WEIGHTS, after.refits).weights
    assert all(torch.equal(found[name], 2 * weight * other[name]) for name, weight in WEIGHTS.items())
