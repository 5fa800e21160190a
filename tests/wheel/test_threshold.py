"""The sampled threshold: few keys are stored, and a misleading sample changes nothing."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch

from lightning_roulette import Mask
from lightning_roulette.large.limits import limits
from lightning_roulette.wheel import threshold
from lightning_roulette.wheel.arcs import HeldArc, held_arcs
from lightning_roulette.wheel.chance import stream
from lightning_roulette.wheel.level import LevelWheel
from lightning_roulette.wheel.threshold import SampledThreshold
from tests.support.wheels import by_law, found_by, network


@pytest.mark.parametrize("different", [1, 2, 7])
@pytest.mark.parametrize("lowest", [0, 1])
@pytest.mark.parametrize("sharpness", [4.0, math.inf])
def test_many_equal_importances_draw_as_the_law_does(different, lowest, sharpness):
    weights = {"a": torch.arange(100_000) % different + lowest, "b": torch.arange(70_000) % different + lowest}
    parent = Mask.full(weights)
    with found_by("sampled"):
        wheel = LevelWheel(weights, parent, sharpness=sharpness)
        for draws in (1, 40_000, 100_001, 169_999):
            mask = wheel.spin(draws, seed=0, level=1, candidate=0)
            assert mask == by_law(weights, parent, draws, sharpness=sharpness)


@pytest.mark.parametrize("picked", [slice(0, 500), slice(-500, None)])
def test_a_sample_that_misleads_changes_no_mask(monkeypatch, picked):
    weights = {"a": torch.linspace(0.1, 1, 100_000)}
    arcs = held_arcs(weights, Mask.full(weights), 30.0)
    monkeypatch.setattr(threshold, "sample_of", lambda arcs: [arcs["a"].at(torch.arange(100_000)[picked])])
    misled = SampledThreshold(arcs)
    for draws in (0, 1, 20_000, 99_999, 100_000):
        mask = Mask(misled.spin(draws, {"a": stream(0, 1, draws, "a")}))
        assert mask == by_law(weights, Mask.full(weights), draws, sharpness=30.0, candidate=draws)


@pytest.mark.parametrize("sharpness", [0.0, 4.0, math.inf])
def test_few_keys_are_stored_and_few_made_twice(sharpness):
    count = 1_000_000
    weights, stored, made = network(a=(count - 9,), b=(9,)), [], []
    smallest, make = threshold.smallest_of, HeldArc.keys

    def told_smallest(keys, draws):
        stored.append(sum(len(values) for values in keys))
        return smallest(keys, draws)

    def told_keys(arc, *args):
        made.append(len(found := make(arc, *args)))
        return found

    with (
        found_by("sampled"),
        patch.object(threshold, "smallest_of", told_smallest),
        patch.object(HeldArc, "keys", told_keys),
    ):
        wheel = LevelWheel(weights, Mask.full(weights), sharpness=sharpness)
        for candidate in range(3):
            wheel.spin(count // 5, seed=0, level=1, candidate=candidate)
    assert len(stored) == 3
    assert max(stored) < 0.04 * count
    assert 3 * count <= sum(made) < 3 * 1.06 * count
    assert max(made) <= limits().block_keys
