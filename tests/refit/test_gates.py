"""Derivatives with respect to gates of units, against those of every sample and output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_roulette import Calibration, Mask, prunable_parameters
from lightning_roulette.refit.sensitivity import NoGradients
from lightning_roulette.wheel.units.units import Cost, Part, Units
from tests.support.units import hidden_units, labels, perceptron

INPUTS = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))


def expected(network: nn.Module, hidden: list[int], inputs: torch.Tensor) -> torch.Tensor:
    """Sum of squared derivatives for each neuron after the named layers, by gates on what they give."""
    gates = [torch.ones(network[place - 1].out_features, requires_grad=True) for place in hidden]

    def outputs(*factors: torch.Tensor) -> torch.Tensor:
        x, left = inputs, dict(zip(hidden, factors, strict=True))
        for place, layer in enumerate(network):
            x = layer(x)
            x = x * left[place] if place in left else x
        return x

    jacobians = torch.autograd.functional.jacobian(outputs, tuple(gates))
    return torch.cat([one.square().sum((0, 1)) for one in jacobians]).double()


def test_single_outputs_give_the_squared_derivatives_exactly():
    network = perceptron((4, 3, 5, 1))
    units, mask = hidden_units(network), Mask.full(prunable_parameters(network))
    before = {name: one.clone() for name, one in network.state_dict().items()}
    found = Calibration(network, list(INPUTS.split(1))).gates(units, mask, {})
    torch.testing.assert_close(found, expected(network, [1, 3], INPUTS), rtol=1e-5, atol=1e-9)
    assert all(torch.equal(one, before[name]) for name, one in network.state_dict().items())
    assert all(one.grad is None for one in network.parameters())


def test_directions_estimate_the_sum_over_outputs_and_samples():
    network = perceptron((4, 3, 5, 6))
    units, mask = hidden_units(network), Mask.full(prunable_parameters(network))
    found = Calibration(network, list(INPUTS.repeat(20, 1).split(2))).gates(units, mask, {})
    torch.testing.assert_close(found, 20 * expected(network, [1, 3], INPUTS), rtol=0.2, atol=0.0)


def test_the_pruned_network_with_its_values_is_differentiated():
    network = perceptron((4, 3, 5, 1))
    units, weights = hidden_units(network), prunable_parameters(network)
    mask = units.without(Mask.full(weights), torch.arange(8) == 4)
    values = {"0.weight": weights["0.weight"].detach() * 2}
    found = Calibration(network, list(INPUTS.split(1))).gates(units, mask, values)
    assert found[4] == 0
    with torch.no_grad():
        weights["0.weight"].mul_(2)
        for name, kept in mask.items():
            weights[name].mul_(kept)
    torch.testing.assert_close(found, expected(network, [1, 3], INPUTS), rtol=1e-5, atol=1e-9)


def test_what_a_channel_does_at_all_positions_counts_together():
    """A channel whose sum over positions moves the output matters more than one whose positions cancel."""
    network = nn.Sequential(nn.Conv1d(1, 2, 1), nn.Conv1d(2, 1, 1), nn.Flatten(), nn.Linear(8, 1))
    with torch.no_grad():
        network[0].weight.fill_(1.0)
        network[0].bias.zero_()
        network[1].weight.fill_(1.0)
        network[3].weight.fill_(1.0)
    units = Units(
        "neuron",
        {"0": 2},
        (Part("0.weight", labels(0, 2, 0, 3), reads=False), Part("1.weight", labels(0, 2, 1, 3))),
        Cost.of_weights(["0.weight"]),
    )
    mask = Mask.full(prunable_parameters(network))
    alike, opposed = torch.ones(1, 1, 8), torch.tensor([1.0, -1]).repeat(4).view(1, 1, 8)
    assert Calibration(network, [alike]).gates(units, mask, {}).tolist() == pytest.approx([64, 64])
    with pytest.raises(NoGradients, match="no derivatives with respect to what reads its units"):
        Calibration(network, [opposed]).gates(units, mask, {})
