"""The search: scripted scores give a literal report, masks nest, and the network is never touched."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette import (
    Candidate,
    Level,
    Mask,
    Observer,
    PrunedWeights,
    Scores,
    SearchReport,
    StopReason,
    Tree,
    Validation,
    Wheel,
    Winner,
    search,
    sparsity,
)
from lightning_roulette.search.arguments import check_search

nan = math.nan


def network(dtype: torch.dtype = torch.float32, **shapes) -> dict[str, torch.Tensor]:
    chance = np.random.default_rng(8)
    shapes = shapes or {"a": (2, 3), "b": (4,)}
    return {name: torch.from_numpy(chance.standard_normal(shape)).to(dtype) for name, shape in shapes.items()}


class Scripted:
    """Gives scores in order, whatever the mask, and keeps the masks. It repeats the last score."""

    def __init__(self, *scores: float) -> None:
        self.scores, self.masks = list(scores), []

    def __call__(self, mask: Mask) -> float:
        self.masks.append(mask)
        return self.scores[min(len(self.masks), len(self.scores)) - 1]


def always(mask: Mask) -> float:
    return 1.0


def never(mask: Mask) -> float:
    """Only the dense network has a good score."""
    return float(mask.sparsity == 0)


def candidates(first: int, slim: float, *scores: float) -> tuple[Candidate, ...]:
    return tuple(Candidate(first + n, slim, s, s) for n, s in enumerate(scores))


def assert_same(one: SearchReport, other: SearchReport) -> None:
    # by their text, where NaN equals NaN
    assert repr(replace(one, seconds=0.0)) == repr(replace(other, seconds=0.0))


def test_a_scripted_search_gives_this_report():
    evaluate = Scripted(0.9, 0.5, 0.95, 0.86, 0.1, nan, 0.2, 0.84, 0.85, 0.8, nan, nan, nan, 0.88, 0.87, 0.86)
    tree = Tree(pruning_rate=0.3, max_levels=3)
    winner = search(
        network(a=(6, 10), b=(40,)), evaluate, branches=3, tolerance=0.05, tree=tree, wheel=Wheel(8.0), seed=5
    )
    slim = {survivors: 1 - survivors / 100 for survivors in (70, 49, 59, 50, 55)}
    expected = SearchReport(
        monitor="score",
        mode="max",
        dense_score=0.9,
        tolerance=0.05,
        branches=3,
        seed=5,
        size=100,
        levels=(
            Level(1, 0.3, slim[70], 70, candidates(0, slim[70], 0.5, 0.95, 0.86), winner=1, accepted=True),
            # below the floor; then, at half the rate, on it
            Level(2, 0.3, slim[49], 49, candidates(0, slim[49], 0.1, nan, 0.2), winner=2, accepted=False),
            Level(2, 0.15, slim[59], 59, candidates(3, slim[59], 0.84, 0.85, 0.8), winner=4, accepted=True),
            # the rate stayed halved, and is halved again
            Level(3, 0.15, slim[50], 50, candidates(0, slim[50], nan, nan, nan), winner=None, accepted=False),
            Level(3, 0.075, slim[55], 55, candidates(3, slim[55], 0.88, 0.87, 0.86), winner=3, accepted=True),
        ),
        stop_reason=StopReason.MAX_LEVELS,
        importance="magnitude",
        validations=16.0,
        seconds=0.0,
        score=None,
        trained_score=None,
    )
    assert_same(winner.report, expected)
    assert len(evaluate.masks) == 16
    assert winner.report.floor == pytest.approx(0.85)
    assert winner.mask == evaluate.masks[13]
    assert [winner.mask_at(level) for level in range(4)] == [evaluate.masks[n] for n in (0, 2, 8, 13)]


def test_a_branch_without_a_number_keeps_the_dense_network():
    winner = search(network(), Scripted(0.9, nan, math.inf, -math.inf), branches=2, seed=1)
    assert winner.report.stop_reason is StopReason.DECLINED
    assert winner.report.winner is None
    assert [level.winner for level in winner.report.levels] == [None] * 3
    assert [level.pruning_rate for level in winner.report.levels] == [0.1, 0.05, 0.025]
    assert all(math.isnan(one.score) for level in winner.report.levels for one in level.candidates)
    assert winner.mask == winner.mask_at(0) == Mask.full(network())
    assert winner.report.sparsity == 0.0


@pytest.mark.parametrize("dense", [nan, math.inf, -math.inf])
def test_a_dense_network_without_a_score_is_an_error(dense):
    evaluate = Scripted(dense)
    with pytest.raises(
        ValueError, match="the score of the dense network is NaN or infinite, so there is no floor. Nothing was"
    ):
        search(network(), evaluate)
    assert len(evaluate.masks) == 1


@pytest.mark.parametrize("goal", [0.1, 0.25, 0.5, 0.77, 0.9])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_target_is_reached_exactly(goal, scope):
    weights = network(a=(20, 10), b=(10, 20), c=(100,))
    winner = search(weights, always, branches=2, target_sparsity=goal, wheel=Wheel(scope=scope))
    assert winner.report.stop_reason is StopReason.TARGET_REACHED
    assert winner.mask.size - winner.mask.survivors == math.floor(goal * 500 + 0.5)
    assert winner.report.sparsity == winner.mask.sparsity == sparsity(winner.weights)
    *before, last = winner.report.levels
    assert all(level.pruning_rate == 0.1 for level in before)
    assert last.sparsity == pytest.approx(goal)


@pytest.mark.parametrize(
    ("evaluate", "shape", "options", "reason", "survivors"),
    [
        (always, (10,), {}, StopReason.EXHAUSTED, 1),
        (always, (1,), {}, StopReason.EXHAUSTED, 1),
        (always, (10,), {"target_sparsity": 0.96}, StopReason.EXHAUSTED, 1),  # more than all but one weight
        (always, (10,), {"target_sparsity": 0.04}, StopReason.TARGET_REACHED, 10),  # less than half a weight
        (never, (10,), {"target_sparsity": 0.5, "tolerance": math.inf}, StopReason.TARGET_REACHED, 5),
        (
            lambda mask: float(mask.sparsity < 0.5),
            (100,),
            {"target_sparsity": 0.9, "tree": Tree(0.2)},
            StopReason.DECLINED,
            51,
        ),
    ],
)
def test_a_search_stops_for_a_reason(evaluate, shape, options, reason, survivors):
    winner = search(network(a=shape), evaluate, branches=2, **options)
    assert winner.report.stop_reason is reason
    assert winner.mask.survivors == winner.report.survivors == survivors
    assert all(level.winner == 0 for level in winner.report.accepted)  # equal scores go to the earliest
    assert (winner.report.floor == -math.inf) == ("tolerance" in options)


@pytest.mark.parametrize("goal", [None, 0.9])
def test_each_layer_keeps_one_weight_where_each_has_its_wheel(goal):
    winner = search(network(), always, branches=2, target_sparsity=goal, wheel=Wheel(scope="layer"))
    assert winner.report.stop_reason is StopReason.EXHAUSTED
    assert [int(kept.sum()) for kept in winner.mask.values()] == [1, 1]


def test_an_empty_tensor_among_others_does_no_harm():
    winner = search(network(a=(0, 3), b=(10,)), always, branches=2, tree=Tree(0.2, max_levels=1))
    assert winner.mask.densities == {"a": 0.0, "b": 0.8}


FAILS, HOLDS = [0.1] * 2, [0.9] * 2  # the scores of a branch


@pytest.mark.parametrize(
    ("tree", "branches", "reason", "rates", "levels"),
    [
        *(
            (Tree(0.8, patience=n), [FAILS], StopReason.DECLINED, [0.8 / 2**k for k in range(n)], [1] * n)
            for n in (1, 2, 4)
        ),
        # an accepted level renews patience, and the rate stays halved
        (
            Tree(0.4, patience=2, smallest_rate=1e-3),
            [FAILS, HOLDS, FAILS, HOLDS, FAILS],
            StopReason.DECLINED,
            [0.4, 0.2, 0.2, 0.1, 0.1, 0.05],
            [1, 1, 2, 2, 3, 3],
        ),
        # the rate is not halved below the smallest
        *(
            (Tree(0.4, patience=9, smallest_rate=smallest), [FAILS], StopReason.RATE_TOO_SMALL, rates, [1] * len(rates))
            for smallest, rates in ((0.1, [0.4, 0.2, 0.1]), (0.11, [0.4, 0.2]), (0.3, [0.4]))
        ),
        # a rate below the smallest is tried before any halving
        (Tree(0.001, max_levels=2, smallest_rate=0.01), [HOLDS], StopReason.MAX_LEVELS, [0.001] * 2, [1, 2]),
        # only accepted levels count
        (Tree(0.05, max_levels=1), [FAILS, HOLDS], StopReason.MAX_LEVELS, [0.05, 0.025], [1, 1]),
        (Tree(0.05, max_levels=3), [FAILS, HOLDS], StopReason.MAX_LEVELS, [0.05, *[0.025] * 3], [1, 1, 2, 3]),
    ],
)
def test_failures_halve_the_rate_and_end_the_search(tree, branches, reason, rates, levels):
    evaluate = Scripted(0.9, *(score for branch in branches for score in branch))
    report = search(network(a=(1000,)), evaluate, branches=2, tree=tree).report
    assert report.stop_reason is reason
    assert [level.pruning_rate for level in report.levels] == rates
    assert [level.level for level in report.levels] == levels


def test_a_copy_names_the_first_candidate_with_its_mask_and_shares_its_scores():
    # with three weights and one to go, six candidates repeat themselves
    evaluate = Scripted(0.9, 0.1, 0.2, 0.3)
    winner = search(network(a=(3,)), evaluate, branches=6, tolerance=1, wheel=Wheel(0.0), tree=Tree(0.2, max_levels=1))
    (level,) = winner.report.levels
    first = [one for one in level.candidates if one.same_as is None]
    assert [one.score for one in first] == [0.1, 0.2, 0.3][: len(first)]
    assert winner.report.validations == len(first) + 1 < 7
    for one in level.candidates:
        if one.same_as is not None:
            original = level.candidates[one.same_as]
            assert original in first
            assert one == replace(original, index=one.index, same_as=original.index)


def test_infinite_sharpness_prunes_the_smallest_magnitudes():
    weights = network(a=(20, 10), b=(50,))
    winner = search(weights, always, branches=1, target_sparsity=0.6, wheel=Wheel(math.inf))
    magnitudes = torch.cat([weight.flatten() for weight in weights.values()]).abs()
    threshold = magnitudes.sort().values[150]
    assert winner.mask == Mask({name: weight.abs() >= threshold for name, weight in weights.items()})


def test_retries_draw_candidates_that_were_not_drawn_before():
    evaluate = Scripted(0.9, 0.1)
    tree = Tree(0.01, smallest_rate=1e-9)  # one weight goes at any rate
    winner = search(network(a=(60,)), evaluate, branches=3, wheel=Wheel(0.0), tree=tree)
    indices = [one.index for level in winner.report.levels for one in level.candidates]
    assert indices == list(range(9))
    assert len({tuple(mask["a"].tolist()) for mask in evaluate.masks[1:]}) > 6


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_equal_seeds_give_equal_searches_and_others_do_not(scope):
    def run(seed: int) -> tuple[Winner, list[Mask]]:
        evaluate = Scripted(0.9)
        tree = Tree(0.2, max_levels=3)
        return search(
            network(a=(20, 10), b=(50,)), evaluate, branches=3, seed=seed, tree=tree, wheel=Wheel(1.0, scope=scope)
        ), evaluate.masks

    (first, masks), (again, masks_again), (other, other_masks) = run(3), run(3), run(-3)
    assert masks == masks_again
    assert_same(first.report, again.report)
    assert not any(one == another for one, another in zip(masks[1:], other_masks[1:], strict=True))
    assert first.mask == again.mask != other.mask


def test_global_random_state_is_neither_read_nor_advanced():
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = search(network(), always, branches=2)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(123)
        assert search(network(), always, branches=2).mask == first.mask


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    rate=st.floats(0.01, 0.95),
    sharpness=st.sampled_from([0.0, 1.0, 4.0, math.inf]),
    scope=st.sampled_from(["global", "layer"]),
    goal=st.none() | st.floats(0.05, 0.95),
    seed=st.integers(-(2**63), 2**63 - 1),
    fates=st.lists(st.booleans(), min_size=1, max_size=8),
)
def test_masks_nest_and_lose_exactly_the_stated_count(sizes, rate, sharpness, scope, goal, seed, fates):
    weights = network(**{f"layer{n}": (size,) for n, size in enumerate(sizes)})
    spun: list[Mask] = []

    def evaluate(mask: Mask) -> float:
        if mask.sparsity == 0:
            return 1.0
        spun.append(mask)
        return float(fates[mask.survivors % len(fates)])

    winner = search(
        weights,
        evaluate,
        branches=2,
        seed=seed,
        target_sparsity=goal,
        wheel=Wheel(sharpness, scope=scope),
        tree=Tree(rate, max_levels=6, smallest_rate=1e-3),
    )
    size, masks = sum(sizes), [winner.mask_at(level) for level in range(len(winner.report.accepted) + 1)]
    assert masks[0] == Mask.full(weights)
    assert masks[-1] == winner.mask
    room = size - (len(sizes) if scope == "layer" else 1)
    if goal is not None:
        room = min(room, math.floor(goal * size + 0.5))
    evaluated = iter(spun)
    for level in winner.report.levels:
        parent = masks[level.level - 1]
        spare = room - (size - parent.survivors)
        assert parent.survivors - level.survivors == min(
            max(1, math.floor(level.pruning_rate * parent.survivors + 0.5)), spare
        )
        for one in level.candidates:
            if one.same_as is None:
                mask = next(evaluated)
                assert mask <= parent
                assert mask.survivors == level.survivors
                assert mask.sparsity == level.sparsity == one.sparsity
                if level.accepted and one.score == 1.0 and level.winner == one.index:
                    assert masks[level.level] == mask
                if scope == "layer":
                    assert all(kept.any() for kept in mask.values())
    assert next(evaluated, None) is None


class Folded:
    """Gives scores in order, one for each new mask and the same on all folds. It repeats the last."""

    def __init__(self, *scores: Scores, folds: int = 3) -> None:
        self.scores, self.folds, self.asked, self.masks = list(scores), folds, [], []

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        self.asked.append((candidate, list(folds)))
        if candidate.mask not in self.masks:
            self.masks.append(candidate.mask)
        return self.scores[min(self.masks.index(candidate.mask), len(self.scores) - 1)]


# one fold and many, with and without a race, with and without a held-out half
every_way = pytest.mark.parametrize(
    ("folds", "validation"),
    [
        (1, Validation()),
        (3, Validation()),
        (3, Validation(confirm=0, race=False)),
        (3, Validation(confirm=0)),
        (16, Validation(race=False)),
        (16, Validation(confirm=0.25)),
    ],
)


def one_branch(evaluate, validation, branches=3, patience=3) -> Winner:
    tree = Tree(0.2, max_levels=1, patience=patience)
    weights, wheel = network(a=(100,)), Wheel(8.0)
    return search(weights, evaluate, branches=branches, tree=tree, validation=validation, wheel=wheel)


def test_an_evaluator_is_asked_about_masked_weights_on_all_folds():
    weights, evaluate = network(a=(8, 10), b=(20,)), Folded(Scores(0.0, 0.0))
    shared = Validation(confirm=0, race=False)
    winner = search(weights, evaluate, branches=2, tree=Tree(0.2, max_levels=1), validation=shared)
    for candidate, _ in evaluate.asked:
        assert candidate.dense is weights
        expected = {name: torch.where(candidate.mask[name], weights[name], 0) for name in weights}
        assert all(torch.equal(candidate.weights[name], expected[name]) for name in weights)
    # the dense network and the winner of a branch also fold by fold, for the standard error of a score
    dense, pruned = ([folds for one, folds in evaluate.asked if one.mask.survivors == kept] for kept in (100, 80))
    assert dense == [[0, 1, 2], [0], [1], [2]]
    assert pruned == [[0, 1, 2], [0, 1, 2], *dense]
    assert [mask.survivors for mask in evaluate.masks] == [100, 80, 80]
    assert winner.mask == evaluate.masks[1]


@every_way
def test_the_rank_orders_the_branch_and_the_score_is_compared_with_the_floor(folds, validation):
    dense, others = Scores(-0.2, 0.9), (Scores(-0.3, 0.95), Scores(-0.4, 0.99))
    for best, kept in ((Scores(rank=-0.1, score=0.7), False), (Scores(rank=-0.1, score=0.91), True)):
        winner = one_branch(Folded(dense, others[0], best, others[1], folds=folds), validation, patience=1)
        (level,) = winner.report.levels
        assert (level.winner, level.score) == (1, best.score)
        assert level.accepted is kept
        assert [one.rank for one in level.candidates] == pytest.approx([-0.3, -0.1, -0.4])
    assert winner.report.dense_score == 0.9


@every_way
def test_equal_ranks_are_ordered_by_the_tiebreak(folds, validation):
    tiebreaks = (0, -3, -1, -2)
    evaluate = Folded(*(Scores(1, 1, tiebreak=tiebreak) for tiebreak in tiebreaks), folds=folds)
    (level,) = one_branch(evaluate, validation).report.levels
    assert level.winner == 1
    assert [one.tiebreak for one in level.candidates] == pytest.approx([-3, -1, -2])


@every_way
def test_a_rank_or_score_that_is_not_finite_never_wins(folds, validation):
    scores = Scores(1, 1), Scores(nan, 1), Scores(math.inf, 1), Scores(9, nan), Scores(0, 1)
    winner = one_branch(Folded(*scores, folds=folds), validation, branches=4)
    assert winner.report.levels[0].winner == 3


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda mask: torch.tensor(0.5),
        *(Folded(Scores(score, score)) for score in (np.float32(0.5), torch.tensor(0.5))),
    ],
)
def test_scores_may_be_numbers_of_other_libraries(evaluate):
    report = search(network(), evaluate, branches=np.int64(2), tree=Tree(0.2, max_levels=1)).report
    read = json.loads(json.dumps(report.to_dict()))
    assert (read["dense_score"], read["levels"][0]["candidates"][0]["score"]) == (0.5, 0.5)


@pytest.mark.parametrize("outcome", [always, never, Scripted(0.9, nan)])
def test_the_weights_are_not_touched(outcome):
    weights = {name: torch.nn.Parameter(weight) for name, weight in network(a=(20, 10), b=(50,)).items()}
    before = {name: (weight, weight.detach().clone(), weight._version) for name, weight in weights.items()}
    winner = search(weights, outcome, branches=2, wheel=Wheel(importance="lamp"), tree=Tree(0.2, max_levels=4))
    for name, (parameter, values, version) in before.items():
        assert weights[name] is parameter
        assert torch.equal(parameter, values)
        assert (parameter._version, parameter.grad) == (version, None)
    assert winner.dense is weights


def test_the_winners_weights_are_new_and_zero_where_pruned():
    weights = network(a=(20, 10), b=(50,))
    winner = search(weights, always, branches=2, target_sparsity=0.5)
    for name, weight in winner.weights.items():
        assert torch.equal(weight, torch.where(winner.mask[name], weights[name], 0))
        assert weight.data_ptr() != weights[name].data_ptr()
    assert sparsity(winner.weights) == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("importance", ["magnitude", "lamp"])
def test_weights_of_every_precision_can_be_searched(dtype, importance):
    weights = network(dtype, a=(20, 10), b=(50,))
    winner = search(weights, always, branches=2, target_sparsity=0.5, wheel=Wheel(importance=importance))
    assert winner.report.sparsity == 0.5
    assert {weight.dtype for weight in winner.weights.values()} == {dtype}


def test_weights_in_any_memory_format_can_be_searched():
    plain = network(conv=(4, 3, 3, 3))
    turned = {"conv": plain["conv"].to(memory_format=torch.channels_last)}
    masks = [search(each, always, branches=2, target_sparsity=0.5).mask for each in (plain, turned)]
    assert masks[0] == masks[1]


def test_importance_is_measured_once_a_level_on_the_pruned_parent():
    weights, seen = network(a=(100,)), []

    def measured(given):
        seen.append(Mask.of_nonzeros(given))
        return {name: weight.abs() for name, weight in given.items()}

    evaluate = Scripted(0.9, 0.9, 0.9, 0.1, 0.1, 0.9)  # the second level fails once
    winner = search(weights, evaluate, branches=2, wheel=Wheel(importance=measured), tree=Tree(0.2, max_levels=3))
    assert len(winner.report.levels) == 4
    assert seen == [winner.mask_at(level) for level in range(3)]


class Recorder(Observer):
    def __init__(self) -> None:
        self.calls, self.told = [], []

    def on_dense(self, so_far, work):
        report = so_far.report
        self.calls.append(("dense", report.dense_score, report.levels, report.stop_reason, report.validations, work))

    def on_candidate(self, level, done, planned, best, sparsity):
        self.calls.append(("candidate", level, done, planned, best and best.index, round(sparsity, 9)))

    def on_level(self, level, so_far):
        report = so_far.report
        self.told.append(so_far)
        self.calls.append(("level", level.level, level.accepted, so_far.mask.survivors, report.validations))
        assert report.levels[-1] is level
        assert report.stop_reason is None
        assert so_far.mask == so_far.mask_at(len(report.accepted))


def test_an_observer_is_told_of_every_step_in_order():
    recorder = Recorder()
    evaluate = Scripted(0.9, nan, 0.95, 0.1, 0.2, 0.9, 0.9)
    search(network(a=(100,)), evaluate, branches=2, observer=recorder, tree=Tree(0.2, max_levels=2))
    assert recorder.calls == [
        ("dense", 0.9, (), None, 1, 2),
        ("candidate", 1, 1, 2, None, 0.2),
        ("candidate", 1, 2, 2, 1, 0.2),
        ("level", 1, True, 80, 3),
        ("candidate", 2, 1, 2, 0, 0.36),
        ("candidate", 2, 2, 2, 1, 0.36),
        ("level", 2, False, 80, 5),
        ("candidate", 2, 1, 2, 2, 0.28),
        ("candidate", 2, 2, 2, 2, 0.28),
        ("level", 2, True, 72, 7),
    ]
    assert [winner.history.level for winner in recorder.told] == [1, 1, 2]  # they stay as they were


def test_time_and_validations_add_up():
    def slow(mask: Mask) -> float:
        time.sleep(0.01)
        return 1.0

    report = search(network(), slow, branches=2, wheel=Wheel(0.0), tree=Tree(0.2, max_levels=2)).report
    assert report.seconds >= 0.01 * report.validations
    assert report.validations == 1 + sum(one.same_as is None for level in report.levels for one in level.candidates)


@pytest.mark.parametrize("stop_at", [1, 4, 6])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_of_the_evaluation_passes_through(stop_at, error):
    weights, calls = network(), []

    def failing(mask: Mask) -> float:
        calls.append(mask)
        if len(calls) == stop_at:
            raise error("evaluation failed")
        return 1.0

    before = {name: weight.clone() for name, weight in weights.items()}
    with pytest.raises(error, match="evaluation failed"):
        search(weights, failing, branches=2, wheel=Wheel(0.0))
    assert len(calls) == stop_at
    assert all(torch.equal(weights[name], before[name]) for name in weights)


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("branches", 0, ValueError, "at least 1"),
        ("branches", 2.0, TypeError, "a whole number"),
        ("tolerance", -0.01, ValueError, "at least 0. It is in the metric's own units"),
        ("tolerance", "0.5", TypeError, "a number"),
        ("target_sparsity", 0.0, ValueError, "more than 0 and less than 1"),
        ("target_sparsity", 1, ValueError, "more than 0 and less than 1"),
        ("confidence", 0.0, ValueError, "more than 0 and less than 1. 0.95 is usual"),
        ("confidence", 1, ValueError, "more than 0 and less than 1"),
        ("confidence", nan, ValueError, "more than 0 and less than 1"),
        ("confidence", "0.95", TypeError, "a number"),
        ("wheel", 4, TypeError, r"a Wheel\(\.\.\.\) of lightning_roulette"),
        ("tree", None, TypeError, "a Tree"),
        ("validation", Tree(), TypeError, "a Validation"),
        ("seed", 1.5, TypeError, "a whole number"),
        ("seed", 2**63, ValueError, "a signed 64-bit number"),
        ("seed", -(2**63) - 1, ValueError, "a signed 64-bit number"),
    ],
)
def test_a_mistake_is_named_before_anything_is_validated(argument, value, error, message):
    evaluate = Scripted(1.0)
    with pytest.raises(error, match=f"{argument} is {re.escape(repr(value))}, but must be {message}"):
        search(network(), evaluate, **{argument: value})
    assert evaluate.masks == []


def test_arguments_within_their_ranges_are_accepted():
    for seed in (-(2**63), 0, 2**63 - 1):
        check_search(1, 0, 1e-9, None, Wheel(), Tree(), Validation(), seed)
    check_search(np.int64(3), math.inf, None, None, Wheel(), Tree(), Validation(), np.int64(5))
    check_search(np.int64(3), 0.5, None, np.float32(0.5), Wheel(), Tree(), Validation(), np.int64(5))
    check_search(1, 1e-9, None, 1e-9, Wheel(), Tree(), Validation(confirm=1e-9), 0)


@pytest.mark.parametrize(
    ("weights", "importance", "message"),
    [
        ({}, "magnitude", "weights is empty, but must name at least one tensor with entries"),
        ({"a": torch.empty(0, 3)}, "magnitude", "weights is empty, but must name at least one tensor with entries"),
        *(
            ({"b": torch.tensor([1.0, value])}, "magnitude", "importance of b has negative, infinite or NaN entries")
            for value in (nan, math.inf)
        ),
        (network(), lambda given: {name: -one.abs() for name, one in given.items()}, "importance of a has negative"),
        (network(), lambda given: {"a": given["a"].abs()}, "importance returned nothing for 'b'"),
    ],
)
def test_every_weight_must_have_a_finite_importance(weights, importance, message):
    with pytest.raises(ValueError, match=message):
        search(weights, always, wheel=Wheel(importance=importance))


def test_a_search_does_not_load_lightning():
    script = """
import sys
import lightning_roulette.search.search
from lightning_roulette import prunable_parameters, search
from torch import nn
weights = prunable_parameters(nn.Linear(4, 5))
assert search(weights, lambda mask: 1.0, target_sparsity=0.5, branches=2).report.sparsity == 0.5
print(*{name.split(".")[0] for name in sys.modules})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    heavy = {"torch", "lightning", "pytorch_lightning", "torchmetrics", "tensorboard"}
    assert heavy & set(done.stdout.split()) == {"torch"}


def test_weights_that_are_held_at_zero_stay_zero_and_count_as_pruned():
    held = Mask({"a": torch.arange(40) % 4 > 0})
    weights = {"a": torch.where(held["a"], torch.arange(1.0, 41), 0.0)}
    winner = search(weights, always, branches=2, tree=Tree(0.5, max_levels=2), held=held)
    assert [level.survivors for level in winner.report.levels] == [15, 7]
    assert winner.mask_at(2) <= winner.mask_at(1) <= winner.mask_at(0) == held
    assert (winner.report.held.survivors, winner.report.sparsity) == (30, 0.825)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (torch.ones(3, dtype=torch.bool), r"held has the shape \(3,\) for 'a', but the weight has \(4,\)"),
        (torch.arange(4) > 0, "held prunes weights of 'a' that are not zero"),
    ],
)
def test_a_mask_that_does_not_hold_the_weights_is_refused(held, message):
    with pytest.raises(ValueError, match=message):
        search({"a": torch.ones(4)}, always, held={"a": held})
