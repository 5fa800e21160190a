"""Idle outputs go, and the outputs of the network stay."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_roulette.slim.export.idle import without_idle
from lightning_roulette.slim.export.operations import Conv2d, Linear
from lightning_roulette.slim.export.reference import run
from lightning_roulette.slim.export.trace import trace
from tests.slim.export.test_trace import Forward
from tests.support.devices import NETWORKS, inputs, network


def outputs(program):
    """The number of outputs of each layer."""
    return [len(one.weight) for one in program.operations if isinstance(one, (Linear, Conv2d))]


def same(program, x):
    slim = without_idle(program)
    torch.testing.assert_close(run(slim, x), run(program, x), rtol=1e-5, atol=1e-5)
    for one in slim.operations:
        if isinstance(one, Linear):
            assert (*one.output.shape, *one.input.shape) == tuple(one.weight.shape)
    assert slim.input == program.input
    assert slim.output == program.output
    return slim


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.1, 1.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_outputs_of_a_network_stay(name, kept):
    program = trace(network(name, kept), inputs(name))
    slim = same(program, inputs(name, 9, 5))
    fewer = [after < before for after, before in zip(outputs(slim), outputs(program), strict=True)]
    if kept in (0.0, 1.0):
        assert any(fewer) == (kept == 0.0)


def chain(*weights):
    """A perceptron with these weights."""
    layers = []
    for one in weights:
        layer = nn.Linear(len(one[0]), len(one))
        layer.weight.data, layer.bias.data = torch.tensor(one), torch.arange(1.0, 1 + len(one))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_a_constant_output_becomes_part_of_the_next_bias_and_an_unused_one_goes():
    # of three outputs the first is the constant 1, and the second is used by nothing
    program = trace(chain([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]], [[5.0, 0.0, 6.0], [7.0, 0.0, 0.0]]), torch.ones(1, 2))
    first, last = same(program, torch.randn(8, 2)).operations
    assert first.weight.tolist() == [[3.0, 4.0]]
    assert first.bias.tolist() == [3.0]
    assert last.weight.tolist() == [[6.0], [0.0]]
    assert last.bias.tolist() == [1 + 5.0, 2 + 7.0]


def test_what_becomes_idle_by_a_removal_goes_too():
    # the only output of the second layer that reads output 0 of the first is not used by the third
    weights = [[[1.0], [2.0]], [[3.0, 0.0], [0.0, 4.0]], [[0.0, 5.0]]]
    assert outputs(same(trace(chain(*weights), torch.ones(1, 1)), torch.randn(8, 1))) == [1, 1, 1]


@pytest.mark.parametrize(("padding", "bias", "left"), [(0, 2.0, 1), (1, 2.0, 2), (1, -2.0, 1), (1, 0.0, 1)])
def test_a_constant_channel_is_removed_where_padding_does_not_show_it(padding, bias, left):
    first, last = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 3, padding=padding)
    first.weight.data[1], first.bias.data[1] = 0, bias
    program = trace(nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), last), torch.randn(2, 1, 12, 12))
    assert outputs(same(program, torch.randn(3, 1, 12, 12))) == [left, 1]


def test_channels_are_removed_through_a_flattened_image():
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 2))
    module[0].weight.data[1] = 0
    module[3].weight.data[:, 8:] = 0
    slim = same(trace(module, torch.randn(2, 1, 6, 6)), torch.randn(3, 1, 6, 6))
    assert outputs(slim) == [1, 2]
    assert slim.operations[-1].weight.shape == (2, 4)


def separable(padding: int, bias: float) -> nn.Module:
    """Two layers with a depthwise convolution between them, whose first channel is the constant `bias` before it."""
    module = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=padding, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    module[0].weight.data.abs_()
    module[0].weight.data[0], module[0].bias.data[0] = 0, bias
    return module


@pytest.mark.parametrize(("padding", "bias", "left"), [(0, 2.0, 3), (1, 2.0, 4), (1, -2.0, 3), (1, 0.0, 3)])
def test_a_constant_channel_goes_through_a_depthwise_convolution(padding, bias, left):
    module = separable(padding, bias)
    slim = same(trace(module, torch.randn(2, 1, 8, 8)), torch.randn(3, 1, 8, 8))
    assert outputs(slim) == [left, left, 2]
    assert slim.operations[1].groups == left


def test_a_channel_that_a_depthwise_convolution_or_the_next_layer_does_not_use_goes():
    module = separable(1, 2.0)
    module[2].weight.data[1] = 0
    module[4].weight.data[:, 2] = 0
    assert outputs(same(trace(module, torch.randn(2, 1, 8, 8)), torch.randn(3, 1, 8, 8))) == [2, 2, 2]


def test_groups_of_several_channels_keep_theirs():
    module = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    module[0].weight.data[0] = 0
    module[2].weight.data[:, 2] = 0
    assert outputs(same(trace(module, torch.randn(2, 1, 8, 8)), torch.randn(3, 1, 8, 8))) == [4, 4, 2]


def test_outputs_that_are_used_twice_stay():
    def forward(layer, x):
        x = layer(x)
        return F.linear(x, torch.eye(3)) + x

    layer = nn.Linear(3, 3)
    layer.weight.data[1] = 0
    assert outputs(same(trace(Forward(layer, forward), torch.randn(2, 3)), torch.randn(4, 3))) == [3, 3]
