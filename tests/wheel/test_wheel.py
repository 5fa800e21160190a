"""The wheel: exactly Plackett-Luce, at any sharpness, scale and size.

Seeds are fixed, so nothing here is flaky. FALSE_ALARM is the chance that a statistical test would fail on an exact
wheel, had its seeds not been fixed.
"""

from __future__ import annotations

import math
from fractions import Fraction
from hashlib import blake2b
from itertools import combinations, permutations
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_roulette import Mask, spin
from lightning_roulette.large.limits import limited, limits
from lightning_roulette.wheel import wheel
from lightning_roulette.wheel.chance import log_clocks, stream
from lightning_roulette.wheel.wheel import Sectors, layer_shares
from tests.support.limits import set_limits

FALSE_ALARM = 1e-5


def everything(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.bool)


def draw(importance, draws, *, sharpness=1.0, seed=0, survivors=None) -> list[int]:
    """Indices of the weights drawn."""
    tensor = torch.as_tensor(importance, dtype=torch.float32)
    on_wheel = everything(len(tensor)) if survivors is None else survivors
    return spin(tensor, on_wheel, draws, sharpness=sharpness, seed=seed).nonzero().flatten().tolist()


def order_of(importance, *, sharpness: float, seed: int) -> tuple[int, ...]:
    """In which order one seed draws all weights: the draw grows by one weight at a time."""
    order: list[int] = []
    for draws in range(1, len(importance)):
        (fresh,) = set(draw(importance, draws, sharpness=sharpness, seed=seed)) - set(order)
        order.append(fresh)
    return (*order, *(set(range(len(importance))) - set(order)))


def plackett_luce(odds: list[float]) -> dict[tuple[int, ...], float]:
    """The exact probability of every order, by definition: each draw in proportion to the odds still on the wheel."""

    def probability(order: tuple[int, ...]) -> float:
        left, product = sum(odds), 1.0
        for weight in order:
            product *= odds[weight] / left
            left -= odds[weight]
        return product

    return {order: probability(order) for order in permutations(range(len(odds)))}


def assert_distributed(found: dict, exact: dict, trials: int) -> None:
    """Chi-square at FALSE_ALARM; outcomes expected fewer than 5 times are taken together."""
    assert sum(exact.values()) == pytest.approx(1)
    rare = {outcome for outcome, share in exact.items() if share * trials < 5}
    cells = [(found.get(outcome, 0), share * trials) for outcome, share in exact.items() if outcome not in rare]
    if rare:
        cells.append((sum(found.get(outcome, 0) for outcome in rare), sum(exact[one] for one in rare) * trials))
    seen, expected = np.array(cells).T
    assert seen.sum() == trials
    chi = float(((seen - expected) ** 2 / expected).sum())
    assert chi < stats.chi2.isf(FALSE_ALARM, len(cells) - 1)


@pytest.mark.parametrize(
    ("importance", "sharpness", "trials"),
    [
        ([1.0, 3.0], 1.0, 1000),
        ([1.0, 2.0, 4.0], 1.0, 1000),
        ([0.5, 2.0, 1.0], 2.5, 1000),
        ([5.0, 1.0, 2.0, 3.0], 1.0, 1000),
        ([4.0, 1.0, 9.0, 2.0], 0.0, 1000),
        ([3.0, 1.0, 2.0, 1.5, 2.5], 0.5, 1200),
    ],
)
def test_orders_of_draws_follow_plackett_luce(importance, sharpness, trials):
    found: dict[tuple[int, ...], int] = {}
    for seed in range(trials):
        order = order_of(importance, sharpness=sharpness, seed=seed)
        found[order] = found.get(order, 0) + 1
    exact = plackett_luce([value**-sharpness for value in importance])
    assert len(exact) == math.factorial(len(importance))
    assert_distributed(found, exact, trials)


def test_literal_roulette_keeps_the_largest_of_1_2_4_in_128_of_210():
    weights = {"layer": torch.tensor([1.0, 2.0, 4.0])}
    sectors, trials = Sectors(weights, Mask.full(weights), sharpness=1.0), 12_000
    masks = (sectors.spin(2, seed=0, level=1, candidate=candidate)["layer"] for candidate in range(trials))
    share, exact = sum(bool(kept[2]) for kept in masks) / trials, 128 / 210
    margin = stats.norm.isf(FALSE_ALARM / 2) * math.sqrt(exact * (1 - exact) / trials)
    assert share == pytest.approx(exact, abs=margin)
    # drawing the survivor in proportion to the weights would be another law
    assert abs(share - 4 / 7) > margin


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_weights_of_different_layers_race_independently(scope):
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0, 2.0])}
    sectors = Sectors(weights, Mask.full(weights), sharpness=1.0, scope=scope)
    found: dict[tuple[int, ...], int] = {}
    for candidate in range(1000):
        mask = sectors.spin(2, seed=0, level=1, candidate=candidate)
        drawn = tuple((~torch.cat(list(mask.values()))).nonzero().flatten().tolist())
        found[drawn] = found.get(drawn, 0) + 1
    if scope == "global":
        orders = plackett_luce([1, 1 / 2, 1, 1 / 2])
        pairs = combinations(range(4), 2)
        exact = {pair: sum(share for order, share in orders.items() if set(order[:2]) == set(pair)) for pair in pairs}
    else:
        exact = {(0, 2): 4 / 9, (0, 3): 2 / 9, (1, 2): 2 / 9, (1, 3): 1 / 9}
    assert_distributed(found, exact, 1000)


def test_sharpness_0_is_blind_to_importance():
    importance = torch.linspace(0, 1e6, 500)
    blind = draw(importance, 200, sharpness=0.0, seed=9)
    assert blind == draw(torch.ones(500), 200, sharpness=0.0, seed=9)
    assert blind == draw(importance.flip(0), 200, sharpness=0.0, seed=9)


def test_mean_importance_of_the_drawn_falls_with_sharpness():
    importance = torch.linspace(0.01, 1, 2000)
    means = [float(importance[draw(importance, 500, sharpness=s)].mean()) for s in (0.0, 0.5, 1.0, 4.0, math.inf)]
    assert means == sorted(means, reverse=True)
    assert means[0] > 0.45
    assert means[-1] < 0.14


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0, 20.0, math.inf])
@pytest.mark.parametrize("power", [-60, -3, 1, 40])
def test_scale_of_importance_does_not_matter(sharpness, power):
    importance = torch.from_numpy(np.random.default_rng(1).random(1000, dtype=np.float32))
    drawn = draw(importance, 300, sharpness=sharpness)
    assert drawn == draw(importance * 2.0**power, 300, sharpness=sharpness)


@pytest.mark.parametrize("sharpness", [1e-9, 0.5, 1.0, 4.0, 50.0, math.inf])
@pytest.mark.parametrize("held", [0, 1 << 24])
def test_zeros_are_drawn_before_everything_else(monkeypatch, held, sharpness):
    set_limits(monkeypatch, held_weights=held)
    importance = torch.tensor([3.0, 0.0, 1e-30, 0.0, 1e30, 0.0])
    for seed in range(20):
        assert draw(importance, 3, sharpness=sharpness, seed=seed) == [1, 3, 5]
        assert set(draw(importance, 2, sharpness=sharpness, seed=seed)) < {1, 3, 5}
        assert set(draw(importance, 4, sharpness=sharpness, seed=seed)) > {1, 3, 5}


@pytest.mark.parametrize("sharpness", [1e18, 1e300])
def test_zeros_are_drawn_first_at_an_absurd_sharpness(sharpness):
    assert draw([1e-3, 0.0, 1.0], 1, sharpness=sharpness) == [1]


def test_zeros_are_drawn_in_any_order():
    found: dict[int, int] = {}
    for seed in range(1000):
        (first,) = draw([0.0, 7.0, 0.0, 0.0], 1, sharpness=4.0, seed=seed)
        found[first] = found.get(first, 0) + 1
    assert_distributed(found, {0: 1 / 3, 2: 1 / 3, 3: 1 / 3}, 1000)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(st.sampled_from([0.0, 1e-38, 0.5, 1.0, 1.0000001, 2.0, 3e38]), min_size=1, max_size=30),
    share=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_infinite_sharpness_is_magnitude_pruning_ties_in_order(values, share, seed):
    draws = int(share * len(values))
    ascending = sorted(range(len(values)), key=lambda index: np.float32(values[index]))  # stable
    assert draw(values, draws, sharpness=math.inf, seed=seed) == sorted(ascending[:draws])


def test_infinite_sharpness_draws_equal_weights_across_layers_in_order():
    weights = {"z": torch.tensor([[2.0, 1.0], [1.0, 1.0]]), "a": torch.tensor([1.0, 5.0])}
    mask = Sectors(weights, Mask.full(weights), sharpness=math.inf).spin(3, seed=0, level=1, candidate=0)
    assert mask["z"].tolist() == [[True, False], [False, False]]
    assert mask["a"].tolist() == [True, True]


@pytest.mark.parametrize("sharpness", [1.0, 50.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_and_huge_importances_do_not_overflow(sharpness, dtype):
    importance = torch.tensor([1e-30, 1e30] * 500, dtype=dtype)
    drawn = spin(importance, everything(1000), 500, sharpness=sharpness, seed=0)
    assert drawn.tolist() == [True, False] * 500
    assert int(spin(importance, everything(1000), 700, sharpness=sharpness, seed=0).sum()) == 700


def test_high_sharpness_tells_near_weights_apart():
    # 1e-30 ** -50 is no float at all; its logarithm orders as well as any
    importance = torch.tensor([1.0e-30, 3.0e-30] * 200)
    drawn = spin(importance, everything(400), 200, sharpness=50.0, seed=0)
    assert drawn.tolist() == [True, False] * 200


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_importance_may_be_of_any_number_type(dtype):
    importance = torch.arange(1, 101)
    expected = spin(importance.float(), everything(100), 40, sharpness=1.0, seed=0)
    assert torch.equal(spin(importance.to(dtype), everything(100), 40, sharpness=1.0, seed=0), expected)


@pytest.mark.slow
@pytest.mark.parametrize("sharpness", [4.0, math.inf])
def test_twenty_million_weights_lose_exactly_the_stated_count(sharpness):
    count, draws = 20_000_000, 7_654_321
    importance = torch.from_numpy(np.random.default_rng(0).random(count, dtype=np.float32))
    drawn = spin(importance, everything(count), draws, sharpness=sharpness, seed=0)
    assert int(drawn.sum()) == draws
    if math.isinf(sharpness):
        assert float(importance[drawn].max()) <= float(importance[~drawn].min())
    else:
        assert float(importance[drawn].mean()) < 0.5 * float(importance[~drawn].mean())


@pytest.mark.parametrize("draws", [0, 1, 37, 99, 100])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, math.inf])
def test_exactly_the_asked_survivors_are_drawn(draws, sharpness):
    chance = np.random.default_rng(4)
    importance = torch.from_numpy(chance.random(250))
    survivors = torch.zeros(250, dtype=torch.bool)
    survivors[torch.from_numpy(chance.permutation(250)[:100])] = True
    drawn = spin(importance, survivors, draws, sharpness=sharpness, seed=1)
    assert (drawn.dtype, drawn.shape) == (torch.bool, (250,))
    assert int(drawn.sum()) == draws
    assert not (drawn & ~survivors).any()


@pytest.mark.parametrize("sharpness", [0.0, 1.0, math.inf])
def test_more_draws_of_one_seed_only_add_weights(sharpness):
    importance, before = torch.linspace(0, 1, 60), set()
    for draws in range(1, 61):
        drawn = set(draw(importance, draws, sharpness=sharpness, seed=5))
        assert before < drawn
        before = drawn


def test_equal_seeds_draw_equally_and_others_do_not():
    importance = torch.linspace(0.1, 1, 400)
    assert draw(importance, 100, seed=7) == draw(importance, 100, seed=7)
    assert len({tuple(draw(importance, 100, seed=seed)) for seed in (-8, -7, 0, 7, 8, 2**62)}) == 6


def test_a_weight_rings_at_its_time_whoever_else_is_on_the_wheel():
    importance, survivors = torch.linspace(0.1, 1, 400), everything(400)
    drawn = spin(importance, survivors, 100, sharpness=1.0, seed=0)
    survivors[300:] = False
    alone = spin(importance, survivors, int(drawn[:300].sum()), sharpness=1.0, seed=0)
    assert torch.equal(alone[:300], drawn[:300])


@pytest.mark.parametrize("held", [0, 1 << 24])
def test_spinning_changes_nothing_it_is_given(monkeypatch, held):
    set_limits(monkeypatch, held_weights=held)
    importance, survivors = torch.linspace(0, 1, 50, dtype=torch.float64), torch.arange(50) % 3 > 0
    before = importance.clone(), survivors.clone()
    spin(importance, survivors, 20, sharpness=2.0, seed=0)
    assert torch.equal(importance, before[0])
    assert torch.equal(survivors, before[1])


def network(**shapes) -> dict[str, torch.Tensor]:
    chance = np.random.default_rng(2)
    return {name: torch.from_numpy(chance.random(shape, dtype=np.float32)) for name, shape in shapes.items()}


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_order_of_layers_does_not_matter(sharpness, scope):
    weights = network(conv=(8, 3, 3, 3), fc=(40, 30), head=(10, 40))
    turned = dict(reversed(weights.items()))
    masks = [
        Sectors(each, Mask.full(each), sharpness=sharpness, scope=scope).spin(700, seed=0, level=2, candidate=3)
        for each in (weights, turned)
    ]
    assert masks[0] == masks[1]
    assert masks[0].survivors == 216 + 1200 + 400 - 700


def test_every_input_of_a_candidate_changes_its_mask():
    weights = network(a=(30, 30))
    renamed = {"b": weights["a"]}
    origin = {"seed": 0, "level": 1, "candidate": 0}
    sectors = Sectors(weights, Mask.full(weights), sharpness=1.0)
    masks = [sectors.spin(300, **origin)["a"]]
    masks += [sectors.spin(300, **origin | {which: 5})["a"] for which in origin]
    masks.append(Sectors(renamed, Mask.full(renamed), sharpness=1.0).spin(300, **origin)["b"])
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 5


def sorted_out(weights, parent: Mask, draws: int, *, sharpness: float, candidate: int) -> Mask:
    """The mask by definition: every key, all of them sorted, zeros first and ties in order."""
    zero, keys = [], []
    for name, values in weights.items():
        exact = values.flatten().double()
        chance = log_clocks(stream(0, 1, candidate, name), torch.arange(len(exact)))
        term = exact.log() * sharpness if sharpness > 0 else torch.zeros_like(exact)
        keys.append(exact if math.isinf(sharpness) else chance + torch.where(term > -math.inf, term, 0))
        zero.append((exact == 0) & (0 < sharpness < math.inf))
    before = torch.cat(list(parent.values())).flatten()
    order = torch.cat(keys).argsort(stable=True)
    order = order[(~torch.cat(zero))[order].to(torch.uint8).argsort(stable=True)]
    kept = before.clone()
    kept[order[before[order]][:draws]] = False
    return Mask(dict(zip(weights, kept.split([len(values) for values in weights.values()]), strict=True)))


def some_of(weights, share: float) -> Mask:
    chance = np.random.default_rng(3)
    return Mask({name: torch.from_numpy(chance.random(len(values)) < share) for name, values in weights.items()})


importances = st.lists(st.sampled_from([0.0, 0.0, 1e-3, 0.5, 1.0, 1.0, 2.0]), max_size=60)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    layers=st.lists(importances, min_size=1, max_size=4).filter(any),
    share=st.floats(0, 1),
    alive=st.sampled_from([0.4, 1.0]),
    sharpness=st.sampled_from([0.0, 1.0, 7.0, math.inf]),
    block=st.sampled_from([1, 7, 64]),
    together=st.sampled_from([0, 1 << 20]),
    sigmas=st.sampled_from([0.01, 1.0, 5.0]),
    held=st.booleans(),
    candidate=st.integers(0, 1000),
)
def test_blocks_and_guesses_draw_as_sorting_all_keys_does(
    layers, share, alive, sharpness, block, together, sigmas, held, candidate
):
    weights = {str(number): torch.tensor(values) for number, values in enumerate(layers)}
    parent = some_of(weights, alive)
    draws = round(share * parent.survivors)
    # where nothing is held, blocks are of whole bytes
    sizes = {"block_keys": block} if held else {"held_weights": 0, "block_keys": 8 * block}
    with patch.object(wheel, "_SIGMAS", sigmas), limited(compared_keys=3, joint_weights=together, **sizes):
        mask = Sectors(weights, parent, sharpness=sharpness).spin(draws, seed=0, level=1, candidate=candidate)
    assert mask == sorted_out(weights, parent, draws, sharpness=sharpness, candidate=candidate)
    assert mask.survivors == parent.survivors - draws


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("alive", [0.7, 1.0])
@pytest.mark.parametrize("sharpness", [0.0, 4.0, math.inf])
@pytest.mark.parametrize(("together", "held"), [(0, 1 << 24), (1 << 20, 1 << 24), (0, 0)])
def test_large_layers_of_different_size_draw_as_sorting_all_keys_does(
    monkeypatch, together, held, dtype, alive, sharpness
):
    set_limits(monkeypatch, joint_weights=together, held_weights=held)
    # one of several blocks, one that ends with its block, one cut short; narrow types tie a great deal
    sizes = {"few": (3,), "longer": (131_075,), "even": (65_536,), "none": (0,), "short": (40_000,)}
    weights = {name: values.to(dtype) for name, values in network(**sizes).items()}
    parent = some_of(weights, alive)
    sectors = Sectors(weights, parent, sharpness=sharpness)
    for candidate, draws in enumerate([0, 1, parent.survivors // 5, parent.survivors - 1, parent.survivors]):
        mask = sectors.spin(draws, seed=0, level=1, candidate=candidate)
        assert mask == sorted_out(weights, parent, draws, sharpness=sharpness, candidate=candidate)


def guesses_of(sectors: Sectors, monkeypatch) -> list[bool]:
    """Whether each spin from now on could do with the guess of the first."""
    told, guessed = [], wheel._Wheel._guessed

    def tell(self, *arguments):
        told.append(guessed(self, *arguments))
        return told[-1]

    monkeypatch.setattr(wheel._Wheel, "_guessed", tell)
    return told


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alive", [0.7, 1.0])
@pytest.mark.parametrize("sharpness", [0.0, 4.0, 20.0])
def test_spins_that_follow_need_no_logarithms_and_draw_as_the_first_would(monkeypatch, dtype, alive, sharpness):
    weights = {name: values.to(dtype) for name, values in network(a=(6000,), b=(2700,), c=(7,)).items()}
    parent = some_of(weights, alive)
    sectors, draws = Sectors(weights, parent, sharpness=sharpness), parent.survivors // 5
    told = guesses_of(sectors, monkeypatch)
    for candidate in range(8):
        mask = sectors.spin(draws, seed=0, level=1, candidate=candidate)
        assert mask == sorted_out(weights, parent, draws, sharpness=sharpness, candidate=candidate)
    assert told == [False] + [True] * 7
    # for another number of draws the guess says nothing
    assert sectors.spin(draws - 1, seed=0, level=1, candidate=0).survivors == parent.survivors - draws + 1
    assert told[-1] is False


@pytest.mark.parametrize("shift", [-1.0, -0.02, 0.02, 1.0])
def test_a_guess_that_misleads_changes_nothing(monkeypatch, shift):
    weights = network(a=(6000,), b=(2700,))
    parent = some_of(weights, 1.0)
    sectors, guess = Sectors(weights, parent, sharpness=4.0), wheel._guess
    monkeypatch.setattr(wheel, "_guess", lambda terms, keys, *rest: guess(terms, keys + shift, *rest))
    for candidate in range(4):
        mask = sectors.spin(1500, seed=0, level=1, candidate=candidate)
        assert mask == sorted_out(weights, parent, 1500, sharpness=4.0, candidate=candidate)


@pytest.mark.parametrize("different", [1, 2, 7])
@pytest.mark.parametrize("lowest", [0, 1])
@pytest.mark.parametrize("sharpness", [4.0, math.inf])
def test_many_equal_importances_draw_as_sorting_all_keys_does(different, lowest, sharpness):
    weights = {"a": torch.arange(100_000) % different + lowest, "b": torch.arange(70_000) % different + lowest}
    sectors = Sectors(weights, Mask.full(weights), sharpness=sharpness)
    for draws in (1, 40_000, 100_001, 169_999):
        mask = sectors.spin(draws, seed=0, level=1, candidate=0)
        assert mask == sorted_out(weights, Mask.full(weights), draws, sharpness=sharpness, candidate=0)


@pytest.mark.parametrize("picked", [slice(0, 500), slice(-500, None)])
def test_a_sample_that_misleads_changes_no_mask(picked):
    weights = {"a": torch.linspace(0.1, 1, 100_000)}
    fair = Sectors(weights, Mask.full(weights), sharpness=30.0)
    misled = Sectors(weights, Mask.full(weights), sharpness=30.0)
    (sampling,) = misled._wheels
    ((name, arc),) = sampling._arcs.items()
    sampling._sample = {name: arc.at(torch.arange(100_000)[picked])}
    for draws in (0, 1, 20_000, 99_999, 100_000):
        place = {"seed": 0, "level": 1, "candidate": draws}
        assert misled.spin(draws, **place) == fair.spin(draws, **place)


@pytest.mark.parametrize("sharpness", [0.0, 4.0, math.inf])
def test_few_keys_are_kept_and_few_made_twice(sharpness):
    count = 1_000_000
    weights, kept, made = network(a=(count - 9,), b=(9,)), [], []
    sectors = Sectors(weights, Mask.full(weights), sharpness=sharpness)

    def smallest(keys, draws):
        kept.append(sum(len(values) for values in keys))
        return select(keys, draws)

    def keys(arc, *args):
        made.append(len(found := make(arc, *args)))
        return found

    select, make = wheel._smallest, wheel._Arc.keys
    with patch.object(wheel, "_smallest", smallest), patch.object(wheel._Arc, "keys", keys):
        for candidate in range(3):
            sectors.spin(count // 5, seed=0, level=1, candidate=candidate)
    assert max(kept) < 0.04 * count
    assert sum(made) < 3 * 1.06 * count
    assert max(made) <= limits().block_keys


@pytest.mark.parametrize(
    ("sharpness", "digest"),
    [(0.0, "75695d5b8e46bc6e"), (0.5, "5ee41e995b062a98"), (4.0, "36ae0a5fcd082d60"), (math.inf, "147c70d68cd50445")],
)
@pytest.mark.parametrize("held", [0, 1 << 24])
def test_masks_never_change_between_releases(monkeypatch, held, sharpness, digest):
    set_limits(monkeypatch, held_weights=held)
    weights = {"a": (torch.arange(150_000) * 7919 % 65_537 / 65_537).view(300, 500), "b": torch.linspace(0, 1, 50_000)}
    sectors = Sectors(weights, Mask.full(weights), sharpness=sharpness)
    parent = sectors.spin(40_000, seed=7, level=1, candidate=3)
    child = Sectors(weights, parent, sharpness=sharpness).spin(32_000, seed=7, level=2, candidate=5)
    found = blake2b(b"".join(kept.numpy().tobytes() for kept in child.values()), digest_size=8).hexdigest()
    assert found == digest


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sharpness", [0.0, 2.0, math.inf])
@pytest.mark.parametrize("held", [0, 1 << 24])
def test_memory_format_does_not_matter(monkeypatch, held, scope, sharpness):
    set_limits(monkeypatch, held_weights=held)
    plain = network(conv=(6, 4, 3, 3), fc=(20, 30))
    turned = {"conv": plain["conv"].to(memory_format=torch.channels_last), "fc": plain["fc"].T.contiguous().T}
    assert not turned["conv"].is_contiguous()
    assert not turned["fc"].is_contiguous()
    masks = [
        Sectors(each, Mask.full(each), sharpness=sharpness, scope=scope).spin(400, seed=0, level=1, candidate=0)
        for each in (plain, turned)
    ]
    assert masks[0] == masks[1]


def test_children_are_thinner_than_their_parent_and_leave_it_alone():
    weights = network(a=(20, 20), b=(100,))
    parent = Mask.full(weights)
    for level, draws in enumerate((100, 150, 200), start=1):
        sectors = Sectors(weights, parent, sharpness=1.0)
        child = sectors.spin(draws, seed=0, level=level, candidate=0)
        assert child <= parent
        assert child.survivors == parent.survivors - draws == int(sum(kept.sum() for kept in parent.values())) - draws
        parent = child


def test_each_layer_gives_its_share():
    weights = network(a=(10,), b=(10,), c=(1,))
    sectors = Sectors(weights, Mask.full(weights), sharpness=1.0, scope="layer")
    for candidate in range(20):
        mask = sectors.spin(5, seed=0, level=1, candidate=candidate)
        assert [int(kept.sum()) for kept in mask.values()] == [7, 8, 1]


def test_no_layer_loses_its_last_weight():
    weights = network(a=(2,), b=(50,), c=(1,)) | {"empty": torch.empty(0)}
    sectors = Sectors(weights, Mask.full(weights), sharpness=0.0, scope="layer")
    mask = sectors.spin(50, seed=0, level=1, candidate=0)
    assert [int(kept.sum()) for kept in mask.values()] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("draws", "survivors", "shares"),
    [
        (5, [10, 10, 1], [3, 2, 0]),
        (0, [4, 4], [0, 0]),
        (3, [1, 1, 1], [0, 0, 0]),
        (10, [10, 20, 70], [1, 2, 7]),
        (1, [3, 5, 5], [0, 1, 0]),  # equal remainders: the earlier
        (2, [3, 3, 3, 3], [1, 1, 0, 0]),
        (4, [2, 2, 9], [1, 0, 3]),
        (9, [1, 1, 10], [0, 0, 9]),
        (7, [0, 4, 0, 5], [0, 3, 0, 4]),
    ],
)
def test_shares_by_largest_remainder(draws, survivors, shares):
    assert layer_shares(draws, survivors) == shares


layers = st.lists(st.integers(0, 200), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(survivors=layers, share=st.floats(0, 1.2))
def test_shares_add_up_and_leave_one_weight_in_each_layer(survivors, share):
    draws = int(share * sum(survivors))
    shares = layer_shares(draws, survivors)
    assert sum(shares) == min(draws, sum(max(0, count - 1) for count in survivors))
    assert all(0 <= given <= max(0, count - 1) for given, count in zip(shares, survivors, strict=True))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(survivors=st.lists(st.integers(3, 200), min_size=1, max_size=12), share=st.floats(0, 0.6))
def test_shares_are_within_one_weight_of_proportion(survivors, share):
    # at up to 0.6 every layer of three or more has room for its rounded-up share
    draws, total = int(share * sum(survivors)), sum(survivors)
    shares = layer_shares(draws, survivors)
    exact = [Fraction(draws * count, total) for count in survivors]
    assert all(abs(given - part) < 1 for given, part in zip(shares, exact, strict=True))
    rounded_up = [part - math.floor(part) for given, part in zip(shares, exact, strict=True) if given > part]
    rounded_down = [part - math.floor(part) for given, part in zip(shares, exact, strict=True) if given <= part]
    assert min(rounded_up, default=1) >= max(rounded_down, default=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"draws": 4}, "draws is 4, but must lie between 0 and the 3 survivors"),
        ({"draws": -1}, "draws is -1, but must lie between 0"),
        ({"survivors": torch.tensor([True, False, False])}, "draws is 2, .* the 1 survivors"),
        ({"sharpness": -0.5}, "sharpness is -0.5, but must be at least 0"),
        ({"sharpness": math.nan}, "sharpness is nan, but must be at least 0"),
        ({"importance": torch.tensor([1.0, -1e-9, 1.0])}, "negative, infinite or NaN entries"),
        ({"importance": torch.tensor([1.0, math.inf, 1.0])}, "negative, infinite or NaN entries"),
        ({"importance": torch.tensor([1.0, math.nan, 1.0])}, "Do the weights hold NaN or infinity"),
        ({"importance": torch.ones(1, 3)}, r"importance has shape \(1, 3\) .* Flatten them first"),
        ({"survivors": everything(4)}, r"survivors shape \(4,\)"),
        ({"survivors": torch.ones(3)}, "torch.float32, but .* survivors of bool"),
    ],
)
@pytest.mark.parametrize("sharpness", [1.0, math.inf])
@pytest.mark.parametrize("held", [0, 1 << 24])
def test_spin_refuses(monkeypatch, held, changed, message, sharpness):
    set_limits(monkeypatch, held_weights=held)
    valid = {"importance": torch.ones(3), "survivors": everything(3), "draws": 2, "sharpness": sharpness}
    assert int(spin(**valid, seed=0).sum()) == 2
    with pytest.raises(ValueError, match=message):
        spin(**valid | changed, seed=0)


def test_a_bad_importance_is_named():
    weights = {"good": torch.ones(3), "layer.weight": torch.tensor([1.0, math.nan])}
    with pytest.raises(ValueError, match=r"importance of layer\.weight has negative, infinite or NaN"):
        Sectors(weights, Mask.full(weights), sharpness=1.0)


def test_a_layer_that_would_lose_its_last_weight_is_refused():
    sectors = Sectors(
        {"a": torch.ones(2), "b": torch.ones(1)},
        Mask.full({"a": torch.ones(2), "b": torch.ones(1)}),
        sharpness=1.0,
        scope="layer",
    )
    with pytest.raises(ValueError, match="draws is 2, but each layer keeps a weight: at most 1 may go"):
        sectors.spin(2, seed=0, level=1, candidate=0)


def test_a_scope_that_is_none_is_refused():
    with pytest.raises(ValueError, match="scope is 'glob', but must be one of 'global', 'layer'"):
        Sectors({"a": torch.ones(2)}, Mask.full({"a": torch.ones(2)}), sharpness=1.0, scope="glob")


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_a_seed_of_more_than_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match="signed 64-bit number"):
        spin(torch.ones(3), torch.ones(3, dtype=torch.bool), 1, sharpness=1.0, seed=seed)
