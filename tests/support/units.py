"""Units of small networks, grouped by hand."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_roulette.wheel.units.units import Cost, Part, Units


def labels(start: int, size: int, dim: int, dims: int) -> Tensor:
    """Numbers of units along one dimension of a weight."""
    return torch.arange(start, start + size).view([size if place == dim else 1 for place in range(dims)])


def perceptron(sizes: tuple[int, ...] = (4, 3, 5, 2), seed: int = 0) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def hidden_units(network: nn.Sequential, cost: Cost | None = None, multiply_adds: Cost | None = None) -> Units:
    """The hidden neurons of a perceptron: a group for each hidden layer."""
    places = [place for place, layer in enumerate(network) if isinstance(layer, nn.Linear)]
    groups, parts, start = {}, [], 0
    for place, following in pairwise(places):
        size = network[place].out_features
        groups[str(place)] = size
        parts.append(Part(f"{place}.weight", labels(start, size, 0, 2), reads=False))
        parts.append(Part(f"{following}.weight", labels(start, size, 1, 2)))
        start += size
    names = [f"{place}.weight" for place in places]
    return Units("neuron", groups, tuple(parts), cost or Cost.of_weights(names), multiply_adds)
