"""Integers: the multiplication of TensorFlow Lite, the choice of scales, and what a program in integers computes."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_roulette.slim.export.integer_reference import every_integer_value, run_as_floats
from lightning_roulette.slim.export.integers import Scale
from lightning_roulette.slim.export.multipliers import multiplied, multipliers
from lightning_roulette.slim.export.operations import Activate, Add, Conv2d, Linear, Pad, Pool2d, Reshape
from lightning_roulette.slim.export.quantised import quantise
from lightning_roulette.slim.export.reference import every_value
from lightning_roulette.slim.export.rescaling import bounds, to_floats, to_integers
from lightning_roulette.slim.export.trace import trace
from tests.support.devices import NETWORKS, inputs, network


def whole(name, kept=1.0):
    program = trace(network(name, kept), inputs(name))
    return quantise(program, inputs(name, 64, 3))


def multiplied_in_c(x, multiplier, shift):
    """The kernel as it is written in C, on Python's integers."""
    left, right = max(shift, 0), max(-shift, 0)
    product = (x << left) * multiplier
    nudge = 1 << 30 if product >= 0 else 1 - (1 << 30)
    high = math.trunc(Fraction(product + nudge, 1 << 31))
    mask = (1 << right) - 1
    threshold = (mask >> 1) + (1 if high < 0 else 0)
    return (high >> right) + (1 if (high & mask) > threshold else 0)


@settings(deadline=None, max_examples=300)
@given(st.integers(-(2**24), 2**24), st.floats(2**-30, 2**5))
def test_a_product_is_that_of_the_kernel_and_near_the_true_one(x, factor):
    by = multipliers([factor])
    found = int(multiplied(torch.tensor([[x]]), by))
    assert found == multiplied_in_c(x, by.multipliers[0], by.shifts[0])
    assert abs(found - x * factor) <= 1 + abs(x) * factor * 2**-29


def test_multipliers_have_a_multiplier_for_each_channel():
    by = multipliers([1.0, 0.25, 2**-40])
    assert (by.multipliers, by.shifts) == ((1 << 30, 1 << 30, 0), (1, -1, 0))
    assert multiplied(torch.full((1, 3, 1, 2), 100), by)[0, :, 0].tolist() == [[100, 100], [25, 25], [0, 0]]


def test_halves_are_rounded_away_from_zero_when_shifted():
    assert multiplied(torch.tensor([[2, -2, 6, -6]]), multipliers([0.25] * 4)).tolist() == [[1, -1, 2, -2]]


@pytest.mark.parametrize("name", NETWORKS)
def test_each_value_is_near_the_float_one(name):
    found = whole(name)
    x = inputs(name, 16, 3)
    floats = every_value(found.program, x)
    integers = every_integer_value(found, to_integers(x, found.scales["input"]))
    assert integers.keys() == floats.keys()
    for key, value in floats.items():
        scale = found.scales[key]
        error = (to_floats(integers[key], scale) - value).abs().mean()
        assert error < 4 * scale.scale, key


def test_a_single_layer_is_off_by_the_rounding_of_its_terms():
    layer = nn.Linear(20, 7)
    x = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
    found = quantise(trace(layer, x), x)
    error = (run_as_floats(found, x) - layer(x)).abs().max()
    weight = found.weights["output" if "output" in found.weights else found.program.output.name]
    rounded_inputs = found.scales["input"].scale / 2 * layer.weight.abs().sum(1).max()
    rounded_weights = weight.scales.max() / 2 * x.abs().sum(1).max()
    assert error <= rounded_inputs + rounded_weights + found.scales[found.program.output.name].scale


@pytest.mark.parametrize("name", ["residual", "lenet_300_100", "depthwise"])
def test_pruned_weights_stay_zero_and_the_largest_of_a_row_is_127(name):
    found = whole(name, 0.3)
    for one in found.program.operations:
        if isinstance(one, (Linear, Conv2d)):
            integers = found.weights[one.output.name].weight
            assert not integers[one.weight == 0].any()
            largest = integers.flatten(1).abs().amax(1)
            assert set(largest.tolist()) <= {0, 127}


@pytest.mark.parametrize("name", NETWORKS)
def test_zero_is_exact_and_operations_that_only_move_keep_the_scale(name):
    found = whole(name)
    for one in found.scales.values():
        assert -128 <= one.zero_point <= 127
        assert torch.equal(to_floats(to_integers(torch.zeros(1), one), one), torch.zeros(1))
    for operation in found.program.operations:
        if isinstance(operation, (Pool2d, Pad, Reshape, Activate)):
            assert found.scales[operation.output.name] == found.scales[operation.input.name]
        elif isinstance(operation, Add):
            assert found.scales[operation.output.name] != found.scales[operation.first.name]


def test_rows_without_weights_keep_their_bias():
    layer = nn.Linear(4, 3)
    layer.weight.data[1:] = 0
    layer.bias.data = torch.tensor([0.5, 3.0, 0.0])
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    found = quantise(trace(layer, x), x)
    made = run_as_floats(found, x)
    step = found.scales[found.program.output.name].scale
    assert (made[:, 1] - 3).abs().max() <= step
    assert not made[:, 2].any()


def test_a_network_that_gives_nothing_but_zero_stays_in_integers():
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    for one in module.parameters():
        one.data.zero_()
    module[0].bias.data.fill_(-1)
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    assert not run_as_floats(quantise(trace(module, x), x), x).any()


def test_bounds_of_activations_and_the_ends_of_the_range():
    scale = Scale(0.05, -20)
    assert bounds("none", scale) == (-128, 127)
    assert bounds("relu", scale) == (-20, 127)
    assert bounds("relu6", scale) == (-20, 100)
    assert to_integers(torch.tensor([-100.0, 0.0, 0.025, -0.025, 100.0]), scale).tolist() == [-128, -20, -19, -21, 127]


def test_a_mean_is_rounded_away_from_zero():
    module = nn.Sequential(nn.AvgPool2d((1, 2)), nn.Flatten())
    x = torch.tensor([[[[-1.0, -2.0, 1.0, 2.0]]], [[[127.0, -128.0, 0.0, 0.0]]]])
    found = quantise(trace(module, x), x)
    assert found.scales["input"] == Scale(1.0, 0)
    assert run_as_floats(found, x).tolist() == [[-2.0, 2.0], [-1.0, 0.0]]


@pytest.mark.parametrize(("height", "layer"), [(6.0, Conv2d), (1.0, Pool2d)])
def test_a_mean_far_below_its_inputs_has_a_scale_of_its_own(height, layer):
    x = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, 0] *= height
    found = quantise(trace(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), x), x)
    assert type(found.program.operations[0]) is layer
    error = (run_as_floats(found, x) - x.mean((2, 3))).abs().max()
    assert error <= (0.7 / 255 if layer is Pool2d else 0.7 * x.mean((2, 3)).max() / 255 + 0.3 * 6 / 255)


def test_calibration_inputs_that_are_not_finite_are_refused():
    program = trace(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="'input' of the network is not finite"):
        quantise(program, torch.tensor([[1.0, torch.inf]]))
