"""Coarse levels of a search with a refit: one candidate each. Then come fine levels with branches."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from lightning_roulette import Candidate, LeastSquares, Observer, StopReason, Tree, Validation, Wheel
from lightning_roulette.judge.journal import Journal, lines_in
from lightning_roulette.judge.noted import Noted
from lightning_roulette.refit_settings import Refit
from tests.support.refits import Asked, equal, faithful, masks_of, network, ranked, refit_of

TREE = Tree(0.1, coarse_rate=0.2, patience=2, smallest_rate=0.03)


def breaking_at(share: float, folds: int = 4) -> Asked:
    """Every network scores 1 that keeps more than a share of the weights, and 0 below it."""
    return Asked(lambda candidate, _: float(candidate.mask.survivors > share * candidate.mask.size), folds)


def found(net=None, evaluate=None, **options):
    return ranked(net or network(), evaluate=evaluate or breaking_at(0.5), **{"tolerance": 0.5, "tree": TREE} | options)


def test_the_search_closes_in_by_coarse_levels_and_goes_on_by_fine_ones():
    report = found().report
    levels = [(one.level, one.pruning_rate, one.survivors, len(one.candidates), one.accepted) for one in report.levels]
    assert levels == [
        (1, 0.2, 205, 1, True),
        (2, 0.2, 164, 1, True),
        (3, 0.2, 131, 1, True),
        (4, 0.2, 105, 1, False),
        (4, 0.1, 118, 6, False),
        (4, 0.05, 124, 6, False),
    ]
    assert report.stop_reason is StopReason.DECLINED
    assert report.winner is not None
    assert report.winner.level == 3


def test_a_failed_coarse_level_costs_no_patience_and_its_candidate_is_not_drawn_again():
    levels = found(tree=Tree(0.1, coarse_rate=0.9, patience=1)).report.levels
    assert [(one.pruning_rate, one.accepted) for one in levels[:3]] == [(0.9, False), (0.1, True), (0.1, True)]
    assert [one.index for one in levels[0].candidates] == [0]
    assert [one.index for one in levels[1].candidates] == [1, 2, 3, 4, 5, 6]
    assert len(levels) == 1 + 6 + 1


def test_no_step_of_the_chain_removes_more_than_the_coarse_rate():
    report = found(evaluate=breaking_at(0.1)).report
    kept = [report.size, *(one.survivors for one in report.accepted)]
    assert len(kept) > 8
    assert all(after >= math.floor(0.8 * before) for before, after in pairwise(kept))


def test_a_coarse_candidate_is_judged_after_its_refit_only_and_has_its_parents_allocation():
    net = network()
    evaluate, told = faithful(net), []

    class Told(Observer):
        def on_candidate(self, level: int, done: int, planned: int, best: Candidate | None, sparsity: float) -> None:
            told.append((level, done, planned, best and best.refitted))

    tree = Tree(0.1, coarse_rate=0.2, max_levels=2)
    wheel = Wheel(math.inf)
    winner = found(net, evaluate, tolerance=math.inf, tree=tree, wheel=wheel, observer=Told())
    coarse = [one for one, _ in evaluate.log if one.mask.sparsity]
    assert all(one.refitted for one in coarse)
    assert told == [(1, 1, 1, True), (2, 1, 1, True)]
    for level, mask in enumerate(masks_of(winner)[1:], start=1):
        assert equal(dict(winner.weights_at(level)), refit_of(net, mask))
    plain = found(net, faithful(net), tolerance=math.inf, tree=tree, wheel=Wheel(math.inf, allocation=0.0))
    assert masks_of(winner) == masks_of(plain)


@pytest.mark.parametrize(
    "options",
    [
        {"refit": None},
        {"refit": "batch_norm"},
        {"refit": Refit(each_level=True)},
        {"refit": LeastSquares(each_level=False)},
        {"tree": Tree(0.2, coarse_rate=0.2)},
        {"tree": Tree(0.15, coarse_rate=None, max_levels=1)},
    ],
)
def test_there_are_no_coarse_levels_without_a_refit_of_each_level_or_with_a_small_rate(options):
    levels = found(**{"tree": Tree(0.15, coarse_rate=0.2, max_levels=1)} | options).report.levels
    assert all(len(one.candidates) == 6 for one in levels)


def test_a_target_is_reached_exactly_by_fine_levels():
    report = found(evaluate=breaking_at(0), tree=TREE, target_sparsity=0.7).report
    assert report.stop_reason is StopReason.TARGET_REACHED
    assert (report.survivors, report.target_met) == (256 - 179, True)
    assert [len(one.candidates) for one in report.levels] == [1] * 4 + [6] * 3


def test_a_score_that_is_no_number_fails_a_coarse_level():
    evaluate = Asked(lambda one, _: math.nan if one.mask.survivors < 200 else 1.0)
    levels = found(evaluate=evaluate).report.levels
    assert [(one.pruning_rate, one.accepted, one.winner) for one in levels[:2]] == [(0.2, True, 0), (0.2, False, None)]


def test_a_killed_search_takes_the_same_steps_from_its_journal(tmp_path):
    path = str(tmp_path / "journal")
    whole = found()
    kept, stop = breaking_at(0.5), []

    def dies(candidate, folds):
        if len(stop) == 14:
            raise KeyboardInterrupt
        stop.append(candidate)
        return kept.score(candidate, folds)

    with pytest.raises(KeyboardInterrupt):
        found(evaluate=Noted(Asked(dies), Journal(path, "search")))
    again = breaking_at(0.5)
    resumed = found(evaluate=Noted(again, Journal(path, "search", lines_in(path, "search"))))
    assert resumed.report.levels == whole.report.levels
    assert masks_of(resumed) == masks_of(whole)
    assert len(again.log) < len(stop) + 30


def test_equal_seeds_take_equal_steps_and_all_levels_are_confirmed():
    one, other = found(validation=Validation(race=True)), found(validation=Validation(race=True))
    assert one.report.levels == other.report.levels
    assert all(level.held for level in one.report.accepted)
    assert torch.equal(one.weights["0.weight"], other.weights["0.weight"])
