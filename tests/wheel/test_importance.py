"""Importance: the magnitude, LAMP against its definition, and what a user's function must return."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_roulette.settings import CALIBRATED, IMPORTANCES
from lightning_roulette.wheel.importance import MEASURES, importance_of, lamp, magnitude


def naive_lamp(weights: list[float]) -> list[float]:
    """The definition: each weight over all later ones in ascending order of magnitude, ties in order of index."""
    places = range(len(weights))
    ranks = [(abs(weights[place]), place) for place in places]
    at_least = [math.fsum(weights[j] ** 2 for j in places if ranks[j] >= ranks[i]) for i in places]
    return [abs(weights[i]) / math.sqrt(at_least[i]) if weights[i] else 0.0 for i in places]


def random_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_magnitude_is_exact_and_at_least_single(dtype):
    weight = torch.tensor([[-2.0, 0.0, -0.0], [0.5, -1e-3, 3.25]], dtype=dtype)
    found = magnitude(weight)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.tolist() == [[abs(value) for value in row] for row in weight.double().tolist()]
    assert not found.signbit().any()


def test_lamp_of_a_worked_layer():
    # squares 1, 4, 9, 16 over the sums 30, 29, 25, 16
    found = lamp(torch.tensor([[2.0, -1.0], [-4.0, 3.0]]))
    exact = [[math.sqrt(4 / 29), math.sqrt(1 / 30)], [1.0, math.sqrt(9 / 25)]]
    assert torch.allclose(found, torch.tensor(exact, dtype=torch.float64), rtol=1e-12)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0.0, -0.5, 0.5, 1.0, -1.0, 3.0, 1e-6]) | st.floats(-10, 10), min_size=1, max_size=25))
def test_lamp_follows_its_definition(values):
    values = [0.0 if abs(value) < 1e-100 else value for value in values]  # its square would underflow
    found = lamp(torch.tensor(values, dtype=torch.float64)).tolist()
    assert found == pytest.approx(naive_lamp(values), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lamp_lies_in_0_to_1_and_the_largest_weight_has_1(dtype):
    weight = random_weight(30, 20).to(dtype)
    found = lamp(weight)
    assert (found.dtype, found.shape) == (torch.float64, weight.shape)
    assert float(found.min()) >= 0
    assert float(found.max()) == float(found.flatten()[weight.abs().argmax()]) == 1.0


def test_lamp_depends_on_the_order_of_magnitudes_alone():
    weight = random_weight(400)
    found, order = lamp(weight), torch.from_numpy(np.random.default_rng(1).permutation(400))
    assert torch.equal(found.argsort(), magnitude(weight).argsort())
    assert torch.equal(lamp(weight * 2.0**20), found)
    assert torch.equal(lamp(-weight), found)
    assert torch.allclose(lamp(weight * 1e-12), found, rtol=1e-5)
    assert torch.equal(lamp(weight[order]), found[order])
    assert torch.equal(lamp(weight.view(20, 20).T), found.view(20, 20).T)


def test_lamp_of_zeros_is_zero():
    assert lamp(torch.tensor([0.0, 2.0, -0.0])).tolist() == [0, 1, 0]
    assert lamp(torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]
    assert lamp(torch.empty(0)).tolist() == []


def test_pruned_weights_do_not_change_lamp_of_the_survivors():
    weight = random_weight(100)
    thinner = weight.masked_fill(weight.abs() < 0.5, 0)
    assert torch.equal(lamp(thinner)[thinner != 0], lamp(weight)[thinner != 0])


def test_lamp_spans_single_precision_without_overflow():
    assert lamp(torch.tensor([3e38, 1e-38, 3e38])).tolist() == pytest.approx([math.sqrt(0.5), 1e-38 / 3e38 / 2**0.5, 1])


def test_every_importance_that_can_be_named_is_measured():
    assert {*MEASURES, *CALIBRATED} == set(IMPORTANCES)
    assert not {*MEASURES} & {*CALIBRATED}


@pytest.mark.parametrize(("kind", "measure"), MEASURES.items())
def test_a_kind_is_measured_layer_by_layer(kind, measure):
    weights = {"a": nn.Parameter(random_weight(3, 4)), "b": nn.Parameter(random_weight(5, seed=1) * 100)}
    found = importance_of(weights, kind)
    assert list(found) == ["a", "b"]
    assert all(torch.equal(found[name], measure(weights[name])) for name in weights)
    assert not any(one.requires_grad for one in found.values())


def test_a_function_sees_all_weights_at_once_and_without_gradients():
    weights = {"a": nn.Parameter(random_weight(3, 4)), "b": nn.Parameter(10 * random_weight(5))}
    seen = {}

    def relative(given):
        seen.update(given)
        largest = max(weight.abs().max() for weight in given.values())
        found = {name: weight.abs() / largest for name, weight in reversed(given.items())}
        return {name: nn.Parameter(values) for name, values in found.items()} | {"extra": torch.ones(1)}

    found = importance_of(weights, relative)
    assert list(found) == list(seen) == ["a", "b"]
    assert not any(weight.requires_grad for weight in (*seen.values(), *found.values()))
    assert float(found["a"].max()) < float(found["b"].max()) == 1.0


@pytest.mark.parametrize("kind", CALIBRATED)
def test_a_calibrated_kind_is_the_magnitude_times_its_scales(kind):
    weights, asked = {"a": nn.Parameter(random_weight(3, 4))}, []
    found = importance_of(weights, kind, lambda named: asked.append(named) or {"a": torch.full((3, 1), 2.0)})
    assert asked == [kind]
    assert torch.equal(found["a"], 2 * magnitude(weights["a"].detach()))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"a": torch.ones(2, 3)}, r"importance returned nothing for 'b', but must return a tensor of shape \(4,\)"),
        ({"a": torch.ones(3, 2), "b": torch.ones(4)}, r"returned \(3, 2\) for 'a', .* of shape \(2, 3\)"),
        ({"a": torch.ones(2, 3), "b": torch.ones(1)}, r"returned \(1,\) for 'b'"),
        ({}, "importance returned nothing for 'a'"),
    ],
)
def test_a_function_that_leaves_a_weight_out_is_refused(returned, message):
    with pytest.raises(ValueError, match=message):
        importance_of({"a": torch.ones(2, 3), "b": torch.ones(4)}, lambda given: returned)


@pytest.mark.parametrize("found", [None, [torch.ones(2)], {"a": [1.0, 2.0]}])
def test_a_function_that_returns_no_tensors_by_name_is_refused(found):
    with pytest.raises(TypeError, match=r"importance returned .*, but must return \{name: tensor\}"):
        importance_of({"a": torch.ones(2)}, lambda weights: found)
