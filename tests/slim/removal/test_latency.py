"""A target in time, and networks without their dead units, under a clock that counts products."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lightning_roulette import Mask, Reduction, Tree, Wheel, apply_mask, prunable_parameters, remove_dead, search
from lightning_roulette.wheel.units import costs
from lightning_roulette.wheel.units.grouping import units_of
from tests.support.networks import numbers
from tests.support.units import perceptron

pytest.importorskip("torch_pruning")
X = numbers(2, 6, seed=3).float()


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A linear layer takes a second for each of its weights, and two beside. A ReLU takes three."""
    now = 0.0
    linear, relu = nn.functional.linear, nn.functional.relu

    def timed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        nonlocal now
        now += weight.numel() + 2
        return linear(x, weight, bias)

    def timed_relu(x: Tensor, inplace: bool = False) -> Tensor:
        nonlocal now
        now += 3
        return relu(x, inplace)

    monkeypatch.setattr(nn.functional, "linear", timed_linear)
    monkeypatch.setattr(nn.functional, "relu", timed_relu)
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: now))


def slimmed(network: nn.Module, latency: float) -> tuple[nn.Module, float, float]:
    """The network with a share of its time saved and without dead units; the seconds of both by their costs."""
    weights = prunable_parameters(network)
    units = units_of(network, X, target=Reduction(latency=latency))
    winner = search(
        {name: one.detach() for name, one in weights.items()},
        lambda mask: mask.sparsity,
        wheel=Wheel(unit="neuron"),
        tree=Tree(0.1, target=Reduction(latency=latency)),
        units=units,
        tolerance=math.inf,
    )
    apply_mask(network, winner.mask)
    return remove_dead(network, X), units.whole(Mask.full(weights)), units.left(winner.mask)


def seconds_of(network: nn.Module) -> float:
    """What a run of the network takes by the clock."""
    return units_of(network, X, target=Reduction(latency=0.5)).whole(Mask.full(prunable_parameters(network)))


def test_a_network_without_its_dead_units_saves_the_time_that_was_asked_for():
    network = perceptron((6, 20, 30, 4))
    slim, before, counted = slimmed(network, 0.5)
    assert before == 6 * 20 + 20 * 30 + 30 * 4 + 3 * 2 + 2 * 3
    assert counted <= 0.5 * before
    # a layer's own seconds are shared by its weights, so those of a smaller layer are counted too low
    assert counted <= seconds_of(slim) <= counted + 3 * 2
    with torch.no_grad():
        assert torch.allclose(slim(X), network(X), atol=1e-5)


def test_a_network_whose_dead_units_were_removed_is_measured_anew_and_pruned_further():
    first, before, _ = slimmed(perceptron((6, 20, 30, 4)), 0.3)
    groups = dict(units_of(first, X).groups)
    taken = seconds_of(first)
    assert taken < before
    second, begun, counted = slimmed(first, 0.4)
    assert begun == taken
    assert counted <= 0.6 * taken
    assert sum(units_of(second, X).groups.values()) < sum(groups.values()) < 50
    with torch.no_grad():
        assert torch.allclose(second(X), first(X), atol=1e-5)
