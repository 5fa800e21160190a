"""Sensitivity: how much a network's outputs depend on each layer, which makes weights of different layers comparable.

No labels are needed, because the outputs are differentiated in random directions, not a loss.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_roulette.large.processes import Processes
from lightning_roulette.network.hooks import run_with_hooks
from lightning_roulette.refit.backward_run import BackwardRun
from lightning_roulette.refit.backward_run import NoGradients as NoGradients
from lightning_roulette.refit.channel_sums import ChannelSums
from lightning_roulette.refit.gates import Gates
from lightning_roulette.refit.owners import around, caller, calls_in, observed, weight_owners
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
        self._owners = weight_owners(module, names)
        parts = dict(module.named_modules(remove_duplicate=False))
        users = around(self._owners, parts)
        rows: Counter[nn.Module] = Counter()
        first = [calls_in(piece, users, rows) for piece in pieces[:1]]
        self._pieces = self._enough(pieces, parts, rows)
        self._calls = (first + [calls_in(piece, users) for piece in self._pieces[1:]])[: len(self._pieces)]
        called = {part for calls in self._calls for part in calls}
        self._observed = observed(self._owners, parts, called, processes)

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
        least = min((rows[caller(prefix, parts)] for prefix in owners), default=0)
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
