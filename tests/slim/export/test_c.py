"""C sources compile without a warning, and compute what the network computes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_roulette.slim.export.c.writing import write
from lightning_roulette.slim.export.integer_reference import run_integers
from lightning_roulette.slim.export.quantised import quantise
from lightning_roulette.slim.export.reference import run
from lightning_roulette.slim.export.rescaling import to_integers
from lightning_roulette.slim.export.trace import trace
from tests.slim.export.test_trace import Forward
from tests.support.compiled import Program, needs_gcc
from tests.support.devices import inputs, network


def in_floats(module, x, folder):
    """What is exported, what it computes, and what the network computes."""
    program = trace(module, x)
    exported = write(program, folder / "network.c", calibration=None, values="float32")
    return exported, Program(exported.files[0], "float32")(x), run(program, x).flatten(1)


def in_integers(module, x, folder):
    """What is exported, what it computes, and what the kernels of the runtime compute."""
    program = trace(module, x)
    integers = quantise(program, x[:8])
    exported = write(program, folder / "network.c", calibration=x[:8], values="int8")
    given = to_integers(x, integers.scales["input"])
    return exported, Program(exported.files[0], "int8")(given), run_integers(integers, given).flatten(1)


def allowed(expected):
    """By how much outputs in floats may differ."""
    return {"rtol": 1e-5, "atol": 1e-5 * max(1.0, float(expected.abs().max()))}


SMALL = ["perceptron", "residual", "depthwise", "sequence"]
MIXED = (1.0, 0.4, 0.05)  # shares of survivors by layer, for which dense, a bitmap and gaps are smallest


@needs_gcc
@pytest.mark.parametrize("name", SMALL)
def test_floats_are_those_of_the_network(name, tmp_path):
    _, found, expected = in_floats(network(name, MIXED), inputs(name, 8), tmp_path)
    torch.testing.assert_close(found, expected, **allowed(expected))


@needs_gcc
@pytest.mark.parametrize("name", SMALL)
def test_integers_are_those_of_the_kernels_bit_for_bit(name, tmp_path):
    exported, found, expected = in_integers(network(name, MIXED), 2 * inputs(name, 24), tmp_path)
    assert torch.equal(found, expected)
    if name != "depthwise":
        assert {one.form for one in exported.layers} == {"dense", "bitmap", "gaps"}


def kept_image(layer, x):
    """A padding, an activation and a pooling whose inputs are used twice, and a sum with itself."""
    x = F.pad(layer(x), (1, 0, 2, 1))
    y = F.max_pool2d(x.relu() + x, 3, 2, 1, 2)
    return (y + y).flatten(1)


@needs_gcc
def test_values_that_are_used_twice_keep_their_place(tmp_path):
    x = torch.randn(12, 2, 6, 5, generator=torch.Generator().manual_seed(0))
    module = Forward(nn.Conv2d(2, 3, 3, padding=1, groups=1), kept_image)
    _, found, expected = in_floats(module, x, tmp_path)
    torch.testing.assert_close(found, expected, **allowed(expected))
    _, found, expected = in_integers(module, x, tmp_path)
    assert torch.equal(found, expected)


@needs_gcc
@pytest.mark.parametrize("function", [lambda layer, x: x.flatten(1), lambda layer, x: x.relu()])
def test_a_network_without_layers_is_written_too(function, tmp_path):
    _, found, expected = in_integers(Forward(nn.Identity(), function), torch.randn(9, 2, 3, 2), tmp_path)
    assert torch.equal(found, expected)


@needs_gcc
def test_layers_without_survivors_give_their_biases(tmp_path):
    _, found, expected = in_integers(network("residual", 0.0), inputs("residual", 9), tmp_path)
    assert torch.equal(found, expected)


@needs_gcc
def test_sums_of_many_inputs_keep_within_32_bits(tmp_path):
    layer = nn.Linear(70_000, 2, bias=False)
    nn.init.constant_(layer.weight[0].detach(), 1.0)
    x = torch.stack((torch.zeros(70_000), torch.ones(70_000)))
    _, found, expected = in_integers(layer, x, tmp_path)
    assert torch.equal(found, expected)


@needs_gcc
def test_an_output_without_weights_beside_small_ones_has_a_multiplier(tmp_path):
    layer = nn.Linear(6, 2, bias=False)
    layer.weight.data = torch.tensor([[1e-12] * 6, [0.0] * 6])
    x = 1e3 * torch.rand(9, 6, generator=torch.Generator().manual_seed(0))
    _, found, expected = in_integers(layer, x, tmp_path)
    assert torch.equal(found, expected)
