"""Sensitivity: how much a network's outputs depend on each layer, which makes weights of different layers comparable.

No labels are needed, because the outputs are differentiated in random directions, not a loss.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.large.devices import with_float64
from lightning_roulette.large.processes import Processes
from lightning_roulette.network.hooks import Enough, run_with_hooks
from lightning_roulette.network.parameters import CONVOLUTIONS, TRANSPOSED, aliases, owners_of
from lightning_roulette.network.ties import ties_of
from lightning_roulette.refit.channel_sums import ChannelSums
from lightning_roulette.wheel.chance import random_bits, stream

_ROWS = 2**14  # of the outputs of each layer that are differentiated at least, if there are as many
_ALL = 1 << 30


class NoGradients(ValueError):
    """The network's outputs have no derivatives with respect to the outputs of its modules."""


class Sensitivity:
    """Derivatives of a network's outputs, from hooks on its modules during forward and backward runs.

    It needs the memory of a training step without an optimizer.

    Args:
        module: The network.
        names: Names of the weights.
        pieces: Functions that each run the network on some samples. As many are used as give each layer 16,384 rows of
            output. The rows are counted in the first one.
        seed: Seed of the random directions.
        processes: Those that share the pieces. They all call the same methods.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        pieces: Sequence[Callable[[], object]],
        seed: int,
        processes: Processes,
    ) -> None:
        self._seed, self._processes = seed, processes
        self._shapes = {name: module.get_parameter(name).shape for name in names}
        self._owners = _owners(module, names)
        parts = dict(module.named_modules(remove_duplicate=False))
        around = [parts[path] for own in self._owners.values() for prefix, *_ in own for path in _outwards(prefix)]
        rows: Counter[nn.Module] = Counter()
        first = [_calls_in(piece, around, rows) for piece in pieces[:1]]
        self._pieces = self._enough(pieces, parts, rows)
        self._calls = (first + [_calls_in(piece, around) for piece in self._pieces[1:]])[: len(self._pieces)]
        called = processes.any_of(list(dict.fromkeys(around)), {part for calls in self._calls for part in calls})
        self._observed = {
            name: [part for prefix, *_ in owners if (part := _nearest(prefix, parts, called)) is not None]
            for name, owners in self._owners.items()
        }

    def _enough(
        self,
        pieces: Sequence[Callable[[], object]],
        parts: Mapping[str, nn.Module],
        rows: Counter[nn.Module],
    ) -> Sequence[Callable[[], object]]:
        """Return the first pieces that have enough rows for all owners of the weights.

        Args:
            pieces: The pieces of this process.
            parts: The modules of the network.
            rows: Rows of the outputs of modules in the first piece.
        """
        owners = {prefix for own in self._owners.values() for prefix, *_ in own}
        least = min((rows[_caller(prefix, parts)] for prefix in owners), default=0)
        most = math.ceil(_ROWS / least) if least else _ALL
        needed = int(self._processes.each(torch.tensor(most))[0])
        return pieces[: len(range(self._processes.rank, needed, self._processes.ranks))]

    def scales(self) -> dict[str, Tensor]:
        """Return the factors that multiply the magnitudes, up to one factor that is the same for all weights.

        For the weight of a Linear or Conv layer from input `i` to output `j` it is

            rms(x_i) ** (1 / 2) * root of the sum of (dy / dz_j) ** 2

        - `x` is the layer's input and `z` its output.
        - `y` are the outputs of the last modules, that is, no other module with one of the weights depends on them.
        - The sum is over all outputs, samples and positions. It is estimated in random directions, and exact in
          expectation.

        With the exponent 1, the square would be the diagonal of the Gauss-Newton matrix if inputs and derivatives were
        independent (as in Martens and Grosse 2015). The exponent is 1 / 2 because a refit of the layer's other weights
        replaces a part of what a weight passes on.

        Other cases:

        - The bias of such a layer has an input of 1.
        - For weights of other modules, both factors are means over all channels.
        - If a module is not called itself, the nearest called module around it is used, also with means.
        - A weight without a derivative gets the mean of all others.

        Returns:
            Float64, each of a shape that broadcasts to the shape of its weight.

        Raises:
            NoGradients: If there are no derivatives, or if one is not finite.
        """
        sums = self._sums()
        found = {name: self._scale(name, sums) for name in self._shapes}
        known = [scale for scale in found.values() if scale is not None]
        if not known:
            raise NoGradients("the network's outputs have no derivatives with respect to the outputs of its layers")
        if not all(bool(scale.isfinite().all()) for scale in known):
            raise NoGradients("some derivatives of the network's outputs are not finite")
        mean = sum(float(scale.mean()) for scale in known) / len(known)
        return {name: torch.tensor(mean, dtype=torch.float64) if one is None else one for name, one in found.items()}

    def _sums(self) -> dict[nn.Module, ChannelSums]:
        """Return the sums over the pieces of all processes."""
        observed = list(dict.fromkeys(part for parts in self._observed.values() for part in parts))
        sums: dict[nn.Module, ChannelSums] = {}
        reason = ""
        try:
            sums = self._run(observed)
        except NoGradients as error:
            reason = str(error)
        if reason := self._processes.first_text(reason):
            raise NoGradients(reason)
        over_all = {part: sums.get(part, ChannelSums()).over(self._processes) for part in observed}
        return {part: one for part, one in over_all.items() if one is not None}

    def _run(self, observed: Sequence[nn.Module]) -> dict[nn.Module, ChannelSums]:
        sums: dict[nn.Module, ChannelSums] = {}
        try:
            for number, (piece, calls) in enumerate(zip(self._pieces, self._calls, strict=True)):
                last = sum(calls[part] for part in observed)
                if last:
                    run = _BackwardRun(last, sums, partial(stream, self._seed, self._processes.number(number)))
                    run_with_hooks(piece, observed, after=run.meet)
        except RuntimeError as error:  # a network that works without derivatives may fail with them
            raise NoGradients(f"the network fails where derivatives are asked for: {error}") from error
        return sums

    def _scale(self, name: str, sums: Mapping[nn.Module, ChannelSums]) -> Tensor | None:
        """Return the scale of a weight. If several modules use it, it is the root of the sum of squares."""
        owners = {owner for _, owner, shaped in self._owners[name] if shaped}
        squares: Tensor | None = None
        for part in self._observed[name]:
            if part in sums and (here := sums[part].square(part, self._shapes[name], part in owners)) is not None:
                squares = here if squares is None else squares + here
        return None if squares is None else squares.sqrt()


class _BackwardRun:
    """One run on some samples. It differentiates at its last call and then ends.

    Args:
        calls: Number of calls of all observed modules in the run.
        sums: The sums that it adds to.
        key: Returns a key of random numbers for a number and a word.
    """

    def __init__(self, calls: int, sums: dict[nn.Module, ChannelSums], key: Callable[[int, str], int]) -> None:
        self._left, self._sums, self._key = calls, sums, key
        self._probed: list[tuple[nn.Module, Tensor, Tensor]] = []  # module, probe, output

    def meet(self, part: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        """Add a probe of zeros to a module's output; differentiate with respect to all probes at the last call."""
        if torch.is_inference_mode_enabled():
            raise NoGradients("the network runs in inference mode")
        torch.set_grad_enabled(True)  # in effect until the run leaves the block that turned gradients off
        place, tensor = _first_floating(output)
        if tensor is not None:
            self._add_inputs(part, arguments)
            probe = torch.zeros_like(tensor, requires_grad=True)
            probed = tensor + probe
            self._probed.append((part, probe, probed))
            output = probed if place is None else type(output)([*output[:place], probed, *output[place + 1 :]])
        self._left -= 1
        if self._left == 0:
            self._differentiate()
            raise Enough
        return output

    def _add_inputs(self, part: nn.Module, arguments: tuple[Any, ...]) -> None:
        _, given = _first_floating(arguments)
        squares = torch.ones(1, dtype=torch.float64) if given is None else _squares_by_channel(part, given)
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
                    self._sums[part].add_derivatives(_squares_by_channel(part, derivative))


def _squares_by_channel(part: nn.Module, values: Tensor) -> Tensor:
    """Return sums of squares over all dimensions but the channels, float64."""
    channel = _channel_of(part, values)
    squares = with_float64(values.detach()).to(torch.float64).square()
    return squares.movedim(channel, 0).flatten(1).sum(1) if values.dim() > 1 else squares


def _channel_of(part: nn.Module, values: Tensor) -> int:
    """Return the dimension of the channels of a module's input or output."""
    spatial = len(part.kernel_size) if isinstance(part, (*CONVOLUTIONS, *TRANSPOSED)) else 0
    return max(0, values.dim() - 1 - spatial)


def _first_floating(values: Any) -> tuple[int | None, Tensor | None]:
    """Return the first floating-point tensor with channels, and its place if it is in a tuple or list."""
    if isinstance(values, Tensor):
        return None, values if values.is_floating_point() and values.dim() else None
    if isinstance(values, tuple | list) and not hasattr(values, "_fields"):
        for place, one in enumerate(values):
            if isinstance(one, Tensor) and one.is_floating_point() and one.dim():
                return place, one
    return None, None


def _owners(module: nn.Module, names: Sequence[str]) -> dict[str, list[tuple[str, nn.Module, bool]]]:
    """For each weight, return the owners: path, module, and whether it has the weight in the same shape.

    A tied weight has several owners. If it is another view of the same memory, its shape may be another.
    """
    known, owner_of = aliases(module), owners_of(module)
    first = {alias: name for name, all_names in known.items() for alias in all_names}
    views = {name: tie.names for tie in ties_of(module) for name in tie.names}

    def of(name: str) -> list[tuple[str, nn.Module, bool]]:
        own = first[name]
        every = [(alias, one == own) for one in dict.fromkeys((own, *views.get(own, ()))) for alias in known[one]]
        return [(alias.rpartition(".")[0], owner_of[alias][0], same) for alias, same in every]

    return {name: of(name) for name in names}


def _outwards(path: str) -> Iterator[str]:
    """Yield a module's path and those of all modules around it, innermost first."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _nearest(path: str, parts: dict[str, nn.Module], called: set[nn.Module]) -> nn.Module | None:
    return next((parts[outer] for outer in _outwards(path) if parts[outer] in called), None)


def _caller(path: str, parts: Mapping[str, nn.Module]) -> nn.Module:
    """Return what is called where a module's weights are used: the module itself, or the attention around it."""
    around = parts[path.rpartition(".")[0]]
    return around if isinstance(around, nn.MultiheadAttention) else parts[path]


def _calls_in(
    piece: Callable[[], object], parts: Sequence[nn.Module], rows: Counter[nn.Module] | None = None
) -> Counter[nn.Module]:
    """Run the network and return how often it calls each of these modules. Count the rows of their outputs, too."""
    calls: Counter[nn.Module] = Counter()

    def count(part: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        calls[part] += 1
        _, found = _first_floating(output)
        if rows is not None and found is not None:
            rows[part] += found.numel() // max(1, found.shape[_channel_of(part, found)])

    run_with_hooks(piece, dict.fromkeys(parts), after=count)
    return calls
