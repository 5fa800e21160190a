"""Calls of a network that keep the products of the last call."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_roulette.network.coupling.graph import tensors_in
from lightning_roulette.network.coupling.remembering import remembering
from tests.network.coupling.networks import NETWORKS
from tests.support.networks import known, numbers


class Counted(TorchFunctionMode):
    """Counts the linear products that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.products += func is functional.linear
        return func(*args, **kwargs or {})


class Chain(nn.Module):
    """Three linear layers, of which the second is followed by an operation in place."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x)).mul_(2))


@pytest.fixture
def chain() -> Chain:
    return Chain()


def products(call) -> tuple[torch.Tensor, int]:
    """The output of a call, and how many linear products it computes."""
    with torch.no_grad(), Counted() as counted:
        return call(), counted.products


def test_a_call_computes_again_what_follows_a_change_and_returns_the_same(chain):
    x = numbers(6, 3, seed=1).float()
    again = remembering(lambda: chain(x))
    first, *others = [products(again) for _ in range(3)]
    assert [count for _, count in (first, *others)] == [3, 0, 0]
    assert all(torch.equal(found, first[0]) for found, _ in others)
    for layer, computed in (("first", 3), ("second", 2), ("third", 1)):
        with torch.no_grad():
            chain.get_submodule(layer).weight[0] += 1
        found, count = products(again)
        assert count == computed
        assert torch.equal(found, products(lambda: chain(x))[0])


def test_a_change_that_nothing_reads_is_computed_once(chain):
    x = numbers(6, 3, seed=1).float()
    again = remembering(lambda: chain(x))
    with torch.no_grad():
        chain.second.weight[:, 1] = 0
    products(again)
    with torch.no_grad():
        chain.first.weight[1] = 7.0
    found, count = products(again)
    assert count == 2  # the first layer and the one that reads it
    assert torch.equal(found, products(lambda: chain(x))[0])


def test_an_input_changed_in_place_and_a_product_kept_by_the_caller_are_noticed(chain):
    x = numbers(6, 3, seed=1).float()
    again = remembering(lambda: chain(x))
    products(again)[0].zero_()
    assert torch.equal(products(again)[0], products(lambda: chain(x))[0])
    x[0] += 1
    assert torch.equal(products(again)[0], products(lambda: chain(x))[0])


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_networks_return_what_a_first_call_returns(name):
    build, inputs, _ = NETWORKS[name]
    model = known(build()).eval()
    again = remembering(lambda: model(inputs))
    for weight in model.parameters():
        found, first = tensors_in(again()), tensors_in(remembering(lambda: model(inputs))())
        assert all(map(torch.equal, found, first))
        weight[0] += 0.5
