"""Sensitivities of pruned versions of one network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_roulette.large.processes import Processes
from lightning_roulette.mask.mask import Mask, fill_pruned
from lightning_roulette.network.lending import copy_into, lent, named_tensors
from lightning_roulette.refit.sensitivity import Sensitivity
from lightning_roulette.wheel.units.units import Units


class Sensitivities:
    """Differentiates a network after it was pruned by one mask or another.

    Each method changes the network while it runs, and restores it bit for bit.

    Args:
        module: The network. It must have its dense weights at each call.
        pieces: See `Sensitivity`.
        seed: See `Sensitivity`.
        processes: See `Sensitivity`.
    """

    def __init__(
        self, module: nn.Module, pieces: Sequence[Callable[[], object]], seed: int, processes: Processes
    ) -> None:
        self._module, self._pieces, self._seed, self._processes = module, pieces, seed, processes
        self._prepared: dict[tuple[str, ...], Sensitivity] = {}  # for each set of names

    def scales(self, mask: Mask, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the factors of `Sensitivity.scales` for the weights of a mask, on their devices.

        Args:
            mask: The mask of the pruned network.
            values: Values that differ from the dense network.
        """
        with self._pruned(mask, values) as sensitivity:
            found = sensitivity.scales()
        return {name: found[name].to(kept.device) for name, kept in mask.items()}

    def gates(self, units: Units, mask: Mask, values: Mapping[str, Tensor]) -> Tensor:
        """Return the sums of `Sensitivity.gates`.

        Args:
            units: The units.
            mask: The mask of the pruned network.
            values: Values that differ from the dense network.
        """
        with self._pruned(mask, values) as sensitivity:
            return sensitivity.gates(units, self._module)

    @contextmanager
    def _pruned(self, mask: Mask, values: Mapping[str, Tensor]) -> Iterator[Sensitivity]:
        """Make the network the pruned one inside the block, and give what differentiates it."""
        names = {*mask, *values, *dict(self._module.named_buffers())}
        tensors = {name: one for name, one in named_tensors(self._module).items() if name in names}
        with lent(tensors):
            if (key := tuple(mask)) not in self._prepared:
                self._prepared[key] = Sensitivity(self._module, key, self._pieces, self._seed, self._processes)
            copy_into(tensors, values)
            fill_pruned(tensors, mask)
            yield self._prepared[key]
