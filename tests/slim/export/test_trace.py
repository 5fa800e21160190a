"""A network and the program made of it agree, or an error names what stands in the way."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from lightning_roulette.slim.export.operations import Activate, Add, Conv2d, Linear, Pad, Pool2d, Reshape
from lightning_roulette.slim.export.reference import finish, run
from lightning_roulette.slim.export.trace import trace
from tests.support.devices import NETWORKS, inputs, network


class Forward(nn.Module):
    """A network of one layer and a function of it and the input."""

    def __init__(self, layer, forward):
        super().__init__()
        self.layer, self.function = layer, forward

    def forward(self, x):
        return self.function(self.layer, x)


def kinds(program):
    return [type(one) for one in program.operations]


def outputs(module, x, rows=5):
    """What a program and its network compute of rows that the program was not traced with, and the program."""
    program = trace(module, x)
    other = torch.randn(rows, *x.shape[1:], generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = module.eval()(other.clone())
    return finish(run(program, other), program.final), expected, program


def agrees(module, x, rows=5):
    """The program of a network, after a look at its outputs."""
    found, expected, program = outputs(module, x, rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    return program


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_program_gives_the_outputs_of_its_network(name, rows):
    found, expected, _ = outputs(network(name, 0.5), inputs(name, rows))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_normalisations_activations_and_dropout_leave_no_operation():
    assert kinds(trace(network("residual"), inputs("residual"))) == [
        *(Conv2d, Conv2d, Conv2d, Add, Conv2d, Conv2d, Conv2d, Add, Pool2d, Reshape, Linear)
    ]


@pytest.mark.parametrize("name", ["residual", "lenet_300_100"])
def test_pruned_weights_stay_zero_and_keep_their_names(name):
    module = network(name, 0.2)
    weights = dict(module.named_parameters())
    layers = [one for one in trace(module, inputs(name)).operations if isinstance(one, (Linear, Conv2d))]
    assert {one.name for one in layers} == {key for key, weight in weights.items() if weight.ndim > 1}
    for one in layers:
        assert torch.equal(one.weight == 0, weights[one.name] == 0)


@pytest.mark.parametrize(
    ("layer", "function", "left"),
    [
        (nn.Conv2d(2, 4, 3), lambda layer, x: layer(F.pad(x, (1, 2, 0, 1))), [Conv2d]),
        (nn.Conv2d(2, 4, 3), lambda layer, x: F.max_pool2d(F.pad(layer(x), (1, 1)), 2), [Conv2d, Pad, Pool2d]),
        (nn.Conv2d(2, 4, 4, padding="same"), lambda layer, x: layer(x).clamp(0, 6), [Conv2d]),
        (nn.Conv2d(2, 4, 3), lambda layer, x: F.avg_pool2d(layer(x), 3, 2, ceil_mode=True), [Conv2d, Pool2d]),
        (nn.Conv2d(2, 4, 3), lambda layer, x: layer(x).mean(-1), [Conv2d, Pool2d, Reshape]),
        (nn.Conv2d(2, 4, 3), lambda layer, x: layer(x).mean((2, 3), keepdim=True), [Conv2d, Pool2d]),
        (nn.Conv2d(2, 4, 3), lambda layer, x: F.adaptive_avg_pool2d(layer(x), (2, 1)), [Conv2d, Pool2d]),
        (nn.Conv2d(2, 2, 3, padding=1), lambda layer, x: (layer(x) + x).relu(), [Conv2d, Add]),
        (nn.Conv2d(2, 2, 3, padding=1), lambda layer, x: layer(x).relu() + layer(x), [Conv2d, Conv2d, Add]),
        (nn.Conv2d(2, 3, 3), lambda layer, x: 2 * layer((x - 0.5) / 2) - 1, [Conv2d, Conv2d]),
        (nn.Conv2d(2, 3, 3), lambda layer, x: 1 - layer(x), [Conv2d]),
        (nn.BatchNorm2d(2), lambda layer, x: layer(x).relu(), [Conv2d]),
        (nn.Conv2d(2, 3, 3), lambda layer, x: F.max_pool2d(layer(x), 2, 2, 1).relu(), [Conv2d, Pool2d]),
        (nn.Conv2d(2, 3, 1), lambda layer, x: layer(x.relu_()).squeeze(0), [Activate, Conv2d]),
        (nn.Linear(96, 3), lambda layer, x: layer(x.flatten(1)) @ torch.ones(3, 2), [Reshape, Linear, Linear]),
        (nn.BatchNorm1d(96), lambda layer, x: layer(x.flatten(1)), [Reshape, Reshape, Conv2d, Reshape]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*even kernel lengths.*")
def test_what_a_network_does_around_its_layers(layer, function, left):
    x = torch.randn(3, 2, 8, 6, generator=torch.Generator().manual_seed(0))
    assert kinds(agrees(Forward(layer, function), x)) == left


def test_an_activation_in_place_changes_what_is_used_later():
    def forward(layer, x):
        before = layer(x)
        after = F.relu_(before)
        return before + after

    module = Forward(nn.Linear(4, 4), forward)
    program = agrees(module, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert kinds(program) == [Linear, Add]
    assert program.operations[1].first == program.operations[1].second


def test_a_mask_that_is_multiplied_in_forward_is_taken_into_the_weight():
    module = nn.Sequential(nn.Linear(6, 4))
    prune.l1_unstructured(module[0], "weight", 0.5)
    (layer,) = agrees(module, torch.randn(3, 6, generator=torch.Generator().manual_seed(0))).operations
    assert int((layer.weight != 0).sum()) == 12


def test_training_modes_come_back_and_the_network_is_not_changed():
    module = network("residual").train()
    module.blocks.eval()
    before, modes = {k: v.clone() for k, v in module.state_dict().items()}, [p.training for p in module.modules()]
    trace(module, inputs("residual"))
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_layer_that_is_used_twice_has_two_outputs():
    module = Forward(nn.Linear(4, 4), lambda layer, x: layer(layer(x)))
    program = agrees(module, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert [one.output.name for one in program.operations] == ["layer", "layer_2"]
    assert [one.name for one in program.operations] == ["layer.weight"] * 2


def test_all_that_cannot_be_expressed_is_named():
    class Unlike(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.conv = nn.GELU(), nn.ConvTranspose2d(2, 3, 3)

        def forward(self, x):
            x = torch.cat((self.act(self.conv(x)), x.softmax(1).repeat(1, 1, 2, 2)[:, :, :10, :10]), 1)
            return x.sum((2, 3))

    with pytest.raises(ValueError, match="operations that an export does not know") as caught:
        trace(Unlike(), torch.randn(2, 2, 8, 8))
    for one in ("gelu in 'act'", "conv_transpose2d in 'conv'", "cat", "softmax", "sum"):
        assert f"- {one}" in str(caught.value)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda layer, x: layer(x).transpose(0, 1), "transpose"),
        (lambda layer, x: layer(x).reshape(-1, 2), "does not begin with the batch"),
        (lambda layer, x: layer(x) + torch.ones(2, 4), "with a constant of shape"),
        (lambda layer, x: layer(x).clamp(0.0, 1.0), "only from 0"),
        (lambda layer, x: layer(x).relu().softmax(1) * 2, "not the last operation"),
        (lambda layer, x: layer(x) * layer(x), "with weights that depend on the input"),
        (lambda layer, x: (layer(x), x), "returns 2 results"),
        (lambda layer, x: layer(x) if x.sum() > 0 else x, "cannot make a graph"),
        (lambda layer, x: F.dropout(layer(x), 0.5, True), "active in evaluation"),
        (lambda layer, x: layer(x.unsqueeze(1)), "on a tensor of shape"),
        (lambda layer, x: layer(x) * torch.nan, "returns numbers that are not finite"),
        (lambda layer, x: torch.div(layer(x), 2.0, rounding_mode="floor"), "div with rounding_mode='floor'"),
        (lambda layer, x: layer(x) + torch.ones(1, 1, 1), "that gets another shape"),
        (lambda layer, x: {"one": layer(x), "two": x}, "returns 2 results"),
    ],
)
def test_errors_say_why_a_network_has_no_program(function, why):
    with pytest.raises(ValueError, match=why):
        trace(Forward(nn.Linear(4, 4), function), torch.randn(5, 4))


@pytest.mark.parametrize(
    ("function", "activation"),
    [
        (lambda layer, x: torch.clamp(layer(x), min=0), "relu"),
        (lambda layer, x: torch.clamp(layer(x), min=0, max=6), "relu6"),
        (lambda layer, x: F.hardtanh(layer(x), 0.0, 6.0), "relu6"),
        (lambda layer, x: {"logits": layer(x)}, "none"),
    ],
)
def test_other_forms_of_a_layer_are_known(function, activation):
    program = trace(Forward(nn.Linear(4, 4), function), torch.randn(5, 4))
    assert [one.activation for one in program.operations] == [activation]


def test_a_forward_that_is_not_its_graph_is_refused():
    module = Forward(nn.Linear(4, 4), lambda layer, x: layer(x) if torch.compiler.is_compiling() else 2 * layer(x))
    with pytest.raises(ValueError, match=r"model and the program made of it differ by .* cannot be exported"):
        trace(module, torch.randn(5, 4))


@pytest.mark.parametrize(
    ("model", "example", "error"),
    [
        (nn.Linear(4, 4).state_dict(), torch.ones(1, 4), "model is"),
        (nn.Linear(4, 4), [1.0], "example_input is a list"),
        (nn.Linear(4, 4), torch.ones(4), "at least one row"),
        (nn.Linear(4, 4), torch.ones(1, 4).double(), "float32"),
        (nn.Linear(4, 4), torch.full((1, 4), torch.nan), "not finite"),
    ],
)
def test_arguments_are_checked(model, example, error):
    with pytest.raises((TypeError, ValueError), match=error):
        trace(model, example)
