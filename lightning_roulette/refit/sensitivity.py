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

from lightning_roulette.large.processes import Processes
from lightning_roulette.network.hooks import run_with_hooks
from lightning_roulette.network.parameters import aliases, owners_of
from lightning_roulette.network.ties import ties_of
from lightning_roulette.refit.backward_run import BackwardRun, channel_of, first_floating
from lightning_roulette.refit.backward_run import NoGradients as NoGradients
from lightning_roulette.refit.channel_sums import ChannelSums
from lightning_roulette.refit.gates import Gates
from lightning_roulette.wheel.chance import stream
from lightning_roulette.wheel.units.units import Units

_ROWS = 2**14  # of the outputs of each layer that are differentiated at least, if there are as many
_ALL = 1 << 30


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

    def gates(self, units: Units, network: nn.Module) -> Tensor:
        """Return the sum of squared derivatives for each unit, float64, see `Gates`.

        Raises:
            NoGradients: If there are no derivatives, or if one is not finite.
        """
        gates = Gates(units, network)
        self._sums(gates)
        if not bool((found := gates.over(self._processes)).isfinite().all()):
            raise NoGradients("some derivatives of the network's outputs are not finite")
        if not bool(found.any()):
            raise NoGradients("the network's outputs have no derivatives with respect to what reads its units")
        return found

    def _sums(self, gates: Gates | None = None) -> dict[nn.Module, ChannelSums]:
        """Return the sums over the pieces of all processes."""
        observed = list(dict.fromkeys(part for parts in self._observed.values() for part in parts))
        sums: dict[nn.Module, ChannelSums] = {}
        reason = ""
        try:
            sums = self._run(observed, gates)
        except NoGradients as error:
            reason = str(error)
        if reason := self._processes.first_text(reason):
            raise NoGradients(reason)
        over_all = {part: sums.get(part, ChannelSums()).over(self._processes) for part in observed}
        return {part: one for part, one in over_all.items() if one is not None}

    def _run(self, observed: Sequence[nn.Module], gates: Gates | None) -> dict[nn.Module, ChannelSums]:
        sums: dict[nn.Module, ChannelSums] = {}
        try:
            for number, (piece, calls) in enumerate(zip(self._pieces, self._calls, strict=True)):
                last = sum(calls[part] for part in observed)
                if last:
                    run = BackwardRun(last, sums, partial(stream, self._seed, self._processes.number(number)), gates)
                    run_with_hooks(piece, observed, before=None if gates is None else run.begin, after=run.meet)
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
        _, found = first_floating(output)
        if rows is not None and found is not None:
            rows[part] += found.numel() // max(1, found.shape[channel_of(part, found)])

    run_with_hooks(piece, dict.fromkeys(parts), after=count)
    return calls
