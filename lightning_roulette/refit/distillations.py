"""Gradient steps in pruned versions of one network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lightning_roulette.large.processes import Processes
from lightning_roulette.large.shards import any_sharded
from lightning_roulette.mask.mask import Mask
from lightning_roulette.refit.backward_run import NoGradients
from lightning_roulette.refit.distillation import Distillation
from lightning_roulette.refit_settings import LeastSquares, Refit


class Distillations:
    """What takes gradient steps in a network after it was pruned by one mask or another.

    Args:
        module: The network. It must be dense at each call.
        lessons: See `Distillation`.
        seed: See `Distillation`.
        processes: See `Distillation`.
        memory: See `Distillation`.
    """

    def __init__(
        self, module: nn.Module, lessons: Sequence[Callable[[], object]], seed: int, processes: Processes, memory: int
    ) -> None:
        self._module, self._lessons, self._memory = module, lessons, memory
        self._seed, self._processes = seed, processes
        self._prepared: dict[tuple[Any, ...], Distillation] = {}  # for each number of steps and set of names

    def prepared(self, mask: Mask, how: Refit | None) -> Distillation | None:
        """Return what takes the steps of a refit; None if it has none.

        Args:
            mask: The mask of the pruned network.
            how: The settings of the refit.

        Raises:
            ValueError: If the network cannot be differentiated, or if its weights are sharded.
        """
        if not isinstance(how, LeastSquares) or not how.distill:
            return None
        if any_sharded(self._module.parameters()):
            raise ValueError(f"distill is {how.distill}, but gradient steps need whole weights. Pass distill=0.")
        if (key := (how.distill, *mask)) not in self._prepared:
            try:
                self._prepared[key] = Distillation(
                    self._module, list(mask), self._lessons, how.distill, self._seed, self._processes, self._memory
                )
            except NoGradients as error:
                raise ValueError(f"distill is {how.distill}, but {error}. Pass distill=0.") from error
        return self._prepared[key]
