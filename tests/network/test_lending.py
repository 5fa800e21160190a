"""Lent weights come back bit for bit, after errors and interrupts too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_roulette import Mask
from lightning_roulette.network.lending import applied, copy_into, lent, named_tensors, surely, write
from tests.support.limits import set_limits
from tests.support.weights import bits_of, every_other, mask_of, odd_weights

# small weights are set aside whole, large ones in part: few entries, and more than a million in one block or several
sizes = pytest.mark.parametrize(("times", "small"), [(1, 1 << 20), (1, 4), (1, 0), (2**18 + 1, 1 << 20)])


@sizes
def test_pruned_weights_are_zero_inside_the_block_and_back_after_it(monkeypatch, times, small):
    set_limits(monkeypatch, unpacked_entries=small)
    weights = odd_weights(times)
    before, mask = bits_of(weights), every_other(weights)
    with applied(mask, weights):
        for name, weight in weights.items():
            gone = ~mask[name]
            assert bits_of({name: weight[gone]})[name] == bytes(int(gone.sum()) * weight.element_size())
            assert bits_of({name: weight[~gone]}) == bits_of({name: odd_weights(times)[name][~gone]})
    assert bits_of(weights) == before


@sizes
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_weights_come_back_after_an_error(monkeypatch, error, times, small):
    set_limits(monkeypatch, unpacked_entries=small)
    weights = odd_weights(times)
    before, mask = bits_of(weights), every_other(weights)
    with pytest.raises(error), applied(mask, weights):  # noqa: PT012
        assert bits_of(weights) != before
        raise error
    assert bits_of(weights) == before


@sizes
def test_weights_come_back_when_pruning_them_is_interrupted(monkeypatch, times, small):
    set_limits(monkeypatch, unpacked_entries=small)
    weights, fill, filled = odd_weights(times), torch.Tensor.masked_fill_, []
    before = bits_of(weights)

    def interrupted(tensor, where, value):
        filled.append(fill(tensor, where, value).count_nonzero())
        if len(filled) == 3:
            raise KeyboardInterrupt
        return tensor

    monkeypatch.setattr(torch.Tensor, "masked_fill_", interrupted)
    with pytest.raises(KeyboardInterrupt), applied(Mask.nothing(weights), weights):
        pytest.fail("the block must not be entered")
    assert filled == [0, 0, 0]
    assert bits_of(weights) == before


@pytest.mark.parametrize("small", [1 << 20, 0])
def test_blocks_can_be_nested_and_parameters_tied(monkeypatch, small):
    set_limits(monkeypatch, unpacked_entries=small)
    shared = nn.Parameter(torch.arange(1.0, 7.0))
    with applied(mask_of(w=[1, 1, 1, 0, 0, 0]), {"w": shared}):
        with applied(mask_of(a=[1, 0, 1, 1, 1, 0], b=[0, 0, 1, 0, 1, 1]), {"a": shared, "b": shared}):
            assert shared.tolist() == [0, 0, 3, 0, 0, 0]
        assert shared.tolist() == [1, 2, 3, 0, 0, 0]
    assert shared.tolist() == [1, 2, 3, 4, 5, 6]


def test_lending_keeps_what_training_needs():
    weight = nn.Parameter(torch.arange(1.0, 5.0))
    weight.grad = torch.ones(4)
    identity = (id(weight), weight.data_ptr(), id(weight.grad))
    with applied(mask_of(w=[1, 0, 0, 1]), {"w": weight}):
        assert (id(weight), weight.data_ptr(), id(weight.grad)) == identity
    assert (id(weight), weight.data_ptr(), id(weight.grad)) == identity
    assert weight.requires_grad
    assert weight.grad.tolist() == [1, 1, 1, 1]


def test_lent_tensors_may_be_written_to_and_come_back():
    weights = odd_weights()
    before = bits_of(weights)
    with pytest.raises(KeyboardInterrupt), lent(weights) as copies:  # noqa: PT012
        for weight in weights.values():
            weight.zero_()
        assert bits_of(copies) == before
        raise KeyboardInterrupt
    assert bits_of(weights) == before


def test_autocast_does_not_use_casts_of_other_values():
    net, x = nn.Linear(3, 2), torch.ones(1, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dense = net(x)
        with lent({"weight": net.weight}):
            net.weight.zero_()
            torch.clear_autocast_cache()
            assert net(x).equal(net.bias.bfloat16().unsqueeze(0))
        assert net(x).equal(dense)
        with applied({"w": torch.zeros(2, 3, dtype=torch.bool)}, {"w": net.weight}):
            assert net(x).equal(net.bias.bfloat16().unsqueeze(0))
        assert net(x).equal(dense)


def test_an_expanded_tensor_is_written_once():
    tensor = torch.zeros(1, 3).expand(4, 3)
    write(tensor, torch.arange(3.0).expand(4, 3))
    assert tensor.tolist() == [[0, 1, 2]] * 4


def test_a_tensor_of_inference_mode_is_written_too():
    with torch.inference_mode():
        tensor = torch.zeros(3)
    with lent({"cache": tensor}):
        write(tensor, torch.ones(3))
        assert tensor.tolist() == [1, 1, 1]
    assert tensor.tolist() == [0, 0, 0]


def test_values_are_copied_by_name_into_parameters_and_buffers():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net.append(net[0])
    tensors = named_tensors(net)
    assert tensors["2.weight"] is tensors["0.weight"] is net[0].weight
    copy_into(tensors, {"2.bias": torch.tensor([3.0, 4.0]), "1.running_mean": torch.tensor([5.0, 6.0])})
    assert net[0].bias.tolist() == [3, 4]
    assert net[1].running_mean.tolist() == [5, 6]


def test_an_interrupted_action_is_repeated_before_the_interrupt_goes_on():
    calls = []

    def action() -> None:
        calls.append("begun")
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append("done")

    with pytest.raises(KeyboardInterrupt):
        surely(action)
    assert calls == ["begun", "begun", "done"]
