"""Refits of recurrent networks, against least squares on states from torch's own modules, and through a Trainer."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.parameters import prunable_parameters
from lightning_roulette.network.refittable import layers_of
from lightning_roulette.refit.dense import DenseOutputs
from lightning_roulette.refit.inputs import Calibration
from lightning_roulette.refit.matrices import RowSampler
from lightning_roulette.refit.traversal import Call, Step
from lightning_roulette.refit_settings import LeastSquares
from tests.support.exact import exact_fit
from tests.support.networks import Recurring, Stepwise, changed, known, mask_of, numbers, related

KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
DAMPING = 1e-3


def single(part: nn.RNNBase, depth: int, tail: str) -> nn.RNNBase:
    """One layer of a module in one direction."""
    inputs = getattr(part, f"weight_ih_l{depth}").shape[1]
    one = type(part)(inputs, part.hidden_size, batch_first=True).double()
    one.load_state_dict({f"{name}_l0": getattr(part, f"{name}_l{depth}{tail}") for name in WORDS})
    return one


WORDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def outputs_of(one: nn.RNNBase, x: torch.Tensor, tail: str) -> torch.Tensor:
    return one(x.flip(1) if tail else x)[0].flip(1) if tail else one(x)[0]


def before(outputs: torch.Tensor, tail: str) -> torch.Tensor:
    """The states before each time step, from zero."""
    nothing = torch.zeros_like(outputs[:, :1])
    return torch.cat([outputs[:, 1:], nothing] if tail else [nothing, outputs[:, :-1]], 1)


def maps_of(part: nn.RNNBase):
    """Which outputs, from which of input and state, with which bias."""
    size = part.hidden_size
    if part.mode != "GRU":
        return [(slice(0, None), ("ih", "hh"), "bias_ih")]
    third = slice(2 * size, 3 * size)
    return [(slice(0, 2 * size), ("ih", "hh"), "bias_ih"), (third, ("ih",), "bias_ih"), (third, ("hh",), "bias_hh")]


def solve(dense, slim, kept, tail, x, x_dense, states) -> None:
    """Write the best values for given states into one layer."""
    sides = {"ih": x, "hh": [before(one, tail) for one in states]}
    wanted = {"ih": x_dense, "hh": [before(outputs_of(dense, one, tail), tail) for one in x_dense]}
    solved = []
    for outputs, used, bias in maps_of(dense):
        rows, goals = (joined(one, used) for one in (sides, wanted))
        one, goal, keep = (side_by_side(part, used, outputs, bias) for part in (slim, dense, kept))
        (x_fit, x_judge), (y_fit, y_judge) = parted(rows), parted([goals_of @ goal[0].T for goals_of in goals])
        found = exact_fit(x_fit, y_fit, goal * keep, keep.bool(), DAMPING)
        worse = (x_judge @ found.mT - y_judge).square().sum() > (x_judge @ one.mT - y_judge).square().sum()
        solved.append((outputs, used, bias, (one if worse else found)[0]))
    for outputs, used, bias, found in solved:
        start = 0
        for side in used:
            weight = getattr(slim, f"weight_{side}_l0")
            weight[outputs] = found[:, start : start + weight.shape[1]]
            start += weight.shape[1]
        getattr(slim, f"{bias}_l0")[outputs] = found[:, -1]


def joined(sides, used) -> list[torch.Tensor]:
    """The rows of each batch."""
    batches = zip(*(sides[side] for side in used), strict=True)
    return [torch.cat([*parts, torch.ones_like(parts[0][..., :1])], -1).flatten(0, 1) for parts in batches]


def parted(batches) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that are fitted, and the last eighth of each batch, which judges the fit."""
    sides = zip(*(one.tensor_split([len(one) - len(one) // 8]) for one in batches), strict=True)
    return tuple(torch.cat(side)[None] for side in sides)


def side_by_side(one: nn.RNNBase, used, outputs, bias) -> torch.Tensor:
    weights = [getattr(one, f"weight_{side}_l0")[outputs] for side in used]
    return torch.cat([*weights, getattr(one, f"{bias}_l0")[outputs][:, None]], 1)[None]


def case(kind: str, both: bool, layers: int = 2, density: float = 0.5):
    read = KINDS[kind](4, 5, num_layers=layers, batch_first=True, bidirectional=both)
    net = known(Recurring(read=read, head=nn.Linear(10 if both else 5, 3)))
    return net, [related(60, 6, 4, seed=seed) for seed in range(2)], mask_of(net, density)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "both"), [*product(KINDS, [False, True])])
def test_a_layer_is_solved_for_dense_states_and_then_for_its_own(kind, both):
    net, batches, mask = case(kind, both)
    found = Calibration(net, batches).refit(mask, LeastSquares(damping=DAMPING))
    assert found.undone == {}
    slim, kept = changed(net, mask), changed(net, Mask({}), {n: torch.ones_like(p) for n, p in net.named_parameters()})
    kept, x, x_dense = changed(kept, mask), batches, batches
    for depth in range(2):
        after, after_dense = [], []
        for tail in ("", "_reverse") if both else ("",):
            dense, own, keep = (single(one.read, depth, tail) for one in (net, slim, kept))
            solve(dense, own, keep, tail, x, x_dense, [outputs_of(dense, one, tail) for one in x])
            solve(dense, own, keep, tail, x, x_dense, [outputs_of(own, one, tail) for one in x])
            for name in WORDS:
                expected = getattr(own, f"{name}_l0")
                value = found.values.get(f"read.{name}_l{depth}{tail}", getattr(net.read, f"{name}_l{depth}{tail}"))
                assert torch.allclose(value, expected, rtol=1e-6, atol=1e-7), (name, depth, tail)
            after.append([outputs_of(own, one, tail) for one in x])
            after_dense.append([outputs_of(dense, one, tail) for one in x_dense])
        x, x_dense = ([torch.cat(one, -1) for one in zip(*sides, strict=True)] for sides in (after, after_dense))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_recurrent_network_that_is_not_pruned_stays(kind):
    net, batches, _ = case(kind, True)
    mask = Mask.full(prunable_parameters(net))
    found = Calibration(net, batches).refit(mask)
    assert all(torch.allclose(found.values[name], net.get_parameter(name), atol=1e-7) for name in mask)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_refitted_recurrent_network_is_closer_to_the_dense_one(kind):
    net, batches, mask = case(kind, True, density=0.6)
    found = Calibration(net, batches).refit(mask)
    other = numbers(20, 6, 4, seed=9)
    wanted, pruned, slim = (one(other) for one in (net, changed(net, mask), changed(net, mask, found.values)))
    assert (slim - wanted).square().mean() < 0.5 * (pruned - wanted).square().mean()


@torch.no_grad()
@pytest.mark.parametrize("carries", [False, True])
def test_a_layer_that_is_called_with_states_of_its_own_is_left_alone(carries):
    net, batches = known(Stepwise(carries)), [related(40, 3, 4, seed=seed) for seed in range(2)]
    mask, calibration = mask_of(net, 0.6), Calibration(net, batches)
    found = calibration.refit(mask)
    read = {"read.weight_ih_l0", "read.weight_hh_l0"}
    why = "the network calls it again with states that it gave before"
    assert calibration.left_alone(mask, LeastSquares()) == (dict.fromkeys(read, why) if carries else {})
    pruned = changed(net, mask)
    same = {name: torch.equal(found.values[name], pruned.get_parameter(name)) for name in read}
    assert same == {"read.weight_ih_l0": carries, "read.weight_hh_l0": True}  # without a state it has no inputs
    assert not torch.equal(found.values["head.weight"], pruned.head.weight)


@torch.no_grad()
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_a_network_that_runs_in_low_precision_is_refitted_in_full(precision):
    net, batches = changed(case("LSTM", True)[0], Mask({})).float(), [related(200, 6, 4, seed=seed) for seed in (0, 1)]
    batches = [batch.float() for batch in batches]
    mask = mask_of(net)

    def run(batch: int) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            net(batches[batch])

    try:
        run(0)
    except RuntimeError as error:
        pytest.skip(f"this processor runs no LSTM in {precision}: {error}")
    plain, lowered = Calibration(net, batches).refit(mask), Calibration(net, 2, run=run).refit(mask)
    assert lowered.undone == plain.undone == {}
    read = [name for name in mask if name.startswith("read")]
    assert all(torch.equal(plain.values[name], lowered.values[name]) for name in read)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_the_weights_that_are_chosen_are_those_that_are_written(kind):
    net, batches, mask = case(kind, True)
    calibration = Calibration(net, batches)
    found = calibration.refit(mask, LeastSquares(choose=True))
    assert found.undone == {}
    assert found.mask is not None
    assert found.mask.survivors == mask.survivors
    for name, kept in found.mask.items():
        assert torch.equal(found.values[name] != 0, kept)
    given = calibration.refit(mask, LeastSquares(choose=False))
    wanted = net(torch.cat(batches))
    close, far = (
        (changed(net, one, values)(torch.cat(batches)) - wanted).square().mean()
        for one, values in ((found.mask, found.values), (mask, given.values))
    )
    assert close < far


def test_outputs_of_a_layer_that_is_solved_twice_are_kept_once():
    net, batches, mask = case("LSTM", False, layers=1)
    (layer, _), _ = layers_of(net, [*mask])
    outputs = DenseOutputs(dict(net.named_parameters()), RowSampler(None, 1, 0), 2**20)
    calls = [Call(Step(net.read, (layer,), followed=followed), 0, 0) for followed in (True, False)]
    for call in calls:
        outputs.keep(call, ((batches[0],), {}))
        assert outputs.bytes == batches[0][..., 0].numel() * 20 * 8
    assert outputs.of(layer, calls[0]).outputs is outputs.of(layer, calls[1]).outputs
