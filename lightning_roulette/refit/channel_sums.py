"""Sums over inputs and derivatives, for the channels of a module."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_roulette.large.processes import Processes
from lightning_roulette.network.kinds import affine_kind_of
from lightning_roulette.network.parameters import CONVOLUTIONS, LINEAR_MAPS

_INPUT_EXPONENT = 1 / 2  # see Sensitivity.scales


@dataclass(eq=False)
class ChannelSums:
    """Sums over all samples and positions, for the channels of a module.

    Attributes:
        inputs: Sum of squares of each channel of the module's first input.
        rows: Number of samples and positions in it.
        derivatives: For each channel of the module's output, the sum of squared derivatives of the network's outputs;
            None if there are none.
    """

    inputs: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    rows: int = 0
    derivatives: Tensor | None = None

    def add_inputs(self, squares: Tensor, rows: int) -> None:
        """Add the inputs of one call, unless it has another number of channels."""
        if self.inputs.shape == squares.shape:
            self.inputs, self.rows = self.inputs + squares, self.rows + rows

    def add_derivatives(self, squares: Tensor) -> None:
        """Add the derivatives of one call, unless it has another number of channels."""
        if self.derivatives is None:
            self.derivatives = squares
        elif self.derivatives.shape == squares.shape:
            self.derivatives = self.derivatives + squares

    def over(self, processes: Processes) -> ChannelSums | None:
        """Return the sums of all processes, on the CPU; None if no process has any. All processes call this.

        The first process that has sums decides on the number of channels.
        """
        if processes.ranks == 1:
            return self if self.rows else None
        inputs, rows = _over(processes, self.inputs if self.rows else None, self.rows)
        derivatives, _ = _over(processes, self.derivatives, 0)
        return None if inputs is None else ChannelSums(inputs, rows, derivatives)

    def square(self, part: nn.Module, shape: torch.Size, owned: bool) -> Tensor | None:
        """Return the squared scale of a weight of this shape; None without derivatives.

        Args:
            part: The module of these sums.
            shape: Shape of the weight.
            owned: Whether the weight is the module's own; otherwise it belongs to a module inside it.
        """
        if self.derivatives is None:
            return None
        inputs, derivatives = (self.inputs / self.rows).sqrt(), self.derivatives
        kind = affine_kind_of(part)
        if not owned or not (kind is not None or isinstance(part, LINEAR_MAPS)):
            return derivatives.mean() * inputs.mean() ** (2 * _INPUT_EXPONENT)
        if len(shape) == 1:
            return derivatives  # a bias, whose input is 1
        groups = part.groups if isinstance(part, CONVOLUTIONS) else 1
        by_output = inputs.view(groups, -1).repeat_interleave(len(derivatives) // groups, 0)
        squares = derivatives.view(-1, 1).mul(by_output ** (2 * _INPUT_EXPONENT))
        if kind is not None and kind.matrix(squares).shape == shape:
            return kind.matrix(squares)
        if kind is not None:  # another parameter of the module
            return squares.mean()
        return squares.view(len(derivatives), -1, *[1] * (len(shape) - 2))


def _over(processes: Processes, own: Tensor | None, rows: int) -> tuple[Tensor | None, int]:
    """Return the sum of tensors with as many entries as that of the first process that has one, and of their rows."""
    known = processes.each(torch.tensor([0 if own is None else len(own), rows]))
    sizes = known[:, 0]
    if not sizes.any():
        return None, 0
    size = int(sizes[sizes > 0][0])
    counted = own is not None and len(own) == size
    ours = own.cpu().clone() if own is not None and counted else torch.zeros(size, dtype=torch.float64)
    (total,) = processes.add(ours)
    return total, int(known[sizes == size, 1].sum())
