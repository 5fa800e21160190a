"""Layers of classes that are not torch's: found by their shape, or registered."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_roulette import (
    Calibration,
    Evaluator,
    Mask,
    Scores,
    Tree,
    Validation,
    Wheel,
    prunable_parameters,
    search,
)
from lightning_roulette.network import kinds
from lightning_roulette.network.kinds import AffineKind, affine_kind_of, register_layer
from lightning_roulette.network.refittable import layers_of
from lightning_roulette.settings import CALIBRATED
from tests.support.networks import mask_of, numbers


class Conv1D(nn.Module):
    """As in transformers: a linear layer with a transposed weight."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x):
        shape = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


class Derived(Conv1D):
    pass


class Scaled(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


class Own(nn.Module):
    """A layer with names of its own."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(outputs, inputs))
        self.offset = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, values):
        return nn.functional.linear(values, self.kernel, self.offset)


@pytest.fixture(autouse=True)
def _forgets(monkeypatch):
    monkeypatch.setattr(kinds, "_registered", {})


def two_layers(kind: str) -> nn.Sequential:
    """The same function at every call, with layers of one kind."""
    layers = {
        "linear": nn.Linear,
        "conv1d": lambda inputs, outputs: Conv1D(outputs, inputs),
        "own": Own,
    }[kind]
    net = nn.Sequential(layers(6, 9), nn.Tanh(), layers(9, 4)).double()
    chance = iter(range(100))
    for part in (net[0], net[2]):
        weight, bias = list(part.parameters())
        values = numbers(len(bias), weight.numel() // len(bias), seed=next(chance))
        weight.data = values.T.contiguous() if kind == "conv1d" else values
        bias.data = numbers(len(bias), seed=next(chance))
    return net


class Distance(Evaluator):
    """How far a network's outputs are from the dense network's."""

    def __init__(self, net: nn.Module, inputs: torch.Tensor) -> None:
        self.net, self.inputs, self.wanted = net, inputs, net(inputs).detach()

    def __call__(self, candidate, folds):
        with torch.no_grad():
            outputs = torch.func.functional_call(self.net, candidate.weights, (self.inputs,))
        score = -float((outputs - self.wanted).pow(2).mean())
        return Scores(score, score)


def searched(kind: str, importance: str):
    net, inputs = two_layers(kind), numbers(160, 6, seed=50)
    return search(
        prunable_parameters(net),
        Distance(net, inputs),
        calibration=Calibration(net, list(inputs.split(40))),
        refit="least_squares",
        branches=3,
        tolerance=100.0,
        wheel=Wheel(importance=importance, sharpness=float("inf")),
        tree=Tree(0.3, max_levels=2),
        validation=Validation(confirm=0.0),
    )


@pytest.mark.parametrize("importance", ["magnitude", "lamp", *CALIBRATED])
def test_a_transposed_weight_is_pruned_and_refitted_as_a_linear_one(importance):
    linear, conv = searched("linear", importance), searched("conv1d", importance)
    assert linear.report.sparsity > 0.4
    assert len(linear.weights) == 4  # the biases too
    for name, value in linear.weights.items():
        other = conv.weights[name].T if value.dim() == 2 else conv.weights[name]
        assert torch.equal(value == 0, other == 0)
        assert torch.allclose(value, other, atol=1e-9)
    scores = [[level.score for level in one.report.levels] for one in (linear, conv)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)


def test_a_registered_layer_is_refitted_and_scaled_as_a_linear_one():
    assert prunable_parameters(two_layers("own")) == {}
    register_layer(Own, weight="kernel", bias="offset")
    words = {"weight": "kernel", "bias": "offset"}

    def renamed(name: str) -> str:
        place, word = name.split(".")
        return f"{place}.{words[word]}"

    linear, own = two_layers("linear"), two_layers("own")
    assert list(prunable_parameters(own)) == ["0.kernel", "2.kernel"]
    mask = mask_of(linear)
    inputs = list(numbers(160, 6, seed=50).split(40))
    other_mask = Mask({renamed(name): kept for name, kept in mask.items()})
    here, there = Calibration(linear, inputs), Calibration(own, inputs)
    refitted, other = here.refit(mask), there.refit(other_mask)
    assert len(refitted.values) == 4
    assert refitted.undone == other.undone == {}
    for name, value in refitted.values.items():
        assert torch.allclose(value, other.values[renamed(name)], atol=1e-12)
    for kind in ("activation", "obs", "sensitivity"):
        scales, others = here.scales(kind, mask, {}), there.scales(kind, other_mask, {})
        assert all(torch.allclose(scales[name], others[renamed(name)]) for name in mask)


def test_conv1d_is_found_by_its_shape():
    assert list(prunable_parameters(Derived(3, 2))) == ["weight"]
    other = Conv1D(3, 2)
    del other.nf
    assert prunable_parameters(other) == {}
    assert affine_kind_of(nn.Conv1d(2, 2, 1)) is None


def test_a_subclass_with_a_forward_of_its_own_is_pruned_but_not_refitted():
    assert list(prunable_parameters(Scaled(3, 2))) == ["weight"]
    reason = "not supported for Scaled: it overrides forward"
    assert layers_of(Scaled(3, 2), ["weight"]) == ([], {"weight": reason})
    register_layer(Scaled, transposed=True)  # named itself
    assert [layer.names for layer in layers_of(Scaled(3, 2), ["weight"])[0]] == [("weight",)]


def test_a_registered_layer_needs_no_bias_and_may_be_called_by_name():
    register_layer(Own, weight="kernel", bias="offset")
    part = Own(3, 2, bias=False)
    ((layer,), left) = layers_of(part, ["kernel"])
    assert (layer.bias, left) == (None, {})
    rows = layer.rows((), {"values": torch.ones(4, 3)}, torch.arange)
    assert rows.shape == (1, 4, 3)


def test_a_class_can_be_registered_as_it_is_defined():
    @register_layer
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))

        def forward(self, x):
            return x @ self.weight.T

    @register_layer(transposed=True)
    class Turned(Plain):
        def forward(self, x):
            return x @ self.weight

    assert affine_kind_of(Plain()) == AffineKind(Plain)
    assert affine_kind_of(Turned()) == AffineKind(Turned, transposed=True)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Own(2, 2),), {}, TypeError, "kind is Own.*Pass the class"),
        ((int,), {}, TypeError, "derived from torch.nn.Module"),
        ((nn.Bilinear,), {}, ValueError, "torch's Bilinear"),
        ((Own,), {"weight": ""}, TypeError, "weight is ''"),
        ((Own,), {"bias": 3}, TypeError, "bias is 3"),
        ((Own,), {"transposed": 1}, TypeError, "transposed is 1"),
        ((Own,), {"bias": "weight"}, ValueError, "both 'weight'.*bias=None"),
    ],
)
def test_what_cannot_be_registered_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        register_layer(*arguments, **options)


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3, 4))


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        (Own(2, 3), {}, "weight='weight'.*Its parameters: 'kernel', 'offset'"),
        (Own(2, 3), {"weight": "kernel", "bias": "shift"}, "bias='shift'.*Its parameters: 'kernel', 'offset'"),
        (Own(2, 3), {"weight": "kernel", "bias": "offset", "transposed": True}, "2 outputs.*transposed=False"),
        (Bank(), {}, r"shape \(2, 3, 4\), but must be a matrix"),
    ],
)
def test_a_module_that_is_not_as_registered_is_refused(part, options, message):
    register_layer(type(part), **options)
    with pytest.raises(ValueError, match=message):
        prunable_parameters(part)
