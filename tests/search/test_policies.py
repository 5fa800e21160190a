"""Policies decide from the state alone, without an evaluator or a network."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette import Candidate, Level, Mask, SearchReport, StopReason, Tree, search
from lightning_roulette.mask.history import History
from lightning_roulette.refit.refitted import Refitted
from lightning_roulette.search.amounts import level_draws, missing, removable
from lightning_roulette.search.policies import (
    CoarseToFine,
    Levels,
    OneLevel,
    Policy,
    Step,
    cubic,
)
from lightning_roulette.search.state import State

SIZES = {"a": 60, "b": 40}


def state(survivors: int = 100, *, levels: int = 0, failures: int = 0, halvings: int = 0, fine: bool = False) -> State:
    """A state whose parent keeps the last `survivors` of 100 weights, after so many accepted levels."""
    weights = {name: torch.ones(size) for name, size in SIZES.items()}
    kept = (torch.arange(100) >= 100 - survivors).split(list(SIZES.values()))
    parent, history = Mask(dict(zip(SIZES, kept, strict=True))), History.of_dense(weights)
    for _ in range(levels):
        history = history.pruned(parent)
    report = SearchReport("score", "max", 0.9, 0.0, branches=4, seed=0, size=100)
    return State(report, history, parent, Refitted(), dict.fromkeys(SIZES, 0.0), {}, failures, halvings, fine)


COARSE = Tree(0.1, coarse_rate=0.2)


@pytest.mark.parametrize(
    ("policy", "at", "expected"),
    [
        (Levels(Tree(0.3), 4), state(), Step(0.3, 30, 4)),
        (Levels(Tree(0.3), 4), state(50, levels=1), Step(0.3, 15, 4)),
        (Levels(Tree(0.3), 4), state(failures=1, halvings=1), Step(0.15, 15, 4)),
        (Levels(Tree(0.3), 4), state(50, levels=1, halvings=2), Step(0.075, 4, 4)),
        (Levels(Tree(0.3), 4, target_sparsity=0.25), state(), Step(0.3, 25, 4)),
        (OneLevel(Levels(Tree(0.3), 4, target_sparsity=0.9)), state(), Step(1 - 10 / 100, 90, 4)),
        (OneLevel(Levels(Tree(0.3), 4, target_sparsity=0.9)), state(40, levels=1), Step(1 - 10 / 40, 30, 4)),
        (Levels(Tree(0.3, patience=2), 4), state(failures=2, halvings=2), StopReason.DECLINED),
        (Levels(Tree(0.3, smallest_rate=0.2), 4), state(failures=1, halvings=1), StopReason.RATE_TOO_SMALL),
        (Levels(Tree(0.001), 4), state(), Step(0.001, 1, 4)),
        (Levels(Tree(0.3, max_levels=2), 4), state(50, levels=2), StopReason.MAX_LEVELS),
        (Levels(Tree(0.3), 4, target_sparsity=0.5), state(50, levels=1), StopReason.TARGET_REACHED),
        (OneLevel(Levels(Tree(0.3), 4, target_sparsity=0.5)), state(50, levels=1), StopReason.TARGET_REACHED),
        (Levels(Tree(0.9), 4), state(1, levels=1), StopReason.EXHAUSTED),
        (Levels(Tree(0.9), 4, "layer"), state(100), Step(0.9, 90, 4)),
        (Levels(Tree(0.99), 4, "layer"), state(100), Step(0.99, 98, 4)),
        (CoarseToFine(Levels(COARSE, 4)), state(), Step(0.2, 20, 1, coarse=True)),
        (CoarseToFine(Levels(COARSE, 4)), state(50, levels=4), Step(0.2, 10, 1, coarse=True)),
        (CoarseToFine(Levels(COARSE, 4)), state(50, levels=4, fine=True), Step(0.1, 5, 4)),
        (CoarseToFine(Levels(COARSE, 4)), state(50, fine=True, failures=1, halvings=1), Step(0.05, 3, 4)),
        (CoarseToFine(Levels(COARSE, 4)), state(fine=True, failures=3, halvings=3), StopReason.DECLINED),
        (CoarseToFine(Levels(Tree(0.1, coarse_rate=0.1), 4)), state(), Step(0.1, 10, 4)),
        (CoarseToFine(Levels(Tree(0.1, coarse_rate=None), 4)), state(), Step(0.1, 10, 4)),
        (CoarseToFine(Levels(COARSE, 4, target_sparsity=0.4)), state(), Step(0.2, 20, 1, coarse=True)),
        (CoarseToFine(Levels(COARSE, 4, target_sparsity=0.39)), state(), Step(0.1, 10, 4)),
        (CoarseToFine(Levels(COARSE, 4, target_sparsity=0.5)), state(50), StopReason.TARGET_REACHED),
        (CoarseToFine(Levels(Tree(0.1, coarse_rate=0.2, max_levels=2), 4)), state(64, levels=2), StopReason.MAX_LEVELS),
        (CoarseToFine(Levels(Tree(0.1, coarse_rate=0.99), 4, "layer")), state(), Step(0.99, 98, 1, coarse=True)),
        (CoarseToFine(Levels(COARSE, 4)), state(1, levels=9), StopReason.EXHAUSTED),
    ],
)
def test_the_next_step_follows_from_the_state(policy, at, expected):
    assert policy.next(at) == expected


@pytest.mark.parametrize(("survivors", "scope", "spare"), [(100, "global", 99), (100, "layer", 98), (40, "layer", 39)])
def test_a_wheel_or_each_layer_keeps_one_weight(survivors, scope, spare):
    assert removable(state(survivors).parent, scope) == spare


@settings(deadline=None, derandomize=True)
@given(rate=st.floats(0.001, 0.999), survivors=st.integers(2, 100))
def test_a_level_removes_at_least_one_weight_and_leaves_one(rate, survivors):
    draws = level_draws(survivors, rate, survivors - 1)
    assert draws == min(max(1, math.floor(rate * survivors + 0.5)), survivors - 1)


@settings(deadline=None, derandomize=True)
@given(target=st.floats(0.01, 0.99), survivors=st.integers(1, 100))
def test_the_missing_weights_lead_to_the_rounded_target(target, survivors):
    assert 100 - survivors + missing(state(survivors).parent, target) == math.floor(target * 100 + 0.5)


@settings(deadline=None, derandomize=True)
@given(target=st.floats(0, 1), shares=st.lists(st.floats(0, 1), min_size=2))
def test_the_cubic_schedule_rises_to_its_target(target, shares):
    found = [cubic(target, share) for share in sorted(shares)]
    assert found == sorted(found)
    assert (cubic(target, 0), cubic(target, 1)) == (0, target)


def test_a_state_is_never_changed_and_a_failure_keeps_the_parent():
    dense, slim = state(), state(70).parent
    level = Level(1, 0.3, 0.3, 70, (Candidate(0, 0.3, 0.9, 0.9),), winner=0, accepted=True)
    after = dense.accepted(level, slim, Refitted(), {"a": 0.1, "b": -0.2})
    failed = after.rejected(dataclasses.replace(level, level=2, accepted=False))
    assert (dense.report.levels, dense.parent.survivors, dense.next_level) == ((), 100, 1)
    assert (after.report.levels, after.parent, after.next_level) == ((level,), slim, 2)
    assert (after.history.mask_at(1), after.factors, after.failures) == (slim, {"a": 0.1, "b": -0.2}, 0)
    assert (failed.parent, failed.next_level, failed.failures, failed.halvings) == (slim, 2, 1, 1)
    assert failed.accepted(level, slim, Refitted(), {}).failures == 0
    assert failed.accepted(level, slim, Refitted(), {}).halvings == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        dense.failures = 3


def test_a_failed_coarse_level_makes_later_levels_fine_and_does_not_count():
    dense = state()
    level = Level(1, 0.2, 0.2, 80, (Candidate(0, 0.2, 0.5, 0.5),), winner=0, accepted=False)
    failed = dense.rejected(level, coarse=True)
    assert (failed.fine, failed.failures, failed.halvings, failed.report.levels) == (True, 0, 0, (level,))
    assert (failed.next_level, failed.tried, dense.tried) == (1, 1, 0)
    assert failed.rejected(level).fine
    assert failed.rejected(level).tried == 2
    assert not dense.rejected(level).fine


@dataclasses.dataclass(frozen=True)
class Thirds(Policy):
    """A policy of a user: three levels, each of which removes a third of the weights that are left."""

    def next(self, state: State) -> Step | StopReason:
        if len(state.report.levels) == 3:
            return StopReason.MAX_LEVELS
        return Step(1 / 3, state.parent.survivors // 3, branches=2)


def test_a_search_follows_a_policy_of_the_users_own():
    weights = {"a": torch.arange(1.0, 91.0)}
    winner = search(weights, lambda mask: 1.0, branches=4, policy=Thirds())
    assert [level.survivors for level in winner.report.levels] == [60, 40, 27]
    assert [len(level.candidates) for level in winner.report.levels] == [2, 2, 2]
    assert winner.mask.survivors == int(winner.weights["a"].count_nonzero()) == 27
    assert winner.report.stop_reason is StopReason.MAX_LEVELS
