"""The certificate: laws of all kinds of outcomes, and how many samples it needs."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_roulette.judge.certificate import method_of, p_value, paired_error, samples_needed, standard_error
from lightning_roulette.judge.outcomes import Batches, Resamples, Singles
from lightning_roulette.report.records import Method
from tests.support.outcomes import KINDS, batches, chance, flips, mean_of, singles

NAN, INF = math.nan, math.inf

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def test_samples_needed():
    assert samples_needed(0.95, 0.005) == samples_needed(0.95, 0.5, width=100) == 598
    assert samples_needed(0.99, 0.01) == 459
    assert samples_needed(0.5, 0.5) == samples_needed(0.95, 1.0) == samples_needed(0.95, INF) == 1


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.9, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("tolerance", [0.3, 0.05, 0.02, 0.005])
@pytest.mark.parametrize("width", [1.0, 100.0])
def test_the_needed_number_of_equal_samples_is_certified_and_one_fewer_is_not(confidence, tolerance, width):
    def p(samples: int) -> float:
        return p_value(*singles(torch.zeros(samples), 0.0, width), tolerance * width, confidence)

    needed = samples_needed(confidence, tolerance * width, width)
    assert p(needed - 1) > 1 - confidence
    for more in (0, 1, 7, needed):
        assert p(needed + more) <= 1 - confidence


@pytest.mark.parametrize(
    ("confidence", "tolerance", "width"),
    [(0.0, 0.1, 1), (1.0, 0.1, 1), (NAN, 0.1, 1), (0.9, 0.0, 1), (0.9, -1, 1), (0.9, NAN, 1), (0.9, 0.1, 0)],
)
def test_samples_needed_refuses(confidence, tolerance, width):
    with pytest.raises(ValueError, match="must"):
        samples_needed(confidence, tolerance, width)


@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_tolerance_certifies_more_readily(kind):
    dense, pruned = (one.values for one in singles(flips((400,), 0.02, 0.02, 6)))
    if kind == "batches":
        pair = (Batches(one.view(20, 20).mean(1), torch.full((20,), 20)) for one in (dense, pruned))
    else:
        pair = KINDS[kind](dense), KINDS[kind](pruned)
    pair = [*pair]
    ps = [p_value(*pair, tolerance) for tolerance in (-INF, -1.0, -0.1, 0.0, 0.02, 0.06, 0.2, 1.0, INF)]
    assert ps == sorted(ps, reverse=True)
    assert (ps[0], ps[-1]) == (1.0, 2.0**-1022)
    assert ps[4] > ps[5] > ps[6]


@pytest.mark.parametrize("one", [Singles(torch.zeros(0), 0, 1), mean_of(torch.ones(1)), batches([0.5]), batches([])])
def test_outcomes_that_are_too_few_are_not_certified(one):
    assert p_value(one, one, 0.5) == 1.0


@every_kind
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("tolerance", [0.005, INF])
def test_outcomes_that_are_not_finite_are_not_certified(kind, bad, tolerance):
    good, spoiled = torch.ones(1000), torch.ones(1000)
    spoiled[3] = bad
    for pair in [(good, spoiled), (spoiled, good), (spoiled, spoiled)]:
        assert p_value(*map(kind, pair), tolerance) == 1.0
        assert math.isnan(paired_error(*map(kind, pair)))


@every_kind
def test_the_error_of_fewer_than_two_outcomes_is_nan_and_of_equal_ones_zero(kind):
    assert math.isnan(paired_error(kind(torch.ones(1)), kind(torch.zeros(1))))
    assert math.isnan(paired_error(kind(torch.ones(0)), kind(torch.zeros(0))))
    assert paired_error(kind(torch.ones(5)), kind(torch.ones(5))) == 0.0


@every_kind
def test_asked_twice_the_answer_is_the_same_and_global_random_state_is_not_used(kind):
    pair = [kind(torch.rand(300, generator=chance(seed), dtype=torch.float64)) for seed in (15, 16)]
    before = torch.get_rng_state()
    assert p_value(*pair, 0.02) == p_value(*pair, 0.02)
    assert paired_error(*pair) == paired_error(*pair)
    assert torch.equal(torch.get_rng_state(), before)


def test_singles_may_have_any_type():
    right, wrong = torch.tensor([True, True, False, True] * 200), torch.tensor([1, 0, 0, 1] * 200)
    assert paired_error(Singles(right, 0, 1), Singles(wrong, 0, 1)) == pytest.approx(math.sqrt(0.1875 / 799))
    assert p_value(Singles(right, 0, 1), Singles(wrong, 0, 1), 0.4) < 0.05 < p_value(*singles(torch.ones(3)), 0.4)


SINGLES, RESAMPLES = Singles(torch.zeros(3), 0, 1), Resamples(lambda index: 0.0, 3)


@pytest.mark.parametrize("compare", [paired_error, lambda one, other: p_value(one, other, 0.1)])
@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (SINGLES, Singles(torch.zeros(4), 0, 1), "one kind on the same samples"),
        (SINGLES, Singles(torch.zeros(3), 0, 2), "one kind on the same samples"),
        (SINGLES, Singles(torch.zeros(3), -1, 1), "one kind on the same samples"),
        (SINGLES, Batches(torch.zeros(3), torch.ones(3)), "one kind on the same samples"),
        (SINGLES, RESAMPLES, "one kind on the same samples"),
        (RESAMPLES, Resamples(lambda index: 0.0, 4), r"Resamples of \d and dense is Resamples of \d"),
        (batches([1.0, 2.0]), batches([1.0, 2.0], [1.0, 2.0]), "weights"),
    ],
)
def test_only_outcomes_of_one_kind_on_the_same_samples_are_compared(one, other, message, compare):
    for pair in [(one, other), (other, one)]:
        with pytest.raises(ValueError, match=message):
            compare(*pair)


@pytest.mark.parametrize(
    ("arguments", "message"), [((NAN,), "tolerance is NaN"), ((0.1, 95), "confidence is 95, but must")]
)
def test_a_tolerance_or_confidence_without_a_meaning_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        p_value(SINGLES, SINGLES, *arguments)


def test_the_method_follows_from_the_outcomes_and_says_whether_it_is_approximate():
    assert [method_of(one) for one in (SINGLES, RESAMPLES, batches([1.0]))] == [*Method]
    assert [one.value.startswith("Approximate") for one in Method] == [False, True, True]


@every_kind
def test_a_standard_error_is_that_of_the_textbook(kind):
    values = torch.rand(400, generator=chance(3), dtype=torch.float64)
    expected = float(values.std()) / 20
    rel = 0.3 if kind is mean_of else 1e-9  # 50 resamples
    assert standard_error(kind(values)) == pytest.approx(expected, rel=rel)


def test_a_heavier_batch_counts_more_in_a_standard_error():
    assert standard_error(batches([0.0, 1.0, 1.0], [1.0, 2.0, 2.0])) == pytest.approx(0.4 / math.sqrt(2))


@pytest.mark.parametrize(
    "outcomes",
    [
        Singles(torch.tensor([0.5]), 0, 1),
        batches([0.5]),
        batches([]),
        batches([0.5, NAN]),
        mean_of(torch.tensor([0.5])),
        Resamples(lambda index: NAN, 20),
    ],
)
def test_too_few_outcomes_have_no_standard_error(outcomes):
    assert math.isnan(standard_error(outcomes))


def test_equal_outcomes_have_a_standard_error_of_zero():
    assert standard_error(Singles(torch.ones(20), 0, 1)) == standard_error(batches([0.25] * 5)) == 0
