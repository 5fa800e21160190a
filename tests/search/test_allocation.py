"""Allocation: candidates that remove more from one layer or another, and factors that a child inherits."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lightning_roulette import LeastSquares, Mask, Wheel, Winner, search
from lightning_roulette.wheel.chance import normal, stream
from tests.support.evaluators import noise
from tests.support.refits import LEVELS, ONE_LEVEL, faithful, network, random, ranked


def pair() -> dict[str, Tensor]:
    return {"a": random(400, seed=1).double(), "b": random(20, 30, seed=2).double(), "c": random(200, seed=3).double()}


def drawn(wheel: Wheel, **options) -> tuple[list[Mask], Winner]:
    """Every distinct mask of a search in which chance decides what wins."""
    seen: list[Mask] = []

    def score(mask):
        seen.append(mask)
        return noise(mask, 0)

    defaults = {"branches": 5, "tolerance": math.inf, "tree": LEVELS, "wheel": wheel}
    return seen, search(pair(), score, **defaults | options)


@pytest.mark.parametrize("sharpness", [0.0, 4.0, math.inf])
def test_candidates_remove_more_from_one_layer_or_another(sharpness):
    masks, winner = drawn(Wheel(sharpness, allocation=0.5))
    by_level = [[mask for mask in masks if mask.survivors == level.survivors] for level in winner.report.levels]
    assert [len(level) for level in by_level] == [5, 5, 5]
    parent = winner.mask_at(0)
    for number, level in enumerate(by_level, start=1):
        draws = math.floor(0.2 * parent.survivors + 0.5)
        for mask in level:
            assert mask <= parent
            assert mask.survivors == parent.survivors - draws
        if sharpness:  # without it importance has no part in the draw
            assert len({tuple(mask.densities.values()) for mask in level}) == 5
        parent = winner.mask_at(number)
    if sharpness == 4:
        before, after = (
            torch.tensor([list(mask.densities.values()) for mask in some]).std(0).mean()
            for some in (drawn(Wheel(sharpness))[0][1:6], by_level[0])
        )
        assert after > 0.01 + before


@pytest.mark.parametrize("sharpness", [4.0, math.inf])
def test_the_same_seed_gives_the_same_allocation(sharpness):
    wheel = Wheel(sharpness, allocation=0.4)
    one, two, other = drawn(wheel), drawn(wheel), drawn(wheel, seed=1)
    assert one[0] == two[0]
    assert one[0][1:6] != other[0][1:6]


@pytest.mark.parametrize(
    ("sharpness", "scope", "width"),
    [(0.0, "layer", 2.0), (4.0, "layer", 2.0), (4.0, "global", 0.0), (math.inf, "global", 0.0)],
)
def test_allocation_has_no_effect_with_a_wheel_for_each_layer_or_a_width_of_zero(sharpness, scope, width):
    plain, other = (drawn(Wheel(sharpness, scope=scope, allocation=one)) for one in (None, width))
    assert plain[0] == other[0]
    assert plain[1].report.levels == other[1].report.levels


def largest(weights: Mapping[str, Tensor], parent: Mask, survivors: int, factors: Mapping[str, float]) -> Mask:
    """The mask of the weights that are largest when each layer's importance is scaled by `exp(factor)`."""
    scaled = {name: (weight.abs() * math.exp(factors[name])) * parent[name] for name, weight in weights.items()}
    threshold = torch.cat([one.flatten() for one in scaled.values()]).topk(survivors).values[-1]
    return Mask({name: one >= threshold for name, one in scaled.items()})


def test_a_childs_importance_factors_start_at_its_parents():
    weights, width, seed = pair(), 0.3, 11
    seen, winner = drawn(Wheel(math.inf, allocation=width), seed=seed)
    factors = dict.fromkeys(weights, 0.0)
    for level in winner.report.levels:
        parent = winner.mask_at(level.level - 1)
        added = {
            one.index: {name: width * normal(stream(seed, level.level, one.index, name)) for name in weights}
            for one in level.candidates
        }
        for index, own in added.items():
            scaled = {name: factors[name] + own[name] for name in weights}
            assert largest(weights, parent, level.survivors, scaled) in seen, (level.level, index)
        factors = {name: factors[name] + added[level.winner][name] for name in weights}
        assert winner.mask_at(level.level) == largest(weights, parent, level.survivors, factors)


def test_a_level_that_failed_leaves_no_importance_factors_behind():
    weights, width = pair(), 0.3
    wheel = Wheel(math.inf, allocation=width)
    score = lambda mask: float(mask.survivors != 960)  # noqa: E731  # the first branch fails, the retry does not
    winner = search(weights, score, branches=5, tolerance=0.5, wheel=wheel, tree=ONE_LEVEL)
    failed, accepted = winner.report.levels
    assert (failed.accepted, accepted.accepted) == (False, True)
    assert {one.index for one in accepted.candidates} == {5, 6, 7, 8, 9}
    factors = {name: width * normal(stream(0, 1, accepted.winner, name)) for name in weights}
    assert winner.mask == largest(weights, winner.mask_at(0), accepted.survivors, factors)


@pytest.mark.parametrize(
    ("refit", "wheel", "differ"),
    [
        ("least_squares", Wheel(math.inf), True),
        ("least_squares", Wheel(math.inf, allocation=0.0), False),
        (LeastSquares(each_level=False), Wheel(math.inf), False),
        ("batch_norm", Wheel(math.inf), False),
        ("batch_norm", Wheel(math.inf, allocation=0.5), True),
        (None, Wheel(math.inf), False),
        (None, Wheel(math.inf, allocation=0.5), True),
        ("least_squares", Wheel(math.inf, scope="layer"), False),
    ],
)
def test_candidates_differ_in_allocation_where_levels_are_refitted_by_least_squares(refit, wheel, differ):
    net = network()
    evaluate = faithful(net)
    winner = ranked(net, refit, evaluate, wheel=wheel, tree=ONE_LEVEL)
    first = winner.report.levels[0].survivors
    densities = {tuple(one.mask.densities.values()) for one, _ in evaluate.log if one.mask.survivors == first}
    assert (len(densities) > 1) == differ


def test_the_allocation_of_a_refit_by_least_squares_is_0_3_by_default():
    net = network()
    default, explicit = (ranked(net, wheel=Wheel(allocation=width)) for width in (None, 0.3))
    assert default.report.levels == explicit.report.levels
    assert default.mask == explicit.mask
