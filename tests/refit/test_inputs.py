"""Calibration: each refit against NumPy on the inputs of the layers, and the laws over a table of networks."""

from __future__ import annotations

import math
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from itertools import product
from threading import Lock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import pad, unfold
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

from lightning_roulette.large.copies import TensorFile
from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.parameters import prunable_parameters
from lightning_roulette.refit.gram import LayerSums
from lightning_roulette.refit.inputs import Calibration
from lightning_roulette.refit.refitted import Survivors
from lightning_roulette.refit_settings import LeastSquares, Refit
from tests.support.exact import exact_diagonals, exact_fit
from tests.support.networks import (
    KINDS,
    PLAIN,
    Repeated,
    case,
    changed,
    known,
    mask_of,
    mlp,
    numbers,
    related,
    slow_but_for_a_few,
    state_of,
)

ATTENTION = nn.MultiheadAttention
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)

plain = pytest.mark.parametrize("kind", PLAIN)
kinds = pytest.mark.parametrize("kind", KINDS)
most_kinds = pytest.mark.parametrize("kind", [slow_but_for_a_few(kind) for kind in KINDS])
memories = pytest.mark.parametrize("memory", [0, 20_000, 2**31])
words = pytest.mark.parametrize("word", ["activation", "obs"])


def calls_of(module: nn.Module, batches) -> dict[str, list]:
    """By each module's name, the inputs and the output of all its calls on the batches."""
    found, module = defaultdict(list), deepcopy(module).eval()
    inside = {name: with_identity(part) for name, part in module.named_modules() if isinstance(part, ATTENTION)}

    def note(name, given, named, output):
        found[name].append(((*given, *named.values()), output))
        if name in inside:  # the output projection is not called
            found[f"{name}.out_proj"].append((inside[name](*given, **named)[:1], output[0]))

    for name, part in module.named_modules():
        part.register_forward_hook(
            lambda _, given, named, output, name=name: note(name, given, named, output), with_kwargs=True
        )
    for batch in batches:
        module(*batch) if isinstance(batch, tuple) else module(batch)
    return found


def with_identity(attention: nn.MultiheadAttention) -> nn.Module:
    """The attention without its output projection."""
    other = deepcopy(attention)
    other.out_proj.weight.data = torch.eye(attention.embed_dim, dtype=torch.float64)
    nn.init.zeros_(other.out_proj.bias)
    return other


def maps_of(module: nn.Module):
    """Each affine map of a module: name of its weight, weight, bias, and the place of its input."""
    if isinstance(module, TRANSPOSED):  # in the form of a convolution's weight: outputs first
        weight = module.weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
        return [("weight", weight, module.bias, 0)]
    if not isinstance(module, nn.MultiheadAttention):
        return [("weight", module.weight, module.bias, 0)]
    if module.in_proj_weight is None:
        parts = [(name, getattr(module, name)) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    else:
        parts = [("in_proj_weight", part) for part in module.in_proj_weight.chunk(3)]
    return [
        (*part, bias, place) for place, (part, bias) in enumerate(zip(parts, module.in_proj_bias.chunk(3), strict=True))
    ]


def rows_of(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Rows of input of the map, shape (groups, rows, inputs)."""
    if isinstance(module, TRANSPOSED):
        return transposed_rows_of(module, inputs)
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return inputs.reshape(1, -1, inputs.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    inputs = pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    lift = isinstance(module, nn.Conv1d)
    sizes = [(1, *one) if lift else one for one in (module.kernel_size, module.dilation, module.stride)]
    patches = unfold(inputs.unsqueeze(2) if lift else inputs, sizes[0], sizes[1], 0, sizes[2])
    return patches.movedim(1, 2).flatten(0, 1).unflatten(1, (module.groups, -1)).movedim(0, 1)


def transposed_rows_of(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What a transposed convolution makes of its input with each entry of its weight set to one alone."""
    alone = torch.eye(module.weight[:, 0].numel() // module.groups, dtype=inputs.dtype)
    alone, ones = alone.unflatten(0, (-1, *module.kernel_size)).movedim(-1, 1), deepcopy(module)
    ones.weight.data, ones.bias = torch.cat([alone] * module.groups), None
    return ones(inputs).movedim(1, -1).unflatten(-1, (module.groups, -1)).flatten(0, -3).movedim(0, 1)


def fitted_rows(rows: torch.Tensor) -> torch.Tensor:
    """All but the last eighth, which judges the fit."""
    return rows[:, : rows.shape[1] - rows.shape[1] // 8]


def outputs_of(weight, bias, rows) -> torch.Tensor:
    matrix = weight.reshape(len(rows), -1, rows.shape[2])
    return rows @ matrix.mT + (0 if bias is None else bias.view(len(rows), 1, -1))


def with_bias(weight, bias, groups: int) -> torch.Tensor:
    """Weight and bias as one matrix, shape (groups, outputs, inputs)."""
    matrix = weight.reshape(groups, len(weight) // groups, -1)
    return matrix if bias is None else torch.cat([matrix, bias.view(*matrix.shape[:2], 1)], 2)


@torch.no_grad()
def assert_refitted(net, mask, batches, found, damping, tolerance=1e-7, left=()) -> None:
    """Each layer of the refitted network has the best weights for the inputs that the refitted network gives it."""
    net, slim, pruned = net.double(), changed(net, mask, found.values).double(), changed(net, mask).double()
    dense_calls, slim_calls = calls_of(net, batches), calls_of(slim, batches)
    kept_in = changed(net, Mask({}), {name: torch.ones_like(one) for name, one in net.named_parameters()})
    kept_in = changed(kept_in, mask)
    compared = set()
    for name, module in net.named_modules():
        if isinstance(module, _BatchNorm):
            assert_normalised(slim.get_submodule(name), slim_calls[name], tolerance)
        if not {f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)} & mask.keys() - {*left}:
            continue
        sides = zip(*(maps_of(one.get_submodule(name)) for one in (net, slim, pruned, kept_in)), strict=True)
        for (own, weight, bias, place), after, before, kept in sides:
            rows = [rows_of(module, inputs[place]) for inputs, _ in dense_calls[name]]
            y = torch.cat([fitted_rows(outputs_of(weight, bias, one)) for one in rows], 1)
            x = torch.cat([fitted_rows(rows_of(module, inputs[place])) for inputs, _ in slim_calls[name]], 1)
            x = x if bias is None else torch.cat([x, torch.ones_like(x[..., :1])], 2)
            after, before, kept = (with_bias(*side[1:3], len(x)) for side in (after, before, kept))
            exact = exact_fit(x, y, before, kept.bool(), damping, rcond=1e-7)
            assert torch.allclose(after, exact, rtol=tolerance, atol=tolerance)
            assert (x @ after.mT - y).square().sum() <= (x @ before.mT - y).square().sum()
            compared.add(f"{name}.{own}")
    assert compared == {*mask} - {*left}
    assert all(not found.values[name][~kept].any() for name, kept in mask.items())


def assert_normalised(norm: nn.Module, calls, tolerance=1e-7) -> None:
    """The running statistics are those of the inputs."""
    given = torch.cat([inputs[0].movedim(1, -1).flatten(0, -2) for inputs, _ in calls])
    assert torch.allclose(norm.running_mean, given.mean(0), rtol=tolerance, atol=tolerance)
    assert torch.allclose(norm.running_var, given.var(0), rtol=tolerance)


def same(one, other, equal=torch.equal) -> bool:
    return (
        one.undone == other.undone
        and one.values.keys() == other.values.keys()
        and all(equal(one.values[name], other.values[name]) for name in one.values)
    )


alike = partial(same, equal=partial(torch.allclose, rtol=1e-8, atol=1e-8))


def refit(net, batches, mask, how="least_squares", **options):
    return Calibration(net, batches, **options).refit(mask, how)


CASES = [*product([*PLAIN, "careful", "norm first"], [0.4, 0.8], [1e-8, 1e-3, 0.1])]


@pytest.mark.parametrize(("kind", "density", "damping"), [*CASES, *product(["mlp", "conv", "residual"], [0.5], [0.0])])
def test_every_layer_is_the_best_for_its_inputs(kind, density, damping):
    net, batches, mask = case(kind, density)
    found = refit(net, batches, mask, LeastSquares(damping=damping))
    assert found.undone == {}
    # the heads of an attention of few tokens are nearly dependent
    assert_refitted(net, mask, batches, found, damping, 2e-6 if kind in ("encoder", "attention") else 1e-7)


@memories
@pytest.mark.parametrize("sizes", [(48, 40, 48), (48, 48, 40)])
def test_a_layer_may_be_called_on_some_batches_only(sizes, memory):
    net, batches, mask = case("choosy", sizes=sizes)
    found = refit(net, batches, mask, cache_bytes=memory)
    assert found.undone == {}
    assert_refitted(net, mask, batches, found, 1e-3)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_single_precision_is_enough(kind):
    net, batches, mask = case(kind)
    batches = [batch.float() for batch in batches]
    found = refit(net.float(), batches, mask)
    assert {value.dtype for value in found.values.values()} == {torch.float32}
    assert_refitted(net, mask, [batch.double() for batch in batches], found, 1e-3, tolerance=1e-5)


def test_a_network_that_runs_in_low_precision_is_refitted_in_full_precision():
    net, inputs = nn.Linear(40, 30), (numbers(400, 8) @ numbers(8, 40, seed=1) + numbers(400, 40, seed=2)).float()
    mask = mask_of(net, 0.5)

    def run(_):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(inputs)

    plain, before = Calibration(net, [inputs]).refit(mask), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        lowered = Calibration(net, 1, run=run).refit(mask)
    finally:
        torch.set_float32_matmul_precision(before)
    assert not plain.undone
    assert all(torch.equal(lowered.values[name], value) for name, value in plain.values.items())


def test_half_precision_comes_closer_than_mere_pruning():
    net, batches, mask = case("mlp")
    net, batches = net.bfloat16(), [batch.bfloat16() for batch in batches]
    found = refit(net, batches, mask)
    assert {value.dtype for value in found.values.values()} == {torch.bfloat16}
    assert found.undone == {}
    assert all(not found.values[name][~kept].any() for name, kept in mask.items())
    wanted, pruned, slim = (
        torch.cat([one(batch) for batch in batches]).double()
        for one in (net, changed(net, mask), changed(net, mask, found.values))
    )
    assert (slim - wanted).square().mean() < 0.7 * (pruned - wanted).square().mean()


@torch.no_grad()
@memories
def test_a_layer_called_twice_is_fitted_to_both_calls(memory):
    net, batches = known(Repeated()), [numbers(40, 5, seed=seed) for seed in range(3)]
    mask = mask_of(net, 0.6)
    found = refit(net, batches, mask, LeastSquares(damping=1e-4), cache_bytes=memory)
    pruned = changed(net, mask)
    assert found.undone == {}
    calls = zip(calls_of(pruned, batches)["again"], calls_of(net, batches)["again"], strict=True)
    pairs = [(given[:35], output[:35]) for ((given,), _), (_, output) in calls]
    x, y = (torch.cat(side) for side in zip(*pairs, strict=True))
    assert len(x) == 2 * 3 * 35
    x, start = torch.cat([x, torch.ones(len(x), 1)], 1)[None], with_bias(pruned.again.weight, pruned.again.bias, 1)
    kept = with_bias(mask["again.weight"], torch.ones(5, dtype=torch.bool), 1)
    exact = exact_fit(x, y[None], start, kept, 1e-4)
    refitted = with_bias(found.values["again.weight"], found.values["again.bias"], 1)
    assert torch.allclose(refitted, exact, atol=1e-7)


def test_frozen_biases_and_layers_without_a_mask_stay():
    net, batches, _ = case("mlp")
    net[0].bias.requires_grad_(False)
    mask = mask_of(net, without=("2.weight",))
    found = refit(net, batches, mask)
    assert found.values.keys() == {"0.weight", "4.weight", "4.bias"}
    x, weight = torch.cat([batch[:35] for batch in batches])[None], net[0].weight.detach()[None]
    exact = exact_fit(x, x @ weight.mT, weight, mask["0.weight"][None], 1e-3)
    assert torch.allclose(found.values["0.weight"], exact[0], atol=1e-7)


def test_batch_norm_changes_running_statistics_alone():
    net, batches, mask = case("conv")
    found = refit(net, batches, mask, "batch_norm")
    slim = changed(net, mask, found.values)
    assert found.undone == {}
    assert found.values.keys() == {*mask, *(name for name, _ in net.named_buffers() if "running" in name)}
    assert all(torch.equal(found.values[name], changed(net, mask).get_parameter(name)) for name in mask)
    for name, calls in calls_of(slim, batches).items():
        if isinstance(slim.get_submodule(name), _BatchNorm):
            assert_normalised(slim.get_submodule(name), calls)


@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
def test_biases_are_pruned_like_weights(kind):
    net, batches, mask = case(kind)
    weights = prunable_parameters(net)
    norms = {f"{name}.bias" for name, part in net.named_modules() if isinstance(part, _BatchNorm)}
    biases = {name: one for name, one in net.named_parameters() if name.endswith("bias") and name not in norms}
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


@most_kinds
@pytest.mark.parametrize("how", [LeastSquares(), Refit()])
def test_equal_masks_are_refitted_equally_in_any_order(kind, how):
    net, batches, _ = case(kind)
    masks = [mask_of(net, seed=seed, without=KINDS[kind].without) for seed in range(2)]
    one, other = Calibration(net, batches), Calibration(net, batches)
    first = [one.refit(mask, how) for mask in masks]
    assert not alike(*first)
    assert all(same(other.refit(mask, how), before) for mask, before in zip(masks, first, strict=True))
    for mask, before in zip(masks, first, strict=True):
        assert alike(one.refit(mask, how), before)
        assert alike(refit(net, batches, mask, how), before)


@pytest.mark.parametrize("how", [LeastSquares(), Refit()])
@pytest.mark.parametrize("kind", ["mlp", "conv", "norm first"])
def test_a_refit_repeated_is_equal_to_the_bit(kind, how):
    net, batches, mask = case(kind)
    calibration = Calibration(net, batches)
    assert same(calibration.refit(mask, how), calibration.refit(mask, how))


@most_kinds
@pytest.mark.parametrize("memory", [0, 10_000, 40_000])
def test_results_do_not_depend_on_the_memory(kind, memory):
    net, batches, mask = case(kind)
    ample, scarce = (Calibration(net, batches, cache_bytes=most) for most in (2**31, memory))
    assert all(same(scarce.refit(mask, LeastSquares()), ample.refit(mask, LeastSquares())) for _ in range(2))


@pytest.mark.parametrize("kind", ["mlp", "conv", "encoder"])
def test_one_batch_gives_the_same_as_many(kind):
    net, batches, mask = case(kind, sizes=(16,) * 4)
    # the last two samples of each batch judge the fit
    alone = torch.cat([*(batch[:14] for batch in batches), *(batch[14:] for batch in batches)])
    assert alike(refit(net, batches, mask), refit(net, [alone], mask))


def test_outputs_are_kept_in_memory_if_no_file_can_be_written(monkeypatch):
    net, batches, mask = case("conv")
    expected = refit(net, batches, mask)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(TensorFile, "add", full)
    assert same(refit(net, batches, mask, cache_bytes=0), expected)


@pytest.mark.parametrize(
    ("kind", "sizes", "memory", "runs"),
    [
        ("mlp", (40,), 0, [1, 1]),  # three layers, one run
        ("mlp", (40, 40), 0, [6, 4]),  # one run for each layer and batch; the sums of the first layer are remembered
        ("mlp", (40, 40), 2**31, [2 + 2, 2]),  # the trial, then one run for each batch
        ("conv", (40,), 0, [1, 1]),  # four layers and three batch normalisations
        ("conv", (40, 40), 0, [14, 12]),
        ("conv", (40,) * 5, 2**31, [2 + 5, 5]),  # two batches show whether they may run by turns
        ("conv", (40, 40, 40, 48, 48), 2**31, [3 + 5, 5]),  # one of another shape is tried, too
        ("repeated", (40,), 0, [2, 2]),  # what comes after a second call starts again
        ("repeated", (40, 40), 2**31, [4 + 4, 4]),
        ("late", (40,), 0, [1, 1]),
        ("choosy", (48, 40), 0, [4, 2]),  # on the long batch, the last layer follows in the same run
        ("choosy", (48, 40, 48), 2**31, [3 + 3, 3]),  # each layer is tried on two batches that call it
        ("either", (48, 40), 2**31, [3 + 3, 3]),  # the second batch calls the layers in the other order
    ],
)
def test_a_refit_runs_the_network_no_more_often_than_needed(kind, sizes, memory, runs):
    net, batches, mask = case(kind, sizes=sizes)
    counted = []
    net.register_forward_pre_hook(lambda *_: counted.append(None))
    calibration = Calibration(net, batches, cache_bytes=memory)
    calibration.others(mask, LeastSquares())
    assert len(counted) == len(sizes)
    found = []
    for _ in runs:
        counted.clear()
        calibration.refit(mask, LeastSquares())
        found.append(len(counted))
    assert found == runs


@plain
def test_the_same_seed_chooses_the_same_rows(kind):
    net, batches, mask = case(kind, 0.6, sizes=(80, 80, 80))
    one, two, other = (refit(net, batches, mask, rows=150, seed=seed) for seed in (1, 1, 2))
    assert same(one, two)
    assert not same(one, other)


def test_rows_chosen_are_the_same_positions_pruned_and_dense():
    net, batches, mask = case("conv", 0.6, sizes=(80, 80, 80))
    some, all_rows = (refit(net, batches, mask, rows=rows) for rows in (600, 2**16))
    assert some.undone == all_rows.undone == {}
    for name in mask:
        far = (changed(net, mask).get_parameter(name) - all_rows.values[name]).norm()
        assert (some.values[name] - all_rows.values[name]).norm() < 0.8 * far


@pytest.mark.parametrize(
    ("called", "rows", "sizes", "seen"),
    [
        ("once", 64, (200, 200), 64),
        ("once", 100, (200,) * 3, 99),
        ("once", 10_000, (200, 200), 400),
        ("once", 20, (200, 200), 20),
        ("once", 16, (200,) * 5, 40),  # eight of each call at least
        ("twice", 64, (200, 200), 128),
    ],
)
def test_at_most_the_given_number_of_rows_is_used(called, rows, sizes, seen, monkeypatch):
    added, add = [], LayerSums.add

    def counted(self, x, y, held_out=0):
        added.append(x.shape[1])
        add(self, x, y, held_out)

    monkeypatch.setattr(LayerSums, "add", counted)
    net = known(Repeated() if called == "twice" else nn.Sequential(nn.Linear(5, 3)))
    mask = Mask({name: kept for name, kept in mask_of(net).items() if name in ("0.weight", "again.weight")})
    calibration = Calibration(net, [numbers(size, 5, seed=seed) for seed, size in enumerate(sizes)], rows=rows)
    for work in (lambda: calibration.refit(mask), lambda: calibration.scales("obs", mask, {})):
        added.clear()
        work()
        assert sum(added) == seen


def test_inputs_of_a_layer_are_taken_after_its_own_hooks():
    net, batches, mask = case("mlp")
    handle = net[0].register_forward_pre_hook(lambda _, given: (given[0] * 2 + 1,))
    found = refit(net, batches, mask)
    handle.remove()
    assert same(found, refit(net, [batch * 2 + 1 for batch in batches], mask))


def test_a_batch_may_be_a_list_and_run_may_run_it():
    net, batches, mask = case("attention")
    expected = refit(net, batches, mask)
    assert same(refit(net, [list(batch) for batch in batches], mask), expected)
    net.eval()
    run = Calibration(net, 3, run=lambda number: net(*batches[number]))
    assert run.batches == 3
    assert same(run.refit(mask, LeastSquares()), expected)


def test_survivors_are_stored_and_spread_again():
    net, batches, mask = case("conv")
    found = refit(net, batches, mask)
    survivors = Survivors.of(mask, found.values)
    assert sum(survivors.values[name].numel() for name in mask) == mask.survivors
    spread = survivors.spread(mask, dict(net.named_parameters()))
    assert spread.keys() == found.values.keys()
    assert all(torch.equal(spread[name], found.values[name]) for name in spread)


def unlike(net: nn.Module) -> nn.Module:
    """The network with mixed modes, a negative zero, gradients and a frozen parameter."""
    net.train()
    list(net.children())[-1].eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.view(-1)[0] = -0.0
            parameter.grad = torch.ones_like(parameter)
    list(net.parameters())[-1].requires_grad_(False)
    return net


@kinds
def test_the_network_is_bit_for_bit_as_before(kind):
    net, batches, mask = case(kind)
    before, calibration = state_of(unlike(net)), Calibration(net, batches)
    left = calibration.left_alone(mask, LeastSquares())
    for how in (LeastSquares(), Refit()):
        calibration.refit(mask, how)
        assert state_of(net) == before
        calibration.others(mask, how)
        calibration.left_alone(mask, how)
        assert state_of(net) == before
    seen = Mask({name: kept for name, kept in mask.items() if name not in left})
    calibration.scales("obs", seen, {"0.bias": torch.full((12,), 7.0)} if kind == "mlp" else {})
    assert state_of(net) == before


class Trap(nn.Module):
    """Passes its input on `left` times, then raises."""

    left = math.inf

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of luck")
        return x


@memories
@pytest.mark.parametrize("passes", [0, 1, 3, 4, 6])
def test_a_forward_that_raises_leaves_the_network_as_it_was(passes, memory):
    net, batches, _ = case("conv")
    net.insert(5, Trap())
    mask, calibration = mask_of(unlike(net)), Calibration(net, batches, cache_bytes=memory)
    expected = calibration.refit(mask, LeastSquares())
    for one in (calibration, Calibration(net, batches, cache_bytes=memory)):
        before, net[5].left = state_of(net), passes if one is not calibration else min(passes, 2)
        with pytest.raises(RuntimeError, match="out of luck"):
            one.refit(mask, LeastSquares())
        assert state_of(net) == before
        net[5].left = math.inf
        assert alike(one.refit(mask, LeastSquares()), expected)


def test_buffers_that_the_network_writes_are_restored():
    net, batches, mask = case("mlp")
    net.register_buffer("count", torch.zeros(()))
    net[1].register_forward_pre_hook(lambda *_: setattr(net, "count", net.count.add_(1)))
    refit(net, batches, mask)
    assert net.count == 0


def assert_merely_pruned(net, mask, found, names) -> None:
    assert all(torch.equal(found.values[name], changed(net, mask).get_parameter(name)) for name in names)


def noise(rows: int, shift: float = 0.0) -> tuple[nn.Module, Mask, list[torch.Tensor]]:
    """A wide layer that keeps more inputs than its rows can separate. Without a shift, all inputs are independent."""
    net = known(nn.Sequential(nn.Linear(40, 5), nn.Tanh(), nn.Linear(5, 2)))
    net[0].bias.data += shift / 2
    some, odd = torch.arange(40).expand(5, 40) < 24, torch.tensor([[True, False, True, False, True]] * 2)
    return net, Mask({"0.weight": some, "2.weight": odd}), [numbers(rows, 40) + shift]


@pytest.mark.parametrize("rows", [32, 7, 3, 1])
def test_a_fit_that_is_worse_on_rows_held_out_is_undone_but_not_those_after_it(rows):
    net, mask, (inputs,) = noise(32)
    found = refit(net, list(inputs.split(rows)), mask, LeastSquares(damping=1e-9))
    assert found.undone == {"0.weight": "it increased the error on inputs that it was not solved on"}
    assert_merely_pruned(net, mask, found, ["0.weight", "0.bias"])
    assert not torch.equal(found.values["2.weight"], changed(net, mask)[2].weight)


def test_a_fit_that_no_row_judges_is_undone():
    net, mask, (inputs,) = noise(1)
    found = refit(net, [inputs], mask)
    assert found.undone == dict.fromkeys(mask, "a single row of its input is known, so nothing could judge the fit")
    assert_merely_pruned(net, mask, found, mask)


def test_a_fit_on_enough_rows_is_kept():
    net, mask, batches = noise(3200, shift=1.0)
    assert refit(net, batches, mask, LeastSquares(damping=1e-9)).undone == {}


def assert_not_finite(net, mask, batches, damping) -> None:
    found = refit(net, batches, mask, LeastSquares(damping=damping))
    assert found.undone == dict.fromkeys(mask, "its inputs or its solved weights are not finite")
    assert_merely_pruned(net, mask, found, mask)


def test_a_fit_too_large_for_the_weights_is_undone():
    net, x = nn.Sequential(nn.Linear(2, 3, bias=False)), numbers(40, 1).float()
    mask = Mask({"0.weight": torch.tensor([[True, False]] * 3)})
    assert_not_finite(net, mask, [torch.cat([x * 1e-25, x * 1e18], 1)], 0.0)


@pytest.mark.parametrize("damping", [0.0, 1e-3])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_fit_to_inputs_that_are_not_finite_is_undone(value, damping):
    net, batches, mask = case("mlp")
    batches[0][3, 2] = value
    assert_not_finite(net, mask, batches, damping)


@pytest.mark.parametrize("seed", range(5))
def test_the_refit_of_a_layer_that_is_not_pruned_is_kept(seed):
    net = known(mlp())
    mask = Mask.full(prunable_parameters(net))
    found = refit(net, [numbers(40, 6, seed=seed)], mask)
    assert all(torch.allclose(found.values[name], net.get_parameter(name), atol=1e-6) for name in mask)
    assert found.undone == {}


class Fickle(nn.Module):
    """Calls a layer as often as its own numbers tell it to, or with as many rows."""

    def __init__(self, rows: bool, least: int = 0) -> None:
        super().__init__()
        self.a, self.loop, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.rows, self.least, self.runs = rows, least, 0

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


@memories
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("least", [0, 1])
def test_a_layer_that_the_pruned_network_calls_less_often_does_not_hold_up_the_others(least, batches, memory):
    net, batches = known(Fickle(False, least)), [related(40, 4, seed=seed) for seed in range(batches)]
    mask = Mask({**mask_of(net), "a.weight": torch.zeros(4, 4, dtype=torch.bool)})
    found = refit(net, batches, mask, cache_bytes=memory)
    assert found.undone["loop.weight"] == "the pruned network does not call it as the dense network does"
    assert "c.weight" not in found.undone
    assert_merely_pruned(net, mask, found, ["loop.weight"])
    assert not torch.equal(found.values["c.weight"], changed(net, mask).c.weight)


def test_a_layer_that_the_pruned_network_gives_other_rows_is_not_refitted():
    net, batches = known(Fickle(True)), [related(40, 4)]
    with torch.no_grad():
        net.a.bias[0] = -0.1
    mask = Mask({**mask_of(net), "a.weight": torch.zeros(4, 4, dtype=torch.bool)})
    found = refit(net, batches, mask)
    assert "c.weight" not in found.undone
    dense, slim = (int((one.a(batches[0])[:, 0] > 0).sum()) for one in (net, changed(net, mask, found.values)))
    reason = f"the pruned network gives it {slim} rows of input, the dense network {dense}"
    assert found.undone["loop.weight"] == reason
    assert not torch.equal(found.values["c.weight"], changed(net, mask).c.weight)


@pytest.mark.parametrize(
    ("kind", "left"), [("repeated", {"spare.weight"}), ("late", {"cell.weight_ih", "cell.weight_hh"})]
)
def test_weights_left_alone_are_named_and_merely_pruned(kind, left):
    net, batches, _ = case(kind)
    mask, calibration = mask_of(net), Calibration(net, batches)
    reasons = calibration.left_alone(mask, LeastSquares())
    assert reasons.keys() == left
    assert kind == "late" or set(reasons.values()) == {"the network does not call it on the calibration inputs"}
    assert calibration.left_alone(mask, Refit()) == {}
    found = calibration.refit(mask, LeastSquares())
    assert found.undone == {}
    biases = {name.replace("weight", "bias") for name in left} & found.values.keys()
    assert_merely_pruned(net, mask, found, left | biases)
    assert alike(calibration.refit(mask, LeastSquares()), found)


@pytest.mark.parametrize("how", [Refit(), LeastSquares()])
def test_others_are_copies_of_the_other_tensors_that_a_refit_may_change(how):
    net, batches, mask = case("conv")
    calibration = Calibration(net, batches)
    others = calibration.others(mask, how)
    assert others.keys() == calibration.refit(mask, how).values.keys() - mask.keys()
    tensors = dict([*net.named_parameters(), *net.named_buffers()])
    assert all(torch.equal(others[name], tensors[name]) for name in others)
    next(iter(others.values())).fill_(9)
    assert not any((tensors[name] == 9).all() for name in others)


@pytest.mark.parametrize("kind", ["mlp", "conv", "encoder", "attention"])
@pytest.mark.parametrize("refitted", [False, True])
@torch.no_grad()
def test_scales_follow_their_formulas(kind, refitted):
    net, batches, mask = case(kind, 0.6)
    calibration = Calibration(net, batches)
    values = calibration.refit(mask, LeastSquares()).values if refitted else {}
    slim = changed(net, mask, values)
    calls = calls_of(slim, batches)
    activation, obs = (calibration.scales(word, mask, values, 0.01) for word in ("activation", "obs"))
    assert activation.keys() == obs.keys() == mask.keys()
    for name, found in activation.items():
        prefix, _, own = name.rpartition(".")
        module, means, costs = slim.get_submodule(prefix), [], []
        for weight, bias, place in (rest for weight_name, *rest in maps_of(module) if weight_name == own):
            x = torch.cat([rows_of(module, inputs[place]) for inputs, _ in calls[prefix]], 1)
            y = outputs_of(weight, bias, x)
            means.append(x.square().mean(1).sqrt()[:, None].expand(-1, y.shape[2], -1).reshape(weight.shape))
            x = x if bias is None else torch.cat([x, torch.ones_like(x[..., :1])], 2)
            kept = with_bias(weight != 0, None if bias is None else torch.ones_like(bias, dtype=torch.bool), len(x))
            variance = float((y.var(1, unbiased=False) if bias is not None else y.square().mean(1)).sum())
            cost = 1 / exact_diagonals(x.mT @ x / x.shape[1], kept, 0.01) * (x.square().sum(1, keepdim=True) > 0)
            costs.append((cost[..., : weight[0].numel()] / variance).sqrt().reshape(weight.shape))
        assert torch.allclose(found, torch.cat(means), rtol=1e-9)
        assert torch.allclose(obs[name], torch.cat(costs), rtol=1e-6)


@words
@pytest.mark.parametrize("dead", [(1,), (0, 1)])
def test_weights_whose_inputs_are_zero_have_little_importance_and_are_merely_pruned(word, dead):
    net, x = known(nn.Sequential(nn.Conv2d(2, 2, 3, groups=2, bias=False))), numbers(8, 2, 6, 6)
    x[:, dead] = 0
    calibration, full = Calibration(net, [x]), Mask.full(prunable_parameters(net))
    found = calibration.scales(word, full, {})["0.weight"]
    assert found[list(dead)].max() <= 1e-5 * (found[0].min() if dead == (1,) else 1)
    mask = Mask({name: kept & (numbers(*kept.shape) > -0.5) for name, kept in full.items()})
    refitted = calibration.refit(mask, LeastSquares()).values["0.weight"]
    assert torch.allclose(refitted[list(dead)], changed(net, mask)[0].weight[list(dead)])


@words
@pytest.mark.parametrize(
    ("kind", "message"),
    [("mlp", "some inputs of '0.weight' are not finite"), ("repeated", "the inputs of 'spare.weight' are not known")],
)
def test_scales_of_inputs_that_are_not_finite_or_not_known_are_refused(kind, message, word):
    net, batches, _ = case(kind)
    batches[1][3, 2] = math.inf
    with pytest.raises(ValueError, match=f"importance is '{word}', but {message}"):
        Calibration(net, batches).scales(word, mask_of(net), {})


NO_LIST, EMPTY = "but must be a list of batches", "is empty, but must have at least one batch of inputs"


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        (DataLoader(TensorDataset(numbers(8, 4)), 2), {}, TypeError, f"is a DataLoader, {NO_LIST}"),
        (numbers(8, 4), {}, TypeError, f"is a Tensor, {NO_LIST}"),
        (None, {}, TypeError, f"is a NoneType, {NO_LIST}"),
        *((batches, options, ValueError, EMPTY) for batches, options in [([], {}), (0, {"run": np.zeros})]),
        (3, {}, TypeError, "is 3, but must be a list of inputs if run is None"),
    ],
)
def test_batches_that_are_no_list_are_refused(batches, options, error, message):
    with pytest.raises(error, match=f"batches {message}"):
        Calibration(nn.Linear(4, 2).double(), batches, **options)


class WritesToItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return self.body(x.mul_(2))


def test_a_network_that_writes_to_its_input_gets_the_same_input_in_every_run():
    net, batches = known(WritesToItsInput()), [related(40, 6, seed=seed) for seed in range(3)]
    before, mask = [batch.clone() for batch in batches], mask_of(net)
    calibration = Calibration(net, batches)
    found = calibration.refit(mask).values
    plain = Calibration(net.body, [2 * batch for batch in batches])
    wanted = plain.refit(Mask({name.removeprefix("body."): kept for name, kept in mask.items()})).values
    assert all(found[f"body.{name}"].equal(value) for name, value in wanted.items())
    calibration.scales("sensitivity", mask, {})
    assert all(map(torch.equal, batches, before))


class InThreads(nn.Module):
    """Its second layer is called twice on a batch, in another thread than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        hidden = self.first(x)
        with ThreadPoolExecutor(1) as threads:
            found = [threads.submit(self.second, part) for part in (hidden[:20], hidden[20:] + 3)]
            return self.third(torch.cat([one.result() for one in found]).relu())


@memories
def test_layers_whose_calls_have_no_certain_order_are_left_alone(memory):
    net, batches = known(InThreads()), [related(40, 6, seed=seed) for seed in range(3)]
    calibration, mask = Calibration(net, batches, cache_bytes=memory), mask_of(net)
    assert calibration.left_alone(mask, LeastSquares()) == {"second.weight": "the network calls it in several threads"}
    values = calibration.refit(mask).values
    assert values["second.weight"].equal(net.second.weight * mask["second.weight"])
    assert not values["third.weight"].equal(net.third.weight * mask["third.weight"])


class Elsewhere(nn.Module):
    """Runs as a whole in another thread."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(self.net, x).result()


def test_a_network_may_run_in_another_thread():
    net, batches, _ = case("repeated")
    mask = mask_of(net)
    other = Mask({f"net.{name}": kept for name, kept in mask.items()})
    known, found = Calibration(net, batches), Calibration(Elsewhere(net), batches)
    reasons = {f"net.{name}": why for name, why in known.left_alone(mask, LeastSquares()).items()}
    assert found.left_alone(other, LeastSquares()) == reasons
    values = known.refit(mask).values
    assert all(found.refit(other).values[f"net.{name}"].equal(value) for name, value in values.items())


class WithAnArgument(WritesToItsInput):
    def forward(self, x, more):
        assert not more.locked()
        return super().forward(x)


def test_an_argument_that_cannot_be_copied_is_passed_on():
    net, batches = known(WithAnArgument()), [related(40, 6, seed=seed) for seed in range(2)]
    before, mask = [batch.clone() for batch in batches], mask_of(net)
    Calibration(net, [(batch, Lock()) for batch in batches]).refit(mask)
    assert all(map(torch.equal, batches, before))
