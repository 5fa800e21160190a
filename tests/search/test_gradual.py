"""Pruning in turn with training: which weights are cut, which level holds, what a state remembers."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette import StopReason, Tree, Validation
from lightning_roulette.report.records import Scores
from lightning_roulette.search.gradual import Cuts, Gradual
from lightning_roulette.search.policies import cubic

SIZE = 200


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(10, 12, generator=chance), "b": torch.randn(80, generator=chance)}


def gradual(**choices) -> Gradual:
    given = {"branches": 1, "tolerance": 0.1, "target_sparsity": None, "number": 10, "tree": Tree(pruning_rate=0.5)}
    return Gradual(Cuts(**given | choices))


class OnFolds:
    """Keeps the folds that it was asked about."""

    def __init__(self) -> None:
        self.folds, self.asked = 4, []

    def __call__(self, candidate, folds):
        self.asked.append(tuple(folds))
        return Scores(1.0, 1.0)


def shown(one: Gradual, score: float, now=None) -> bool:
    """Whether a network with this score holds; by default the network as it was at first."""
    return one.judge(weights() if now is None else now, lambda mask: score)


def test_each_cut_takes_its_share_of_the_survivors_and_masks_nest():
    one, now, masks = gradual(tree=Tree(pruning_rate=0.3)), weights(), []
    for place in range(1, 6):
        assert shown(one, 1.0, now)
        network = one.cut(place)
        masks.append(network.mask)
        now = network.weights
    survivors = [SIZE]
    for _ in range(5):
        survivors.append(survivors[-1] - math.floor(0.3 * survivors[-1] + 0.5))
    assert [mask.survivors for mask in masks] == survivors[1:] == [level.survivors for level in one.report.levels]
    assert all(later <= earlier for earlier, later in pairwise(masks))
    assert [one.history.mask_at(level) for level in range(1, 6)] == masks
    assert one.mask == masks[-1]


def test_the_weights_as_trained_are_cut_not_those_of_the_dense_network():
    one = gradual(tree=Tree(pruning_rate=0.5))
    trained = {name: torch.arange(1.0, w.numel() + 1).view(w.shape) for name, w in weights().items()}
    shown(one, 1.0)
    assert shown(one, 1.0, trained)
    network = one.cut(1)
    assert all(torch.equal(network.weights[name], trained[name] * network.mask[name]) for name in trained)


def test_a_level_has_held_once_it_keeps_the_floor_and_not_before():
    one = gradual()
    assert shown(one, 0.9)
    one.cut(1, epoch=3)
    assert (one.report.winner, one.history.level, one.history.deepest) == (None, 0, 1)
    for score, held, expected in (
        (0.79, False, (False, 0.79, 0)),
        (0.8, True, (True, 0.8, 1)),
        (0.5, False, (True, 0.8, 1)),
    ):
        assert shown(one, score) == held
        (level,) = one.report.levels
        assert (level.held, level.held_out_score, one.history.level) == expected
        assert (level.epoch, one.report.winner) == (3, level if level.held else None)


def test_the_floor_is_that_of_the_first_network_shown():
    one = gradual()
    shown(one, 0.9)
    one.cut(1)
    assert shown(one, 2.0)
    one.cut(2)
    assert shown(one, 0.81)
    assert (one.report.dense_score, one.report.held_out_floor) == (0.9, pytest.approx(0.8))


@settings(deadline=None, derandomize=True)
@given(target=st.floats(0.01, 0.99), number=st.integers(1, 12), left_out=st.sets(st.integers(1, 11)))
def test_the_cubic_schedule_reaches_the_target_even_if_cuts_are_left_out(target, number, left_out):
    one, now = gradual(target_sparsity=target, number=number), weights()
    for place in range(1, number + 1):
        shown(one, 1.0, now)
        if place in left_out and place < number:
            continue
        goal = math.floor(cubic(target, place / number) * SIZE + 0.5)
        if (network := one.cut(place)) is not None:
            now = network.weights
        assert SIZE - one.mask.survivors == min(goal, SIZE - 1)
    assert SIZE - one.mask.survivors == min(math.floor(target * SIZE + 0.5), SIZE - 1)


@pytest.mark.parametrize(
    ("options", "score", "reason"),
    [
        ({"target_sparsity": 0.5, "number": 1}, 1.0, StopReason.TARGET_REACHED),
        ({"target_sparsity": 0.332, "number": 1}, 1.0, StopReason.TARGET_REACHED),  # 66.4 of 200 weights
        ({"target_sparsity": 0.5, "number": 1}, 0.0, StopReason.TRAINING_ENDED),  # the level does not hold
        ({"tree": Tree(0.5, max_levels=1)}, 1.0, StopReason.MAX_LEVELS),
    ],
)
def test_cuts_end_for_a_reason(options, score, reason):
    one = gradual(**options)
    shown(one, 1.0)
    network = one.cut(1)
    assert one.report.levels[0].pruning_rate == pytest.approx(options.get("target_sparsity", 0.5), abs=0.005)
    assert shown(one, score, network.weights) == (score == 1.0)
    assert one.cut(options.get("number", 2)) is None
    assert one.ended().stop_reason is reason


def test_a_restored_pruning_continues_as_if_it_had_never_stopped():
    def run(stops: bool) -> Gradual:
        choices = {"branches": 3, "number": 4}
        one, now = gradual(**choices), weights()
        for place in range(1, 5):
            shown(one, 1.0, now)
            now = one.cut(place, epoch=place).weights
            if stops:
                state, one = one.state(), gradual(**choices)
                one.restore(state)
        return one

    whole, stopped = run(False), run(True)
    assert whole.mask == stopped.mask
    assert whole.report.to_dict()["levels"] == stopped.report.to_dict()["levels"]
    assert whole.report.validations == stopped.report.validations


def test_importance_factors_are_read_under_their_old_name_too():
    one, other = gradual(branches=3, refit=None), gradual(branches=3)
    shown(one, 1.0)
    one.cut(1)
    state = one.state()
    del state["importance_factors"]
    other.restore(state | {"leaning": {"a": 0.5}})
    assert other.state()["importance_factors"] == {"a": 0.5}


def test_before_the_first_judgement_there_is_no_state():
    one = gradual()
    assert (one.state(), one.mask) == ({}, None)
    one.restore({})
    assert one.report is None


def test_one_candidate_is_judged_on_all_folds_and_several_on_the_held_out_half():
    alone, branch = OnFolds(), OnFolds()
    gradual().judge(weights(), alone)
    gradual(branches=2).judge(weights(), branch)
    assert set(alone.asked) == {(0, 1, 2, 3), (0,), (1,), (2,), (3,)}
    assert (2, 3) in branch.asked
    shared = gradual(branches=2, validation=Validation(confirm=0))
    shared.judge(weights(), alone)
    assert shared.report.folds == (4, 0)
    assert shared.report.held_out_dense == 1.0


def test_a_score_of_nan_does_not_hold_and_is_refused_for_the_first_network():
    one = gradual()
    with pytest.raises(ValueError, match="is NaN or infinite"):
        shown(one, math.nan)
    shown(one, 1.0)
    one.cut(1)
    assert not shown(one, math.nan)
    assert one.history.level == 0


def test_a_cut_whose_candidates_all_score_nan_is_none():
    one = gradual()
    one.judge(weights(), lambda mask: 1.0 if mask.sparsity == 0 else math.nan)
    assert one.cut(1) is None
    assert one.report.levels == ()


def test_a_pickle_holds_no_data():
    one = gradual(branches=2)
    shown(one, 1.0)
    copied = pickle.loads(pickle.dumps(one))  # a lambda inside could not be pickled
    assert copied.report == one.report
