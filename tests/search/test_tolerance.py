"""The default tolerance: half a standard error of the dense score, within bounds, found before the first candidate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_roulette import Mask, PrunedWeights, Scores, Singles, Tree, Validation, search
from lightning_roulette.judge.evaluator import Judge
from lightning_roulette.judge.outcomes import Resamples
from lightning_roulette.search.gradual import Cuts, Gradual
from lightning_roulette.search.tolerance import Tolerance, default_tolerance
from tests.support.evaluators import Logged, Sampled, Telling, network, noise

WEIGHTS = network()
DENSE = PrunedWeights(Mask.full(WEIGHTS), WEIGHTS)


def of_accuracy(wrong: int, samples: int) -> float:
    """The standard error of a share of right samples, as in a textbook."""
    share = wrong / samples
    return math.sqrt(share * (1 - share) / (samples - 1))


def default(evaluate, confirm: float = 0.5) -> Tolerance:
    judge = Judge(evaluate, confirm)
    _, outcomes = judge.recorded(DENSE, judge.held_out_folds or judge.search_folds)
    return default_tolerance(judge, DENSE, outcomes)


@given(st.integers(1, 9), st.integers(10, 40))
def test_it_is_half_the_standard_error_of_an_accuracy(wrong, size):
    found = default(Sampled(lambda mask, fold: wrong, 8, size))
    assert found.value == pytest.approx(of_accuracy(4 * wrong, 4 * size) / 2)
    assert found.why == f"half a standard error of the dense score on the held-out half, from {4 * size} samples"


@pytest.mark.parametrize(
    ("confirm", "data"), [(0.5, "held-out half, from 8 parts of it"), (0, "validation data, from 16 parts of it")]
)
@pytest.mark.parametrize("kind", [Logged, Telling])
def test_without_outcomes_it_is_half_the_standard_error_over_the_folds(kind, confirm, data):
    folds = range(8 if confirm else 0, 16)
    scores = torch.tensor([noise(DENSE.mask, fold) for fold in folds], dtype=torch.float64)
    found = default(kind(noise, 16), confirm)
    assert found.value == pytest.approx(float(scores.std()) / math.sqrt(len(folds)) / 2)
    assert found.why == f"half a standard error of the dense score on the {data}"


@pytest.mark.parametrize(
    ("evaluate", "why"),
    [
        (lambda mask: 0.5, "validation data is unknown"),
        (Sampled(lambda mask, fold: 0, 8, 20), "held-out half is zero"),
        (Logged(lambda mask, fold: math.nan, 8), "held-out half is unknown"),
    ],
    ids=["one number", "no errors", "not finite"],
)
def test_without_a_standard_error_nothing_may_be_lost(evaluate, why):
    assert default(evaluate) == Tolerance(0.0, f"the standard error of the dense score on the {why}")


@pytest.mark.parametrize(("gain", "value"), [(None, 1), (100.0, 1), (1.0, 0.1), (0.0, 0), (-1.0, 0)])
def test_it_is_at_most_a_tenth_of_what_the_weights_add(gain, value):
    evaluate, half = Sampled(lambda mask, fold: 5, 8, 10), of_accuracy(20, 40) / 2
    evaluate.gain = None if gain is None else gain * half
    found = default(evaluate)
    assert found.value == pytest.approx(value * half)
    assert found.why.startswith("half a standard error" if value == 1 else "a tenth of what the prunable weights add")


def test_a_metric_that_some_resamples_do_not_have_keeps_its_standard_error():
    values = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    class Resampled(Logged):
        def recorded(self, candidate, folds):
            return self(candidate, folds), Resamples(self.mean, 40)

        def mean(self, index):
            return float(values[index].mean()) if bool((index == 0).any()) else math.nan

    half = float(values.std()) / math.sqrt(40) / 2
    assert default(Resampled(noise, 8)).value == pytest.approx(half, rel=0.5)


def test_a_search_uses_the_number_from_its_first_level_on():
    """With the number that the default finds, given as a number, the search is the same."""

    def wrong(mask, fold):
        return 32 + round(10 * mask.sparsity)

    given = {"branches": 3, "tree": Tree(pruning_rate=0.1)}
    found = search(WEIGHTS, Sampled(wrong, 8, 160), **given)
    half = of_accuracy(128, 640) / 2
    assert found.report.tolerance == pytest.approx(half)
    assert found.report.floor == pytest.approx(0.8 - half)
    same = search(WEIGHTS, Sampled(wrong, 8, 160), tolerance=found.report.tolerance, **given)
    assert found.mask == same.mask
    assert replace(found.report, seconds=0, tolerance_why="") == replace(same.report, seconds=0)
    none = search(WEIGHTS, Sampled(wrong, 8, 160), tolerance=0, **given)
    assert found.mask.sparsity > none.mask.sparsity


def test_a_certificate_needs_a_tolerance_that_was_given():
    with pytest.raises(ValueError, match=r"tolerance is None and confidence 0\.95.*Pass a tolerance, such as 0\.005"):
        search(WEIGHTS, Sampled(lambda mask, fold: 1, 8, 20), confidence=0.95)


def test_nothing_held_out_is_said():
    report = search(WEIGHTS, Sampled(lambda mask, fold: 5, 8, 20), validation=Validation(confirm=0)).report
    assert report.tolerance == pytest.approx(of_accuracy(40, 160) / 2)
    assert report.tolerance_why.endswith("on the validation data, from 160 samples")


def test_outcomes_of_one_sample_have_no_standard_error():
    class Single(Logged):
        def recorded(self, candidate, folds):
            return Scores(0.5, 0.5), Singles(torch.tensor([0.5]), 0.0, 1.0)

    assert default(Single(lambda mask, fold: 0.5, 2)).value == 0


def test_between_epochs_the_dense_network_sets_it_and_cuts_have_no_floor():
    def wrong(mask, fold):
        return 8 if mask.sparsity == 0 else 39

    cuts = Cuts(1, None, None, 3, tree=Tree(pruning_rate=0.5))
    one, evaluate = Gradual(cuts), Sampled(wrong, 8, 40)
    assert one.judge(WEIGHTS, evaluate)
    assert one.report.tolerance == pytest.approx(of_accuracy(64, 320) / 2)
    network = one.cut(1)
    assert network is not None
    assert not one.judge(network.weights, Sampled(lambda mask, fold: 10, 8, 40))  # 0.75 is below the floor 0.789
    again = Gradual(cuts)
    again.restore(one.state())
    assert again.judge(network.weights, Sampled(lambda mask, fold: 8, 8, 40))
    assert again.report.tolerance == one.report.tolerance
    assert again.report.tolerance_why == one.report.tolerance_why != ""
