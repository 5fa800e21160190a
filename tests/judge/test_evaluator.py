"""Evaluators: derived from the base class, of a class of one's own, or a function of a mask. The judge."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette import Evaluator, Mask, PrunedWeights, Scores, search
from lightning_roulette.judge.evaluator import Judge, as_evaluator, divided
from tests.support.evaluators import Logged, noise

WEIGHTS = {"a": torch.arange(1.0, 41.0)}
DENSE = PrunedWeights(Mask.full(WEIGHTS), WEIGHTS)


class Own:
    """Has the methods of an evaluator, and is not derived from it."""

    folds = 4

    def __call__(self, candidate, folds):
        return Scores(len(folds), candidate.mask.survivors)


class Derived(Own, Evaluator):
    pass


class OwnRecording(Own):
    at_once, at_least, undivided_because = 2, 3, "too few samples"

    def recorded(self, candidate, folds):
        return self(candidate, folds), None


class DerivedRecording(Derived):
    recorded = OwnRecording.recorded


@pytest.mark.parametrize(
    ("evaluate", "facts"),
    [
        (Derived(), (4, None, 1, "", False)),
        (DerivedRecording(), (4, None, 1, "", True)),
        (Own(), (4, None, 1, "", False)),
        (OwnRecording(), (4, 2, 3, "too few samples", True)),
        (lambda mask: mask.survivors, (1, None, 1, "", False)),
    ],
)
def test_anything_that_scores_networks_becomes_an_evaluator(evaluate, facts):
    one = as_evaluator(evaluate)
    assert (one.folds, one.at_once, one.at_least, one.undivided_because, one.records) == facts
    assert one(DENSE, [0]).score == 40
    if one.records:
        assert one.recorded(DENSE, [0, 1]) == (Scores(2, 40), None)
    assert as_evaluator(one) is one


def test_a_search_is_the_same_with_a_derived_class_and_with_ones_own():
    first, second = (search(WEIGHTS, one(), branches=3, tolerance=8) for one in (Derived, Own))
    assert first.mask == second.mask
    assert first.report.to_dict() | {"seconds": 0} == second.report.to_dict() | {"seconds": 0}
    assert first.report.folds == (2, 2)


def test_an_evaluator_without_a_call_raises():
    with pytest.raises(NotImplementedError):
        Evaluator()(DENSE, [0])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 100), st.floats(0, 1, exclude_max=True))
def test_the_folds_are_divided_into_a_search_half_and_a_held_out_half(folds, confirm):
    search_folds, held_out = divided(folds, confirm)
    assert [*search_folds, *held_out] == list(range(folds))
    assert len(search_folds) >= 1
    if confirm == 0 or folds == 1:
        assert not held_out
    else:
        assert len(held_out) >= 1
        assert abs(len(held_out) - confirm * folds) <= 0.5 or 1 in (len(held_out), len(search_folds))


def test_a_judge_counts_folds_and_turns_scores_that_are_not_finite_into_nan():
    judge = Judge(Logged(lambda mask, fold: math.inf if fold == 2 else fold, 4), 0.5)
    assert (judge.search_folds, judge.held_out_folds, judge.records) == (range(0, 2), range(2, 4), False)
    assert judge.scores(DENSE, [0, 1]) == Scores(0.5, 0.5, 0.0)
    assert math.isnan(judge.scores(DENSE, [2]).rank)
    assert judge.validations == 0.75
    _, outcomes = judge.recorded(DENSE, [0, 1, 3])
    assert outcomes.values.tolist() == [0, 1, 3]
    assert judge.validations == 0.75 + 1.5
    assert judge.recorded(DENSE, [3]) == (Scores(3, 3, 0.0), None)


@pytest.mark.parametrize(("at_once", "expected"), [(None, 4), (2, 2), (99, 4)])
def test_a_judge_knows_how_many_folds_are_read_at_once(at_once, expected):
    assert Judge(Logged(noise, 4, at_once), 0.5).at_once == expected
