"""The certificate: exact for means of samples, approximate for the rest, and the same whenever it is asked."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from lightning_roulette.judge.betting import log_wealth
from lightning_roulette.judge.certificate import method_of, p_value, paired_error, samples_needed
from lightning_roulette.judge.outcomes import Batches, Resamples, Singles
from lightning_roulette.judge.student import t_tail
from lightning_roulette.report.records import Method


def chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flips(shape: tuple[int, ...], worse: float, better: float, seed: int) -> Tensor:
    """Declines of accuracy: 1 where a sample becomes wrong, -1 where it becomes right."""
    uniform = torch.rand(shape, generator=chance(seed), dtype=torch.float64)
    return (uniform < worse).double() - (uniform >= 1 - better).double()


def singles(declines: Tensor, low: float = 0.0, high: float = 1.0) -> tuple[Singles, Singles]:
    """A dense and a pruned network of these declines, in units of the width."""
    dense = low + (high - low) * (declines > 0).double()
    return Singles(dense, low, high), Singles(dense - (high - low) * declines, low, high)


def mean_of(values: Tensor) -> Resamples:
    return Resamples(lambda index: float(values[index].mean()), len(values))


def batches(values: list[float], weights: list[float] | None = None) -> Batches:
    return Batches(torch.tensor(values), torch.tensor(weights or [1.0] * len(values)))


# ------------------------------------------------------------------------------------------------ betting


def naive_log_wealth(declines: list[float], tolerance: float, confidence: float) -> float:
    """The game sample by sample, as the documentation states it."""
    goal, wealth, best, squares, bet = 1e-9 - math.log(1 - confidence), 1.0, 1.0, 4.0, 0.0
    block = max(1, math.ceil(len(declines) / 200))
    for i, decline in enumerate(declines):
        if i % block == 0:
            need = goal * (1 + math.floor(math.log(best) / goal)) - (math.log(wealth) if wealth > 0 else -math.inf)
            left = len(declines) - i
            bet = math.sqrt(2 * need * (i + 1) / (left * squares))
            if tolerance > 0:
                bet = max(bet, math.expm1(min(need / left, 700)) / tolerance)
            bet = min(bet, 1 / (1 - tolerance))
        wealth *= max(1 + bet * (tolerance - decline), 0.0)
        best = max(best, wealth)
        squares += decline**2
    return math.log(best)


@pytest.mark.parametrize("samples", [1, 7, 199, 200, 201, 1000, 1234])
@pytest.mark.parametrize(("worse", "better"), [(0.01, 0.0), (0.02, 0.05), (0.0, 0.3)])
@pytest.mark.parametrize(("tolerance", "confidence"), [(0.005, 0.95), (0.3, 0.8), (0.0, 0.9), (-0.02, 0.99)])
def test_the_wealth_is_that_of_the_naive_game(samples, worse, better, tolerance, confidence):
    declines = flips((samples,), worse, better, samples)
    expected = naive_log_wealth(declines.tolist(), tolerance, confidence)
    assert float(log_wealth(declines, tolerance, confidence)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_one_sample_by_hand():
    # the aim is out of reach in one step: the largest bet, 1 / (1 - 0.5), and a wealth of 1 + 2 * (0.5 - decline)
    wealth = log_wealth(torch.tensor([[0.0], [0.5], [1.0], [-1.0], [0.25]], dtype=torch.float64), 0.5).exp()
    assert wealth.tolist() == pytest.approx([2.0, 1.0, 1.0, 4.0, 1.5])


def test_the_wealth_of_many_games_is_that_of_each():
    declines = flips((3, 4, 700), 0.01, 0.01, 0)
    together = log_wealth(declines, 0.005)
    assert together.shape == (3, 4)
    torch.testing.assert_close(together[1, 2], log_wealth(declines[1, 2], 0.005))


@pytest.mark.parametrize("samples", [600, 2000])
@pytest.mark.parametrize(("worse", "better"), [(0.005, 0.0), (0.015, 0.01), (0.007, 0.002)])
def test_a_decline_of_just_the_tolerance_is_rarely_certified(samples, worse, better):
    certified = log_wealth(flips((1000, samples), worse, better, 1), 0.005) >= math.log(20)
    assert certified.double().mean() <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 1000)


def test_no_level_of_confidence_is_broken():
    # skewed declines that no accuracy has: mostly small gains, some large losses
    uniform = torch.rand((4000, 300), generator=chance(2), dtype=torch.float64)
    declines = torch.where(uniform < 0.2, 0.9, -0.1)
    for aim in (0.5, 0.95, 0.99):
        p = torch.exp(-log_wealth(declines, 0.1, aim))
        for level in (0.5, 0.2, 0.1, 0.05, 0.01):
            assert (p <= level).double().mean() <= level + 2 * math.sqrt(level * (1 - level) / 4000)


@pytest.mark.slow
def test_a_decline_of_just_the_tolerance_is_rarely_certified_on_much_data():
    for seed, (worse, better) in enumerate([(0.005, 0.0), (0.015, 0.01)]):
        certified = torch.cat(
            [
                log_wealth(flips((200, 20_000), worse, better, 100 * seed + part), 0.005) >= math.log(20)
                for part in range(10)
            ]
        )
        assert certified.double().mean() <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize(("samples", "least"), [(1000, 0.18), (5000, 0.70), (10_000, 0.93)])
def test_networks_that_did_not_decline_are_certified(samples, least):
    certified = log_wealth(flips((400, samples), 0.01, 0.01, 3), 0.005) >= math.log(20)
    assert certified.double().mean() >= least


# ------------------------------------------------------------------------------------------ samples needed


def test_samples_needed():
    assert samples_needed(0.95, 0.005) == 598
    assert samples_needed(0.95, 0.5, width=100) == 598
    assert samples_needed(0.99, 0.01) == 459
    assert samples_needed(0.5, 0.5) == 1
    assert samples_needed(0.95, 1.0) == samples_needed(0.95, math.inf) == 1


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.9, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("tolerance", [0.3, 0.05, 0.02, 0.005])
@pytest.mark.parametrize("width", [1.0, 100.0])
def test_so_many_equal_samples_are_certified_and_no_fewer(confidence, tolerance, width):
    def p(samples: int) -> float:
        return p_value(*singles(torch.zeros(samples), 0.0, width), tolerance * width, confidence)

    needed = samples_needed(confidence, tolerance * width, width)
    assert p(needed - 1) > 1 - confidence
    for more in (0, 1, 7, needed):
        assert p(needed + more) <= 1 - confidence


@pytest.mark.parametrize(
    ("confidence", "tolerance", "width"),
    [(0.0, 0.1, 1), (1.0, 0.1, 1), (math.nan, 0.1, 1), (0.9, 0.0, 1), (0.9, -1, 1), (0.9, math.nan, 1), (0.9, 0.1, 0)],
)
def test_samples_needed_refuses(confidence, tolerance, width):
    with pytest.raises(ValueError, match="must"):
        samples_needed(confidence, tolerance, width)


# ------------------------------------------------------------------------------------------------ p-values


def test_golden_p_values():
    worse = torch.zeros(1000)
    worse[::200] = 1.0
    better = torch.zeros(1000)
    better[7] = -1.0
    found = [p_value(*singles(declines), 0.005) for declines in (torch.zeros(1000), worse, better)]
    assert found == pytest.approx(GOLDEN, rel=1e-6)


GOLDEN = [0.028792625551759262, 0.6754062427943425, 0.01848699771398098]


def test_units_do_not_matter():
    declines = flips((2000,), 0.004, 0.006, 5)
    unit = p_value(*singles(declines), 0.005)
    assert unit < 0.9
    assert p_value(*singles(declines, 0, 100), 0.5) == pytest.approx(unit)
    assert p_value(*singles(declines, -3, 1), 0.02) == pytest.approx(unit)


def test_only_the_differences_count():
    declines = flips((1500,), 0.004, 0.006, 5)
    dense, pruned = singles(declines)
    both_right = torch.where(declines == 0, 1.0, dense.values)
    shifted = Singles(both_right, 0, 1), Singles(both_right - declines, 0, 1)
    assert p_value(*shifted, 0.005) == p_value(dense, pruned, 0.005)


def test_sorted_data_are_no_trap():
    # a data set sorted by class whose last class alone declines: in its own order the game would be won before
    declines = torch.zeros(1000)
    declines[-20:] = 1.0
    assert float(log_wealth(declines.double(), 0.005)) > math.log(20)
    assert p_value(*singles(declines), 0.005) > 0.5


@pytest.mark.parametrize("kind", ["singles", "resamples", "batches"])
def test_a_larger_tolerance_certifies_more_readily(kind):
    declines = flips((400,), 0.02, 0.02, 6)
    dense, pruned = singles(declines)
    pair = {
        "singles": (dense, pruned),
        "resamples": (mean_of(dense.values), mean_of(pruned.values)),
        "batches": (
            Batches(dense.values.view(20, 20).mean(1), torch.full((20,), 20)),
            Batches(pruned.values.view(20, 20).mean(1), torch.full((20,), 20)),
        ),
    }[kind]
    ps = [p_value(*pair, tolerance) for tolerance in (-math.inf, -1.0, -0.1, 0.0, 0.02, 0.06, 0.2, 1.0, math.inf)]
    assert ps == sorted(ps, reverse=True)
    assert ps[0] == 1.0
    assert ps[-1] == 2.0**-1022
    assert ps[4] > ps[5] > ps[6]


def test_a_tolerance_as_wide_as_the_score_is_always_kept():
    assert p_value(*singles(torch.ones(3)), 1.0) == 2.0**-1022
    assert p_value(*singles(torch.ones(3), 0, 100), 99.9) > 0.01


def test_a_network_without_samples_is_not_certified():
    assert p_value(*singles(torch.zeros(0)), 0.005) == 1.0
    assert p_value(mean_of(torch.ones(1)), mean_of(torch.ones(1)), 0.5) == 1.0
    assert p_value(batches([0.5]), batches([0.5]), 0.5) == 1.0
    assert p_value(batches([]), batches([]), 0.5) == 1.0


def test_a_million_samples_underflow_to_the_least_number():
    assert p_value(*singles(torch.zeros(1_000_000)), 0.01) == 2.0**-1022


def test_the_aim_changes_the_bets_and_the_default_is_95():
    pair = singles(flips((3000,), 0.01, 0.01, 8))
    assert p_value(*pair, 0.005) == p_value(*pair, 0.005, 0.95) != p_value(*pair, 0.005, 0.99)


# -------------------------------------------------------------------------------- t-test over batches


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 29, 199, 5000])
def test_the_tail_of_t(degrees):
    for t in (-30.0, -1.5, -0.01, 0.0, 1e-9, 0.3, 1.0, 1.7, 2.5, 8.0, 60.0):
        assert t_tail(t, degrees) == pytest.approx(stats.t.sf(t, degrees), rel=1e-9)


def test_the_tail_of_t_from_the_tables():
    assert t_tail(6.314, 1) == pytest.approx(0.05, rel=1e-3)
    assert t_tail(1.833, 9) == pytest.approx(0.05, rel=1e-3)
    assert t_tail(2.462, 29) == pytest.approx(0.01, rel=1e-3)
    assert t_tail(math.inf, 4) == 0.0
    assert t_tail(-math.inf, 4) == 1.0


def test_batches_by_hand():
    dense, pruned = batches([0.9, 0.8, 1.0, 0.9]), batches([0.88, 0.79, 0.97, 0.88])
    # differences 0.02, 0.01, 0.03, 0.02: mean 0.02, error sqrt(2e-4 / 3 / 4); reach: the wider range, 0.2 / 4
    error = math.sqrt(2e-4 / 12)
    assert paired_error(dense, pruned) == pytest.approx(error, rel=1e-4)
    t = (0.3 - 0.02) / math.hypot(error, 0.05)
    assert p_value(dense, pruned, 0.3) == pytest.approx(stats.t.sf(t, 3), rel=1e-4)


def test_the_weights_of_batches_are_their_sizes():
    dense, pruned = batches([0.9, 0.8, 0.0], [100, 100, 10]), batches([0.89, 0.83, 0.5], [100, 100, 10])
    differences, weights = torch.tensor([-0.01, 0.03, 0.5]), torch.tensor([100.0, 100.0, 10.0])
    mean = (weights * differences).sum() / 210
    error = ((weights * (differences - mean) ** 2).sum() / 210 / 2).sqrt()
    assert paired_error(dense, pruned) == pytest.approx(float(error), rel=1e-4)
    effects = weights * (torch.tensor([0.9, 0.8, 0.0]) - 170 / 210) / 210
    t = (0.4 + mean) / torch.hypot(error, effects.max() - effects.min())
    assert p_value(dense, pruned, 0.4) == pytest.approx(stats.t.sf(float(t), 2), rel=1e-4)


@pytest.mark.parametrize(("worse", "better"), [(0.005, 0.0), (0.015, 0.01)])
@pytest.mark.parametrize(("number", "size"), [(10, 20), (10, 100), (50, 100)])
def test_batches_that_declined_by_just_the_tolerance_are_rarely_certified(worse, better, number, size):
    declines = flips((400, number, size), worse, better, 9).mean(2)
    right = (torch.rand((400, number, size), generator=chance(10)) < 0.95).double().mean(2)
    weights = torch.full((number,), size)
    certified = [
        p_value(Batches(one, weights), Batches(one - decline, weights), 0.005) <= 0.05
        for one, decline in zip(right, declines, strict=True)
    ]
    assert sum(certified) / 400 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)


def test_batches_without_any_variation_are_not_certified():
    assert p_value(batches([1.0] * 9), batches([1.0] * 9), 0.005) == 1.0


# ------------------------------------------------------------------------------------------------ bootstrap


def f1(outcomes: Tensor) -> Resamples:
    """Of rows (true, predicted), both 0 or 1."""

    def score(index: Tensor) -> float:
        true, predicted = outcomes[index].unbind(1)
        return float(2 * (true * predicted).sum() / (true.sum() + predicted.sum()).clamp(min=1))

    return Resamples(score, len(outcomes))


@pytest.mark.parametrize("samples", [200, 3000])
def test_the_error_of_a_mean_is_the_analytic_one(samples):
    dense = torch.randn(samples, generator=chance(11), dtype=torch.float64)
    pruned = dense + 0.1 * torch.randn(samples, generator=chance(12), dtype=torch.float64)
    analytic = float((pruned - dense).std()) / math.sqrt(samples)
    # the deviation of 50 numbers is known to 10 %
    assert paired_error(mean_of(dense), mean_of(pruned)) == pytest.approx(analytic, rel=0.25)
    low, high = float(torch.min(dense.min(), pruned.min())), float(torch.max(dense.max(), pruned.max()))
    assert paired_error(Singles(dense, low, high), Singles(pruned, low, high)) == pytest.approx(analytic)


def test_resamples_have_the_size_of_the_data_and_repeat_samples():
    seen: list[Tensor] = []
    one = Resamples(lambda index: seen.append(index) or 0.5, 50)
    one.resampled(200)
    assert one.resampled(200) == [0.5] * 200
    assert len(seen) == 200  # each is scored once
    assert all(index.dtype == torch.int64 and index.shape == (50,) for index in seen)
    assert min(int(index.min()) for index in seen) == 0
    assert max(int(index.max()) for index in seen) == 49
    assert all(len(index.unique()) < 50 for index in seen)
    counts = torch.cat(seen).bincount(minlength=50)
    assert stats.chisquare(counts.numpy()).pvalue > 0.001
    assert not torch.equal(seen[0], seen[1])
    again: list[Tensor] = []
    Resamples(lambda index: again.append(index) or 0.5, 50).resampled(2)
    assert torch.equal(torch.cat(again), torch.cat(seen[:2]))


def test_the_bootstrap_p_of_a_mean_by_hand():
    values = torch.randn(100, generator=chance(13), dtype=torch.float64)
    dense, pruned = mean_of(values), mean_of(values + 0.1 * torch.randn(100, generator=chance(14), dtype=torch.float64))
    every = torch.arange(100)
    # a mean without sample i is off by (mean - value[i]) / 99
    ranges = [max(s) - min(s) for s in ([one.score(every[every != i]) for i in range(100)] for one in (dense, pruned))]
    apart = torch.tensor(pruned.resampled(200)) - torch.tensor(dense.resampled(200))
    reach, error = max(ranges), float(apart.double().std())
    decline = dense.score(every) - pruned.score(every)
    expected = stats.t.sf((0.2 - decline - reach) / math.hypot(error, reach), 199)
    assert p_value(dense, pruned, 0.2) == pytest.approx(expected)


def test_a_rare_class_that_happens_to_show_no_change_is_not_certified():
    true = (torch.arange(400) % 10 == 0).double()
    dense = true.clone()
    dense[::100] = 1 - dense[::100]
    outcomes = f1(torch.stack([true, dense], 1))
    assert paired_error(outcomes, outcomes) == 0.0
    assert p_value(outcomes, outcomes, 0.005) > 0.05
    assert p_value(outcomes, outcomes, 0.2) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("prevalence", "lost"), [(0.5, 0.01), (0.1, 0.05)])
def test_an_f1_that_declined_by_just_the_tolerance_is_rarely_certified(prevalence, lost):
    def drawn(samples: int, seed: int) -> Tensor:
        uniform = torch.rand((3, samples), generator=chance(seed))
        true = uniform[0] < prevalence
        dense = torch.where(true, uniform[1] < 0.9, uniform[1] < 0.02)
        pruned = dense & ~(true & (uniform[2] < lost))
        return torch.stack([true, dense, pruned], 1).double()

    everything = torch.arange(4_000_000)
    population = drawn(4_000_000, 0)
    tolerance = f1(population[:, :2]).score(everything) - f1(population[:, ::2]).score(everything)
    draws = [drawn(300, seed) for seed in range(1, 101)]
    certified = [p_value(f1(one[:, :2]), f1(one[:, ::2]), tolerance) <= 0.05 for one in draws]
    assert sum(certified) / 100 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 100)


# ------------------------------------------------------------------------------- not numbers, not pairs


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("tolerance", [0.005, INF])
def test_what_is_not_a_number_is_not_certified(bad, tolerance):
    good, spoiled = torch.ones(1000), torch.ones(1000)
    spoiled[3] = bad
    for kind in (lambda v: Singles(v, 0, 1), mean_of, lambda v: Batches(v, torch.ones(1000))):
        for pair in [(kind(good), kind(spoiled)), (kind(spoiled), kind(good)), (kind(spoiled), kind(spoiled))]:
            assert p_value(*pair, tolerance) == 1.0
            assert math.isnan(paired_error(*pair))


def test_errors_of_nothing_and_of_no_difference():
    for kind in (lambda v: Singles(v, 0, 1), mean_of, lambda v: Batches(v, torch.ones(len(v)))):
        assert math.isnan(paired_error(kind(torch.ones(1)), kind(torch.zeros(1))))
        assert math.isnan(paired_error(kind(torch.ones(0)), kind(torch.zeros(0))))
        assert paired_error(kind(torch.ones(5)), kind(torch.ones(5))) == 0.0


def test_singles_of_any_type():
    right, wrong = torch.tensor([True, True, False, True] * 200), torch.tensor([1, 0, 0, 1] * 200)
    assert paired_error(Singles(right, 0, 1), Singles(wrong, 0, 1)) == pytest.approx(math.sqrt(0.1875 / 799))
    assert p_value(Singles(right, 0, 1), Singles(wrong, 0, 1), 0.4) < 0.05 < p_value(*singles(torch.ones(3)), 0.4)


@pytest.mark.parametrize(
    "other",
    [
        Singles(torch.zeros(4), 0, 1),
        Singles(torch.zeros(3), 0, 2),
        Singles(torch.zeros(3), -1, 1),
        Batches(torch.zeros(3), torch.ones(3)),
        Resamples(lambda index: 0.0, 3),
    ],
)
def test_only_outcomes_alike_are_compared(other):
    one = Singles(torch.zeros(3), 0, 1)
    for compare in (paired_error, lambda a, b: p_value(a, b, 0.1)):
        for pair in [(one, other), (other, one)]:
            with pytest.raises(ValueError, match="one kind on the same samples"):
                compare(*pair)


def test_sizes_and_weights_are_compared():
    score = lambda index: 0.0  # noqa: E731
    with pytest.raises(ValueError, match="Resamples of 4 and dense is Resamples of 3"):
        paired_error(Resamples(score, 3), Resamples(score, 4))
    with pytest.raises(ValueError, match="weights"):
        p_value(batches([1.0, 2.0]), batches([1.0, 2.0], [1.0, 2.0]), 0.1)


def test_a_tolerance_or_confidence_that_means_nothing_is_refused():
    pair = singles(torch.zeros(3))
    with pytest.raises(ValueError, match="tolerance is NaN"):
        p_value(*pair, math.nan)
    with pytest.raises(ValueError, match="confidence is 95"):
        p_value(*pair, 0.1, 95)


@pytest.mark.parametrize("bounds", [(1, 0), (0, 0), (0, INF), (-INF, 0), (NAN, 1)])
def test_bounds_are_finite_and_in_order(bounds):
    with pytest.raises(ValueError, match="low and high"):
        Singles(torch.zeros(3), *bounds)


def test_records_refuse_what_breaks_their_word():
    with pytest.raises(ValueError, match=r"values hold 1.5.*must lie in \[0, 1\]"):
        Singles(torch.tensor([0.5, 1.5, 0.0]), 0, 1)
    with pytest.raises(ValueError, match="one dimension"):
        Singles(torch.zeros(3, 2), 0, 1)
    with pytest.raises(ValueError, match="one dimension"):
        Batches(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="weights have shape"):
        Batches(torch.zeros(3), torch.ones(2))
    for bad in (0.0, -1.0, NAN, INF):
        with pytest.raises(ValueError, match="weights hold"):
            batches([1.0, 1.0], [1.0, bad])


# ------------------------------------------------------------------------------------- methods and chance


def test_methods_say_what_they_are():
    assert method_of(Singles(torch.zeros(3), 0, 1)) is Method.BETTING
    assert method_of(Resamples(lambda index: 0.0, 3)) is Method.BOOTSTRAP
    assert method_of(batches([1.0])) is Method.STUDENT
    assert [one.value.startswith("Approximate") for one in Method] == [False, True, True]


def test_asked_twice_the_answer_is_the_same_and_no_global_chance_is_used():
    values = torch.rand(300, generator=chance(15), dtype=torch.float64)
    other = torch.rand(300, generator=chance(16), dtype=torch.float64)
    before = torch.get_rng_state()
    for kind in (lambda v: Singles(v, 0, 1), mean_of, lambda v: Batches(v, torch.ones(300))):
        pair = kind(values), kind(other)
        assert p_value(*pair, 0.02) == p_value(*pair, 0.02)
        assert paired_error(*pair) == paired_error(*pair)
    assert torch.equal(torch.get_rng_state(), before)
