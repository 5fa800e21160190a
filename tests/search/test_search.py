"""The search: scripted scores in, a literal report out; masks that nest; a network that is never touched."""

from __future__ import annotations

import json
import math
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
    """Hands out scores in order, whatever the mask, and keeps the masks; after the last it repeats the last."""

    def __init__(self, *scores: float) -> None:
        self.scores, self.masks = list(scores), []

    def __call__(self, mask: Mask) -> float:
        self.masks.append(mask)
        return self.scores[min(len(self.masks), len(self.scores)) - 1]


def always(mask: Mask) -> float:
    return 1.0


def never(mask: Mask) -> float:
    """Only the dense network is any good."""
    return float(mask.sparsity == 0)


def candidates(first: int, slim: float, *scores: float, same: Sequence[int | None] = ()) -> tuple[Candidate, ...]:
    twins = [*same, *[None] * (len(scores) - len(same))]
    return tuple(Candidate(first + n, slim, s, s, same_as=twins[n]) for n, s in enumerate(scores))


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


def test_equal_scores_go_to_the_earliest_and_prune_to_the_last_weight():
    evaluate = Scripted(0.5)
    winner = search(network(), evaluate, branches=3)
    assert winner.report.stop_reason is StopReason.EXHAUSTED
    assert {level.winner for level in winner.report.levels} == {0}
    assert all(level.accepted for level in winner.report.levels)
    assert winner.mask.survivors == winner.report.survivors == 1


@pytest.mark.parametrize("dense", [nan, math.inf, -math.inf])
def test_a_dense_network_without_a_score_is_an_error(dense):
    evaluate = Scripted(dense)
    with pytest.raises(
        ValueError, match="the score of the dense network is NaN or infinite, so there is no floor. Nothing was"
    ):
        search(network(), evaluate)
    assert len(evaluate.masks) == 1


def test_the_dense_network_is_validated_first_and_counted():
    evaluate = Scripted(0.5)
    winner = search(network(), evaluate, branches=4, wheel=Wheel(0.0), tree=Tree(0.2, max_levels=1))
    assert evaluate.masks[0] == Mask.full(network())
    assert winner.report.validations == len(evaluate.masks) == 5


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


def test_a_target_that_declines_first_is_not_reached():
    winner = search(
        network(a=(100,)), lambda mask: float(mask.sparsity < 0.5), target_sparsity=0.9, branches=2, tree=Tree(0.2)
    )
    assert winner.report.stop_reason is StopReason.DECLINED
    assert 0.4 < winner.report.sparsity < 0.5


def test_a_target_of_less_than_half_a_weight_keeps_all():
    winner = search(network(), always, target_sparsity=0.04)
    assert winner.report.stop_reason is StopReason.TARGET_REACHED
    assert winner.report.levels == ()


@pytest.mark.parametrize(("scope", "goal"), [("global", 0.96), ("layer", 0.9)])
def test_a_target_beyond_the_last_weight_is_not_reached(scope, goal):
    winner = search(network(), always, target_sparsity=goal, branches=2, wheel=Wheel(scope=scope))
    assert winner.report.sparsity < goal - 0.05
    assert winner.report.stop_reason is StopReason.EXHAUSTED


@pytest.mark.parametrize("levels", [1, 3])
def test_max_levels_counts_accepted_levels(levels):
    evaluate = Scripted(0.5, 0.1, 0.1, 0.5, 0.5)  # the first level fails once
    tree = Tree(pruning_rate=0.05, max_levels=levels)
    winner = search(network(a=(500,)), evaluate, branches=2, tree=tree)
    assert winner.report.stop_reason is StopReason.MAX_LEVELS
    assert len(winner.report.accepted) == levels
    assert len(winner.report.levels) == levels + 1


def test_each_layer_keeps_one_weight_where_each_has_its_wheel():
    winner = search(network(), always, branches=2, wheel=Wheel(scope="layer"))
    assert winner.report.stop_reason is StopReason.EXHAUSTED
    assert [int(kept.sum()) for kept in winner.mask.values()] == [1, 1]


def test_a_single_weight_is_never_pruned():
    winner = search(network(a=(1,)), always)
    assert winner.report.stop_reason is StopReason.EXHAUSTED
    assert winner.report.levels == ()
    assert winner.mask.survivors == 1


def test_an_empty_tensor_among_others_does_no_harm():
    winner = search(network(a=(0, 3), b=(10,)), always, branches=2, tree=Tree(0.2, max_levels=1))
    assert winner.mask.densities == {"a": 0.0, "b": 0.8}


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_patience_counts_failures_in_a_row(patience):
    winner = search(network(a=(1000,)), never, branches=2, tree=Tree(0.8, patience=patience))
    assert winner.report.stop_reason is StopReason.DECLINED
    assert [level.pruning_rate for level in winner.report.levels] == [0.8 / 2**n for n in range(patience)]
    assert [level.level for level in winner.report.levels] == [1] * patience


def test_an_accepted_level_renews_patience_and_the_rate_stays_halved():
    good, bad = [0.9] * 2, [0.1] * 2
    evaluate = Scripted(0.9, *bad, *good, *bad, *good, *bad, *bad)
    winner = search(network(a=(1000,)), evaluate, branches=2, tree=Tree(0.4, patience=2, smallest_rate=1e-3))
    assert [level.accepted for level in winner.report.levels] == [False, True, False, True, False, False]
    assert [level.pruning_rate for level in winner.report.levels] == [0.4, 0.2, 0.2, 0.1, 0.1, 0.05]
    assert [level.level for level in winner.report.levels] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(("smallest", "rates"), [(0.1, [0.4, 0.2, 0.1]), (0.11, [0.4, 0.2]), (0.3, [0.4])])
def test_the_rate_is_not_halved_below_the_smallest(smallest, rates):
    winner = search(network(a=(1000,)), never, branches=1, tree=Tree(0.4, patience=9, smallest_rate=smallest))
    assert winner.report.stop_reason is StopReason.RATE_TOO_SMALL
    assert [level.pruning_rate for level in winner.report.levels] == rates


def test_a_rate_below_the_smallest_is_tried_before_any_halving():
    winner = search(network(a=(1000,)), always, branches=1, tree=Tree(0.001, max_levels=2, smallest_rate=0.01))
    assert [level.survivors for level in winner.report.levels] == [999, 998]


def test_identical_candidates_are_validated_once():
    evaluate = Scripted(0.9, 0.8)
    winner = search(network(), evaluate, branches=5, tolerance=1, wheel=Wheel(math.inf), tree=Tree(0.2, max_levels=2))
    assert winner.report.validations == len(evaluate.masks) == 3
    for level, slim in zip(winner.report.levels, (0.2, 0.4), strict=True):
        assert level.candidates == candidates(0, pytest.approx(slim), *[0.8] * 5, same=[None, 0, 0, 0, 0])


def test_different_candidates_are_all_validated():
    evaluate = Scripted(0.9)
    winner = search(network(a=(300,)), evaluate, branches=20, tree=Tree(0.2, max_levels=1))
    assert len({tuple(mask["a"].tolist()) for mask in evaluate.masks[1:]}) == 20
    assert all(one.same_as is None for one in winner.report.levels[0].candidates)


def test_a_twin_names_the_first_of_its_kind_and_shares_its_scores():
    # with three weights and one to go, six candidates repeat themselves
    evaluate = Scripted(0.9, 0.1, 0.2, 0.3)
    winner = search(network(a=(3,)), evaluate, branches=6, tolerance=1, wheel=Wheel(0.0), tree=Tree(0.2, max_levels=1))
    (level,) = winner.report.levels
    first = [one for one in level.candidates if one.same_as is None]
    assert [one.score for one in first] == [0.1, 0.2, 0.3][: len(first)]
    assert winner.report.validations == len(first) + 1 < 7
    for one in level.candidates:
        if one.same_as is not None:
            twin = level.candidates[one.same_as]
            assert twin in first
            assert one == replace(twin, index=one.index, same_as=twin.index)


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


def test_global_chance_is_neither_read_nor_advanced():
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


def test_the_mask_of_a_level_is_the_one_that_was_validated():
    evaluate = Scripted(0.9, 0.1, 0.9, 0.1)  # the second, and then the first of a branch of two
    winner = search(network(a=(200,)), evaluate, branches=2, tolerance=1.0, tree=Tree(0.2, max_levels=3))
    winners = [level.winner for level in winner.report.levels]
    assert winners == [1, 0, 0]
    assert [winner.mask_at(level) for level in (1, 2, 3)] == [evaluate.masks[n] for n in (2, 3, 5)]
    with pytest.raises(ValueError, match=r"level is 4, but must lie between 0 \(dense\) and 3"):
        winner.mask_at(4)


class Folded:
    """An evaluator of folds whose rank is not what is held against the floor: hands out scores, one for each new mask.

    After the last it repeats the last. A mask has the same scores on all folds.
    """

    def __init__(self, *scores: Scores, folds: int = 3) -> None:
        self.scores, self.folds, self.asked, self.masks = list(scores), folds, [], []

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        self.asked.append((candidate, list(folds)))
        if candidate.mask not in self.masks:
            self.masks.append(candidate.mask)
        return self.scores[min(self.masks.index(candidate.mask), len(self.scores) - 1)]


# of one fold and of many, with a race and without one, with confirmation and without it
EVERY_WAY = [
    (1, Validation()),
    (3, Validation()),
    (3, Validation(confirm=0, race=False)),
    (3, Validation(confirm=0)),
    (16, Validation(race=False)),
    (16, Validation(confirm=0.25)),
]
every_way = pytest.mark.parametrize(("folds", "validation"), EVERY_WAY)


def test_an_evaluator_is_asked_about_masked_weights_on_all_folds():
    weights, evaluate = network(a=(8, 10), b=(20,)), Folded(Scores(0.0, 0.0))
    shared = Validation(confirm=0, race=False)
    winner = search(weights, evaluate, branches=2, tree=Tree(0.2, max_levels=1), validation=shared)
    for candidate, _ in evaluate.asked:
        assert candidate.dense is weights
        expected = {name: torch.where(candidate.mask[name], weights[name], 0) for name in weights}
        assert all(torch.equal(candidate.weights[name], expected[name]) for name in weights)
    # the dense network and the winner of a branch also fold by fold, which tells how far a score may be off
    one_by_one = [[0], [1], [2]]
    asked = {
        survivors: [folds for one, folds in evaluate.asked if one.mask.survivors == survivors]
        for survivors in (100, 80)
    }
    assert asked == {100: [[0, 1, 2], *one_by_one], 80: [[0, 1, 2], [0, 1, 2], [0, 1, 2], *one_by_one]}
    assert [mask.survivors for mask in evaluate.masks] == [100, 80, 80]
    assert winner.mask == evaluate.masks[1]


@every_way
def test_rank_orders_the_branch_and_floor_is_held_against_the_floor(folds, validation):
    dense, others = Scores(-0.2, 0.9), (Scores(-0.3, 0.95), Scores(-0.4, 0.99))
    for best, kept in ((Scores(rank=-0.1, score=0.7), False), (Scores(rank=-0.1, score=0.91), True)):
        evaluate, tree = Folded(dense, others[0], best, others[1], folds=folds), Tree(0.2, max_levels=1, patience=1)
        winner = search(network(a=(100,)), evaluate, branches=3, tree=tree, validation=validation, wheel=Wheel(8.0))
        (level,) = winner.report.levels
        assert (level.winner, level.score) == (1, best.score)
        assert level.accepted is kept
        assert [one.rank for one in level.candidates] == pytest.approx([-0.3, -0.1, -0.4])
    assert winner.report.dense_score == 0.9


@every_way
def test_equal_ranks_are_ordered_by_the_tiebreak(folds, validation):
    tiebreaks = (0, -3, -1, -2)
    evaluate = Folded(*(Scores(1, 1, tiebreak=tiebreak) for tiebreak in tiebreaks), folds=folds)
    winner = search(
        network(a=(100,)), evaluate, branches=3, tree=Tree(0.2, max_levels=1), validation=validation, wheel=Wheel(8.0)
    )
    assert winner.report.levels[0].winner == 1
    assert [one.tiebreak for one in winner.report.levels[0].candidates] == pytest.approx([-3, -1, -2])


@every_way
def test_a_rank_or_floor_that_is_no_number_never_wins(folds, validation):
    scores = Scores(1, 1), Scores(nan, 1), Scores(math.inf, 1), Scores(9, nan), Scores(0, 1)
    evaluate = Folded(*scores, folds=folds)
    winner = search(
        network(a=(100,)), evaluate, branches=4, tree=Tree(0.2, max_levels=1), validation=validation, wheel=Wheel(8.0)
    )
    assert winner.report.levels[0].winner == 3


def test_infinite_tolerance_disables_the_floor():
    winner = search(network(), never, branches=2, tolerance=math.inf, target_sparsity=0.5)
    assert winner.report.stop_reason is StopReason.TARGET_REACHED
    assert winner.report.floor == -math.inf


def test_a_plain_function_may_return_a_tensor():
    report = search(network(), lambda mask: torch.tensor(0.5), branches=2, tree=Tree(0.2, max_levels=1)).report
    assert json.loads(json.dumps(report.to_dict()))["dense_score"] == 0.5


@pytest.mark.parametrize("score", [np.float32(0.5), torch.tensor(0.5)])
def test_an_evaluator_may_return_numbers_of_other_libraries(score):
    report = search(network(), Folded(Scores(score, score)), branches=np.int64(2), tree=Tree(0.2, max_levels=1)).report
    assert json.loads(json.dumps(report.to_dict()))["levels"][0]["candidates"][0]["score"] == 0.5


@pytest.mark.parametrize("outcome", [always, never, Scripted(0.9, nan)])
def test_the_weights_are_not_touched(outcome):
    weights = {name: torch.nn.Parameter(weight) for name, weight in network(a=(20, 10), b=(50,)).items()}
    before = {name: (weight, weight.detach().clone(), weight._version) for name, weight in weights.items()}
    winner = search(weights, outcome, branches=2, wheel=Wheel(importance="lamp"), tree=Tree(0.2, max_levels=4))
    for name, (parameter, values, version) in before.items():
        assert weights[name] is parameter
        assert torch.equal(parameter, values)
        assert parameter._version == version
        assert parameter.grad is None
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
        self.calls = []

    def on_dense(self, so_far, work):
        report = so_far.report
        self.calls.append(("dense", report.dense_score, report.levels, report.stop_reason, report.validations, work))

    def on_candidate(self, level, done, planned, best, sparsity):
        self.calls.append(("candidate", level, done, planned, best and best.index, round(sparsity, 9)))

    def on_level(self, level, so_far):
        report = so_far.report
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


def test_what_an_observer_was_told_stays_as_it_was():
    told = []

    class Keeper(Observer):
        def on_level(self, level, so_far):
            told.append(so_far)

    search(network(), always, branches=2, observer=Keeper(), tree=Tree(0.2, max_levels=3))
    assert [winner.history.level for winner in told] == [1, 2, 3]


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
        ("branches", 0, ValueError, "branches is 0, but must be at least 1"),
        ("branches", 2.0, TypeError, "branches is 2.0, but must be a whole number"),
        ("branches", True, TypeError, "branches is True, but must be a whole number"),
        ("tolerance", -0.01, ValueError, "tolerance is -0.01, but must be at least 0. It is in the metric's own units"),
        ("tolerance", nan, ValueError, "tolerance is nan, but must be at least 0"),
        ("tolerance", "0.5", TypeError, "tolerance is '0.5', but must be a number"),
        ("target_sparsity", 0.0, ValueError, "target_sparsity is 0.0, but must be more than 0 and less than 1"),
        ("target_sparsity", 1, ValueError, "target_sparsity is 1, but must be more than 0 and less than 1"),
        ("target_sparsity", 90, ValueError, "target_sparsity is 90, but must be more than 0 and less than 1"),
        ("target_sparsity", nan, ValueError, "target_sparsity is nan"),
        ("wheel", {"sharpness": 1}, TypeError, r"wheel is .*, but must be a Wheel\(\.\.\.\) of lightning_roulette"),
        ("confidence", 0.0, ValueError, "confidence is 0.0, but must be more than 0 and less than 1. 0.95 is usual"),
        ("confidence", 1, ValueError, "confidence is 1, but must be more than 0 and less than 1"),
        ("confidence", 95, ValueError, "confidence is 95, but must be more than 0 and less than 1"),
        ("confidence", nan, ValueError, "confidence is nan"),
        ("confidence", True, TypeError, "confidence is True, but must be a number"),
        ("confidence", "0.95", TypeError, "confidence is '0.95', but must be a number"),
        ("wheel", Tree(), TypeError, r"wheel is Tree\(.*\), but must be a Wheel"),
        ("tree", None, TypeError, "tree is None, but must be a Tree"),
        ("validation", Tree(), TypeError, r"validation is Tree\(.*\), but must be a Validation"),
        ("validation", None, TypeError, "validation is None, but must be a Validation"),
        ("seed", 1.5, TypeError, "seed is 1.5, but must be a whole number"),
        ("seed", None, TypeError, "seed is None, but must be a whole number"),
        ("seed", 2**63, ValueError, "seed is 9223372036854775808, but must be a signed 64-bit number"),
        ("seed", -(2**63) - 1, ValueError, "seed is -9223372036854775809, but must be"),
    ],
)
def test_a_mistake_is_named_before_anything_is_validated(argument, value, error, message):
    evaluate = Scripted(1.0)
    with pytest.raises(error, match=message):
        search(network(), evaluate, **{argument: value})
    assert evaluate.masks == []


def test_what_is_in_range_is_taken():
    for seed in (-(2**63), 0, 2**63 - 1):
        check_search(1, 0, 1e-9, None, Wheel(), Tree(), Validation(), seed)
    check_search(np.int64(3), math.inf, None, None, Wheel(), Tree(), Validation(), np.int64(5))
    check_search(np.int64(3), 0.5, None, np.float32(0.5), Wheel(), Tree(), Validation(), np.int64(5))
    check_search(1, 1e-9, None, 1e-9, Wheel(), Tree(), Validation(confirm=1e-9), 0)


@pytest.mark.parametrize("weights", [{}, {"a": torch.empty(0, 3)}])
def test_there_must_be_weights(weights):
    with pytest.raises(ValueError, match="weights is empty, but must name at least one tensor with entries"):
        search(weights, always)


@pytest.mark.parametrize("value", [nan, math.inf])
def test_weights_must_be_finite(value):
    weights = network()
    weights["b"][1] = value
    with pytest.raises(ValueError, match="importance of b has negative, infinite or NaN entries"):
        search(weights, always)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (lambda given: {name: -weight.abs() for name, weight in given.items()}, "importance of a has negative"),
        (lambda given: {"a": given["a"].abs()}, "importance returned nothing for 'b'"),
    ],
)
def test_importance_must_be_a_number_for_every_weight(importance, message):
    with pytest.raises(ValueError, match=message):
        search(network(), always, wheel=Wheel(importance=importance))


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
