"""One run of a network forwards and backwards, in which the outputs of its modules are differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.large.devices import with_float64
from lightning_roulette.network.hooks import Enough
from lightning_roulette.network.parameters import CONVOLUTIONS, TRANSPOSED
from lightning_roulette.refit.channel_sums import ChannelSums
from lightning_roulette.refit.gates import Gates
from lightning_roulette.wheel.chance import random_bits


class NoGradients(ValueError):
    """The network's outputs have no derivatives with respect to the outputs of its modules."""


class BackwardRun:
    """One run on some samples. It differentiates at its last call and then ends.

    Args:
        calls: Number of calls of all observed modules in the run.
        sums: The sums that it adds to.
        key: Returns a key of random numbers for a number and a word.
        gates: Gates of units, whose derivatives are added, too. None: there are none.
    """

    def __init__(
        self,
        calls: int,
        sums: dict[nn.Module, ChannelSums],
        key: Callable[[int, str], int],
        gates: Gates | None,
    ) -> None:
        self._left, self._sums, self._key, self._gates = calls, sums, key, gates
        self._probed: list[tuple[nn.Module, Tensor, Tensor]] = []  # module, probe, output

    def begin(self, part: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Turn gradients on before a module uses its weights."""
        turn_gradients_on()

    def meet(self, part: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        """Add a probe of zeros to a module's output; differentiate with respect to all probes at the last call."""
        turn_gradients_on()
        place, tensor = first_floating(output)
        if tensor is not None:
            self._add_inputs(part, arguments)
            probe = torch.zeros_like(tensor, requires_grad=True)
            probed = tensor + probe
            self._probed.append((part, probe, probed))
            output = with_floating(output, place, probed)
        self._left -= 1
        if self._left == 0:
            self._differentiate()
            raise Enough
        return output

    def _add_inputs(self, part: nn.Module, arguments: tuple[Any, ...]) -> None:
        _, given = first_floating(arguments)
        squares = torch.ones(1, dtype=torch.float64) if given is None else squares_by_channel(part, given)
        rows = 1 if given is None else max(1, given.numel() // len(squares))
        if part in self._sums:
            self._sums[part].add_inputs(squares, rows)
        else:
            self._sums[part] = ChannelSums(squares, rows)

    def _differentiate(self) -> None:
        """Differentiate the outputs on which no later output depends, each in a direction of random signs."""
        reached: set[int] = set()
        for last in reversed(range(len(self._probed))):
            if last in reached:
                continue
            probes = [probe for _, probe, _ in self._probed[: last + 1]]
            output = self._probed[last][2]
            key = self._key(last, "directions")
            signs = random_bits(key, torch.arange(output.numel())).lt(0).to(output.device).view(output.shape)
            direction = torch.where(signs, -1.0, 1.0).to(output.dtype)
            found = torch.autograd.grad(output, probes, direction, retain_graph=True, allow_unused=True)
            for index, derivative in enumerate(found):
                if derivative is not None:
                    reached.add(index)
                    part = self._probed[index][0]
                    self._sums[part].add_derivatives(squares_by_channel(part, derivative))
            if self._gates is not None:
                self._gates.add(output, partial(self._key, last))


def turn_gradients_on() -> None:
    """Turn gradients on until the run leaves the block that turned them off.

    Raises:
        NoGradients: If the network runs in inference mode.
    """
    if torch.is_inference_mode_enabled():
        raise NoGradients("the network runs in inference mode")
    torch.set_grad_enabled(True)


def squares_by_channel(part: nn.Module, values: Tensor) -> Tensor:
    """Return sums of squares over all dimensions but the channels, float64."""
    channel = channel_of(part, values)
    squares = with_float64(values.detach()).to(torch.float64).square()
    return squares.movedim(channel, 0).flatten(1).sum(1) if values.dim() > 1 else squares


def channel_of(part: nn.Module, values: Tensor) -> int:
    """Return the dimension of the channels of a module's input or output."""
    spatial = len(part.kernel_size) if isinstance(part, (*CONVOLUTIONS, *TRANSPOSED)) else 0
    return max(0, values.dim() - 1 - spatial)


def first_floating(values: Any) -> tuple[int | None, Tensor | None]:
    """Return the first floating-point tensor with channels, and its place if it is in a tuple or list."""
    if isinstance(values, Tensor):
        return None, values if values.is_floating_point() and values.dim() else None
    if isinstance(values, tuple | list) and not hasattr(values, "_fields"):
        for place, one in enumerate(values):
            if isinstance(one, Tensor) and one.is_floating_point() and one.dim():
                return place, one
    return None, None


def with_floating(values: Any, place: int | None, tensor: Tensor) -> Any:
    """Return values with another tensor in the place that `first_floating` gave."""
    return tensor if place is None else type(values)([*values[:place], tensor, *values[place + 1 :]])
