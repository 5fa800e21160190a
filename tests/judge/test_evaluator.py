"""Evaluators: derived from the base class, of a class of one's own, or a function of a mask."""

from __future__ import annotations

import pytest
import torch

from lightning_roulette import Evaluator, Mask, PrunedWeights, Scores, search
from lightning_roulette.judge.evaluator import as_evaluator

WEIGHTS = {"a": torch.arange(1.0, 41.0)}


class Derived(Evaluator):
    folds = 4

    def __call__(self, candidate, folds):
        return Scores(len(folds), candidate.mask.survivors)


class Own:
    """Has the names of an evaluator, and is not derived from it."""

    folds = 4

    def __call__(self, candidate, folds):
        return Scores(len(folds), candidate.mask.survivors)


class OwnRecording(Own):
    at_once, at_least, undivided_because = 2, 3, "too few samples"

    def recorded(self, candidate, folds):
        return self(candidate, folds), None


class DerivedRecording(Derived):
    def recorded(self, candidate, folds):
        return self(candidate, folds), None


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
def test_whatever_scores_networks_becomes_an_evaluator(evaluate, facts):
    one = as_evaluator(evaluate)
    assert (one.folds, one.at_once, one.at_least, one.undivided_because, one.records) == facts
    candidate = PrunedWeights(Mask.full(WEIGHTS), WEIGHTS)
    assert one(candidate, [0]).score == 40
    if one.records:
        assert one.recorded(candidate, [0, 1]) == (Scores(2, 40), None)
    assert as_evaluator(one) is one


def test_a_search_is_the_same_with_a_derived_class_and_with_ones_own():
    first, second = (search(WEIGHTS, one(), branches=3, tolerance=8) for one in (Derived, Own))
    assert first.mask == second.mask
    assert first.report.to_dict() | {"seconds": 0} == second.report.to_dict() | {"seconds": 0}
    assert first.report.folds == (2, 2)


def test_an_evaluator_that_does_not_score_says_so():
    candidate = PrunedWeights(Mask.full(WEIGHTS), WEIGHTS)
    with pytest.raises(NotImplementedError):
        Evaluator()(candidate, [0])
