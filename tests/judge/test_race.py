"""The race of a branch: few see all folds, the best are among them, and nothing is counted or asked twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_roulette
from lightning_roulette import Candidate, Mask, Observer, PrunedWeights, Scores, Tree, Validation, Wheel, Winner
from lightning_roulette.judge.evaluator import Judge
from lightning_roulette.judge.race import Race, Reference, furthest, mean_of, no_race, rungs
from lightning_roulette.judge.selection import best_of
from tests.support.evaluators import Logged, Telling, key_of, noise

nan = math.nan

BRANCHES, FOLDS, AT_ONCE = st.integers(1, 100), st.integers(1, 16), st.integers(1, 16)
SEED = st.integers(0, 2**32 - 1)

search = partial(lightning_roulette.search, wheel=Wheel(sharpness=4.0))  # blunt enough for all candidates to differ


def network(size: int = 100) -> dict[str, torch.Tensor]:
    return {"a": torch.from_numpy(np.random.default_rng(2).standard_normal(size))}


def numbered(index: int) -> Mask:
    """A mask that tells its number."""
    return Mask({"a": torch.tensor([bool(index >> bit & 1) for bit in range(8)])})


def number_of(mask: Mask) -> int:
    return sum(1 << bit for bit, kept in enumerate(mask["a"].tolist()) if kept)


class Raced:
    """A race over a table of scores, a row for each candidate and a column for each fold, with what it asked and told.

    Args:
        dense: The dense network's score on each fold, None: it is not known.
        kinds: How many different masks there are.
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
            lambda index: numbered(index % kinds),
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
def test_all_enter_the_first_rung_and_never_more_the_next(branches, folds, at_once):
    entrants = [rung.entrants for rung in rungs(branches, folds, at_once)]
    assert entrants[0] == branches
    assert entrants == sorted(entrants, reverse=True)
    # nobody races alone
    assert entrants[-1] >= min(branches, 2)


@given(BRANCHES, FOLDS, AT_ONCE, st.integers(1, 20))
def test_all_see_at_least_so_many_folds_and_the_rest_is_for_the_best(branches, folds, at_once, at_least):
    stages = rungs(branches, folds, at_once, at_least)
    assert [fold for rung in stages for part in rung.parts for fold in part] == list(range(folds))
    assert stages[0].entrants == branches
    assert sum(len(part) for part in stages[0].parts) == min(at_least, folds)
    # those that go on are as many as if the race had begun with a single fold
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
def test_as_many_go_on_as_a_rung_admits_and_they_are_the_best(branches, folds, at_once, seed):
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
def test_a_candidate_without_a_number_never_wins(branches, folds, at_once, seed, share):
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


def test_a_rung_in_which_nobody_has_a_number_leaves_no_winner():
    table = np.ones((20, 8))
    last = rungs(20, 8, 8)[-1].parts[0].start
    table[:, last:] = nan
    raced = Raced(table, 8)
    assert raced.winner is None
    # those that dropped out before have a number, but did not see what the others failed on
    assert sum(not math.isnan(one.rank) for one in raced.branch) == 20 - rungs(20, 8, 8)[-1].entrants


def test_where_nobody_has_a_number_in_the_first_rung_nobody_enters_the_next():
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


def test_what_is_told_counts_up_and_ends_with_the_winner():
    raced = Raced(np.random.default_rng(4).uniform(-1, 1, (20, 8)), 8)
    assert [done for done, _ in raced.told] == list(range(1, len(raced.told) + 1))
    assert raced.told[0] == (1, 0)
    assert raced.told[-1][1] == raced.winner


@settings(max_examples=100, deadline=None, derandomize=True)
@given(FOLDS, AT_ONCE, SEED)
def test_a_shift_of_single_folds_is_corrected_for(folds, at_once, seed):
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


def test_the_mean_of_parts_counts_each_as_often_as_it_has_folds():
    parts = {range(0, 1): Scores(1.0, 10.0, 100.0), range(1, 4): Scores(5.0, 50.0, 500.0)}
    assert mean_of(parts) == Scores(4.0, 40.0, 400.0)
    assert mean_of({range(3, 7): Scores(0.1, 0.2, nan)}).rank == 0.1


# ------------------------------------------------------------------------------------------------ in a search


class Steps(Observer):
    """Keeps what it is told, and how long the evaluator's log was then."""

    def __init__(self, evaluate: Logged) -> None:
        self.evaluate, self.dense, self.work, self.candidates, self.levels = evaluate, 0, 0.0, [], []

    def on_dense(self, so_far: Winner, work: float) -> None:
        self.dense, self.work = len(self.evaluate.log), work

    def on_candidate(self, level, done, planned, best, sparsity):
        self.candidates.append((level, done, planned, best and best.index))

    def on_level(self, level, so_far):
        self.levels.append((level, len(self.evaluate.log), so_far.report.validations))


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
    evaluate = kind(noise, folds, at_once)
    report = search(
        network(20),
        evaluate,
        branches=branches,
        tolerance=1,
        wheel=Wheel(sharpness),
        tree=Tree(0.2, max_levels=2),
        validation=Validation(confirm=confirm, race=race),
    ).report
    assert report.validations == pytest.approx(evaluate.validations)
    ranking = report.folds[0]
    assert sum(report.folds) == folds
    for level in report.levels:
        for one in level.candidates:
            assert 1 <= one.folds <= ranking
        assert next(one.folds for one in level.candidates if one.index == level.winner) == ranking


@pytest.mark.parametrize("kind", [Logged, Telling])
def test_each_candidate_is_asked_about_as_many_folds_as_the_report_says(kind):
    evaluate = kind(noise, 16)
    steps = Steps(evaluate)
    winner = search(network(), evaluate, branches=20, tolerance=1, tree=Tree(0.2, max_levels=1), observer=steps)
    (level,) = winner.report.levels
    log = evaluate.log[steps.dense : steps.levels[0][1]]
    asked: dict[bytes, list[int]] = {}
    for mask, folds in log:
        asked.setdefault(key_of(mask), []).extend(folds)
    assert all(one.same_as is None for one in level.candidates)
    stages = rungs(20, 8, 16)
    for one, folds in zip(level.candidates, asked.values(), strict=True):
        assert folds[: one.folds] == list(range(one.folds))
        if one.index != level.winner:
            assert len(folds) == one.folds
    counts = sorted(one.folds for one in level.candidates)
    ends = [rung.parts[-1].stop for rung in stages]
    expected = [
        end
        for rung, next_, end in zip(stages, [*stages[1:], None], ends, strict=True)
        for _ in range(rung.entrants - (next_.entrants if next_ else 0))
    ]
    assert counts == sorted(expected)


class Uneven(Telling):
    """Its floor score is no mean of folds, as F1 is not."""

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        scores = super().__call__(candidate, folds)
        return Scores(scores.rank, scores.score + noise(candidate.mask, 100 + len(folds)))


def test_the_winner_of_a_branch_has_its_scores_on_the_union_of_the_ranking_folds():
    evaluate = Uneven(noise, 16)
    winner = search(network(), evaluate, branches=20, tolerance=9, tree=Tree(0.2, max_levels=1))
    (level,) = winner.report.levels

    def on_union(mask: Mask) -> float:
        return sum(noise(mask, fold) for fold in range(8)) / 8 + noise(mask, 108)

    assert level.score == pytest.approx(on_union(winner.mask))
    assert winner.report.dense_score == pytest.approx(on_union(winner.mask_at(0)))
    assert evaluate.asked(winner.mask)[-2:] == [tuple(range(8)), tuple(range(8, 16))]


def test_twins_of_a_winner_share_the_scores_it_has_on_the_union():
    sharp = Wheel(math.inf)
    report = search(
        network(), Uneven(noise, 16), branches=5, tolerance=9, wheel=sharp, tree=Tree(0.2, max_levels=1)
    ).report
    first, *twins = report.levels[0].candidates
    assert [one.same_as for one in twins] == [0] * 4
    assert {(one.score, one.rank, one.folds) for one in twins} == {(first.score, first.rank, first.folds)}
    assert report.levels[0].spread == (first.score,) * 3


def test_infinite_sharpness_validates_one_candidate_a_level():
    evaluate = Telling(noise, 16)
    steps = Steps(evaluate)
    search(
        network(),
        evaluate,
        branches=5,
        tolerance=1,
        wheel=Wheel(math.inf),
        tree=Tree(0.2, max_levels=3),
        observer=steps,
    )
    starts = [steps.dense, *(end for _, end, _ in steps.levels)]
    for begin, end in pairwise(starts):
        masks = {key_of(mask) for mask, _ in evaluate.log[begin:end]}
        assert len(masks) == 1
        # by parts, and once more on their union
        *parts, union = [folds for _, folds in evaluate.log[begin:end]]
        assert [fold for part in parts for fold in part] == list(range(8))
        assert union == tuple(range(8))


def test_without_a_race_every_candidate_is_judged_once_on_the_union():
    evaluate = Telling(noise, 16, at_once=2)
    steps = Steps(evaluate)
    off = Validation(race=False)
    winner = search(
        network(), evaluate, branches=6, tolerance=1, tree=Tree(0.2, max_levels=2), validation=off, observer=steps
    )
    assert steps.dense == 2
    begin = steps.dense
    for level, end, _ in steps.levels:
        log = evaluate.log[begin:end]
        assert [folds for _, folds in log] == [tuple(range(8))] * 7
        assert len({key_of(mask) for mask, _ in log}) == 6
        assert log[-1][0] == winner.mask_at(level.level)
        assert [one.folds for one in level.candidates] == [8] * 6
        begin = end


def test_a_lone_candidate_does_not_race():
    evaluate = Telling(noise, 16)
    steps = Steps(evaluate)
    search(network(), evaluate, branches=1, tolerance=1, tree=Tree(0.2, max_levels=1), observer=steps)
    assert {folds for _, folds in evaluate.log[: steps.levels[0][1]]} == {tuple(range(8)), tuple(range(8, 16))}


@pytest.mark.parametrize("field", ["rank", "score"])
def test_there_is_no_race_where_a_part_gives_the_dense_network_no_number(field):
    class Blind(Telling):
        def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
            scores = super().__call__(candidate, folds)
            if len(folds) < 8:  # as a metric that needs more samples than a fold has
                return Scores(**{"rank": scores.rank, "score": scores.score, field: nan})
            return scores

    evaluate = Blind(noise, 16)
    steps = Steps(evaluate)
    winner = search(network(), evaluate, branches=6, tolerance=1, tree=Tree(0.2, max_levels=1), observer=steps)
    (level,) = winner.report.levels
    assert level.accepted
    assert [folds for _, folds in evaluate.log[steps.dense : steps.levels[0][1]]] == [tuple(range(8))] * 7
    assert [one.folds for one in level.candidates] == [8] * 6


def test_there_is_no_race_where_the_dense_network_has_no_number_on_the_union():
    class Blind(Telling):
        def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
            scores = super().__call__(candidate, folds)
            blind = candidate.mask.sparsity == 0 and len(folds) == 8
            return Scores(nan if blind else scores.rank, scores.score)

    report = search(network(), Blind(noise, 16), branches=6, tolerance=1, tree=Tree(0.2, max_levels=1)).report
    assert report.levels[0].accepted
    assert [one.folds for one in report.levels[0].candidates] == [8] * 6


def test_a_winner_without_a_rank_on_the_union_does_not_become_a_parent():
    class Blind(Telling):
        def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
            scores = super().__call__(candidate, folds)
            blind = candidate.mask.sparsity > 0 and len(folds) == 8
            return Scores(nan if blind else scores.rank, scores.score)

    tree = Tree(0.2, max_levels=1, patience=1)
    report = search(network(), Blind(noise, 16), branches=6, tolerance=1, tree=tree).report
    assert not report.levels[0].accepted


def test_a_branch_that_fails_on_a_late_fold_has_no_winner_and_is_tried_again():
    parts = [part for rung in rungs(6, 8, 16) for part in rung.parts]

    def blind_late(mask: Mask, fold: int) -> float:
        return nan if fold in parts[-1] and mask.sparsity > 0 else 0.5

    winner = search(network(), Telling(blind_late, 16), branches=6, tolerance=1, tree=Tree(0.2, patience=2))
    assert [(level.winner, level.accepted) for level in winner.report.levels] == [(None, False)] * 2
    assert all(math.isnan(level.score) for level in winner.report.levels)
    assert winner.mask == Mask.full(network())


@pytest.mark.parametrize("kind", [Logged, Telling])
@pytest.mark.parametrize("race", [True, False])
def test_the_work_announced_is_the_work_of_a_level(race, kind):
    evaluate = kind(noise, 16, at_once=3)
    steps = Steps(evaluate)
    search(
        network(),
        evaluate,
        branches=20,
        tolerance=1,
        tree=Tree(0.2, max_levels=2),
        validation=Validation(race=race),
        observer=steps,
    )
    (_, _, first), (_, _, second) = steps.levels
    assert second - first == pytest.approx(steps.work)
    done = [done for level, done, _, _ in steps.candidates if level == 1]
    planned = {planned for _, _, planned, _ in steps.candidates}
    assert done == list(range(1, len(done) + 1))
    assert planned == {len(done)}


@pytest.mark.parametrize("race", [True, False])
def test_the_last_candidate_told_of_is_the_winner(race):
    evaluate = Telling(noise, 16)
    steps = Steps(evaluate)
    validation = Validation(race=race)
    search(
        network(),
        evaluate,
        branches=9,
        tolerance=1,
        tree=Tree(0.2, max_levels=3),
        validation=validation,
        observer=steps,
    )
    for level, _, _ in steps.levels:
        assert [best for number, _, _, best in steps.candidates if number == level.level][-1] == level.winner


def test_a_fold_that_is_harder_for_all_does_not_decide_the_floor():
    # uncorrected, every candidate that saw the first fold alone would seem to decline
    evaluate = Telling(lambda mask, fold: (0.2 if fold == 0 else 0.9) - 0.1 * mask.sparsity, 16)
    report = search(network(), evaluate, branches=20, tolerance=0.05, tree=Tree(0.2, max_levels=1)).report
    (level,) = report.levels
    assert level.accepted
    assert level.spread == pytest.approx((report.dense_score - 0.1 * level.sparsity,) * 3)


def test_a_race_finds_a_candidate_that_is_better_on_every_fold():
    found = []
    for race in (True, False):
        evaluate = Telling(lambda mask, fold: noise(mask, 0) + fold, 16)
        report = search(
            network(),
            evaluate,
            branches=20,
            tolerance=1,
            tree=Tree(0.2, max_levels=3),
            validation=Validation(race=race),
        ).report
        found.append([level.winner for level in report.levels])
    assert found[0] == found[1]
