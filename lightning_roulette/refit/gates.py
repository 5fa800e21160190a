"""How much a network's outputs depend on whole units: derivatives with respect to a factor of what reads each unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_roulette.large.processes import Processes
from lightning_roulette.wheel.chance import random_bits
from lightning_roulette.wheel.units.units import Units

_DIRECTIONS = 8  # of each run in which outputs are differentiated


class Gates:
    """Sums of squared derivatives of outputs with respect to a gate of each unit.

    A gate is a factor of all weights that read a unit. It is 1 in the network, and 0 in the network without the unit.
    The derivative sums over all positions that a weight meets, so that what a unit does at all positions of a picture
    together counts, unlike in `Sensitivity.scales`, where each position counts alone.

    The sum of squares over all outputs and samples is estimated in directions of random signs, and is exact in
    expectation.

    Args:
        units: The units.
        network: The network.
    """

    def __init__(self, units: Units, network: nn.Module) -> None:
        names = dict.fromkeys(part.name for part in units.parts if part.reads)
        self._units, self._weights = units, {name: network.get_parameter(name) for name in names}
        self.squares = torch.zeros(units.count, dtype=torch.float64)

    def add(self, output: Tensor, key: Callable[[str], int]) -> None:
        """Add the squared derivatives of an output, whose graph is kept.

        Args:
            output: An output of the network.
            key: Returns a key of random numbers for a word.
        """
        for number in range(_DIRECTIONS):
            bits = random_bits(key(f"gates {number}"), torch.arange(output.numel()))
            direction = torch.where(bits.lt(0), -1.0, 1.0).to(output.device, output.dtype).view(output.shape)
            found = torch.autograd.grad(
                output, list(self._weights.values()), direction, retain_graph=True, allow_unused=True
            )
            self.squares += self._along_gates(dict(zip(self._weights, found, strict=True))).square() / _DIRECTIONS

    def over(self, processes: Processes) -> Tensor:
        """Return the sums of all processes."""
        (total,) = processes.add(self.squares)
        return total

    def _along_gates(self, derivatives: Mapping[str, Tensor | None]) -> Tensor:
        """Return the derivative with respect to each gate."""
        products = {}
        for name, weight in self._weights.items():
            derivative = derivatives[name]
            products[name] = torch.zeros_like(weight) if derivative is None else weight.detach() * derivative
        return self._units.totals(products, readers_alone=True)
