"""The scales of `importance="sensitivity"` against Jacobians, and networks without derivatives."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_roulette import Calibration, Mask, Scores, Tree, Wheel, prunable_parameters, search
from lightning_roulette.refit.sensitivity import NoGradients
from tests.support.networks import changed, known, numbers, state_of


def scales(net: nn.Module, x, mask: Mask | None = None, values=None, **options):
    mask = mask or Mask.full(prunable_parameters(net))
    return Calibration(net, [x], **options).scales("sensitivity", mask, values or {})


def hooked(net, x, layers, hook):
    """The network's outputs while `hook(name, inputs, output)` sees each call of these layers."""
    handles = [
        net.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: hook(name, a[0], out))
        for name in layers
    ]
    try:
        return net(x)
    finally:
        for handle in handles:
            handle.remove()


def exact(net, x, layers):
    """For each layer, root mean squares of its inputs and sums of squared derivatives of all outputs by its outputs."""
    seen = {}
    hooked(net, x, layers, lambda name, given, out: seen.update({name: (given, out)}))

    def outputs(*added):
        return hooked(net, x, layers, lambda name, given, out: out + added[layers.index(name)])

    jacobians = torch.autograd.functional.jacobian(outputs, tuple(torch.zeros_like(seen[name][1]) for name in layers))
    found = {}
    for name, jacobian in zip(layers, jacobians, strict=True):
        conv = isinstance(net.get_submodule(name), nn.Conv2d)
        squares = jacobian.square().flatten(0, net(x).dim() - 1).sum(0)
        inputs = seen[name][0].movedim(1 if conv else -1, 0).flatten(1).square().mean(1).sqrt()
        channel = squares.dim() - (3 if conv else 1)
        found[name] = (inputs, squares.movedim(channel, 0).flatten(1).sum(1))
    return found


def mlp():
    return known(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)))


def conv():
    first, second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, groups=2)
    return known(nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(24, 3)))


def in_expectation(net, x, repeats=400):
    """The mean of squared scales over random directions."""
    sums = {}
    for seed in range(repeats):
        for name, scale in scales(net, x, seed=seed).items():
            sums[name] = sums.get(name, 0) + scale.square() / repeats
    return sums


@pytest.mark.parametrize(("make", "shape", "layers"), [(mlp, (6, 5), "024"), (conv, (3, 2, 4, 4), "024")])
def test_scales_follow_the_jacobian(make, shape, layers):
    net, x = make(), numbers(*shape)
    wanted, found = exact(net, x, list(layers)), in_expectation(net, x)
    for layer in layers:
        inputs, derivatives = wanted[layer]
        weight = net.get_submodule(layer).weight
        groups = getattr(net.get_submodule(layer), "groups", 1)
        by_output = inputs.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
        squares = (by_output * derivatives[:, None]).view(*by_output.shape, *[1] * (weight.dim() - 2))
        assert torch.allclose(found[f"{layer}.weight"], squares, rtol=0.2)


def test_the_derivatives_of_the_last_layer_are_exact():
    net, x = mlp(), numbers(6, 5)
    inputs, derivatives = exact(net, x, ["4"])["4"]
    assert torch.equal(derivatives, torch.full((3,), 6.0, dtype=torch.float64))
    assert torch.allclose(scales(net, x)["4.weight"].square(), inputs * derivatives[:, None])


@pytest.mark.parametrize(("first", "width"), [(nn.Linear(3, 5), 5), (nn.Conv1d(3, 6, 2, groups=3), 18)])
def test_a_bias_has_the_importance_of_a_weight_with_an_input_of_one(first, width):
    net = known(nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(width, 2)))
    x = numbers(20, 3, 4).sign()
    x = x if isinstance(net[0], nn.Conv1d) else x[..., 0]
    found = scales(net, x, Mask.full(prunable_parameters(net, include=["*"])))
    assert found["0.bias"].shape == net[0].bias.shape
    weight = found["0.weight"].expand_as(net[0].weight)
    assert torch.allclose(weight, found["0.bias"].view(-1, *[1] * (weight.dim() - 1)).expand_as(weight))


def test_a_dead_unit_has_no_importance():
    net = mlp()
    with torch.no_grad():
        net[0].bias[2] = -1e6
    found = scales(net, numbers(6, 5))["0.weight"]
    assert not found[2].any()
    assert found[[0, 1]].any()


def test_importance_does_not_depend_on_the_scale_of_a_unit():
    """A ReLU unit whose weights are doubled and whose successors are halved computes the same."""
    net, x = known(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))), numbers(6, 5)
    before = scales(net, x)["0.weight"] * net[0].weight.abs()
    with torch.no_grad():
        net[0].weight[3] *= 2
        net[0].bias[3] *= 2
        net[2].weight[:, 3] /= 2
    after = scales(net, x)["0.weight"] * net[0].weight.abs()
    assert torch.allclose(before, after)


def test_the_derivatives_are_those_of_the_pruned_network():
    net, x = mlp(), numbers(6, 5)
    mask = Mask({name: numbers(*one.shape, seed=9) > 0 for name, one in prunable_parameters(net).items()})
    values = {"0.bias": numbers(7, seed=8), "2.weight": numbers(6, 7, seed=7)}
    found = scales(net, x, mask, values)
    again = scales(changed(net, mask, values), x)
    assert all(torch.equal(found[name], again[name]) for name in found)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        x = self.body(x).relu()
        return self.one(x), self.two(x)


def test_every_head_counts():
    net, x = known(Heads()), numbers(8, 5)
    both = in_expectation(net, x)["body.weight"]
    silent = ({f"{head}.weight": torch.zeros_like(net.get_submodule(head).weight)} for head in ("one", "two"))
    alone = [in_expectation(changed(net, Mask({}), values), x)["body.weight"] for values in silent]
    assert torch.allclose(both, alone[0] + alone[1], rtol=0.2)


class Odd(nn.Module):
    """Parts whose weights are applied without a call of their own, and a part that is never called."""

    def __init__(self):
        super().__init__()
        self.attend, self.recur = nn.MultiheadAttention(4, 2, batch_first=True), nn.LSTM(4, 4, batch_first=True)
        self.end, self.spare = nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x):
        x = self.attend(x, x, x)[0]
        return self.end(self.recur(x)[0])


def test_weights_without_channels_or_derivatives_of_their_own_get_a_mean():
    net = known(Odd())
    found = scales(net, numbers(6, 5, 4))
    assert {name for name, one in found.items() if one.numel() == 1} == found.keys() - {"end.weight"}
    assert all(bool((one > 0).all()) for one in found.values())
    assert torch.equal(found["attend.in_proj_weight"], found["attend.out_proj.weight"])
    assert all((one * net.get_parameter(name)).shape == net.get_parameter(name).shape for name, one in found.items())


def test_a_weight_of_a_layer_that_is_not_called_gets_the_mean_of_all_others():
    net, x = known(nn.ModuleDict({"used": mlp(), "spare": nn.Linear(3, 3)})), numbers(6, 5)
    calibration = Calibration(net, 1, run=lambda _: net["used"](x))
    found = dict(calibration.scales("sensitivity", Mask.full(prunable_parameters(net)), {}))
    spare = float(found.pop("spare.weight"))
    assert spare == pytest.approx(sum(float(one.mean()) for one in found.values()) / 3)


def test_a_tied_weight_counts_wherever_it_is_used():
    apart = known(nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False)))
    with torch.no_grad():
        apart[2].weight.copy_(apart[0].weight)
    tied, x = deepcopy(apart), numbers(6, 4)
    tied[2].weight = tied[0].weight
    one, other = scales(tied, x)["0.weight"], scales(apart, x)
    assert torch.allclose(one.square(), other["0.weight"].square() + other["2.weight"].square())


class Stubborn(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.net, self.how = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), how

    def forward(self, x):
        if self.how == "numpy":
            return self.net[2](torch.from_numpy(self.net[0](x).numpy()))
        with torch.no_grad() if self.how == "no_grad" else torch.inference_mode():
            return self.net(x)


def test_a_network_that_turns_gradients_off_is_differentiated_too():
    net = known(Stubborn("no_grad"))
    found = scales(net, numbers(6, 4))
    plain = scales(net.net, numbers(6, 4))
    assert all(torch.equal(found[f"net.{name}"], one) for name, one in plain.items())


def overflowing() -> nn.Module:
    net = known(Stubborn("no_grad"))
    net.net[2].weight.data[0] = math.inf
    return net


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (known(Stubborn("inference")), "runs in inference mode"),
        (known(Stubborn("numpy")), "fails where derivatives"),
        (overflowing(), "not finite"),
    ],
)
def test_a_network_without_finite_derivatives_is_refused_with_the_reason(net, why):
    with pytest.raises(NoGradients, match=why):
        scales(net, numbers(6, 4))
    assert not any(part._forward_hooks for part in net.modules())


@pytest.mark.parametrize("grad", [True, False])
def test_nothing_is_left_behind(grad):
    net, x = conv().train(), numbers(3, 2, 4, 4)
    net[1].inplace = True
    with torch.set_grad_enabled(grad):
        before = state_of(net)
        scales(net, x)
        assert state_of(net) == before


def test_the_same_seed_gives_the_same():
    net, x = mlp(), numbers(6, 5)
    one, _, other, apart = scales(net, x, seed=3), torch.rand(1), scales(net, x, seed=3), scales(net, x, seed=4)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["0.weight"], apart["0.weight"])


def searched(net, x, **options):
    weights = prunable_parameters(net)
    dense = net(x).detach()

    def fidelity(candidate, folds):
        with torch.no_grad():
            apart = -float((functional_call(net, candidate.weights, (x,)) - dense).square().mean())
        return Scores(apart, apart)

    fidelity.folds = 1
    options = {"refit": "least_squares", "branches": 2, "tolerance": math.inf, **options}
    return search(weights, fidelity, calibration=Calibration(net, [x]), tree=Tree(0.2, max_levels=2), **options)


@pytest.mark.parametrize(
    ("options", "importance"),
    [
        ({}, "sensitivity"),
        ({"refit": None}, "magnitude"),
        ({"refit": "batch_norm"}, "magnitude"),
        ({"refit": None, "wheel": Wheel(importance="sensitivity")}, "sensitivity"),
        ({"wheel": Wheel(importance="lamp")}, "lamp"),
        ({"wheel": Wheel(importance=lambda weights: {name: one.abs() for name, one in weights.items()})}, "a function"),
    ],
)
def test_the_report_names_the_importance_of_the_wheel(options, importance):
    assert searched(mlp(), numbers(30, 5), **options).report.importance == importance


def test_the_default_importance_is_magnitude_where_there_are_no_derivatives():
    net, x = known(Stubborn("inference")), numbers(30, 4)
    by_default = searched(net, x)
    assert by_default.report.importance == "magnitude, as the network runs in inference mode"
    assert by_default.mask == searched(net, x, wheel=Wheel(importance="magnitude")).mask


def test_sensitivity_is_refused_where_there_are_no_derivatives():
    with pytest.raises(ValueError, match="importance is 'sensitivity', but the network runs in inference mode. Choose"):
        searched(known(Stubborn("inference")), numbers(30, 4), wheel=Wheel(importance="sensitivity"))
