"""Gradient steps after a refit: outputs come closer to the dense network's, zeros stay, and nothing else changes."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_roulette import Calibration, LeastSquares, Mask
from lightning_roulette.refit import distillation
from lightning_roulette.refit.outputs import LastOutputs
from tests.support.networks import KINDS, case, changed, known, mlp, numbers, related, slow_but_for_a_few, state_of
from tests.support.shares import assert_close, in_processes

STEPS = LeastSquares(distill=40)
MAY_NOT_LEARN = ("choosy", "choosy at last", "norm first", "either", "late")  # too few inputs for some of their layers


def far(net, values, inputs) -> float:
    """Squared distance of the outputs from those of the dense network."""
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        apart = functional_call(net, dict(values), given) - net(*given)
    return float(apart.square().mean())


@pytest.mark.parametrize("kind", [slow_but_for_a_few(kind) for kind in KINDS])
def test_outputs_on_the_judging_batch_come_closer_or_nothing_changes_and_zeros_stay(kind):
    net, batches, mask = case(kind)
    net.eval()
    before = state_of(net)
    calibration = Calibration(net, batches)
    solved, taught = calibration.refit(mask), calibration.refit(mask, STEPS)
    assert state_of(net) == before
    assert not taught.undone.keys() - solved.undone.keys()
    if far(net, taught.values, batches[1]) >= far(net, solved.values, batches[1]):
        assert kind in MAY_NOT_LEARN
        assert_close({name: taught.values[name] for name in solved.values}, solved.values)
    assert all(bool((taught.values[name][~kept] == 0).all()) for name, kept in mask.items())
    assert_close(calibration.refit(mask, STEPS).values, taught.values)


def test_steps_that_lead_away_are_not_kept(monkeypatch, caplog):
    monkeypatch.setattr(distillation, "_RATE", 100.0)
    net, batches, mask = case("conv")
    calibration = Calibration(net, batches)
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        taught, solved = calibration.refit(mask, STEPS).values, calibration.refit(mask).values
    assert {name: one.tolist() for name, one in taught.items() if name in solved} == {
        name: one.tolist() for name, one in solved.items()
    }
    assert torch.equal(taught["1.weight"], net.state_dict()["1.weight"])
    assert "gradient steps did not bring the outputs closer to the dense network's, and are not kept." in caplog.text


def test_batch_normalisations_take_steps_and_have_the_statistics_of_the_taught_network():
    net, batches, mask = case("conv")
    calibration = Calibration(net, batches)
    taught = calibration.refit(mask, STEPS)
    dense = net.state_dict()
    assert not torch.equal(taught.values["1.weight"], dense["1.weight"])
    assert not torch.equal(taught.values["1.bias"], dense["1.bias"])
    pruned = changed(net, mask, taught.values)
    again = Calibration(pruned, batches).refit(mask, "batch_norm")
    for name, value in again.values.items():
        assert torch.allclose(taught.values[name], value, rtol=1e-9), name
    kept = calibration.refit(mask, STEPS, statistics=False).values
    assert all(torch.equal(kept[name], dense[name]) for name in kept if "running" in name)


def test_weights_that_need_no_gradients_take_steps_and_need_none_afterwards():
    net, batches, mask = case("mlp")
    expected = Calibration(net, batches).refit(mask, STEPS)
    for name in mask:
        net.get_parameter(name).requires_grad_(False)
    assert_close(Calibration(net, batches).refit(mask, STEPS).values, expected.values)
    assert not any(net.get_parameter(name).requires_grad for name in mask)


def test_steps_are_as_good_in_half_precision():
    net, batches, mask = case("mlp")
    net.to(torch.bfloat16)
    batches = [one.to(torch.bfloat16) for one in batches]
    calibration = Calibration(net, batches)
    solved, taught = calibration.refit(mask), calibration.refit(mask, STEPS)
    assert {one.dtype for one in taught.values.values()} == {torch.bfloat16}
    assert far(net, taught.values, batches[1]) < far(net, solved.values, batches[1])


@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
def test_steps_in_two_processes_are_those_of_one(kind):
    net, batches, mask = case(kind, sizes=(48, 40, 48, 40, 56))
    how = LeastSquares(distill=7)
    expected = Calibration(net, batches).refit(mask, how)
    for found in in_processes(2, net, batches, lambda calibration: calibration.refit(mask, how)):
        assert_close(found.values, expected.values)


def test_the_seed_chooses_the_order_of_the_batches():
    net, batches, mask = case("mlp", sizes=(40,) * 6)

    def weight(seed):
        return Calibration(net, batches, seed=seed).refit(mask, LeastSquares(distill=5)).values["0.weight"]

    assert torch.equal(weight(0), weight(0))
    assert not torch.allclose(weight(0), weight(1), rtol=1e-6)


@pytest.mark.parametrize(("batches", "pieces"), [([150], 3), ([64], 1), ([60, 60], 2)])
def test_batches_are_cut_to_pieces_of_at_most_64_samples_and_a_single_one_teaches_nothing(batches, pieces, caplog):
    net, _, mask = case("mlp")
    given = [related(size, 6, seed=size) for size in batches]
    seen = []
    net[0].register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    calibration = Calibration(net, given)
    solved = calibration.refit(mask)
    seen.clear()
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        taught = calibration.refit(mask, LeastSquares(distill=30))
    assert any(size < 64 or pieces == 1 for size in seen)
    alone = "no gradient steps are taken: there is one piece of calibration inputs, and they need two."
    assert (alone in caplog.text) == (pieces == 1)
    assert torch.equal(taught.values["0.weight"], solved.values["0.weight"]) == (pieces == 1)


class Branches(nn.Module):
    """Two outputs, of which later layers write to one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2), nn.Linear(2, 2)

    def forward(self, x):
        hidden = self.a(x).relu_()
        first = self.b(hidden)
        second = self.c(hidden)
        self.d(second.detach())
        return first.relu_(), second.mul_(2)


def test_last_outputs_are_those_on_which_no_later_one_depends_as_their_layers_give_them():
    net, x = known(Branches()), numbers(9, 4)
    hidden = net.a(x).relu()
    last = LastOutputs([net.a, net.b, net.c, net.d])
    for _ in range(2):
        found = last.of(0, lambda: net(x))
        expected = [net.b(hidden), net.c(hidden), net.d(net.c(hidden))]
        assert len(found) == 3
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other)
            assert one.requires_grad


class Strict(nn.Module):
    """Something after the last layer works without gradients only."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return torch.from_numpy(self.net(x).numpy())


def test_what_follows_the_last_layer_need_not_work_with_gradients():
    net, (_, batches, mask) = known(Strict()), case("mlp")
    calibration, mask = Calibration(net, batches), Mask({f"net.{name}": kept for name, kept in mask.items()})
    solved, taught = calibration.refit(mask), calibration.refit(mask, STEPS)
    assert far(net, taught.values, batches[1]) < far(net, solved.values, batches[1])


class TwoHeads(nn.Module):
    """Two outputs of one hidden layer, one of them as large as is asked for."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.into, self.one, self.two = mlp(), nn.Linear(4, 4), nn.Linear(4, 4)
        known(self)
        with torch.no_grad():
            self.two.weight.mul_(size)
            self.two.bias.mul_(size)

    def forward(self, x):
        hidden = self.into(x).relu()
        return self.one(hidden), self.two(hidden)


def test_outputs_of_very_different_size_count_alike():
    _, batches, mask = case("mlp")
    mask = Mask({f"into.{name}": kept for name, kept in mask.items()})
    usual, large = (Calibration(TwoHeads(size), batches).refit(mask, STEPS).values for size in (1, 1e4))
    assert_close(large, usual)
    assert not torch.equal(
        usual["into.0.weight"], Calibration(TwoHeads(1), batches).refit(mask).values["into.0.weight"]
    )


class Stubborn(nn.Module):
    """A network that runs in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        with torch.inference_mode():
            return self.layer(x)


def test_a_network_without_derivatives_is_refused_and_left_as_it_was():
    net = known(Stubborn())
    before = state_of(net)
    calibration, mask = Calibration(net, [numbers(30, 4)] * 2), Mask({"layer.weight": numbers(4, 4) > 0})
    with pytest.raises(ValueError, match="distill is 40, but the network runs in inference mode. Pass distill=0."):
        calibration.refit(mask, STEPS)
    assert state_of(net) == before


def test_outputs_of_the_dense_network_are_kept_up_to_the_memory_and_of_two_pieces_at_least():
    """One piece judges and the others teach."""
    net, batches, mask = case("mlp", sizes=(40,) * 8)
    runs = []
    net[0].register_forward_pre_hook(lambda module, inputs: runs.append(float(inputs[0][0, 0])))

    def used(cache_bytes):
        calibration = Calibration(net, batches, cache_bytes=cache_bytes)
        calibration.refit(mask)
        runs.clear()
        calibration.refit(mask, LeastSquares(distill=120))
        return {one for one in runs if runs.count(one) > 9}

    outputs = 40 * 4 * 8  # bytes of a piece
    assert len(used(2**31)) == 7
    assert len(used(4 * 3 * outputs)) == 2
    assert len(used(0)) == 1
