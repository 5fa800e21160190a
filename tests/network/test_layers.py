"""The rows of a layer times its matrices are the module's outputs, for every setting of the module."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils.parametrize import register_parametrization

from lightning_roulette.network.layers import batch_norms_of, channels
from lightning_roulette.network.parameters import prunable_parameters
from lightning_roulette.network.refittable import layers_of
from tests.support.networks import MetricOf, known, numbers

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
KERNEL, STRIDE, DILATION, PADDING = (3, 2, 1), (2, 1, 2), (2, 3, 2), (1, 2, 1)


def all_layers(module: nn.Module):
    found, left = layers_of(module, list(prunable_parameters(module)))
    assert left == {}
    return found


def everywhere(count: int) -> torch.Tensor:
    return torch.arange(count)


def applied(layer, arguments, named=None, chosen=everywhere, module=None) -> torch.Tensor:
    """The module's outputs computed from rows and matrices, shape (rows, outputs)."""
    parameters = dict((module or layer.module).named_parameters())
    found = (layer.rows(arguments, named or {}, chosen) @ layer.matrices(parameters).mT).movedim(0, 1).flatten(1)
    return found if layer.bias is None else (found + parameters[layer.bias][layer.offsets]).detach()


def assert_applies(module: nn.Module, inputs: torch.Tensor, channel: int) -> None:
    (layer,) = all_layers(module)
    wanted = module(inputs).detach().movedim(channel, -1)
    wanted = wanted.reshape(-1, wanted.shape[-1])
    assert torch.allclose(applied(layer, (inputs,)), wanted, atol=1e-12)
    asked = []

    def some(count: int) -> torch.Tensor:
        asked.append(count)
        return torch.tensor([count - 1, 0, count // 2, 0])

    found = applied(layer, (), {"input": inputs}, some)
    assert torch.allclose(found, wanted[some(len(wanted))], atol=1e-12)
    assert asked[0] == len(wanted)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (2, 3, 2, 4), (1, 4)])
def test_linear_rows_give_its_outputs(shape, bias):
    assert_applies(known(nn.Linear(4, 3, bias=bias)), numbers(*shape), -1)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("padding", ["none", "numbers", "same", "valid"])
def test_convolution_rows_give_its_outputs(dims, mode, padding):
    pads = {"none": 0, "numbers": PADDING[:dims]}.get(padding, padding)
    strides = [1] if padding == "same" else [1, STRIDE[:dims]]
    kernel = (3, 5, 1)[:dims] if padding == "same" else KERNEL[:dims]
    for stride, dilation, groups, bias in product(strides, [1, DILATION[:dims]], [1, 2, 4], [True, False]):
        module = CONVOLUTIONS[dims](
            4, 8, kernel, stride, pads, dilation=dilation, groups=groups, bias=bias, padding_mode=mode
        )
        assert_applies(known(module), numbers(2, 4, *(9, 13, 5)[:dims]), 1)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_convolution_accepts_a_sample_without_a_batch_dimension(dims, mode):
    module = CONVOLUTIONS[dims](4, 6, KERNEL[:dims], padding=PADDING[:dims], groups=2, padding_mode=mode)
    assert_applies(known(module), numbers(4, *(7, 6, 5)[:dims]), 0)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("dims", [1, 2])
def test_the_same_padding_of_even_kernels_is_uneven(dims, mode):
    module = CONVOLUTIONS[dims](2, 3, (4, 2)[:dims], padding="same", padding_mode=mode)
    assert_applies(known(module), numbers(2, 2, *(7, 6)[:dims]), 1)


TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, (1, 2, 1), (3, 1, 0)])  # also more than the kernel reaches
def test_rows_of_a_transposed_convolution_give_its_outputs(dims, padding):
    pads = padding if padding == 0 else padding[:dims]
    for stride, dilation, groups, bias in product([1, STRIDE[:dims]], [1, DILATION[:dims]], [1, 2, 4], [True, False]):
        for more in [0, 1] if stride != 1 and dims != 2 else [0]:
            ends = tuple(more if step > 1 else 0 for step in STRIDE[:dims])
            module = TRANSPOSED[dims](4, 8, KERNEL[:dims], stride, pads, ends, groups, bias, dilation)
            assert_applies(known(module), numbers(2, 4, *(6, 7, 5)[:dims]), 1)


@given(
    samples=st.integers(1, 3),
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=2),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    more=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    channels=st.sampled_from([(1, 1, 1), (2, 3, 1), (4, 2, 2), (3, 6, 3)]),
)
def test_rows_of_any_transposed_convolution_give_its_outputs(
    samples, sizes, kernel, stride, padding, dilation, more, channels
):
    inputs, outputs, groups = channels
    ends = tuple(min(end, max(one) - 1) for end, one in zip(more, zip(stride, dilation, strict=True), strict=True))
    module = nn.ConvTranspose2d(inputs, outputs, kernel, stride, padding, ends, groups, True, dilation)
    places = (*zip(sizes, kernel, stride, padding, dilation, ends, strict=True),)
    assume(all((size - 1) * step - 2 * less + far * (k - 1) + end + 1 > 0 for size, k, step, less, far, end in places))
    assert_applies(known(module), numbers(samples, inputs, *sizes), 1)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_transposed_convolution_is_told_its_output_size(dims):
    module = known(TRANSPOSED[dims](4, 6, KERNEL[:dims], (3, 2, 4)[:dims], 1, groups=2))
    (layer,), x = all_layers(module), numbers(2, 4, *(5, 4, 3)[:dims])
    shortest = module(x).shape[2:]
    for more in (0, 1):
        size = [one + more for one in shortest]
        wanted = module(x, output_size=size).detach().movedim(1, -1).flatten(0, -2)
        assert torch.allclose(applied(layer, (x, size)), wanted, atol=1e-12)
        assert torch.allclose(applied(layer, (x,), {"output_size": size}), wanted, atol=1e-12)
    assert_applies(module, numbers(4, *(5, 4, 3)[:dims]), 0)


def test_memory_formats_do_not_matter():
    module = known(nn.Conv2d(4, 6, 3, groups=2)).to(memory_format=torch.channels_last)
    assert_applies(module, numbers(2, 4, 7, 7).to(memory_format=torch.channels_last), 1)
    assert_applies(module, numbers(2, 7, 7, 4).permute(0, 3, 2, 1), 1)
    assert_applies(known(nn.Linear(4, 3)), numbers(4, 5).T, -1)
    module = known(nn.ConvTranspose2d(4, 6, 3, groups=2)).to(memory_format=torch.channels_last)
    assert_applies(module, numbers(2, 4, 7, 7).to(memory_format=torch.channels_last), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rows_are_float32_at_least_without_gradients_and_matrices_are_views(dtype):
    for module, inputs in ((nn.Linear(4, 3), numbers(5, 4)), (nn.Conv1d(4, 3, 2), numbers(2, 4, 6))):
        (layer,), given = all_layers(module), inputs.to(dtype).requires_grad_()
        found = layer.rows((given,), {}, everywhere)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        assert not found.requires_grad
        assert found.double().unique().tolist() == given.detach().double().unique().tolist()
        layer.matrices({"weight": module.weight}).fill_(7)
        assert (module.weight == 7).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 3, "vdim": 5}, {"kdim": 6, "vdim": 4}])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_rows_give_its_projections(sizes, bias, batch_first):
    module = known(nn.MultiheadAttention(6, 2, bias=bias, batch_first=batch_first, **sizes))
    given = [numbers(2, 4, 6), numbers(2, 3, sizes.get("kdim", 6), seed=1), numbers(2, 3, sizes.get("vdim", 6), seed=2)]
    names = [name for name in prunable_parameters(module) if name != "out_proj.weight"]
    layers, left = layers_of(module, names)
    assert left == {}
    if module.in_proj_weight is None:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    else:
        weights = module.in_proj_weight.chunk(3)
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    assert {name for layer in layers for name in layer.names} == set(names)
    for layer, inputs, weight, own in zip(layers, given, weights, biases, strict=True):
        wanted = linear(inputs, weight, own).detach().flatten(0, 1)
        named = dict(zip(("query", "key", "value"), given, strict=True))
        assert torch.allclose(applied(layer, tuple(given)), wanted, atol=1e-12)
        assert torch.allclose(applied(layer, (), named), wanted, atol=1e-12)
        value = {"value": named.pop("value")}
        assert torch.allclose(applied(layer, tuple(given[:2]), value), wanted, atol=1e-12)


ATTENTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "other sizes": {"kdim": 3, "vdim": 5},
    "biases of keys and values": {"add_bias_kv": True},
    "zeros": {"add_zero_attn": True},
    "without biases": {"bias": False},
    "dropout": {"dropout": 0.5},
}


def attended(kind: str, batched: bool = True):
    """A module, its arguments, and the place of their batch dimension."""
    options = ATTENTIONS[kind]
    module = known(nn.MultiheadAttention(6, 2, **options))
    sizes = [(4, 6), (3, options.get("kdim", 6)), (3, options.get("vdim", 6))]
    place = 0 if options.get("batch_first") else 1
    shapes = [[*size[:place], 2, *size[place:]] if batched else size for size in sizes]
    return module, [numbers(*shape, seed=seed) for seed, shape in enumerate(shapes)]


MASKS = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
    {"attn_mask": torch.tensor([[False, True, False]] * 4)},
    {"key_padding_mask": torch.tensor([[False, False, True], [False, False, False]])},
    {"attn_mask": torch.ones(4, 3, dtype=torch.bool).triu(1), "is_causal": True, "need_weights": False},
]


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("named", MASKS)
@pytest.mark.parametrize("training", [False, True])
def test_attention_rows_give_its_outputs(kind, named, training):
    module, given = attended(kind)
    layers, _ = layers_of(module, list(prunable_parameters(module)))
    layer = layers[-1]
    assert (layer.names, layer.turn, {one.turn for one in layers[:-1]}) == (("out_proj.weight",), 1, {0})
    wanted = module.eval()(*given, **named)[0].detach().flatten(0, 1)
    before, generator = [one.clone() for one in module.parameters()], torch.get_rng_state()
    found = applied(layer, tuple(given), named, module=module.train(training))
    assert torch.allclose(found, wanted, atol=1e-12)
    assert all(torch.equal(*pair) for pair in zip(module.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    words = dict(zip(("query", "key", "value"), given, strict=True))
    assert torch.equal(applied(layer, (), words | named, module=module), found)
    rows = layer.rows(tuple(given), named, everywhere)
    with torch.no_grad():
        module.out_proj.weight.fill_(7)
        module.out_proj.bias = None
    assert torch.equal(layer.rows(tuple(given), named, everywhere), rows)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_rows_without_a_batch_give_its_outputs(kind):
    module, given = attended(kind, batched=False)
    layer = layers_of(module, list(prunable_parameters(module)))[0][-1]
    wanted = module.eval()(*given)[0].detach()
    assert torch.allclose(applied(layer, tuple(given), module=module), wanted, atol=1e-12)


def test_an_output_projection_inside_an_attention_of_its_own_is_a_layer_of_its_own():
    part = Attends(4, 2)
    layers, left = layers_of(part, ["in_proj_weight", "out_proj.weight"])
    assert [(layer.names, layer.module) for layer in layers] == [(("out_proj.weight",), part.out_proj)]
    assert left.keys() == {"in_proj_weight"}


def test_a_bias_that_is_frozen_or_tied_must_not_change():
    def biases() -> list[str | None]:
        return [layer.bias for layer in layers_of(module, ["0.weight", "2.weight", "1.in_proj_weight"])[0]]

    module = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    assert biases() == ["0.bias", *["1.in_proj_bias"] * 3, "2.bias"]
    module[0].bias.requires_grad_(False)
    module[1].in_proj_bias.requires_grad_(False)
    assert biases() == [None] * 4 + ["2.bias"]
    module[0].bias = module[2].bias
    assert biases() == [None] * 5


class Scaled(nn.Linear):
    def forward(self, x):
        return linear(x, 0.1 * self.weight, self.bias)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Attends(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


PATCHED = nn.Linear(2, 2)
PATCHED.forward = lambda x: linear(x, 2 * PATCHED.weight)


@pytest.mark.parametrize("part", [Scaled(2, 2), Standardised(1, 2, 3), Attends(4, 2), PATCHED])
def test_a_layer_whose_forward_is_overridden_is_not_supported(part):
    name = "in_proj_weight" if isinstance(part, nn.MultiheadAttention) else "weight"
    assert layers_of(part, [name]) == ([], {name: f"not supported for {type(part).__name__}: it overrides forward"})


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_bias_that_is_computed_from_other_tensors_must_not_change():
    part = nn.Linear(2, 2)
    register_parametrization(part, "bias", Doubled())
    layers, left = layers_of(part, ["weight"])
    assert [(layer.names, layer.bias) for layer in layers] == [(("weight",), None)]
    assert left == {}


def test_a_bias_belongs_to_the_layer_of_its_weight():
    part = nn.Linear(2, 2)
    assert layers_of(part, ["weight", "bias"])[1] == {}
    assert layers_of(part, ["bias"])[1] == {"bias": "not supported for bias of Linear"}


def test_layers_are_found_by_name_at_any_depth():
    class Named(nn.Linear):
        """Overrides nothing."""

    module = nn.ModuleDict({"a": nn.Sequential(Named(2, 2), nn.ReLU()), "b": nn.Conv2d(1, 2, 3)})
    found = [("a.0.weight", "a.0.bias", module["a"][0]), ("b.weight", "b.bias", module["b"])]
    for names, expected in ((["a.0.weight", "b.weight"], found), (["b.weight"], found[1:])):
        layers, left = layers_of(module, names)
        assert [(*layer.names, layer.bias, layer.module) for layer in layers] == expected
        assert left == {}


def test_every_other_weight_has_a_reason():
    net = nn.ModuleDict(
        {"cell": nn.GRUCell(2, 2), "one": nn.Linear(2, 2), "other": nn.Linear(2, 2), "free": nn.Linear(2, 2)}
    )
    net.matrix, net["other"].weight = nn.Parameter(torch.ones(2, 2)), net["one"].weight
    names = ["matrix", "cell.weight_ih", "cell.weight_hh", "one.weight", "free.weight"]
    layers, left = layers_of(net, names)
    assert [layer.names for layer in layers] == [("free.weight",)]
    assert left == {
        "matrix": "not supported for matrix of ModuleDict",
        "cell.weight_ih": "not supported for GRUCell",
        "cell.weight_hh": "not supported for GRUCell",
        "one.weight": "not supported for tied weights",
    }


def test_batch_norms_with_running_statistics_are_found():
    module = nn.ModuleDict(
        {
            "plain": nn.BatchNorm1d(2),
            "inside": nn.Sequential(nn.BatchNorm2d(2, affine=False), nn.LayerNorm(2)),
            "deep": nn.BatchNorm3d(2),
            "stateless": nn.BatchNorm1d(2, track_running_stats=False),
            "frozen": nn.BatchNorm1d(2).requires_grad_(False),
            "metric": MetricOf(nn.BatchNorm1d(2)),
        }
    )
    assert batch_norms_of(module) == {
        "plain.": module["plain"],
        "inside.0.": module["inside"][0],
        "deep.": module["deep"],
    }
    assert list(batch_norms_of(module["plain"])) == [""]


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 4, 2), (5, 3, 2, 2, 2)])
def test_channels_have_the_statistics_that_a_batch_norm_computes(shape):
    inputs = numbers(*shape).float()
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](3, momentum=1.0)
    norm(inputs)
    for found in (channels((inputs,), {}), channels((), {"input": inputs})):
        assert found.dtype == torch.float32
        assert found.shape == (5, 3, inputs[0, 0].numel())
        assert torch.allclose(found.mean((0, 2)), norm.running_mean, atol=1e-6)
        assert torch.allclose(found.var((0, 2)), norm.running_var, rtol=1e-5)
