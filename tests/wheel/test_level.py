"""The wheel of a level draws what the law says, whichever way it finds the threshold."""

from __future__ import annotations

import math
from hashlib import blake2b

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_roulette import Mask, spin
from lightning_roulette.wheel.agreed import AgreedThreshold
from lightning_roulette.wheel.guess import GuessedThreshold
from lightning_roulette.wheel.law import layer_shares
from lightning_roulette.wheel.level import LevelWheel
from lightning_roulette.wheel.threshold import SampledThreshold
from tests.support.together import on_shards
from tests.support.wheels import WAYS, by_law, found_by, network, partly

PLACE = {"seed": 0, "level": 1, "candidate": 0}
every_way = pytest.mark.parametrize("way", WAYS)


def full_wheel(weights, sharpness=1.0, scope="global") -> LevelWheel:
    return LevelWheel(weights, Mask.full(weights), sharpness=sharpness, scope=scope)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    layers=st.lists(
        st.lists(st.sampled_from([0.0, 0.0, 1e-3, 0.5, 1.0, 1.0, 2.0]), max_size=60), min_size=1, max_size=4
    ).filter(any),
    share=st.floats(0, 1),
    alive=st.sampled_from([0.4, 1.0]),
    sharpness=st.sampled_from([0.0, 1.0, 7.0, 1e300, math.inf]),
    way=st.sampled_from([*WAYS]),
    block=st.sampled_from([1, 7, 64]),
    sigmas=st.sampled_from([0.01, 1.0, 5.0]),
    candidate=st.integers(0, 1000),
)
def test_every_way_draws_as_the_law_does(layers, share, alive, sharpness, way, block, sigmas, candidate):
    weights = {str(number): torch.tensor(values) for number, values in enumerate(layers)}
    parent = partly(weights, alive)
    draws = round(share * parent.survivors)
    with found_by(way, block=block, compared=3, sigmas=sigmas):
        mask = LevelWheel(weights, parent, sharpness=sharpness).spin(draws, **PLACE | {"candidate": candidate})
    assert mask == by_law(weights, parent, draws, sharpness=sharpness, candidate=candidate)
    assert mask.survivors == parent.survivors - draws


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("alive", [0.7, 1.0])
@pytest.mark.parametrize("sharpness", [0.0, 4.0, math.inf])
@every_way
def test_large_layers_of_different_size_draw_as_the_law_does(way, dtype, alive, sharpness):
    # one of several blocks, one that ends with its block, one cut short; narrow types have many ties
    sizes = {"few": (3,), "longer": (131_075,), "even": (65_536,), "none": (0,), "short": (40_000,)}
    weights = {name: values.to(dtype) for name, values in network(**sizes).items()}
    parent = partly(weights, alive)
    with found_by(way):
        wheel = LevelWheel(weights, parent, sharpness=sharpness)
        for candidate, draws in enumerate([0, 1, parent.survivors // 5, parent.survivors - 1, parent.survivors]):
            mask = wheel.spin(draws, **PLACE | {"candidate": candidate})
            assert mask == by_law(weights, parent, draws, sharpness=sharpness, candidate=candidate)


def test_the_size_of_a_network_chooses_the_way():
    weights = network(a=(4, 5), b=(30,))
    parent = Mask.full(weights)

    def chosen(shards=None, own=weights):
        wheel = LevelWheel(own, parent, sharpness=1.0, scope="layer", shards=shards)
        return [type(one) for one in wheel._thresholds]

    assert chosen() == [GuessedThreshold] * 2
    for way in ("sampled", "long"):
        with found_by(way):
            assert chosen() == [SampledThreshold] * 2
    assert on_shards(weights, 2, chosen) == [[AgreedThreshold] * 2] * 2


@pytest.mark.slow
@pytest.mark.parametrize("sharpness", [4.0, math.inf])
def test_twenty_million_weights_lose_exactly_the_stated_count(sharpness):
    importance, draws = torch.from_numpy(np.random.default_rng(0).random(20_000_000, dtype=np.float32)), 7_654_321
    alive = torch.ones(len(importance), dtype=torch.bool)
    drawn = spin(importance, alive, draws, sharpness=sharpness, seed=0)
    assert int(drawn.sum()) == draws
    wheel = LevelWheel({"": importance}, Mask({"": alive}), sharpness=sharpness)
    mask = wheel.spin(draws, seed=0, level=0, candidate=0)
    assert torch.equal(mask[""], ~drawn)


def test_literal_roulette_keeps_the_largest_of_1_2_4_in_128_of_210():
    wheel, trials = full_wheel({"layer": torch.tensor([1.0, 2.0, 4.0])}), 12_000
    masks = (wheel.spin(2, seed=0, level=1, candidate=candidate)["layer"] for candidate in range(trials))
    share, exact = sum(bool(kept[2]) for kept in masks) / trials, 128 / 210
    margin = stats.norm.isf(1e-5 / 2) * math.sqrt(exact * (1 - exact) / trials)
    assert share == pytest.approx(exact, abs=margin)
    # to draw the survivor in proportion to the weights would be another law
    assert abs(share - 4 / 7) > margin


@pytest.mark.parametrize(
    ("sharpness", "digest"),
    [(0.0, "75695d5b8e46bc6e"), (0.5, "5ee41e995b062a98"), (4.0, "36ae0a5fcd082d60"), (math.inf, "147c70d68cd50445")],
)
@every_way
def test_masks_never_change_between_releases(way, sharpness, digest):
    weights = {"a": (torch.arange(150_000) * 7919 % 65_537 / 65_537).view(300, 500), "b": torch.linspace(0, 1, 50_000)}
    with found_by(way):
        parent = full_wheel(weights, sharpness).spin(40_000, seed=7, level=1, candidate=3)
        child = LevelWheel(weights, parent, sharpness=sharpness).spin(32_000, seed=7, level=2, candidate=5)
    found = blake2b(b"".join(kept.numpy().tobytes() for kept in child.values()), digest_size=8).hexdigest()
    assert found == digest


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_order_of_layers_does_not_matter(sharpness, scope):
    weights = network(conv=(8, 3, 3, 3), fc=(40, 30), head=(10, 40))
    turned = dict(reversed(weights.items()))
    one, other = (full_wheel(each, sharpness, scope).spin(700, **PLACE) for each in (weights, turned))
    assert one == other
    assert one.survivors == 216 + 1200 + 400 - 700


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sharpness", [0.0, 2.0, math.inf])
@every_way
def test_memory_format_does_not_matter(way, scope, sharpness):
    plain = network(conv=(6, 4, 3, 3), fc=(20, 30))
    turned = {"conv": plain["conv"].to(memory_format=torch.channels_last), "fc": plain["fc"].T.contiguous().T}
    assert not any(one.is_contiguous() for one in turned.values())
    with found_by(way):
        one, other = (full_wheel(each, sharpness, scope).spin(400, **PLACE) for each in (plain, turned))
    assert one == other


def test_every_input_of_a_candidate_changes_its_mask():
    weights = network(a=(30, 30))
    wheel, renamed = full_wheel(weights), full_wheel({"b": weights["a"]})
    masks = [wheel.spin(300, **PLACE | {which: 5})["a"] for which in PLACE]
    masks += [wheel.spin(300, **PLACE)["a"], renamed.spin(300, **PLACE)["b"]]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 5


@every_way
def test_a_wheel_changes_no_importance_and_no_parent(way):
    weights = {"a": torch.linspace(0, 1, 50, dtype=torch.float64)}
    importance, parent = weights["a"].clone(), Mask({"a": torch.arange(50) % 3 > 0})
    with found_by(way):
        for level in (1, 2, 3):
            child = LevelWheel(weights, parent, sharpness=2.0).spin(10, **PLACE | {"level": level})
            assert child <= parent
            assert child.survivors == parent.survivors - 10 == int(parent["a"].sum()) - 10
            parent = child
    assert torch.equal(weights["a"], importance)


@pytest.mark.parametrize("sharpness", [0.0, 3.0, math.inf])
@every_way
def test_each_layer_gives_its_share_by_the_law(way, sharpness):
    weights = network(a=(10,), b=(10,), c=(1,), d=(7, 90))
    parent = partly(weights, 0.9)
    with found_by(way):
        mask = LevelWheel(weights, parent, sharpness=sharpness, scope="layer").spin(100, **PLACE)
    for name, draws in zip(weights, layer_shares(100, [*parent.counts.values()]), strict=True):
        alone = by_law({name: weights[name]}, Mask({name: parent[name]}), draws, sharpness=sharpness)
        assert torch.equal(mask[name], alone[name])


def test_no_layer_loses_its_last_weight():
    weights = network(a=(2,), b=(50,), c=(1,)) | {"empty": torch.empty(0)}
    wheel = full_wheel(weights, 0.0, scope="layer")
    assert [int(kept.sum()) for kept in wheel.spin(50, **PLACE).values()] == [1, 1, 1, 0]
    with pytest.raises(ValueError, match="draws is 51, but must be at most 50, because each layer keeps a weight"):
        wheel.spin(51, **PLACE)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"draws": 6}, "draws is 6, but must lie between 0 and the 5 survivors"),
        ({"draws": -1}, "draws is -1, but must lie between 0"),
        ({"sharpness": -0.5}, "sharpness is -0.5, but must be at least 0"),
        ({"scope": "glob"}, "scope is 'glob', but must be one of 'global', 'layer'"),
        ({"bad": math.nan}, r"importance of layer\.weight has negative, infinite or NaN"),
        ({"bad": math.inf}, r"importance of layer\.weight has negative, infinite or NaN"),
        ({"bad": -1e-9}, r"importance of layer\.weight has negative, infinite or NaN"),
    ],
)
@every_way
def test_a_wheel_refuses(way, changed, message):
    def spun(draws=2, sharpness=1.0, scope="global", bad=1.0) -> Mask:
        weights = {"good": torch.ones(3), "layer.weight": torch.tensor([1.0, bad])}
        return full_wheel(weights, sharpness, scope).spin(draws, **PLACE)

    with found_by(way):
        assert spun().survivors == 3
        with pytest.raises(ValueError, match=message):
            spun(**changed)
