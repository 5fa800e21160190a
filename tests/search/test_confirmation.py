"""Confirmation: the held-out half is asked once, when the search is over, and decides what wins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette import Batches, Mask, Method, Resamples, Singles, StopReason, Tree, Validation, Winner, search
from lightning_roulette.judge.certificate import p_value, paired_error, samples_needed
from lightning_roulette.judge.evaluator import divided
from lightning_roulette.judge.selection import keeps_floor
from lightning_roulette.mask.history import History
from tests.support.evaluators import Logged, Sampled, Steps, Telling, key_of, network, noise

nan = math.nan


def depth(mask: Mask) -> int:
    """The level of a mask in a tree that prunes a fifth of 100 weights a level, if no level fails."""
    return {100: 0, 80: 1, 64: 2, 51: 3, 41: 4}[mask.survivors]


def by_level(*held_out: float, searched: float = 0.5) -> Telling:
    """An evaluator of eight folds: a score for each level on the held-out half, and one for all on the search half."""
    return Telling(lambda mask, fold: held_out[depth(mask)] if fold >= 4 else searched, 8)


def grown(evaluate, levels: int = 4, **options) -> Winner:
    """A search of at most four levels."""
    return search(network(), evaluate, **{"branches": 3, "tree": Tree(0.2, max_levels=levels), **options})


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from([Logged, Telling]),
    folds=st.integers(1, 16),
    at_once=st.integers(1, 16),
    confirm=st.sampled_from([0.0, 0.25, 0.5, 0.9]),
    race=st.booleans(),
    branches=st.integers(1, 6),
    tolerance=st.sampled_from([0.02, 0.1, 0.3]),
    seed=st.integers(0, 100),
)
def test_the_held_out_half_is_asked_about_the_dense_network_and_then_once_about_each_level_up_to_a_failure(
    kind, folds, at_once, confirm, race, branches, tolerance, seed
):
    evaluate = kind(lambda mask, fold: noise(mask, fold) ** 2 / 4, folds, at_once)
    steps = Steps(evaluate)
    options = {"branches": branches, "tolerance": tolerance, "seed": seed, "observer": steps}
    options |= {"tree": Tree(0.2, max_levels=4), "validation": Validation(confirm=confirm, race=race)}
    winner = search(network(30), evaluate, **options)
    search_folds, held_out = divided(folds, confirm)
    log = evaluate.log
    dense, growing, after = log[: steps.dense], log[steps.dense : steps.grown], log[steps.grown :]
    assert {key_of(mask) for mask, _ in dense} == {key_of(winner.mask_at(0))}
    assert all(set(asked) <= {*search_folds} or set(asked) <= {*held_out} for _, asked in dense)
    assert all(set(asked) <= {*search_folds} for _, asked in growing)
    assert not any(mask == winner.mask_at(0) for mask, _ in growing)
    if not held_out:
        assert (after, steps.confirmed) == ([], [])
        assert winner.mask == winner.mask_at(winner.history.deepest)
        return
    # one union each, and each of its folds if the evaluator records nothing itself
    once = [tuple(held_out)]
    if kind is Logged and len(held_out) > 1:
        once += [(fold,) for fold in held_out]
    assert [asked for _, asked in dense if set(asked) <= {*held_out}] == once
    chain, held = [], 0
    for level in winner.report.accepted:
        mask = winner.mask_at(level.level)
        chain += [(key_of(mask), asked) for asked in once]
        score = sum(evaluate.score(mask, fold) for fold in held_out) / len(held_out)
        assert level.held_out_score == pytest.approx(score)
        assert level.held is keeps_floor(level.held_out_score, winner.report.held_out_floor)
        if not level.held:
            break
        held = level.level
    assert [(key_of(mask), asked) for mask, asked in after] == chain
    assert [one.held for one in winner.report.accepted[held + 1 :]] == [None] * (len(winner.report.accepted) - held - 1)
    assert winner.history.level == (winner.report.winner.level if winner.report.winner else 0) == held
    assert winner.mask == winner.mask_at(held)


def test_levels_that_failed_are_not_confirmed():
    # the first branch falls below the floor on the search half, and its retry at half the rate does not
    evaluate = Telling(lambda mask, fold: float(mask.survivors != 80), 8)
    winner = grown(evaluate, levels=1)
    failed, accepted = winner.report.levels
    assert (failed.accepted, failed.held_out_score, failed.held) == (False, None, None)
    assert (accepted.accepted, accepted.held_out_score, accepted.held) == (True, 1.0, True)
    assert winner.mask.survivors == 90


def test_the_winner_is_the_last_level_that_held():
    # the fourth level would hold, but the third did not
    evaluate = by_level(0.9, 0.95, 0.86, 0.84, 0.9)
    steps = Steps(evaluate)
    winner = grown(evaluate, tolerance=0.05, observer=steps)
    report = winner.report
    assert [level.held for level in report.levels] == [True, True, False, None]
    assert [level.held_out_score for level in report.levels][:3] == pytest.approx([0.95, 0.86, 0.84])
    assert report.levels[3].held_out_score is None
    assert all(level.accepted for level in report.levels)
    assert report.winner == report.levels[1]
    assert (report.dense_score, report.held_out_dense) == pytest.approx((0.5, 0.9))
    assert (report.floor, report.held_out_floor) == pytest.approx((0.45, 0.85))
    assert report.decline == pytest.approx(0.05)
    assert report.search_score == pytest.approx(0.5)
    assert report.folds == (4, 4)
    assert report.stop_reason is StopReason.MAX_LEVELS
    assert (winner.history.level, winner.history.deepest) == (2, 4)
    assert winner.mask == winner.mask_at(2)
    assert [winner.mask_at(level).survivors for level in range(5)] == [100, 80, 64, 51, 41]
    assert winner.weights["a"].count_nonzero() == report.survivors == 64
    with pytest.raises(ValueError, match=r"level is 5, but must lie between 0 \(dense\) and 4"):
        winner.mask_at(5)


@pytest.mark.parametrize("misses", [1, 2, 3, 4, 5])
def test_a_checkpoint_keeps_the_winner_and_the_levels_after_it(misses):
    winner = grown(by_level(*[0.9] * misses, *[0.1] * (5 - misses)))
    read = History.from_state(winner.history.state())
    assert (read.level, read.deepest) == (misses - 1, 4)
    assert read.mask == winner.mask == winner.mask_at(misses - 1)
    assert [read.mask_at(level) for level in range(5)] == [winner.mask_at(level) for level in range(5)]


def test_where_no_level_held_the_dense_network_wins_and_all_levels_are_kept():
    winner = grown(by_level(0.9, 0.1, 0.95, 0.95, 0.95))
    assert [level.held for level in winner.report.levels] == [False, None, None, None]
    assert winner.report.winner is None
    assert winner.mask == Mask.full(network())
    assert (winner.report.sparsity, winner.report.survivors, winner.report.decline) == (0.0, 100, 0.0)
    assert winner.report.search_score == winner.report.dense_score == 0.5
    assert (winner.history.level, winner.history.deepest) == (0, 4)
    assert [winner.mask_at(level).survivors for level in range(5)] == [100, 80, 64, 51, 41]


def test_a_search_without_accepted_levels_confirms_nothing():
    evaluate = Telling(lambda mask, fold: float(mask.sparsity == 0), 8)
    steps = Steps(evaluate)
    winner = grown(evaluate, observer=steps)
    assert steps.confirmed == []
    assert len(evaluate.log) == steps.grown
    assert (winner.report.winner, winner.report.decline, winner.mask.sparsity) == (None, 0.0, 0.0)


@pytest.mark.parametrize("bad", [nan, math.inf, -math.inf])
def test_a_level_whose_score_is_not_finite_does_not_hold(bad):
    winner = grown(by_level(0.9, 0.9, bad, 0.9, 0.9))
    assert [level.held for level in winner.report.levels] == [True, False, None, None]
    assert math.isnan(winner.report.levels[1].held_out_score)
    assert winner.report.winner.level == 1


@pytest.mark.parametrize("bad", [nan, math.inf])
def test_a_dense_network_whose_score_on_the_held_out_half_is_not_finite_is_an_error(bad):
    evaluate = by_level(bad, 0.9, 0.9, 0.9, 0.9)
    with pytest.raises(ValueError, match="the score of the dense network is NaN or infinite, so there is no floor"):
        grown(evaluate)
    assert {mask.sparsity for mask, _ in evaluate.log} == {0.0}


def test_an_observer_is_told_of_each_confirmed_level_in_order():
    evaluate = by_level(0.9, 0.95, 0.9, 0.1, 0.9)
    steps = Steps(evaluate)
    winner = grown(evaluate, observer=steps)
    assert [level.level for level, _ in steps.confirmed] == [1, 2, 3]
    assert [level for level, _ in steps.confirmed] == list(winner.report.levels[:3])
    for (_, so_far), survivors in zip(steps.confirmed, (80, 64, 64), strict=True):
        assert so_far.mask.survivors == so_far.report.survivors == survivors
        assert so_far.report.stop_reason is None
        assert so_far.history.deepest == 4


@pytest.mark.parametrize(
    ("evaluate", "confirm", "folds"),
    [(lambda mask: 0.9, 0.5, (1, 0)), (by_level(0.9, 0.9, 0.9, 0.9, 0.9, searched=0.9), 0.0, (8, 0))],
)
def test_nothing_is_confirmed_without_a_held_out_half(evaluate, confirm, folds):
    steps = Steps(Telling(noise, 1))
    winner = grown(evaluate, observer=steps, validation=Validation(confirm=confirm))
    report = winner.report
    assert steps.confirmed == []
    assert (report.folds, report.held_out_dense, report.held_out_floor) == (folds, None, None)
    assert (report.samples, report.confidence, report.method, report.undivided_because) == (None, None, None, "")
    assert [(level.held_out_score, level.held, level.p_value) for level in report.levels] == [(None, None, None)] * 4
    assert report.winner == report.levels[-1]
    assert report.dense_score == pytest.approx(0.9)
    assert winner.mask == winner.mask_at(4)


def test_why_an_evaluator_has_one_fold_is_reported():
    evaluate = Telling(lambda mask, fold: 1.0, 1)
    evaluate.undivided_because = "loader 0 gives 3 samples, fewer than 16"
    assert grown(evaluate).report.undivided_because == evaluate.undivided_because


def test_errors_are_those_of_the_differences_on_the_same_samples():
    evaluate = Sampled(lambda mask, fold: depth(mask) * (1 + fold % 3), folds=8, size=50)
    winner = grown(evaluate, tolerance=1)
    dense = winner.mask_at(0)
    for level in winner.report.levels:
        mask = winner.mask_at(level.level)
        searched, held_out = (
            paired_error(evaluate.outcomes(dense, part), evaluate.outcomes(mask, part)) for part in divided(8, 0.5)
        )
        assert level.error == pytest.approx(searched)
        assert level.held_out_error == pytest.approx(held_out)
        assert 0 < level.error != level.held_out_error
    assert winner.report.samples == 200


def test_without_outcomes_the_errors_are_those_over_folds():
    evaluate = Logged(lambda mask, fold: -depth(mask) * float(1 + fold), 8)
    winner = grown(evaluate, tolerance=99)
    for level in winner.report.levels:
        # the differences on four folds are k, 2k, 3k, 4k, and the same for the others
        expected = level.level * math.sqrt(1.25 / 3)
        assert (level.error, level.held_out_error) == pytest.approx((expected, expected))
    assert winner.report.samples == 4


def samples(count: int, wrong: int = 0, low: float = 0.0) -> Singles:
    """Samples that all score 1, except the first ones, which score 0. A score lies between `low` and 1."""
    return Singles((torch.arange(count) >= wrong).double(), low, 1.0)


class Records(Logged):
    """Scores all networks alike, and records `outcomes(depth, folds)`."""

    undivided_because = "loader 0 gives 3 batches"

    def __init__(self, outcomes, folds: int = 8) -> None:
        super().__init__(lambda mask, fold: 1.0, folds)
        self.outcomes = outcomes

    def recorded(self, candidate, folds):
        return self(candidate, folds), self.outcomes(depth(candidate.mask), folds)


@pytest.mark.parametrize(
    ("tells", "known"),
    [
        (lambda depth, folds: depth == 0 or min(folds) < 4, (True, False)),
        (lambda depth, folds: depth == 0 or min(folds) >= 4, (False, True)),
        (lambda depth, folds: False, (False, False)),
    ],
)
def test_errors_are_nan_where_outcomes_are_missing(tells, known):
    winner = grown(Records(lambda *asked: samples(200, wrong=asked[0]) if tells(*asked) else None))
    for level in winner.report.levels:
        assert (not math.isnan(level.error), not math.isnan(level.held_out_error)) == known
    assert winner.report.samples == (200 if any(known) else None)


def erring(*wrong: int, size: int = 250) -> Sampled:
    """So many samples of each of the four held-out folds are wrong at each level, and none of the search folds."""
    return Sampled(lambda mask, fold: wrong[depth(mask)] if fold >= 4 else 0, folds=8, size=size)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_the_chain_ends_at_the_first_level_that_is_not_certified(confidence):
    evaluate = erring(0, 0, 1, 7, 0)
    winner = grown(evaluate, tolerance=0.02, confidence=confidence)
    report, dense = winner.report, evaluate.outcomes(winner.mask_at(0), range(4, 8))
    assert [level.held for level in report.levels] == [True, True, False, None]
    assert (report.levels[3].p_value, report.levels[3].held_out_score) == (None, None)
    for level in report.levels[:3]:
        pruned = evaluate.outcomes(winner.mask_at(level.level), range(4, 8))
        assert level.p_value == p_value(dense, pruned, 0.02, confidence)
        assert level.held is (level.p_value <= 1 - confidence)
    assert report.winner == report.levels[1]
    assert winner.mask == winner.mask_at(2)
    assert (report.confidence, report.method, report.samples) == (confidence, Method.BETTING, 1000)
    assert not any(mask == winner.mask_at(4) for mask, folds in evaluate.log if min(folds) >= 4)
    assert "true decline is at most 0.02" in str(report)


def test_a_level_within_the_tolerance_that_is_not_certified_does_not_hold():
    evaluate = erring(0, 4, 0, 0, 0)  # a decline of 0.016 where 0.02 is allowed
    assert grown(evaluate, tolerance=0.02).report.levels[0].held is True
    winner = grown(evaluate, tolerance=0.02, confidence=0.95)
    assert winner.report.levels[0].held_out_score >= winner.report.held_out_floor
    assert [level.held for level in winner.report.levels] == [False, None, None, None]
    assert winner.mask.sparsity == 0
    assert "No level could be certified with confidence 0.95" in str(winner.report)


def test_levels_have_no_p_value_without_a_confidence():
    report = grown(erring(0, 1, 1, 1, 1), tolerance=0.02).report
    assert [level.p_value for level in report.levels] == [None] * 4
    assert (report.confidence, report.method, report.samples) == (None, None, 1000)


def test_a_level_without_outcomes_is_not_certified():
    evaluate = Records(lambda depth, folds: None if depth == 2 else samples(1000))
    winner = grown(evaluate, tolerance=0.02, confidence=0.95)
    assert [level.p_value == 1.0 for level in winner.report.levels[:2]] == [False, True]
    assert [level.held for level in winner.report.levels] == [True, False, None, None]


def test_scores_of_whole_folds_are_certified_as_batches():
    declines = (0, 0.001, 0.002, 0.019, 0)
    evaluate = Logged(lambda mask, fold: 0.9 - (declines[depth(mask)] * (1 + fold % 2 / 10) if fold >= 8 else 0), 16)
    winner = grown(evaluate, tolerance=0.02, confidence=0.95)
    report = winner.report

    def batches(level: int) -> Batches:
        scores = [evaluate.score(winner.mask_at(level), fold) for fold in range(8, 16)]
        return Batches(torch.tensor(scores, dtype=torch.float64), torch.ones(8, dtype=torch.float64))

    assert (report.method, report.samples) == (Method.STUDENT, 8)
    # the third level is within the tolerance, but not certainly
    assert [level.held for level in report.levels] == [True, True, False, None]
    assert report.levels[2].held_out_score >= report.held_out_floor
    for level in report.levels[:3]:
        assert level.p_value == p_value(batches(0), batches(level.level), 0.02, 0.95)


def test_a_metric_that_is_no_mean_is_certified_by_resamples():
    def outcomes(depth: int, folds) -> Resamples:
        values = torch.tensor([0.9, 0.8, 1.0, 0.7]).repeat(50) - 1e-4 * depth
        return Resamples(lambda index: float(values[index].mean()), len(values))

    report = grown(Records(outcomes), levels=2, tolerance=0.02, confidence=0.9).report
    assert (report.method, report.samples) == (Method.BOOTSTRAP, 200)
    assert [level.held for level in report.levels] == [True, True]


def perfect(folds: int = 8) -> Records:
    return Records(lambda *_: samples(1000), folds)


NO_OUTCOMES = "the held-out half has no scores of single samples or batches"
ONE_NUMBER = "shows the metric as 1 numbers, which must be at least 2. Log"


@pytest.mark.parametrize(
    ("evaluate", "options", "message"),
    [
        (perfect(), {"tolerance": 0}, "tolerance is 0 and confidence 0.95, but no finite sample can certify"),
        (perfect(), {"tolerance": math.inf}, "tolerance is inf .* but without a floor there is nothing to certify"),
        (perfect(), {"validation": Validation(confirm=0)}, r"confirm is 0 and confidence 0.95.*\(confirm=0.5\)"),
        (lambda mask: 1.0, {}, NO_OUTCOMES),
        (perfect(folds=1), {}, r"no scores of single samples or batches \(loader 0 gives 3 batches\)"),
        (Telling(lambda mask, fold: 1.0, 16), {}, NO_OUTCOMES),
        (Logged(lambda mask, fold: 1.0, 2), {}, NO_OUTCOMES),  # a held-out half of one fold is one number
        (Records(lambda *_: Batches(torch.ones(1), torch.ones(1))), {}, ONE_NUMBER),
        (Records(lambda *_: Resamples(lambda index: 1.0, 1)), {}, ONE_NUMBER),
    ],
)
def test_a_search_that_can_certify_nothing_is_refused_before_any_candidate(evaluate, options, message):
    with pytest.raises(ValueError, match=message):
        grown(evaluate, **{"tolerance": 0.02, "confidence": 0.95, **options})
    log = getattr(evaluate, "log", [])
    assert all(mask.sparsity == 0 for mask, _ in log)
    assert not (options and log)  # a contradiction between arguments is found before the dense network is validated


@pytest.mark.parametrize(("low", "needed"), [(0.0, 149), (-3.0, 598)])
def test_too_few_samples_are_refused_with_the_number_needed(low, needed):
    assert needed == samples_needed(0.95, 0.02, 1 - low)
    # two of eight folds are held out
    options = {"tolerance": 0.02, "confidence": 0.95, "validation": Validation(confirm=0.25)}
    few, enough = (Records(lambda _, folds, n=n: samples(n, low=low)) for n in (needed - 1, needed))
    message = f"but {needed - 1} held-out samples can certify no network.*At least {needed} are needed, "
    with pytest.raises(ValueError, match=f"{message}which is {4 * needed} validation samples in all"):
        grown(few, **options)
    assert all(mask.sparsity == 0 for mask, _ in few.log)
    report = grown(enough, **options).report  # the smallest number is enough for networks without any difference
    assert [level.held for level in report.levels] == [True] * 4
    assert report.samples == needed


@pytest.mark.parametrize(
    ("held_out", "target", "sparsity", "reason"),
    [
        ((0.5, 0.5, 0.5, 0.5), 0.49, 0.49, StopReason.TARGET_REACHED),
        ((0.5, 0.5, 0.2, 0.5), 0.49, 0.2, StopReason.TARGET_NOT_HELD),
        ((0.5, 0.2, 0.2, 0.5), 0.49, 0.0, StopReason.TARGET_NOT_HELD),
        ((0.5, 0.5, 0.2, 0.5), 0.99, 0.2, StopReason.MAX_LEVELS),
    ],
)
def test_a_target_is_reached_only_by_the_network_that_held(held_out, target, sparsity, reason):
    winner = grown(by_level(*held_out), levels=3, tolerance=0.1, target_sparsity=target)
    assert 1 - winner.mask.survivors / 100 == pytest.approx(sparsity)
    assert (winner.report.stop_reason, winner.report.target_sparsity) == (reason, target)
    assert winner.report.target_met is (sparsity >= target)
