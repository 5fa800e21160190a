"""Calibration: each refit against numpy on what the layers are given, and the network as it was afterwards."""

from __future__ import annotations

import math
from collections import defaultdict
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import pad, unfold
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.parameters import prunable_parameters
from lightning_roulette.refit.gram import GramSums
from lightning_roulette.refit.inputs import Calibration
from lightning_roulette.refit.refitted import Survivors
from lightning_roulette.settings import LeastSquares, Refit
from tests.support.limits import set_limits

WORSE = "it did not improve held-out inputs"


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(rows: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """Rows of numbers that say much about one another, so that survivors can stand in for what is pruned."""
    common = numbers(rows, *(1 for _ in shape), seed=seed + 1000)
    return numbers(rows, *shape, seed=seed) / 2 + common + 0.5


def known(module: nn.Module) -> nn.Module:
    """The module in double precision, its parameters and statistics the same at every call."""
    module.double()
    for seed, (name, one) in enumerate([*module.named_parameters(), *module.named_buffers()]):
        if one.is_floating_point():
            fan = max(1, one[0].numel())
            one.data = numbers(*one.shape, seed=seed + 100) / math.sqrt(fan)
            one.data = one.data.abs() + 0.5 if name.endswith("var") else one.data
    return module


def mask_of(module: nn.Module, density: float = 0.5, seed: int = 0, without: tuple[str, ...] = ()) -> Mask:
    chance = np.random.default_rng(seed)
    names = [name for name in prunable_parameters(module) if name not in without]
    return Mask({n: torch.from_numpy(chance.random(module.get_parameter(n).shape) < density) for n in names})


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
        self.inner, self.norm = nn.Conv2d(4, 4, (3, 1), padding="same", bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = x + torch.relu(self.norm(self.inner(x)))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Is given queries and what they look at, and calls its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.MultiheadAttention(6, 2, kdim=4, vdim=5, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x, keys, values):
        return self.head(input=torch.tanh(self.look(query=x, key=keys, value=values)[0]))


def mlp() -> nn.Module:
    return known(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)))


def conv() -> nn.Module:
    return known(
        nn.Sequential(
            nn.Conv2d(2, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 2, groups=4, dilation=2, bias=False),
            nn.BatchNorm2d(8, affine=False),
            nn.Tanh(),
            nn.Flatten(2),
            nn.Conv1d(8, 6, 2, stride=2, groups=2),
            nn.Flatten(),
            nn.Linear(12, 3),
            nn.BatchNorm1d(3),
        )
    )


def residual() -> nn.Module:
    return known(Residual())


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.5, batch_first=True)
    return known(nn.Sequential(layer, nn.Linear(6, 3)))


def attention() -> nn.Module:
    return known(Attention())


NETWORKS = {
    "mlp": (mlp, ((6,),)),
    "conv": (conv, ((2, 7, 7),)),
    "residual": (residual, ((2, 4, 5),)),
    "encoder": (encoder, ((5, 6),)),
    "attention": (attention, ((3, 6), (4, 4), (4, 5))),
}
UNSEEN = ("0.self_attn.out_proj.weight", "look.out_proj.weight")
networks = pytest.mark.parametrize("kind", list(NETWORKS))


def network_and_batches(kind: str, batches: int = 3, size: int = 40):
    make, shapes = NETWORKS[kind]
    given = [
        tuple(related(size, *shape, seed=10 * batch + place) for place, shape in enumerate(shapes))
        for batch in range(batches)
    ]
    return make(), given if len(shapes) > 1 else [one for (one,) in given]


def changed(module: nn.Module, mask: Mask, values=None) -> nn.Module:
    """A copy of the network, pruned, with other values."""
    other = deepcopy(module)
    with torch.no_grad():
        for name, value in (values or {}).items():
            dict([*other.named_parameters(), *other.named_buffers()])[name].copy_(value)
        for name, kept in mask.items():
            other.get_parameter(name).masked_fill_(~kept, 0)
    return other


def calls_of(module: nn.Module, batches) -> dict[str, list]:
    """For each module's name all calls of it on the batches: inputs and output."""
    found, module = defaultdict(list), deepcopy(module).eval()
    for name, part in module.named_modules():
        part.register_forward_hook(
            lambda _, given, named, output, name=name: found[name].append(((*given, *named.values()), output)),
            with_kwargs=True,
        )
    for batch in batches:
        module(*batch) if isinstance(batch, tuple) else module(batch)
    return found


def maps_of(module: nn.Module):
    """Each affine map of a module: name and place of its weight, its bias, and which of the inputs it takes."""
    if not isinstance(module, nn.MultiheadAttention):
        return [("weight", module.weight, module.bias, 0)]
    biases = module.in_proj_bias.chunk(3)
    if module.in_proj_weight is None:
        own = [f"{letter}_proj_weight" for letter in "qkv"]
        return [(name, getattr(module, name), biases[place], place) for place, name in enumerate(own)]
    parts = module.in_proj_weight.chunk(3)
    return [("in_proj_weight", parts[place], biases[place], place) for place in range(3)]


def rows_of(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What the map is applied to, shape (groups, rows, inputs)."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return inputs.reshape(1, -1, inputs.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    inputs = pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    lift = isinstance(module, nn.Conv1d)
    sizes = [(1, *one) if lift else one for one in (module.kernel_size, module.dilation, module.stride)]
    patches = unfold(inputs.unsqueeze(2) if lift else inputs, sizes[0], sizes[1], 0, sizes[2])
    rows = patches.movedim(1, 2).flatten(0, 1)
    return rows.unflatten(1, (module.groups, -1)).movedim(0, 1)


def fit_rows(rows: torch.Tensor) -> torch.Tensor:
    """All but the last eighth, which judge."""
    return rows[:, : rows.shape[1] - rows.shape[1] // 8]


def outputs_of(module: nn.Module, weight, bias, rows) -> torch.Tensor:
    maps = weight.reshape(len(rows), -1, rows.shape[2])
    return rows @ maps.mT + (0 if bias is None else bias.view(len(rows), 1, -1))


def by_numpy(x, y, start, kept, damping: float) -> torch.Tensor:
    found = np.zeros(start.shape)
    for group, output in np.ndindex(start.shape[:2]):
        on, rows = kept[group, output].numpy(), x[group].numpy()
        root = math.sqrt(damping * (rows**2).sum(0).mean())
        tall, before = np.concatenate([rows, root * np.eye(len(on))])[:, on], start[group, output].numpy()[on]
        missing = y[group, :, output].numpy() - rows[:, on] @ before
        change = np.linalg.lstsq(tall, np.concatenate([missing, np.zeros(len(on))]), rcond=1e-7)[0]
        found[group, output, on] = before + change
    return torch.from_numpy(found)


@torch.no_grad()
def assert_refitted(net, mask, batches, found, damping, tolerance=1e-7) -> None:
    """Every layer of the network is the best there is on what the refitted network gives it."""
    slim, pruned = changed(net, mask, found.values), changed(net, mask)
    dense_calls, slim_calls = calls_of(net.double(), batches), calls_of(slim.double(), batches)
    pruned.double()
    seen = set()
    for name, module in net.named_modules():
        if isinstance(module, _BatchNorm):
            given = torch.cat([inputs[0].movedim(1, -1).flatten(0, -2) for inputs, _ in slim_calls[name]])
            now = slim.get_submodule(name)
            assert torch.allclose(now.running_mean, given.mean(0), rtol=tolerance, atol=tolerance)
            assert torch.allclose(now.running_var, given.var(0), rtol=tolerance)
        owned = {f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)}
        if not owned & mask.keys() - set(UNSEEN):
            continue
        kept_in = deepcopy(module)
        for own, parameter in kept_in.named_parameters(recurse=False):
            full = torch.ones_like(parameter, dtype=torch.bool)
            parameter.copy_(mask.get(f"{name}.{own}", full))
        sides = zip(*(maps_of(one.get_submodule(name)) for one in (net, slim, pruned)), maps_of(kept_in), strict=True)
        for (own, weight, bias, place), after, before, kept in sides:
            x = torch.cat([fit_rows(rows_of(module, inputs[place])) for inputs, _ in slim_calls[name]], 1)
            y = torch.cat(
                [
                    fit_rows(outputs_of(module, weight, bias, rows_of(module, inputs[place])))
                    for inputs, _ in dense_calls[name]
                ],
                1,
            )
            if bias is not None:
                x = torch.cat([x, torch.ones_like(x[..., :1])], 2)

            def whole(side, x=x):
                _, weight, bias, _ = side
                maps = weight.reshape(len(x), -1, x.shape[2] - (bias is not None))
                return maps if bias is None else torch.cat([maps, bias.view(*maps.shape[:2], 1)], 2)

            exact = by_numpy(x, y, whole(before), whole(kept).bool(), damping)
            assert torch.allclose(whole(after), exact, rtol=tolerance, atol=tolerance)
            errors = [float((x @ whole(side).mT - y).square().sum()) for side in (after, before)]
            assert errors[0] <= errors[1]
            seen.add(f"{name}.{own}")
    assert seen == set(mask) - set(UNSEEN)
    for name, kept in mask.items():
        assert not found.values[name][~kept].any()


def same(one, other) -> bool:
    return (
        one.undone == other.undone
        and one.values.keys() == other.values.keys()
        and all(torch.equal(one.values[name], other.values[name]) for name in one.values)
    )


def alike(one, other) -> bool:
    """Up to rounding."""
    return (
        one.undone == other.undone
        and one.values.keys() == other.values.keys()
        and all(torch.allclose(one.values[name], other.values[name], rtol=1e-8, atol=1e-8) for name in one.values)
    )


@networks
@pytest.mark.parametrize("damping", [1e-8, 1e-3, 0.1])
@pytest.mark.parametrize("density", [0.4, 0.8])
def test_every_layer_is_the_best_on_what_it_is_given(kind, density, damping):
    net, batches = network_and_batches(kind)
    mask = mask_of(net, density, without=UNSEEN)
    found = Calibration(net, batches).refit(mask, LeastSquares(damping=damping))
    assert found.undone == {}
    assert_refitted(net, mask, batches, found, damping)


@pytest.mark.parametrize("kind", ["mlp", "conv", "residual"])
def test_undamped_survivors_are_those_of_least_squares(kind):
    net, batches = network_and_batches(kind)
    mask = mask_of(net, 0.5)
    found = Calibration(net, batches).refit(mask, LeastSquares(damping=0))
    assert found.undone == {}
    assert_refitted(net, mask, batches, found, 0.0)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_single_precision_is_enough(kind):
    net, batches = network_and_batches(kind)
    net, batches = net.float(), [batch.float() for batch in batches]
    mask = mask_of(net, 0.5)
    found = Calibration(net, batches).refit(mask, LeastSquares(damping=1e-3))
    assert {value.dtype for value in found.values.values()} == {torch.float32}
    assert_refitted(net, mask, [batch.double() for batch in batches], found, 1e-3, tolerance=1e-5)


def test_half_precision_comes_closer_than_mere_pruning():
    net, batches = network_and_batches("mlp")
    net, batches = net.bfloat16(), [batch.bfloat16() for batch in batches]
    mask = mask_of(net, 0.5)
    found = Calibration(net, batches).refit(mask, LeastSquares())
    assert {value.dtype for value in found.values.values()} == {torch.bfloat16}
    assert found.undone == {}
    assert all(not found.values[name][~kept].any() for name, kept in mask.items())
    wanted, pruned, slim = (
        torch.cat([one(batch) for batch in batches]).double()
        for one in (net, changed(net, mask), changed(net, mask, found.values))
    )
    assert (slim - wanted).square().mean() < 0.7 * (pruned - wanted).square().mean()


@pytest.mark.parametrize("kind", ["mlp", "conv", "encoder"])
def test_one_batch_says_what_many_say(kind):
    net, batches = network_and_batches(kind, batches=4, size=16)
    # of each batch the last two samples judge
    alone = torch.cat([*(batch[:14] for batch in batches), *(batch[14:] for batch in batches)])
    mask = mask_of(net, without=UNSEEN)
    many, one = (Calibration(net, given).refit(mask, LeastSquares()) for given in (batches, [alone]))
    assert alike(many, one)


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.again, self.last, self.spare = nn.Linear(5, 5), nn.Linear(5, 3), nn.Linear(5, 5)

    def forward(self, x):
        return self.last(torch.tanh(self.again(torch.tanh(self.again(x)))))


@torch.no_grad()
@pytest.mark.parametrize("most_bytes", [0, 2**29])
def test_a_layer_called_twice_is_fitted_to_both_calls(most_bytes, monkeypatch):
    set_limits(monkeypatch, dense_output_bytes=most_bytes)
    net, batches = known(Repeated()), [numbers(40, 5, seed=seed) for seed in range(3)]
    mask = mask_of(net, 0.6)
    found = Calibration(net, batches).refit(mask, LeastSquares(damping=1e-4))
    assert found.undone == {}
    pruned, dense = changed(net, mask), net
    calls = zip(calls_of(pruned, batches)["again"], calls_of(dense, batches)["again"], strict=True)
    pairs = [(given[:35], output[:35]) for ((given,), _), (_, output) in calls]
    x, y = (torch.cat(side) for side in zip(*pairs, strict=True))
    assert len(x) == 2 * 3 * 35
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    start = torch.cat([pruned.again.weight, pruned.again.bias.unsqueeze(1)], 1)
    kept = torch.cat([mask["again.weight"], torch.ones(5, 1, dtype=torch.bool)], 1)
    exact = by_numpy(x[None], y[None], start[None], kept[None], 1e-4)[0]
    assert torch.allclose(found.values["again.weight"], exact[:, :5], atol=1e-7)
    assert torch.allclose(found.values["again.bias"], exact[:, 5], atol=1e-7)


@networks
def test_equal_masks_are_refitted_equally(kind):
    net, batches = network_and_batches(kind)
    calibration = Calibration(net, batches)
    masks = [mask_of(net, seed=seed, without=UNSEEN) for seed in range(2)]
    first = [calibration.refit(mask, LeastSquares()) for mask in masks]
    assert not alike(*first)
    for mask, before in zip(masks, first, strict=True):
        assert alike(calibration.refit(mask, LeastSquares()), before)
        assert alike(Calibration(net, batches).refit(mask, LeastSquares()), before)


@networks
def test_equal_calibrations_refit_alike_to_the_bit(kind):
    net, batches = network_and_batches(kind)
    masks = [mask_of(net, seed=seed, without=UNSEEN) for seed in range(2)]
    calibrations = Calibration(net, batches), Calibration(net, batches)
    one, other = ([each.refit(mask, LeastSquares()) for mask in masks] for each in calibrations)
    assert all(same(*pair) for pair in zip(one, other, strict=True))


def test_a_refit_does_not_depend_on_those_before_it_to_the_bit():
    net, batches = network_and_batches("mlp")
    calibration, mask = Calibration(net, batches), mask_of(net)
    assert same(calibration.refit(mask, LeastSquares()), calibration.refit(mask, LeastSquares()))


@pytest.mark.parametrize("how", [Refit(), LeastSquares()])
def test_a_batch_norm_that_comes_first_is_refitted_every_time(how):
    net = known(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)))
    mask, batches = mask_of(net), [numbers(40, 6)]
    calibration = Calibration(net, batches)
    assert same(calibration.refit(mask, how), calibration.refit(mask, how))


def test_running_statistics_alone_are_refitted_every_time():
    net, batches = network_and_batches("conv")
    calibration, mask = Calibration(net, batches), mask_of(net)
    assert same(calibration.refit(mask, Refit()), calibration.refit(mask, Refit()))


class Either(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        first, second = (self.a, self.b) if len(x) > 45 else (self.b, self.a)
        return second(torch.tanh(first(x)))


def test_the_first_layer_may_differ_between_batches():
    net, batches = known(Either()), [numbers(48, 4), numbers(40, 4, seed=1)]
    calibration = Calibration(net, batches)
    calibration.refit(mask_of(net, seed=1), LeastSquares())
    mask = mask_of(net, seed=2)
    assert alike(calibration.refit(mask, LeastSquares()), Calibration(net, batches).refit(mask, LeastSquares()))


@networks
@pytest.mark.parametrize("most_bytes", [0, 10_000])
def test_outputs_computed_again_are_those_kept(kind, most_bytes, monkeypatch):
    net, batches = network_and_batches(kind)
    mask = mask_of(net, without=UNSEEN)
    kept = Calibration(net, batches).refit(mask, LeastSquares())
    set_limits(monkeypatch, dense_output_bytes=most_bytes)
    again = Calibration(net, batches)
    for _ in range(2):
        assert alike(again.refit(mask, LeastSquares()), kept)


def test_a_mere_refit_changes_running_statistics_alone():
    net, batches = network_and_batches("conv")
    mask = mask_of(net)
    found = Calibration(net, batches).refit(mask, Refit())
    assert found.undone == {}
    statistics = {name for name, _ in net.named_buffers() if "running" in name}
    assert found.values.keys() == {*mask, *statistics}
    pruned = changed(net, mask)
    assert all(torch.equal(found.values[name], pruned.get_parameter(name)) for name in mask)
    slim = changed(net, mask, found.values)
    for name, calls in calls_of(slim, batches).items():
        if isinstance(slim.get_submodule(name), _BatchNorm):
            given = torch.cat([inputs[0].movedim(1, -1).flatten(0, -2) for inputs, _ in calls])
            assert torch.allclose(found.values[f"{name}.running_mean"], given.mean(0))
            assert torch.allclose(found.values[f"{name}.running_var"], given.var(0))


def test_frozen_biases_and_layers_without_a_mask_stay():
    net, batches = network_and_batches("mlp")
    net[0].bias.requires_grad_(False)
    mask = mask_of(net, without=("2.weight",))
    found = Calibration(net, batches).refit(mask, LeastSquares())
    assert found.values.keys() == {"0.weight", "4.weight", "4.bias"}
    x = torch.cat([batch[:35] for batch in batches])[None]
    y = x @ net[0].weight.detach().mT
    exact = by_numpy(x, y, net[0].weight.detach()[None], mask["0.weight"][None], 1e-3)
    assert torch.allclose(found.values["0.weight"], exact[0], atol=1e-7)


def test_what_a_layer_is_given_is_seen_behind_its_own_hooks():
    net, batches = network_and_batches("mlp")
    handle = net[0].register_forward_pre_hook(lambda _, given: (given[0] * 2 + 1,))
    mask = mask_of(net)
    found = Calibration(net, batches).refit(mask, LeastSquares())
    handle.remove()
    other = Calibration(net, [batch * 2 + 1 for batch in batches]).refit(mask, LeastSquares())
    assert same(found, other)


def test_a_batch_may_be_a_list_and_run_may_run_it():
    net, batches = network_and_batches("attention")
    mask = mask_of(net, without=UNSEEN)
    expected = Calibration(net, batches).refit(mask, LeastSquares())
    assert same(Calibration(net, [list(batch) for batch in batches]).refit(mask, LeastSquares()), expected)
    net.eval()
    run = Calibration(net, 3, run=lambda number: net(*batches[number]))
    assert run.batches == 3
    assert same(run.refit(mask, LeastSquares()), expected)


def state_of(module: nn.Module):
    """All that a caller could see of a network, as bytes."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    grads = {name: None if one.grad is None else one.grad.numpy().tobytes() for name, one in module.named_parameters()}
    return (
        {name: one.detach().numpy().tobytes() for name, one in tensors},
        {name: (id(one), one.data_ptr(), one.requires_grad) for name, one in tensors},
        grads,
        {name: part.training for name, part in module.named_modules()},
        {name: (len(part._forward_pre_hooks), len(part._forward_hooks)) for name, part in module.named_modules()},
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    )


def unlike(net: nn.Module) -> nn.Module:
    """With modes mixed, a negative zero, gradients and a frozen parameter."""
    net.train()
    list(net.children())[-1].eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.view(-1)[0] = -0.0
            parameter.grad = torch.ones_like(parameter)
    list(net.parameters())[-1].requires_grad_(False)
    return net


@networks
def test_the_network_is_given_back_bit_for_bit(kind):
    net, batches = network_and_batches(kind)
    unlike(net)
    mask, before = mask_of(net, without=UNSEEN), state_of(net)
    calibration = Calibration(net, batches)
    for how in (LeastSquares(), Refit()):
        calibration.refit(mask, how)
        assert state_of(net) == before
        calibration.others(mask, how)
        calibration.left_alone(mask, how)
        assert state_of(net) == before
    calibration.scales("obs", mask, {"0.bias": torch.full((12,), 7.0)} if kind == "mlp" else {})
    assert state_of(net) == before


class Trap(nn.Module):
    """Passes on what it is given, so often."""

    def __init__(self) -> None:
        super().__init__()
        self.left = math.inf

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of luck")
        return x


@pytest.mark.parametrize("most_bytes", [0, 2**29])
@pytest.mark.parametrize("passes", [0, 1, 3, 4, 6])
def test_a_forward_that_raises_leaves_the_network_as_it_was(passes, most_bytes, monkeypatch):
    set_limits(monkeypatch, dense_output_bytes=most_bytes)
    net, batches = network_and_batches("conv")
    net.insert(5, Trap())
    mask, calibration = mask_of(unlike(net)), Calibration(net, batches)
    expected = calibration.refit(mask, LeastSquares())
    for one in (calibration, Calibration(net, batches)):
        before, net[5].left = state_of(net), passes if one is not calibration else min(passes, 2)
        with pytest.raises(RuntimeError, match="out of luck"):
            one.refit(mask, LeastSquares())
        assert state_of(net) == before
        net[5].left = math.inf
        assert alike(one.refit(mask, LeastSquares()), expected)


class Careful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        try:
            return self.b(torch.tanh(self.a(x)))
        except Exception as caught:
            raise AssertionError("the network saw what was none of its business") from caught


def test_a_network_that_catches_exceptions_does_not_notice():
    net, batches = known(Careful()), [related(40, 4, seed=seed) for seed in range(2)]
    mask = mask_of(net)
    found = Calibration(net, batches).refit(mask, LeastSquares())
    assert_refitted(net, mask, batches, found, 1e-3)


class Counting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return super().forward(x)


def test_buffers_that_the_network_writes_itself_are_given_back():
    net = nn.Sequential(Counting())
    Calibration(net, [numbers(40, 4).float()]).refit(mask_of(net), LeastSquares())
    assert net[0].count == 0


def noise(rows: int) -> tuple[nn.Module, Mask, list[torch.Tensor]]:
    """Of a wide layer more is kept than the rows can tell apart, and the kept know nothing of the others."""
    net = known(nn.Sequential(nn.Linear(40, 5), nn.Tanh(), nn.Linear(5, 2)))
    kept = torch.zeros(5, 40, dtype=torch.bool)
    kept[:, :24] = True
    return net, Mask({"0.weight": kept}), [numbers(rows, 40)]


def test_a_fit_that_is_worse_on_rows_held_back_is_undone():
    net, mask, batches = noise(32)
    found = Calibration(net, batches).refit(mask, LeastSquares(damping=1e-9))
    assert found.undone == {"0.weight": WORSE}
    pruned = changed(net, mask)
    assert torch.equal(found.values["0.weight"], pruned[0].weight)
    assert torch.equal(found.values["0.bias"], net[0].bias)


def test_a_fit_on_rows_enough_is_not_undone():
    net, mask, batches = noise(3200)
    net[0].bias.data += 0.5
    batches = [batch + 1 for batch in batches]
    assert Calibration(net, batches).refit(mask, LeastSquares(damping=1e-9)).undone == {}


def test_layers_after_one_that_was_undone_are_refitted():
    net, mask, batches = noise(32)
    mask = Mask({**mask, "2.weight": torch.tensor([[True, False, True, False, True]] * 2)})
    found = Calibration(net, batches).refit(mask, LeastSquares(damping=1e-9))
    assert "0.weight" in found.undone
    assert not torch.equal(found.values["2.weight"], changed(net, mask)[2].weight)


def test_a_fit_too_large_for_the_weights_is_undone():
    net = nn.Sequential(nn.Linear(2, 3, bias=False))
    x = numbers(40, 1).float()
    mask = Mask({"0.weight": torch.tensor([[True, False]] * 3)})
    found = Calibration(net, [torch.cat([x * 1e-25, x * 1e18], 1)]).refit(mask, LeastSquares(damping=0))
    assert found.undone == {"0.weight": "its inputs or its solved weights are not finite"}
    assert torch.equal(found.values["0.weight"], changed(net, mask)[0].weight)


@pytest.mark.parametrize("damping", [0.0, 1e-3])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_fit_to_inputs_that_are_not_finite_is_undone(value, damping):
    net, batches = network_and_batches("mlp")
    batches[0][3, 2] = value
    mask = mask_of(net)
    found = Calibration(net, batches).refit(mask, LeastSquares(damping=damping))
    assert found.undone.keys() == mask.keys()
    assert all(torch.equal(found.values[name], changed(net, mask).get_parameter(name)) for name in mask)


def test_what_is_not_pruned_is_not_undone():
    for seed in range(5):
        net, batches = mlp(), [numbers(40, 6, seed=seed)]
        mask = Mask.full(prunable_parameters(net))
        found = Calibration(net, batches).refit(mask, LeastSquares())
        assert all(torch.allclose(found.values[name], net.get_parameter(name), atol=1e-6) for name in mask)
        assert found.undone == {}


class Choosy(nn.Module):
    """Looks at long batches with one layer more."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.long, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.c(torch.tanh(self.long(h)) if len(x) > 45 else h)


@pytest.mark.parametrize("most_bytes", [0, 2**29])
@pytest.mark.parametrize("sizes", [(48, 40, 48), (48, 48, 40)])
def test_a_layer_may_be_called_on_some_batches_only(sizes, most_bytes, monkeypatch):
    set_limits(monkeypatch, dense_output_bytes=most_bytes)
    net, batches = known(Choosy()), [related(size, 4, seed=seed) for seed, size in enumerate(sizes)]
    mask = mask_of(net)
    found = Calibration(net, batches).refit(mask, LeastSquares())
    assert found.undone == {}
    assert_refitted(net, mask, batches, found, 1e-3)


class Fickle(nn.Module):
    """Calls a layer as often as its own numbers say, or with as many rows."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.a, self.loop, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.rows, self.runs = rows, 0

    def forward(self, x):
        self.runs += 1
        assert self.runs < 200
        h = self.a(x)
        if self.rows:
            return self.c(h), self.loop(h[h[:, 0] > 0])
        y = x
        for _ in range(2 if h.var(0).mean() > 1e-3 else self.least):
            y = self.loop(y)
        return self.c(torch.tanh(x))


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("most_bytes", [0, 2**29])
def test_a_network_that_calls_a_layer_less_when_pruned_is_not_waited_for(least, most_bytes, monkeypatch):
    set_limits(monkeypatch, dense_output_bytes=most_bytes)
    net, batches = known(Fickle(rows=False)), [related(40, 4, seed=seed) for seed in range(3)]
    net.least = least
    mask = Mask({**mask_of(net), "a.weight": torch.zeros(4, 4, dtype=torch.bool)})
    found = Calibration(net, batches).refit(mask, LeastSquares())
    assert found.undone["loop.weight"] == "the pruned network does not call it as the dense network does"
    assert "c.weight" not in found.undone
    assert torch.equal(found.values["loop.weight"], changed(net, mask).loop.weight)
    assert not torch.equal(found.values["c.weight"], changed(net, mask).c.weight)


def test_a_network_that_gives_a_layer_other_rows_when_pruned_is_left_there():
    net, batches = known(Fickle(rows=True)), [related(40, 4)]
    with torch.no_grad():
        net.a.bias[0] = -0.1
    mask = Mask({**mask_of(net), "a.weight": torch.zeros(4, 4, dtype=torch.bool)})
    found = Calibration(net, batches).refit(mask, LeastSquares())
    assert "c.weight" not in found.undone
    dense = int((net.a(batches[0])[:, 0] > 0).sum())
    slim = int((changed(net, mask, found.values).a(batches[0])[:, 0] > 0).sum())
    assert found.undone["loop.weight"] == f"the pruned network gives it {slim} rows of input, the dense network {dense}"
    assert not torch.equal(found.values["c.weight"], changed(net, mask).c.weight)


def test_what_is_left_alone_is_named_and_merely_pruned():
    net, batches = network_and_batches("encoder")
    mask = mask_of(net)
    calibration = Calibration(net, batches)
    unseen = "the network does not call it on the calibration inputs"
    assert calibration.left_alone(mask, LeastSquares()) == {UNSEEN[0]: unseen}
    assert calibration.left_alone(mask, Refit()) == {}
    found = calibration.refit(mask, LeastSquares())
    assert torch.equal(found.values[UNSEEN[0]], changed(net, mask).get_parameter(UNSEEN[0]))
    assert "0.self_attn.out_proj.bias" not in found.values or torch.equal(
        found.values["0.self_attn.out_proj.bias"], net.get_parameter("0.self_attn.out_proj.bias")
    )
    assert alike(calibration.refit(mask, LeastSquares()), found)
    assert_refitted(net, mask, batches, found, 1e-3)


def test_a_layer_that_is_never_called_is_left_alone():
    net, batches = known(Repeated()), [numbers(40, 5)]
    mask, calibration = mask_of(net), Calibration(net, batches)
    assert list(calibration.left_alone(mask, LeastSquares())) == ["spare.weight"]
    found = calibration.refit(mask, LeastSquares())
    assert torch.equal(found.values["spare.weight"], changed(net, mask).spare.weight)
    assert torch.equal(found.values["spare.bias"], net.spare.bias)


@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
def test_biases_are_pruned_like_weights(kind):
    net, batches = network_and_batches(kind)
    weights = prunable_parameters(net)
    biases = {name: one for name, one in net.named_parameters() if name.endswith("bias") and one.dim() == 1}
    norms = {f"{name}.bias" for name, part in net.named_modules() if isinstance(part, _BatchNorm)}
    biases = {name: one for name, one in biases.items() if name not in norms}
    mask = Mask({**mask_of(net), **{name: torch.arange(len(one)) % 2 == 0 for name, one in biases.items()}})
    calibration = Calibration(net, batches)
    found = calibration.refit(mask, LeastSquares())
    assert biases.keys() <= found.values.keys()
    assert all(not found.values[name][~mask[name]].any() for name in mask)
    some = [name for name in biases if not torch.equal(found.values[name][mask[name]], biases[name][mask[name]])]
    assert some
    seen = {name: weights[name] for name in weights if name not in calibration.left_alone(mask, LeastSquares())}
    scales = calibration.scales("activation", Mask.full(seen | {name: biases[name] for name in some}), {})
    assert all(torch.equal(scales[name], torch.ones_like(scales[name])) for name in some)


@pytest.mark.parametrize("batches", [DataLoader(TensorDataset(numbers(8, 4)), 2), numbers(8, 4), None])
def test_batches_are_a_list(batches):
    with pytest.raises(TypeError, match=f"batches is a {type(batches).__name__}, but must be a list of batches"):
        Calibration(nn.Linear(4, 2).double(), batches)


def test_what_has_no_layer_is_left_alone():
    net = nn.Sequential(nn.LSTM(4, 3))
    mask = mask_of(net)
    calibration = Calibration(net, [numbers(20, 4).float()])
    assert calibration.left_alone(mask, LeastSquares()).keys() == mask.keys()
    found = calibration.refit(mask, LeastSquares())
    assert found.undone == {}
    assert all(torch.equal(found.values[name], changed(net, mask).get_parameter(name)) for name in mask)


@pytest.mark.parametrize("how", [Refit(), LeastSquares()])
def test_others_are_what_a_refit_may_change_beside_the_weights(how):
    net, batches = network_and_batches("conv")
    calibration, mask = Calibration(net, batches), mask_of(net)
    others = calibration.others(mask, how)
    assert others.keys() == calibration.refit(mask, how).values.keys() - mask.keys()
    tensors = dict([*net.named_parameters(), *net.named_buffers()])
    assert all(torch.equal(others[name], tensors[name]) for name in others)
    next(iter(others.values())).fill_(9)
    assert not any((tensors[name] == 9).all() for name in others)


@pytest.mark.parametrize("kind", ["mlp", "conv", "encoder", "attention"])
@pytest.mark.parametrize("refitted", [False, True])
def test_scales_follow_their_formulas(kind, refitted):
    net, batches = network_and_batches(kind)
    mask = mask_of(net, 0.6, without=UNSEEN)
    calibration = Calibration(net, batches)
    values = calibration.refit(mask, LeastSquares()).values if refitted else {}
    slim = changed(net, mask, values)
    calls = calls_of(slim, batches)
    activation, obs = (calibration.scales(word, mask, values, 0.01) for word in ("activation", "obs"))
    assert activation.keys() == obs.keys() == mask.keys()
    for name, found in activation.items():
        prefix, _, own = name.rpartition(".")
        module, exact, surgeon = slim.get_submodule(prefix), [], []
        for weight_name, weight, bias, place in maps_of(module):
            if weight_name != own:
                continue
            x = torch.cat([rows_of(module, inputs[place]) for inputs, _ in calls[prefix]], 1).detach()
            y = outputs_of(module, weight, bias, x).detach()
            exact.append(x.square().mean(1).sqrt()[:, None].expand(-1, y.shape[2], -1).reshape(weight.shape))
            kept = (weight != 0).reshape(len(x), -1, x.shape[2])
            if bias is not None:
                x = torch.cat([x, torch.ones_like(x[..., :1])], 2)
                kept = torch.cat([kept, torch.ones_like(kept[..., :1])], 2)
            spread = float((y.var(1, unbiased=False) if bias is not None else y.square().mean(1)).sum())
            costs = removal_costs(x, kept, 0.01) * (x.square().sum(1, keepdim=True) > 0)
            surgeon.append((costs[..., : weight[0].numel()] / spread).sqrt().reshape(weight.shape))
        assert torch.allclose(found, torch.cat(exact), rtol=1e-9)
        assert torch.allclose(obs[name], torch.cat(surgeon), rtol=1e-6)


def removal_costs(x, kept, damping: float) -> torch.Tensor:
    """One over the diagonal of the inverse of the damped mean Gram matrix; nothing where not kept."""
    found = np.zeros(kept.shape)
    for group, output in np.ndindex(kept.shape[:2]):
        on, rows = kept[group, output].numpy(), x[group].numpy()
        gram = rows.T @ rows / len(rows)
        gram = gram + damping * np.diag(gram).mean() * np.eye(len(gram))
        found[group, output, on] = 1 / np.diag(np.linalg.inv(gram[np.ix_(on, on)]))
    return torch.from_numpy(found)


def dead_channels(*dead: int):
    net, x = known(nn.Sequential(nn.Conv2d(2, 2, 3, groups=2, bias=False))), numbers(8, 2, 6, 6)
    x[:, dead] = 0
    return net, Mask.full(prunable_parameters(net)), Calibration(net, [x])


@pytest.mark.parametrize("word", ["activation", "obs"])
def test_a_weight_that_is_given_zeros_alone_is_worth_next_to_nothing(word):
    _, mask, calibration = dead_channels(1)
    found = calibration.scales(word, mask, {})["0.weight"]
    assert found[1].max() <= 1e-5 * found[0].min()


@pytest.mark.parametrize("word", ["activation", "obs"])
def test_weights_of_a_layer_that_is_given_zeros_alone_are_worth_next_to_nothing(word):
    _, mask, calibration = dead_channels(0, 1)
    assert calibration.scales(word, mask, {})["0.weight"].max() <= 1e-5


def test_weights_that_are_given_zeros_alone_are_merely_pruned():
    net, full, calibration = dead_channels(1)
    mask = Mask({name: kept & (numbers(*kept.shape) > -0.5) for name, kept in full.items()})
    found = calibration.refit(mask, LeastSquares())
    assert torch.allclose(found.values["0.weight"][1], changed(net, mask)[0].weight[1])


@pytest.mark.parametrize("word", ["activation", "obs"])
def test_scales_of_inputs_that_are_not_finite_are_refused(word):
    net, batches = network_and_batches("mlp")
    batches[1][3, 2] = math.inf
    with pytest.raises(ValueError, match=f"importance is '{word}', but some inputs of .0.weight. are not fin"):
        Calibration(net, batches).scales(word, mask_of(net), {})


@pytest.mark.parametrize("word", ["activation", "obs"])
def test_scales_of_what_is_not_seen_are_refused(word):
    net, batches = known(Repeated()), [numbers(40, 5)]
    with pytest.raises(ValueError, match=rf"importance is '{word}', but the inputs of .spare.weight. are not known"):
        Calibration(net, batches).scales(word, mask_of(net), {})


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="batches is empty, but must have at least one batch of inputs"):
        Calibration(mlp(), [])
    with pytest.raises(ValueError, match="batches is empty"):
        Calibration(mlp(), 0, run=print)


def test_a_number_of_batches_without_a_run_is_refused():
    with pytest.raises(TypeError, match="batches is 3, but must be a list of inputs if run is None"):
        Calibration(mlp(), 3)


@pytest.fixture
def rows_seen(monkeypatch):
    """How many rows each sum of products was given."""
    seen, add = [], GramSums.add

    def counted(self, x, y):
        seen.append(x.shape[1])
        add(self, x, y)

    monkeypatch.setattr(GramSums, "add", counted)
    return seen


@pytest.mark.parametrize(("rows", "batches", "seen"), [(64, 2, 64), (100, 3, 99), (10_000, 2, 400), (20, 2, 20)])
def test_a_layer_sees_no_more_rows_than_asked(rows, batches, seen, rows_seen):
    net = known(nn.Sequential(nn.Linear(6, 3)))
    calibration = Calibration(net, [numbers(200, 6, seed=seed) for seed in range(batches)], rows=rows)
    calibration.refit(mask_of(net), LeastSquares())
    assert sum(rows_seen) == seen
    rows_seen.clear()
    calibration.scales("obs", mask_of(net), {})
    assert sum(rows_seen) == seen


@pytest.mark.parametrize(("rows", "batches", "twice", "seen"), [(16, 5, False, 40), (64, 2, True, 128)])
def test_of_each_call_so_many_rows_are_looked_at_and_eight_at_least(rows, batches, twice, seen, rows_seen):
    net = known(Repeated() if twice else nn.Sequential(nn.Linear(5, 3)))
    mask = Mask({name: kept for name, kept in mask_of(net).items() if name in ("0.weight", "again.weight")})
    given = [numbers(200, 5, seed=seed) for seed in range(batches)]
    Calibration(net, given, rows=rows).refit(mask, LeastSquares())
    assert sum(rows_seen) == seen


@networks
def test_a_choice_of_rows_is_the_same_for_the_same_seed(kind):
    net, batches = network_and_batches(kind, size=80)
    mask = mask_of(net, 0.6, without=UNSEEN)

    def refit(seed):
        return Calibration(net, batches, rows=150, seed=seed).refit(mask, LeastSquares())

    assert same(refit(1), refit(1))
    assert not same(refit(1), refit(2))


def test_rows_chosen_are_the_same_positions_pruned_and_dense():
    net, batches = network_and_batches("conv", size=80)
    mask = mask_of(net, 0.6)
    some, all_rows = (Calibration(net, batches, rows=rows).refit(mask, LeastSquares()) for rows in (600, 2**16))
    assert some.undone == all_rows.undone == {}
    for name in mask:
        far = (changed(net, mask).get_parameter(name) - all_rows.values[name]).norm()
        assert (some.values[name] - all_rows.values[name]).norm() < 0.8 * far


def test_survivors_are_stored_and_spread_again():
    net, batches = network_and_batches("conv")
    mask = mask_of(net)
    found = Calibration(net, batches).refit(mask, LeastSquares())
    survivors = Survivors.of(mask, found.values)
    assert sum(survivors.values[name].numel() for name in mask) == mask.survivors
    spread = survivors.spread(mask, dict(net.named_parameters()))
    assert spread.keys() == found.values.keys()
    assert all(torch.equal(spread[name], found.values[name]) for name in spread)


class Late(nn.Module):
    """Its first layer comes behind weights that no refit sees."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


@pytest.mark.parametrize("make", [Late, Repeated])
def test_what_pruned_weights_change_is_not_remembered(make):
    net, batches = known(make()), [related(40, 5, seed=seed) for seed in range(2)]
    names = ("lstm.weight_ih_l0", "head.weight", "again.weight", "last.weight")
    masks = [Mask({n: kept for n, kept in mask_of(net, seed=seed).items() if n in names}) for seed in range(2)]
    calibration = Calibration(net, batches)
    for mask in masks:
        found = calibration.refit(mask, LeastSquares())
        assert alike(found, Calibration(net, batches).refit(mask, LeastSquares()))
