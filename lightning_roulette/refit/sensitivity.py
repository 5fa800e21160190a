"""How much a network's outputs depend on what its modules give: what tells the weights of different layers apart.

Labels are not needed: what is derived is not a loss but the outputs themselves, in random directions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.large.devices import with_float64
from lightning_roulette.network.hooks import Enough, run_with_hooks
from lightning_roulette.network.parameters import CONVOLUTIONS, LINEAR_MAPS, TRANSPOSED, aliases, owners_of
from lightning_roulette.wheel.chance import random_bits, stream

_SHARE = 1 / 2  # of the inputs: see Sensitivity.scales


class NoGradients(ValueError):
    """A network's outputs cannot be derived by what its modules give."""


@dataclass(eq=False)
class _Seen:
    """What a module was given, and what the outputs' derivatives by its own are: sums over all samples and positions.

    Attributes:
        inputs: Sum of squares of each channel of its first input.
        rows: How many there were.
        derivatives: For each channel of its output the sum of squared derivatives of the network's outputs.
    """

    inputs: Tensor
    rows: int
    derivatives: Tensor | None = None


class Sensitivity:
    """A network whose modules are listened to while it runs, forwards and backwards.

    It takes the memory of a training step without an optimizer.

    Args:
        module: The network.
        names: The weights of interest.
        pieces: Each runs the network on some samples.
        seed: Of the random directions.
    """

    def __init__(
        self, module: nn.Module, names: Sequence[str], pieces: Sequence[Callable[[], object]], seed: int
    ) -> None:
        self._pieces, self._seed = pieces, seed
        parts, known = dict(module.named_modules(remove_duplicate=False)), aliases(module)
        owner_of = owners_of(module)
        first = {alias: name for name, all_names in known.items() for alias in all_names}
        self._owners = {
            name: [(alias.rpartition(".")[0], owner_of[alias][0]) for alias in known[first[name]]] for name in names
        }
        around = {path: parts[path] for owners in self._owners.values() for prefix, _ in owners for path in _up(prefix)}
        self._calls: list[Counter[nn.Module]] = []
        for piece in pieces:
            calls: Counter[nn.Module] = Counter()
            run_with_hooks(piece, dict.fromkeys(around.values()), after=partial(_count, calls))
            self._calls.append(calls)
        called = {one for calls in self._calls for one in calls}
        self._heard = {
            name: [part for prefix, _ in owners if (part := _nearest(prefix, parts, called)) is not None]
            for name, owners in self._owners.items()
        }
        self._shapes = {name: module.get_parameter(name).shape for name in names}

    def scales(self) -> dict[str, Tensor]:
        """What multiplies the magnitude of each weight, up to a factor that is the same for all.

        For the weight of a Linear or Conv layer from input `i` to output `j` it is

            rms(x_i) ** (1 / 2) * root of the sum of (dy / dz_j) ** 2

        with the layer's input `x` and output `z`, and the outputs `y` of the network: of those modules on which no
        other that has a weight of interest depends. The sum is over all outputs (its expectation in random directions,
        to be exact), samples and positions. With the exponent 1 the square would be the diagonal of the Gauss-Newton
        matrix with inputs and derivatives taken as independent (as in Martens and Grosse 2015). What a weight gives
        through its input is in part made up for by the layer's other inputs once they are refitted, so it counts half.

        The bias of such a layer has an input of 1. Of other modules, and where a module is not called itself but one
        around it, both factors are means over all channels. A weight of which there is no derivative gets the mean of
        all others.

        Returns:
            Float64, each of a shape that broadcasts to that of its weight.

        Raises:
            NoGradients: If there is no derivative at all, or one is not finite.
        """
        seen: dict[nn.Module, _Seen] = {}
        listened = list(dict.fromkeys(part for parts in self._heard.values() for part in parts))
        try:
            for number, piece in enumerate(self._pieces):
                _Backwards(self._calls[number], listened, seen, self._seed, number).run(piece)
        except RuntimeError as error:  # what works without derivatives need not with them
            raise NoGradients(f"the network fails where derivatives are asked for: {error}") from error
        found = {name: _scale(shape, self._owned(name), seen) for name, shape in self._shapes.items()}
        known = [scale for scale in found.values() if scale is not None]
        if not known:
            raise NoGradients("no output of the network can be derived by what its layers give")
        if not all(bool(scale.isfinite().all()) for scale in known):
            raise NoGradients("some derivatives of the network's outputs are not finite")
        mean = sum(float(scale.mean()) for scale in known) / len(known)
        return {name: torch.tensor(mean, dtype=torch.float64) if one is None else one for name, one in found.items()}

    def _owned(self, name: str) -> list[tuple[nn.Module, bool]]:
        """The modules that stand for a weight, and whether each applies it itself."""
        owners = {owner for _, owner in self._owners[name]}
        return [(part, part in owners) for part in self._heard[name]]


class _Backwards:
    """One run on some samples, with a derivative at its last call.

    Args:
        calls: How often each module is called in it.
        parts: The modules that are listened to.
        seen: What is added to.
        seed: Of the directions.
        number: Of the samples.
    """

    def __init__(
        self,
        calls: Counter[nn.Module],
        parts: Sequence[nn.Module],
        seen: dict[nn.Module, _Seen],
        seed: int,
        number: int,
    ) -> None:
        self._parts, self._seen, self._seed, self._number = parts, seen, seed, number
        self._left = sum(calls[part] for part in parts)
        self._given: list[tuple[nn.Module, Tensor, Tensor]] = []  # module, probe, output

    def run(self, piece: Callable[[], object]) -> None:
        if self._left:
            run_with_hooks(piece, self._parts, after=self._meet)

    def _meet(self, part: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if torch.is_inference_mode_enabled():
            raise NoGradients("the network runs in inference mode")
        torch.set_grad_enabled(True)  # until the run leaves the block that it was off in
        place, tensor = _floating(output)
        if tensor is None:
            return self._count_down(None)
        probe = torch.zeros_like(tensor, requires_grad=True)
        probed = tensor + probe
        self._note(part, arguments)
        self._given.append((part, probe, probed))
        return self._count_down(
            probed if place is None else type(output)([*output[:place], probed, *output[place + 1 :]])
        )

    def _count_down(self, output: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            self._derive()
            raise Enough
        return output

    def _note(self, part: nn.Module, arguments: tuple[Any, ...]) -> None:
        _, given = _floating(arguments)
        squares = torch.ones(1, dtype=torch.float64) if given is None else _by_channel(part, given)
        rows = 1 if given is None else max(1, given.numel() // len(squares))
        if (seen := self._seen.get(part)) is None:
            self._seen[part] = _Seen(squares, rows)
        elif seen.inputs.shape == squares.shape:
            seen.inputs, seen.rows = seen.inputs + squares, seen.rows + rows

    def _derive(self) -> None:
        reached: set[int] = set()
        for last in reversed(range(len(self._given))):
            if last in reached:
                continue
            probes = [probe for _, probe, _ in self._given[: last + 1]]
            output = self._given[last][2]
            key = stream(self._seed, self._number, last, "directions")
            signs = random_bits(key, torch.arange(output.numel())).lt(0).to(output.device).view(output.shape)
            direction = torch.where(signs, -1.0, 1.0).to(output.dtype)
            found = torch.autograd.grad(output, probes, direction, retain_graph=True, allow_unused=True)
            for index, derivative in enumerate(found):
                if derivative is not None:
                    reached.add(index)
                    self._add(self._given[index][0], derivative)

    def _add(self, part: nn.Module, derivative: Tensor) -> None:
        seen, squares = self._seen[part], _by_channel(part, derivative)
        if seen.derivatives is None:
            seen.derivatives = squares
        elif seen.derivatives.shape == squares.shape:
            seen.derivatives = seen.derivatives + squares


def _scale(shape: torch.Size, owned: Sequence[tuple[nn.Module, bool]], seen: dict[nn.Module, _Seen]) -> Tensor | None:
    """The scale of a weight of this shape; of one that several modules use, the root of the sum of squares."""
    squares: Tensor | None = None
    for part, itself in owned:
        one = seen.get(part)
        if one is None or one.derivatives is None:
            continue
        inputs, derivatives = (one.inputs / one.rows).sqrt(), one.derivatives
        if not itself or not isinstance(part, LINEAR_MAPS):
            here = derivatives.mean() * inputs.mean() ** (2 * _SHARE)
        elif len(shape) == 1:
            here = derivatives  # of a bias, whose input is 1
        else:
            groups = 1 if isinstance(part, nn.Linear) else part.groups
            flat = (len(derivatives), -1, *[1] * (len(shape) - 2))
            by_output = inputs.view(groups, -1).repeat_interleave(len(derivatives) // groups, 0)
            here = derivatives.view(-1, 1).mul(by_output ** (2 * _SHARE)).view(flat)
        squares = here if squares is None else squares + here
    return None if squares is None else squares.sqrt()


def _by_channel(part: nn.Module, values: Tensor) -> Tensor:
    """Sums of squares over all but the channels, float64."""
    channel = values.dim() - 1
    if isinstance(part, (*CONVOLUTIONS, *TRANSPOSED)):
        channel -= len(part.kernel_size)
    squares = with_float64(values.detach()).to(torch.float64).square()
    return squares.movedim(channel, 0).flatten(1).sum(1) if values.dim() > 1 else squares


def _floating(values: Any) -> tuple[int | None, Tensor | None]:
    """The first floating tensor with channels, and where it is in a tuple or list."""
    if isinstance(values, Tensor):
        return None, values if values.is_floating_point() and values.dim() else None
    if isinstance(values, tuple | list) and not hasattr(values, "_fields"):
        for place, one in enumerate(values):
            if isinstance(one, Tensor) and one.is_floating_point() and one.dim():
                return place, one
    return None, None


def _up(prefix: str) -> Iterator[str]:
    """A path and all around it, innermost first."""
    while prefix:
        yield prefix
        prefix = prefix.rpartition(".")[0]
    yield ""


def _nearest(prefix: str, parts: dict[str, nn.Module], called: set[nn.Module]) -> nn.Module | None:
    return next((parts[path] for path in _up(prefix) if parts[path] in called), None)


def _count(calls: Counter[nn.Module], part: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
    calls[part] += 1
