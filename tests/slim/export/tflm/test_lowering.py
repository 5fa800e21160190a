"""Operations become operators of the runtime, which computes the same integers as the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette.slim.export.integer_reference import run_integers
from lightning_roulette.slim.export.operations import (
    Activate,
    Add,
    Conv2d,
    Linear,
    Pad,
    Pool2d,
    Program,
    Reshape,
    Value,
)
from lightning_roulette.slim.export.quantised import quantise
from lightning_roulette.slim.export.tflm.lowering import lowered
from lightning_roulette.slim.export.trace import trace
from tests.slim.export.tflm.running import outputs_of
from tests.support import devices

pytest.importorskip("tflite_micro", reason="needs the extra `tflm`")


def chance(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def computed(program, rows=6):
    """The output of the reference and of the runtime, for inputs that also leave the calibrated range."""
    integers = quantise(program, chance(rows, *program.input.shape))
    inputs = torch.randint(
        -128, 128, (rows, *program.input.shape), generator=torch.Generator().manual_seed(1), dtype=torch.int8
    )
    wanted = run_integers(integers, inputs)
    last, first = ((0, 2, 3, 1) if values.ndim == 4 else tuple(range(values.ndim)) for values in (wanted, inputs))
    given = [row[None].numpy() for row in inputs.permute(first).contiguous()]
    return wanted.permute(last).flatten(1).tolist(), outputs_of(lowered(integers), given)


def assert_equal(program):
    wanted, got = computed(program)
    assert got == wanted


@pytest.mark.parametrize("name", ["lenet_300_100", "lenet_5", "residual", "sequence"])
def test_networks_compute_the_same(name):
    assert_equal(trace(devices.network(name, kept=0.3).eval(), devices.inputs(name, 1)))


def images(channels, height, width):
    return Value("x", (channels, height, width))


windows = st.fixed_dictionaries(
    {
        "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    }
)
sides = st.tuples(*[st.integers(0, 2)] * 4)


def size(before, after, extent, kernel, stride, dilation):
    return (extent + before + after - dilation * (kernel - 1) - 1) // stride + 1


def extents(window, padding, height, width):
    above, below, left, right = padding
    rows, columns = zip(window["kernel"], window["stride"], window["dilation"], strict=True)
    return size(above, below, height, *rows), size(left, right, width, *columns)


@settings(max_examples=40, deadline=None)
@given(
    window=windows,
    padding=sides,
    height=st.integers(7, 9),
    width=st.integers(7, 9),
    channels=st.sampled_from([(2, 4, 1), (2, 6, 2), (4, 6, 2), (3, 3, 3), (1, 3, 1), (1, 1, 1)]),
    activation=st.sampled_from(["none", "relu", "relu6"]),
)
def test_convolutions_compute_the_same(window, padding, height, width, channels, activation):
    inputs, outputs, groups = channels
    made = Value("y", (outputs, *extents(window, padding, height, width)))
    weight, bias = chance(outputs, inputs // groups, *window["kernel"]), chance(outputs, seed=2)
    one = Conv2d(
        images(inputs, height, width),
        made,
        "w",
        weight,
        bias,
        window["stride"],
        padding,
        window["dilation"],
        groups,
        activation,
    )
    assert_equal(Program(one.input, (one,), made))


@settings(max_examples=30, deadline=None)
@given(
    window=windows,
    padding=sides,
    height=st.integers(7, 9),
    width=st.integers(7, 9),
    kind=st.sampled_from(["max", "mean"]),
)
def test_pooling_computes_the_same(window, padding, height, width, kind):
    window = window | {"dilation": (1, 1)}
    shared = [
        min(side, (extent - 1) // 2)
        for side, extent in zip(padding, [window["kernel"][0]] * 2 + [window["kernel"][1]] * 2, strict=True)
    ]
    padding = tuple(shared) if kind == "max" else (0, 0, 0, 0)
    made = Value("y", (3, *extents(window, padding, height, width)))
    one = Pool2d(images(3, height, width), made, kind, window["kernel"], window["stride"], padding)
    assert_equal(Program(one.input, (one,), made))


def test_a_mean_with_the_padding_of_same_computes_the_same():
    made = Value("y", (3, 4, 5))
    one = Pool2d(images(3, 7, 5), made, "mean", (3, 3), (2, 1), (1, 1, 1, 1))
    assert_equal(Program(one.input, (one,), made))


def test_sums_activations_and_borders_compute_the_same():
    x, border, flat = images(2, 3, 4), Value("border", (2, 6, 5)), Value("flat", (60,))
    conv = Conv2d(border, Value("conv", (2, 6, 5)), "w", chance(2, 2, 1, 1), chance(2))
    steps = [Pad(x, border, (1, 2, 0, 1)), conv, Add(border, conv.output, Value("sum", (2, 6, 5)), "relu")]
    steps += [Activate(conv.output, Value("six", (2, 6, 5)), "relu6")]
    steps += [Add(steps[2].output, steps[3].output, Value("last", (2, 6, 5)), "relu6")]
    steps += [Reshape(steps[-1].output, flat)]
    assert_equal(Program(x, tuple(steps), flat))


def test_a_flattened_image_that_others_read_too_is_put_in_order():
    x, flat = images(3, 2, 2), Value("flat", (12,))
    layer = Linear(flat, Value("line", (12,)), "w", chance(12, 12), chance(12))
    total = Add(flat, layer.output, Value("sum", (12,)))
    program = Program(x, (Reshape(x, flat), layer, total), total.output)
    assert_equal(program)
    codes = [one.code for one in lowered(quantise(program, chance(4, 3, 2, 2))).operators]
    assert codes == ["TRANSPOSE", "RESHAPE", "FULLY_CONNECTED", "ADD"]


def test_a_flattened_image_that_only_layers_read_is_not_moved():
    x, flat, line = images(3, 2, 2), Value("flat", (12,)), Value("line", (5,))
    program = Program(x, (Reshape(x, flat), Linear(flat, line, "w", chance(5, 12), chance(5))), line)
    assert_equal(program)
    assert [one.code for one in lowered(quantise(program, chance(4, 3, 2, 2))).operators] == ["FULLY_CONNECTED"]


def test_a_vector_becomes_an_image():
    x, image = Value("x", (12,)), Value("image", (3, 2, 2))
    conv = Conv2d(image, Value("y", (2, 2, 2)), "w", chance(2, 3, 1, 1), chance(2))
    assert_equal(Program(x, (Reshape(x, image), conv), conv.output))


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_layer_of_one_output_computes_the_same(outputs):
    x, y = Value("x", (7,)), Value("y", (outputs,))
    assert_equal(Program(x, (Linear(x, y, "w", chance(outputs, 7) * 100, chance(outputs) * 100),), y))


def test_a_layer_of_one_output_whose_sums_are_mostly_negative_is_accepted():
    x, y = Value("x", (1,)), Value("y", (1,))
    bias = -0.95 * chance(6, 1).max(0).values
    assert_equal(Program(x, (Linear(x, y, "w", torch.ones(1, 1), bias, "relu"),), y))


def test_two_layers_may_share_a_weight():
    x, between, y = (Value(name, (6,)) for name in ("x", "between", "y"))
    weight, bias = chance(6, 6), chance(6)
    program = Program(x, (Linear(x, between, "w", weight, bias), Linear(between, y, "w", weight, bias)), y)
    assert_equal(program)


def test_all_that_the_runtime_has_no_operator_for_is_named():
    x, a, b = images(2, 8, 8), Value("mean", (2, 4, 4)), Value("wide", (2, 2, 2))
    steps = (
        Pool2d(x, a, "mean", (3, 3), (2, 2), (1, 1, 1, 1)),
        Pool2d(a, b, "max", (2, 2), (1, 1), dilation=(2, 2)),
    )
    with pytest.raises(ValueError, match="mean is a mean over windows .*; wide pools with a dilation of .*format='c'"):
        lowered(quantise(Program(x, steps, b), chance(4, 2, 8, 8)))


@pytest.mark.parametrize("shape", [(8, 1, 3), (2, 6, 2), (4, 1, 6), (1, 4, 6)])
def test_an_image_becomes_one_of_another_shape(shape):
    x, image = images(4, 2, 3), Value("image", shape)
    conv = Conv2d(image, Value("y", (2, *shape[1:])), "w", chance(2, shape[0], 1, 1), chance(2))
    assert_equal(Program(x, (Reshape(x, image), conv), conv.output))


def test_an_image_with_the_same_channels_is_not_moved():
    x, image = images(4, 2, 3), Value("image", (4, 1, 6))
    conv = Conv2d(image, Value("y", (2, 1, 6)), "w", chance(2, 4, 1, 1), chance(2))
    found = lowered(quantise(Program(x, (Reshape(x, image), conv), conv.output), chance(4, 4, 2, 3)))
    assert [one.code for one in found.operators] == ["RESHAPE", "CONV_2D"]


def test_a_weight_may_have_the_name_of_a_value():
    x, y, z = images(3, 4, 4), Value("y", (3, 4, 4)), Value("z", (3, 4, 4))
    scaled = Conv2d(x, y, "y", chance(3, 1, 1, 1), chance(3), groups=3)
    layer = Conv2d(y, z, "x", chance(3, 3, 1, 1), chance(3))
    assert_equal(Program(x, (scaled, layer), z))


def test_a_mean_over_an_image_with_a_scale_of_its_own_computes_the_same():
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    program = trace(module, chance(4, 3, 6, 6))
    assert any(isinstance(one, Conv2d) for one in quantise(program, chance(6, 3, 6, 6)).program.operations)
    assert_equal(program)


def test_a_program_without_operations_is_refused():
    x = Value("x", (3,))
    with pytest.raises(ValueError, match="cannot express this network: it returns its input"):
        lowered(quantise(Program(x, (), x), chance(4, 3)))
