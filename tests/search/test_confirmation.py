"""Confirmation: data that ranks nothing is asked once, when the search is over, and decides what wins."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette import (
    Batches,
    Level,
    Mask,
    Method,
    Observer,
    PrunedWeights,
    Resamples,
    Scores,
    SearchReport,
    Singles,
    StopReason,
    Tree,
    Validation,
    Winner,
    search,
)
from lightning_roulette.judge.certificate import p_value, paired_error, samples_needed
from lightning_roulette.judge.evaluator import Judge, divided
from lightning_roulette.judge.selection import keeps_floor
from lightning_roulette.mask.history import History
from tests.support.evaluators import Logged, Sampled, Telling, key_of, noise

nan = math.nan


def network(size: int = 100) -> dict[str, torch.Tensor]:
    return {"a": torch.from_numpy(np.random.default_rng(2).standard_normal(size))}


def depth(mask: Mask) -> int:
    """The level of a mask in trees that prune a fifth of 100 weights a level, no level of which fails."""
    return {100: 0, 80: 1, 64: 2, 51: 3, 41: 4}[mask.survivors]


def by_level(*held_out: float, ranked: float = 0.5, folds: int = 8, kind: type[Logged] = Telling) -> Logged:
    """An evaluator of one score for each level on the confirmation folds, and one for all on the others."""
    first = divided(folds, 0.5)[1].start
    return kind(lambda mask, fold: held_out[depth(mask)] if fold >= first else ranked, folds)


class Steps(Observer):
    """Keeps what it is told, and how long the evaluator's log was then."""

    def __init__(self, evaluate: Logged) -> None:
        self.evaluate, self.dense, self.grown, self.confirmed = evaluate, 0, 0, []

    def on_dense(self, so_far: Winner, work: float) -> None:
        self.dense = self.grown = len(self.evaluate.log)
        self.so_far = so_far

    def on_level(self, level: Level, so_far: Winner) -> None:
        self.grown = len(self.evaluate.log)

    def on_confirmed(self, level: Level, so_far: Winner) -> None:
        self.confirmed.append((level, so_far))


def grown(evaluate, levels: int = 4, **options) -> Winner:
    return search(network(), evaluate, **{"branches": 3, "tree": Tree(0.2, max_levels=levels), **options})


# ------------------------------------------------------------------------------------------------ which folds


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 100), st.floats(0, 1, exclude_max=True))
def test_the_folds_are_divided_into_those_that_rank_and_those_that_confirm(folds, confirm):
    ranking, confirming = divided(folds, confirm)
    assert [*ranking, *confirming] == list(range(folds))
    assert len(ranking) >= 1
    if confirm == 0 or folds == 1:
        assert not confirming
    else:
        assert len(confirming) >= 1
        assert abs(len(confirming) - confirm * folds) <= 0.5 or 1 in (len(confirming), len(ranking))


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
def test_confirmation_folds_are_asked_about_the_dense_network_and_then_once_about_the_chain(
    kind, folds, at_once, confirm, race, branches, tolerance, seed
):
    evaluate = kind(lambda mask, fold: noise(mask, fold) ** 2 / 4, folds, at_once)
    steps = Steps(evaluate)
    winner = search(
        network(30),
        evaluate,
        branches=branches,
        tolerance=tolerance,
        tree=Tree(0.2, max_levels=4),
        validation=Validation(confirm=confirm, race=race),
        seed=seed,
        observer=steps,
    )
    ranking, confirming = (set(part) for part in divided(folds, confirm))
    dense, growing, after = (
        evaluate.log[: steps.dense],
        evaluate.log[steps.dense : steps.grown],
        evaluate.log[steps.grown :],
    )
    assert {key_of(mask) for mask, _ in dense} == {key_of(winner.mask_at(0))}
    assert all(set(asked) <= ranking or set(asked) <= confirming for _, asked in dense)
    assert all(set(asked) <= ranking for _, asked in growing)
    assert not any(mask == winner.mask_at(0) for mask, _ in growing)
    # one union each, and where the evaluator tells nothing itself each fold of it
    once = [tuple(sorted(confirming))]
    if kind is Logged and len(confirming) > 1:
        once += [(fold,) for fold in sorted(confirming)]
    if not confirming:
        assert (after, steps.confirmed) == ([], [])
        assert winner.mask == winner.mask_at(winner.history.deepest)
        return
    chain, held = [], 0
    for level in winner.report.accepted:
        mask = winner.mask_at(level.level)
        chain += [(key_of(mask), asked) for asked in once]
        score = sum(evaluate.score(mask, fold) for fold in sorted(confirming)) / len(confirming)
        assert level.held_out_score == pytest.approx(score)
        assert level.held is keeps_floor(level.held_out_score, winner.report.held_out_floor)
        if not level.held:
            break
        held = level.level
    assert [(key_of(mask), asked) for mask, asked in after] == chain
    assert [one.held for one in winner.report.accepted[held + 1 :]] == [None] * (len(winner.report.accepted) - held - 1)
    assert winner.history.level == (winner.report.winner.level if winner.report.winner else 0) == held
    assert winner.mask == winner.mask_at(held)


def test_the_dense_network_is_asked_once_about_the_confirmation_folds():
    evaluate = Telling(noise, 16)
    winner = grown(evaluate, tolerance=1)
    confirming = tuple(range(8, 16))
    assert evaluate.asked(winner.mask_at(0)).count(confirming) == 1
    assert [level.held for level in winner.report.levels] == [True] * 4


def test_levels_that_failed_are_not_confirmed():
    # the first branch falls below the floor on the ranking folds, and its retry at half the rate does not
    evaluate = Telling(lambda mask, fold: float(mask.survivors != 80), 8)
    winner = grown(evaluate, levels=1)
    failed, accepted = winner.report.levels
    assert (failed.accepted, failed.held_out_score, failed.held) == (False, None, None)
    assert (accepted.accepted, accepted.held_out_score, accepted.held) == (True, 1.0, True)
    assert winner.mask.survivors == 90


# ------------------------------------------------------------------------------------------------ the winner


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


def test_where_no_level_held_the_dense_network_wins_and_all_levels_can_be_had():
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
def test_a_level_without_a_number_does_not_hold(bad):
    winner = grown(by_level(0.9, 0.9, bad, 0.9, 0.9))
    assert [level.held for level in winner.report.levels] == [True, False, None, None]
    assert math.isnan(winner.report.levels[1].held_out_score)
    assert winner.report.winner.level == 1


@pytest.mark.parametrize("bad", [nan, math.inf])
def test_a_dense_network_without_a_number_on_the_confirmation_folds_is_an_error(bad):
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


def test_nothing_is_confirmed_by_a_plain_function():
    steps = Steps(Telling(noise, 1))
    winner = grown(lambda mask: 1.0, observer=steps, validation=Validation(confirm=0.5))
    report = winner.report
    assert steps.confirmed == []
    assert (report.folds, report.held_out_dense, report.held_out_floor) == ((1, 0), None, None)
    assert (report.samples, report.confidence, report.method, report.undivided_because) == (None, None, None, "")
    assert [(level.held_out_score, level.held, level.p_value) for level in report.levels] == [(None, None, None)] * 4
    assert report.winner == report.levels[-1]
    assert winner.mask == winner.mask_at(4)


def test_nothing_is_confirmed_where_all_data_ranks():
    evaluate = by_level(0.9, 0.9, 0.9, 0.9, 0.9, ranked=0.9)
    winner = grown(evaluate, validation=Validation(confirm=0))
    assert (winner.report.folds, winner.report.held_out_dense) == ((8, 0), None)
    assert winner.report.winner == winner.report.levels[-1]
    assert winner.report.dense_score == pytest.approx(0.9)


def test_why_an_evaluator_has_one_fold_is_reported():
    evaluate = Telling(lambda mask, fold: 1.0, 1)
    evaluate.undivided_because = "loader 0 gives 3 samples, fewer than 16"
    assert grown(evaluate).report.undivided_because == evaluate.undivided_because


def test_a_search_by_folds_repeats_itself():
    first, again = (grown(Telling(noise, 16), tolerance=0.3, seed=4) for _ in range(2))
    assert first.mask == again.mask
    assert [level.candidates for level in first.report.levels] == [level.candidates for level in again.report.levels]
    assert [level.held_out_score for level in first.report.levels] == [
        level.held_out_score for level in again.report.levels
    ]


def test_a_confirmed_search_survives_json_in_either_unit():
    for evaluate in (by_level(0.9, 0.95, 0.86, 0.1, 0.9), by_level(0.9, 0.95, 0.86, 0.1, 0.9, kind=Logged)):
        report = grown(evaluate, tolerance=0.05).report
        for one in (report, report.in_metric("val_loss", "min")):
            assert repr(SearchReport.from_dict(json.loads(json.dumps(one.to_dict(), allow_nan=False)))) == repr(one)
            assert one.decline == pytest.approx(0.05)


# ------------------------------------------------------------------------------------------------ errors of scores


def test_errors_are_those_of_the_differences_on_the_same_samples():
    evaluate = Sampled(lambda mask, fold: depth(mask) * (1 + fold % 3), folds=8, size=50)
    winner = grown(evaluate, tolerance=1)
    dense = winner.mask_at(0)
    for level in winner.report.levels:
        mask = winner.mask_at(level.level)
        ranked, held_out = (
            paired_error(evaluate.outcomes(dense, part), evaluate.outcomes(mask, part)) for part in divided(8, 0.5)
        )
        assert level.error == pytest.approx(ranked)
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


def test_an_evaluator_that_can_tell_but_does_not_leaves_the_errors_open():
    winner = grown(Telling(noise, 8), tolerance=1)
    assert all(math.isnan(level.error) and math.isnan(level.held_out_error) for level in winner.report.levels)
    assert winner.report.samples is None


@pytest.mark.parametrize("ranking", [True, False])
def test_a_level_that_tells_nothing_has_no_error(ranking):
    class Forgetful(Sampled):
        def recorded(self, candidate, folds):
            scores, outcomes = super().recorded(candidate, folds)
            tells = candidate.mask.sparsity == 0 or (min(folds) >= 4) == ranking
            return scores, outcomes if tells else None

    winner = grown(Forgetful(lambda mask, fold: depth(mask), 8, 50), tolerance=1)
    for level in winner.report.levels:
        assert math.isnan(level.error) == ranking
        assert math.isnan(level.held_out_error) != ranking


# ------------------------------------------------------------------------------------------------ confidence


def erring(*wrong: int, size: int = 250) -> Sampled:
    """So many samples of each of the four confirmation folds are wrong at each level, and none of the ranking folds."""
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


def test_a_level_that_tells_no_outcomes_is_not_certified():
    class Forgetful(Sampled):
        def recorded(self, candidate, folds):
            scores, outcomes = super().recorded(candidate, folds)
            return scores, None if depth(candidate.mask) == 2 else outcomes

    winner = grown(Forgetful(lambda mask, fold: 0, 8, 250), tolerance=0.02, confidence=0.95)
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
    class Whole(Telling):
        def recorded(self, candidate, folds):
            values = torch.tensor([0.9, 0.8, 1.0, 0.7]).repeat(50) - 1e-4 * depth(candidate.mask)
            return self(candidate, folds), Resamples(lambda index: float(values[index].mean()), len(values))

    report = grown(Whole(lambda mask, fold: 0.85, 8), levels=2, tolerance=0.02, confidence=0.9).report
    assert (report.method, report.samples) == (Method.BOOTSTRAP, 200)
    assert [level.held for level in report.levels] == [True, True]


def assert_refused(evaluate, message: str, **options) -> None:
    """Before any candidate is asked about."""
    with pytest.raises(ValueError, match=message):
        grown(evaluate, **{"tolerance": 0.02, "confidence": 0.95, **options})
    assert all(mask.sparsity == 0 for mask, _ in evaluate.log)


def test_nothing_can_be_certified_without_a_tolerance():
    evaluate = erring(0, 0, 0, 0, 0)
    assert_refused(evaluate, "tolerance is 0 and confidence 0.95, but no finite sample can certify", tolerance=0)
    assert evaluate.log == []


def test_nothing_can_be_certified_by_data_that_ranked():
    evaluate = erring(0, 0, 0, 0, 0)
    shared = Validation(confirm=0)
    assert_refused(evaluate, r"confirm is 0 and confidence 0.95.*Validation\(confirm=0.5\)", validation=shared)
    assert evaluate.log == []


@pytest.mark.parametrize("confidence", [0, 1, -0.5, 1.5, nan, math.inf])
def test_a_confidence_out_of_range_is_refused(confidence):
    evaluate = erring(0, 0, 0, 0, 0)
    assert_refused(evaluate, "confidence is .* but must be more than 0 and less than 1", confidence=confidence)
    assert evaluate.log == []


def test_a_plain_function_can_certify_nothing():
    with pytest.raises(ValueError, match="the held-out half has no scores of single samples or batches"):
        grown(lambda mask: 1.0, tolerance=0.02, confidence=0.95)


def test_an_evaluator_of_one_fold_can_certify_nothing_and_says_why():
    evaluate = Sampled(lambda mask, fold: 0, folds=1, size=5000)
    evaluate.undivided_because = "loader 0 gives 3 batches"
    assert_refused(evaluate, r"no scores of single samples or batches \(loader 0 gives 3 batches\)")


def test_an_evaluator_that_tells_nothing_can_certify_nothing():
    assert_refused(Telling(lambda mask, fold: 1.0, 16), "has no scores of single samples or batches")
    # a single confirmation fold without outcomes is one number
    assert_refused(Logged(lambda mask, fold: 1.0, 2), "has no scores of single samples or batches")


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 1.0)])
def test_too_few_samples_are_refused_with_the_number_needed(low, high):
    class Wide(Sampled):
        def outcomes(self, mask, folds):
            return Singles(torch.ones(self.size * len(folds), dtype=torch.float64), low, high)

    needed = samples_needed(0.95, 0.02, high - low)
    assert needed == (149 if low == 0 else 598)
    # a quarter of eight folds confirms
    enough, few = math.ceil(needed / 2), (needed - 1) // 2
    quarter = Validation(confirm=0.25)
    assert_refused(
        Wide(lambda mask, fold: 0, 8, few),
        f"but {2 * few} held-out samples can certify no network.*"
        f"At least {needed} are needed, which is {4 * needed} validation samples in all",
        validation=quarter,
    )
    winner = grown(Wide(lambda mask, fold: 0, 8, enough), tolerance=0.02, confidence=0.95, validation=quarter)
    # the least number is enough for networks without any difference
    assert [level.held for level in winner.report.levels] == [True] * 4
    assert winner.report.samples == 2 * enough


@pytest.mark.parametrize("outcomes", [Batches(torch.ones(1), torch.ones(1)), Resamples(lambda index: 1.0, 1)])
def test_a_single_batch_is_too_few(outcomes):
    class Single(Telling):
        def recorded(self, candidate, folds):
            return self(candidate, folds), outcomes

    assert_refused(Single(lambda mask, fold: 1.0, 8), "shows the metric as 1 numbers, which must be at least 2. Log")


def test_an_infinite_tolerance_needs_no_certificate():
    with pytest.raises(ValueError, match="tolerance is inf .* but without a floor there is nothing to certify"):
        grown(erring(0, 250, 250, 250, 250), tolerance=math.inf, confidence=0.99)


# ------------------------------------------------------------------------------------------------ the judge


def test_a_judge_counts_folds_and_turns_what_is_not_finite_into_nan():
    evaluate = Logged(lambda mask, fold: math.inf if fold == 2 else fold, 4)
    judge = Judge(evaluate, 0.5)
    full = PrunedWeights(Mask.full(network()), network())
    assert (judge.search_folds, judge.held_out_folds, judge.records, judge.at_once) == (
        range(0, 2),
        range(2, 4),
        False,
        4,
    )
    assert judge.scores(full, [0, 1]) == Scores(0.5, 0.5, 0.0)
    assert math.isnan(judge.scores(full, [2]).rank)
    assert judge.validations == 0.75
    _, outcomes = judge.recorded(full, [0, 1, 3])
    assert outcomes.values.tolist() == [0, 1, 3]
    assert judge.validations == 0.75 + 1.5
    assert judge.recorded(full, [3]) == (Scores(3, 3, 0.0), None)


@pytest.mark.parametrize(("at_once", "expected"), [(None, 4), (2, 2), (99, 4)])
def test_a_judge_knows_how_many_folds_are_read_at_once(at_once, expected):
    assert Judge(Logged(noise, 4, at_once), 0.5).at_once == expected
