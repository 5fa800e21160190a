"""The race of a branch: few candidates see all folds, the best are among them, and no mask is judged twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette import Candidate, Mask, PrunedWeights, Scores, Tree, Validation, Wheel, Winner, search
from lightning_roulette.judge.evaluator import Judge
from lightning_roulette.judge.race import Masks, Race, Reference, furthest, mean_of, no_race, rungs
from lightning_roulette.judge.selection import best_of
from tests.support.evaluators import Blind, Logged, Steps, Telling, key_of, network, noise

nan = math.nan

BRANCHES, FOLDS, AT_ONCE = st.integers(1, 100), st.integers(1, 16), st.integers(1, 16)
SEED = st.integers(0, 2**32 - 1)


def numbered(index: int) -> Mask:
    """A mask that encodes a number."""
    return Mask({"a": torch.tensor([bool(index >> bit & 1) for bit in range(8)])})


def number_of(mask: Mask) -> int:
    return sum(1 << bit for bit, kept in enumerate(mask["a"].tolist()) if kept)


class Raced:
    """A race over a table of scores, a row for each candidate and a column for each fold.

    `dense` holds the dense network's score on each fold, and `kinds` is the number of different masks.
    """

    def __init__(
        self, table: np.ndarray, at_once: int, dense: Sequence[float] | None = None, kinds: int = 256, race: bool = True
    ) -> None:
        branches, folds = table.shape
        self.evaluate = Logged(lambda mask, fold: float(table[number_of(mask), fold]), folds)
        self.stages = rungs(branches, folds, at_once) if race else no_race(branches, range(folds))
        self.told: list[tuple[int, int | None]] = []
        reference = None
        if dense is not None:
            scores = {part: Scores(*[float(np.mean(dense[part.start : part.stop]))] * 2) for part in self.parts}
            reference = Reference(scores, Scores(*[float(np.mean(dense))] * 2))
        candidates = [Candidate(index, 0.5, nan, nan, folds=0) for index in range(branches)]
        self.branch = Race(
            candidates,
            Masks(lambda index: numbered(index % kinds)),
            lambda mask: PrunedWeights(mask, {}),
            Judge(self.evaluate, confirm=0),
            reference,
            lambda done, best: self.told.append((done, best and best.index)),
        ).run(self.stages)

    @property
    def parts(self) -> list[range]:
        return [part for rung in self.stages for part in rung.parts]

    @property
    def winner(self) -> int | None:
        best = best_of(furthest(self.branch))
        return best and best.index

    def seen(self, index: int) -> list[int]:
        """The folds on which a candidate was judged, in order."""
        return [fold for folds in self.evaluate.asked(numbered(index)) for fold in folds]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(BRANCHES, FOLDS, AT_ONCE)
def test_the_parts_cover_the_folds_once_in_order(branches, folds, at_once):
    stages = rungs(branches, folds, at_once)
    parts = [part for rung in stages for part in rung.parts]
    assert [fold for part in parts for fold in part] == list(range(folds))
    assert all(1 <= len(part) <= at_once for part in parts)
    assert all(rung.parts for rung in stages)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(BRANCHES, FOLDS, AT_ONCE)
def test_all_enter_the_first_rung_and_no_more_enter_the_next(branches, folds, at_once):
    entrants = [rung.entrants for rung in rungs(branches, folds, at_once)]
    assert entrants[0] == branches
    assert entrants == sorted(entrants, reverse=True)
    assert entrants[-1] >= min(branches, 2)  # no candidate races alone


@given(BRANCHES, FOLDS, AT_ONCE, st.integers(1, 20))
def test_all_candidates_see_the_first_folds_and_the_best_see_the_rest(branches, folds, at_once, at_least):
    stages = rungs(branches, folds, at_once, at_least)
    assert [fold for rung in stages for part in rung.parts for fold in part] == list(range(folds))
    assert stages[0].entrants == branches
    assert sum(len(part) for part in stages[0].parts) == min(at_least, folds)
    # as many go on as in a race that begins with a single fold
    known = {part.start: rung.entrants for rung in rungs(branches, folds, 1) for part in rung.parts}
    if at_least in (1, 2, 4, 8):
        assert all(rung.entrants == known[rung.parts[0].start] for rung in stages[1:])


def test_a_race_is_less_work_than_judging_all_on_everything():
    work = sum(rung.entrants * len(part) for rung in rungs(20, 8, 8) for part in rung.parts)
    assert work < 20 * 8


def test_without_a_race_all_are_judged_on_all_folds_at_once():
    (rung,) = no_race(7, range(3, 9))
    assert (rung.entrants, rung.parts) == (7, (range(3, 9),))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(BRANCHES, FOLDS, AT_ONCE, SEED, st.booleans(), st.booleans())
def test_a_candidate_that_is_best_on_every_fold_wins(branches, folds, at_once, seed, corrected, race):
    chance = np.random.default_rng(seed)
    table, best = chance.uniform(-1, 1, (branches, folds)), int(chance.integers(branches))
    table[best] = 1.01
    dense = list(chance.uniform(-5, 5, folds)) if corrected else None
    raced = Raced(table, at_once, dense, race=race)
    assert raced.winner == best
    assert raced.branch[best].folds == folds
    assert raced.seen(best) == list(range(folds))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 40), FOLDS, AT_ONCE, SEED)
def test_a_candidate_has_the_corrected_mean_of_the_folds_it_saw(branches, folds, at_once, seed):
    chance = np.random.default_rng(seed)
    table, dense = chance.uniform(-1, 1, (branches, folds)), chance.uniform(-5, 5, folds)
    raced = Raced(table, at_once, list(dense))
    for one in raced.branch:
        seen = raced.seen(one.index)
        assert seen == list(range(one.folds))
        ahead = table[one.index, seen].mean() - dense[seen].mean()
        assert one.rank == one.score == pytest.approx(dense.mean() + ahead)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 40), FOLDS, AT_ONCE, SEED)
def test_a_rung_admits_a_number_of_candidates_and_they_are_the_best(branches, folds, at_once, seed):
    table = np.random.default_rng(seed).uniform(-1, 1, (branches, folds))
    raced = Raced(table, at_once)
    begin = 0
    running = list(range(branches))
    for rung in raced.stages:
        ordered = sorted(running, key=lambda index: table[index, :begin].mean() if begin else 0, reverse=True)
        running = sorted(ordered[: rung.entrants])
        begin = rung.parts[-1].stop
        assert [one.index for one in raced.branch if one.folds >= begin] == running
    assert len(raced.told) == sum(rung.entrants * len(rung.parts) for rung in raced.stages)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 40), FOLDS, AT_ONCE, SEED, st.sampled_from([0.05, 0.3, 0.9, 1.0]))
def test_a_candidate_with_a_score_of_nan_never_wins(branches, folds, at_once, seed, share):
    chance = np.random.default_rng(seed)
    table = chance.uniform(-1, 1, (branches, folds))
    table[chance.uniform(size=table.shape) < share] = nan
    raced = Raced(table, at_once, [0.0] * folds)
    last = furthest(raced.branch)
    fit = [one.index for one in last if not np.isnan(table[one.index, : one.folds]).any()]
    if fit:
        assert raced.winner in fit
    else:
        assert raced.winner is None
    for one in raced.branch:
        assert math.isnan(one.rank) == bool(np.isnan(table[one.index, : one.folds]).any())


def test_a_last_rung_of_nan_leaves_no_winner():
    table = np.ones((20, 8))
    last = rungs(20, 8, 8)[-1].parts[0].start
    table[:, last:] = nan
    raced = Raced(table, 8)
    assert raced.winner is None
    # those that dropped out before have a number, but did not see the folds on which the others failed
    assert sum(not math.isnan(one.rank) for one in raced.branch) == 20 - rungs(20, 8, 8)[-1].entrants


def test_after_a_first_rung_of_nan_no_candidate_enters_the_next():
    stages = rungs(20, 8, 8)
    table = np.ones((20, 8))
    table[:, stages[0].parts[0].start] = nan
    raced = Raced(table, 8)
    assert raced.winner is None
    assert raced.evaluate.validations == 20 * sum(len(part) for part in stages[0].parts) / 8
    assert raced.told[-1] == (20 * len(stages[0].parts), None)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 40), FOLDS, AT_ONCE, SEED, st.integers(1, 10))
def test_equal_masks_are_judged_once_and_share_their_scores(branches, folds, at_once, seed, kinds):
    table = np.random.default_rng(seed).uniform(-1, 1, (branches, folds))
    raced = Raced(table, at_once, [0.0] * folds, kinds=kinds)
    for one in raced.branch:
        first = raced.branch[one.index % kinds]
        assert one.same_as == (None if one.index < kinds else first.index)
        assert (one.score, one.rank, one.tiebreak, one.folds) == (first.score, first.rank, first.tiebreak, first.folds)
        asked = [fold for folds in raced.evaluate.asked(numbered(one.index)) for fold in folds]
        assert len(asked) == len(set(asked)) == (one.folds if one.index < kinds else 0)
    assert raced.winner is not None
    assert raced.winner < kinds


def test_the_observer_hears_of_each_judgement_and_last_of_the_winner():
    raced = Raced(np.random.default_rng(4).uniform(-1, 1, (20, 8)), 8)
    assert [done for done, _ in raced.told] == list(range(1, len(raced.told) + 1))
    assert raced.told[0] == (1, 0)
    assert raced.told[-1][1] == raced.winner


@settings(max_examples=100, deadline=None, derandomize=True)
@given(FOLDS, AT_ONCE, SEED)
def test_the_difficulty_of_single_folds_is_corrected_for(folds, at_once, seed):
    chance = np.random.default_rng(seed)
    shift, ahead = chance.uniform(-100, 100, folds), Scores(-0.25, 0.125, 3.0)
    parts = [part for rung in rungs(9, folds, at_once) for part in rung.parts]

    def shifted(by: Scores, seen: Sequence[int]) -> Scores:
        easy = float(shift[list(seen)].mean())
        return Scores(by.rank + easy, by.score - easy, by.tiebreak + 2 * easy)

    zero = Scores(0.0, 0.0, 0.0)
    reference = Reference({part: shifted(zero, part) for part in parts}, shifted(zero, range(folds)))
    expected = shifted(ahead, range(folds))
    for count in range(1, len(parts) + 1):
        ours = reference.corrected({part: shifted(ahead, part) for part in parts[:count]})
        assert (ours.rank, ours.score, ours.tiebreak) == pytest.approx(
            (expected.rank, expected.score, expected.tiebreak), abs=1e-9
        )


def test_the_mean_of_parts_is_weighted_by_their_numbers_of_folds():
    parts = {range(0, 1): Scores(1.0, 10.0, 100.0), range(1, 4): Scores(5.0, 50.0, 500.0)}
    assert mean_of(parts) == Scores(4.0, 40.0, 400.0)
    assert mean_of({range(3, 7): Scores(0.1, 0.2, nan)}).rank == 0.1


def grown(evaluate: Logged, levels: int = 1, size: int = 100, **options) -> tuple[Winner, Steps]:
    """A search of some levels that accepts almost anything, and what its observer was told."""
    steps = Steps(evaluate)
    usual = {"branches": 6, "tolerance": 1, "tree": Tree(0.2, max_levels=levels)}
    usual["wheel"] = Wheel(sharpness=4.0)  # blunt enough for all candidates to differ
    return search(network(size), evaluate, observer=steps, **usual | options), steps


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from([Logged, Telling]),
    branches=st.integers(1, 12),
    folds=FOLDS,
    at_once=AT_ONCE,
    confirm=st.sampled_from([0.0, 0.25, 0.5, 0.9]),
    race=st.booleans(),
    sharpness=st.sampled_from([0.0, 4.0, math.inf]),
)
def test_validations_are_the_folds_that_were_asked(kind, branches, folds, at_once, confirm, race, sharpness):
    evaluate, how = kind(noise, folds, at_once), Validation(confirm=confirm, race=race)
    report = grown(evaluate, 2, 20, branches=branches, wheel=Wheel(sharpness), validation=how)[0].report
    assert report.validations == pytest.approx(evaluate.validations)
    assert sum(report.folds) == folds
    for level in report.levels:
        assert all(1 <= one.folds <= report.folds[0] for one in level.candidates)
        assert next(one.folds for one in level.candidates if one.index == level.winner) == report.folds[0]


@pytest.mark.parametrize("kind", [Logged, Telling])
def test_each_candidate_is_asked_about_as_many_folds_as_the_report_says(kind):
    evaluate = kind(noise, 16)
    winner, steps = grown(evaluate, branches=20)
    (level,) = winner.report.levels
    asked: dict[bytes, list[int]] = {}
    for mask, folds in evaluate.log[steps.dense : steps.grown]:
        asked.setdefault(key_of(mask), []).extend(folds)
    assert all(one.same_as is None for one in level.candidates)
    for one, folds in zip(level.candidates, asked.values(), strict=True):
        assert folds[: one.folds] == list(range(one.folds))
        assert len(folds) == one.folds or one.index == level.winner
    stages = rungs(20, 8, 16)
    leaving = [
        rung.entrants - after for rung, after in zip(stages, [*(r.entrants for r in stages[1:]), 0], strict=True)
    ]
    expected = [rung.parts[-1].stop for rung, count in zip(stages, leaving, strict=True) for _ in range(count)]
    assert sorted(one.folds for one in level.candidates) == sorted(expected)


class Uneven(Telling):
    """Its score on several folds is not the mean of their scores, as with F1."""

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        scores = super().__call__(candidate, folds)
        return Scores(scores.rank, scores.score + noise(candidate.mask, 100 + len(folds)))


def test_the_winner_of_a_branch_has_its_scores_on_the_union_of_the_search_folds():
    evaluate = Uneven(noise, 16)
    winner, _ = grown(evaluate, branches=20, tolerance=9)

    def on_union(mask: Mask) -> float:
        return sum(noise(mask, fold) for fold in range(8)) / 8 + noise(mask, 108)

    assert winner.report.levels[0].score == pytest.approx(on_union(winner.mask))
    assert winner.report.dense_score == pytest.approx(on_union(winner.mask_at(0)))
    assert evaluate.asked(winner.mask)[-2:] == [tuple(range(8)), tuple(range(8, 16))]


def test_copies_of_a_winner_share_its_scores_on_the_union():
    (level,) = grown(Uneven(noise, 16), branches=5, tolerance=9, wheel=Wheel(math.inf))[0].report.levels
    first, *copies = level.candidates
    assert [one.same_as for one in copies] == [0] * 4
    assert {(one.score, one.rank, one.folds) for one in copies} == {(first.score, first.rank, first.folds)}
    assert level.spread == (first.score,) * 3


def test_infinite_sharpness_validates_one_candidate_a_level():
    evaluate = Telling(noise, 16)
    _, steps = grown(evaluate, 3, branches=5, wheel=Wheel(math.inf))
    for begin, end in pairwise([steps.dense, *(end for _, end, _ in steps.levels)]):
        assert len({key_of(mask) for mask, _ in evaluate.log[begin:end]}) == 1
        *parts, union = [folds for _, folds in evaluate.log[begin:end]]
        assert [fold for part in parts for fold in part] == list(range(8))
        assert union == tuple(range(8))


def test_without_a_race_every_candidate_is_judged_once_on_the_union():
    evaluate = Telling(noise, 16, at_once=2)
    winner, steps = grown(evaluate, 2, validation=Validation(race=False))
    begin = steps.dense
    assert begin == 2
    for level, end, _ in steps.levels:
        log = evaluate.log[begin:end]
        assert [folds for _, folds in log] == [tuple(range(8))] * 7
        assert len({key_of(mask) for mask, _ in log}) == 6
        assert log[-1][0] == winner.mask_at(level.level)
        assert [one.folds for one in level.candidates] == [8] * 6
        begin = end


def test_a_lone_candidate_does_not_race():
    evaluate = Telling(noise, 16)
    _, steps = grown(evaluate, branches=1)
    assert {folds for _, folds in evaluate.log[: steps.grown]} == {tuple(range(8)), tuple(range(8, 16))}


@pytest.mark.parametrize(
    ("field", "blind"),
    [
        ("rank", lambda mask, folds: len(folds) < 8),  # as a metric that needs more samples than a fold has
        ("score", lambda mask, folds: len(folds) < 8),
        ("rank", lambda mask, folds: mask.sparsity == 0 and len(folds) == 8),
    ],
)
def test_there_is_no_race_where_a_score_of_the_dense_network_is_nan(field, blind):
    evaluate = Blind(blind, field)
    winner, steps = grown(evaluate)
    (level,) = winner.report.levels
    assert level.accepted
    assert [folds for _, folds in evaluate.log[steps.dense : steps.grown]] == [tuple(range(8))] * 7
    assert [one.folds for one in level.candidates] == [8] * 6


def test_a_winner_whose_rank_on_the_union_is_nan_does_not_become_a_parent():
    evaluate = Blind(lambda mask, folds: mask.sparsity > 0 and len(folds) == 8)
    (level,) = grown(evaluate, tree=Tree(0.2, max_levels=1, patience=1))[0].report.levels
    assert not level.accepted


def test_a_branch_that_fails_on_a_late_fold_has_no_winner_and_is_tried_again():
    last = [part for rung in rungs(6, 8, 16) for part in rung.parts][-1]
    evaluate = Telling(lambda mask, fold: nan if fold in last and mask.sparsity > 0 else 0.5, 16)
    winner, _ = grown(evaluate, tree=Tree(0.2, patience=2))
    assert [(level.winner, level.accepted) for level in winner.report.levels] == [(None, False)] * 2
    assert all(math.isnan(level.score) for level in winner.report.levels)
    assert winner.mask == Mask.full(network())


@pytest.mark.parametrize("kind", [Logged, Telling])
@pytest.mark.parametrize("race", [True, False])
def test_the_work_announced_is_the_work_of_a_level(race, kind):
    _, steps = grown(kind(noise, 16, at_once=3), 2, branches=20, validation=Validation(race=race))
    (_, _, first), (_, _, second) = steps.levels
    assert second - first == pytest.approx(steps.work)
    done = [done for level, done, _, _ in steps.candidates if level == 1]
    assert done == list(range(1, len(done) + 1))
    assert {planned for _, _, planned, _ in steps.candidates} == {len(done)}


@pytest.mark.parametrize("race", [True, False])
def test_the_last_candidate_told_of_is_the_winner(race):
    _, steps = grown(Telling(noise, 16), 3, branches=9, validation=Validation(race=race))
    for level, _, _ in steps.levels:
        assert [best for number, _, _, best in steps.candidates if number == level.level][-1] == level.winner


def test_a_fold_that_is_harder_for_all_does_not_decide_the_floor():
    # uncorrected, every candidate that saw the first fold alone would seem to decline
    evaluate = Telling(lambda mask, fold: (0.2 if fold == 0 else 0.9) - 0.1 * mask.sparsity, 16)
    report = grown(evaluate, branches=20, tolerance=0.05)[0].report
    (level,) = report.levels
    assert level.accepted
    assert level.spread == pytest.approx((report.dense_score - 0.1 * level.sparsity,) * 3)


def test_a_race_finds_a_candidate_that_is_better_on_every_fold():
    raced, judged = (
        grown(Telling(lambda mask, fold: noise(mask, 0) + fold, 16), 3, branches=20, validation=Validation(race=race))[
            0
        ]
        for race in (True, False)
    )
    assert [level.winner for level in raced.report.levels] == [level.winner for level in judged.report.levels]
