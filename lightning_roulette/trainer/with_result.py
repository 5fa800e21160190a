"""A callback with the result of a search, which a worker process may have found."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_roulette.mask.mask import Mask
from lightning_roulette.report.report import SearchReport
from lightning_roulette.trainer.choices import Choices
from lightning_roulette.trainer.hold_zeros import ZeroHolder
from lightning_roulette.trainer.persistence import Result
from lightning_roulette.trainer.removing import refuse_unfinished, removal_from
from lightning_roulette.trainer.spawned import Handover


class WithResult(ZeroHolder):
    """A callback with the result of a search.

    Args:
        choices: The arguments of the callback.
    """

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self._found = Result(choices.between_epochs())
        self._handover = Handover()

    @property
    def report(self) -> SearchReport | None:
        """Report of the search; None before a search."""
        return self._result.report

    @property
    def best_model_path(self) -> str:
        """Path of the checkpoint of the winner; empty if none was written."""
        return self._result.best_model_path

    @property
    def mask(self) -> Mask | None:
        """Which weights the winner keeps, True = kept; None before a search has ended."""
        return self._result.mask

    def mask_at(self, level: int) -> Mask:
        """Return the mask of an accepted level; level 0 is the dense network.

        Args:
            level: Number of an accepted level.

        Returns:
            The mask of all prunable parameters, True = kept.

        Raises:
            ValueError: If there is no such level.
            RuntimeError: If no search has ended.
        """
        return self._result.masks().mask_at(level)

    def weights_at(self, level: int) -> dict[str, Tensor]:
        """Return the prunable weights of an accepted level, and all values that a refit changed; level 0 is dense.

        The tensors are on the CPU. Sharded weights are DTensors on their own devices.
        `module.load_state_dict(pruning.weights_at(level), strict=False)` turns the network into that level.

        Args:
            level: Number of an accepted level.

        Raises:
            ValueError: If there is no such level.
            RuntimeError: If no search has ended in this process. A checkpoint holds only the weights of the winner.
        """
        return self._result.weights_at(level)

    def shrunk(self, example_input: Any = None) -> LightningModule:
        """Return a new module without the neurons, channels and heads that pruning left without effect.

        The module that was pruned keeps its shapes. The new one is of the same class with the same names, on the same
        device, without a Trainer. Its outputs are equal, see `remove_dead`. To train it, pass it to a new fit.

        Args:
            example_input: What the forward of the module is called with: a tensor, a tuple or list of arguments, or a
                mapping of named arguments. None: with `shrink=True`, what the search found; otherwise the module's
                `example_input_array`.

        Raises:
            ImportError: If the extra `units` is not installed.
            RuntimeError: If no search has ended, or if the module is not known in this process.
            TypeError: See `remove_dead`.
            ValueError: If there is no example, or if the module cannot be called with it; see `remove_dead`.
        """
        refuse_unfinished(self._result)
        found: LightningModule = removal_from(self._result, example_input).model  # type: ignore[assignment]
        return found

    def forget(self) -> None:
        """Forget what was found, so that the next fit searches its network anew."""
        self._result.forget(Choices.of(self).between_epochs())

    def held(self) -> Mask | None:
        """Return the mask whose zeros are held: the winner's, or the deepest level's between epochs."""
        return self._result.held

    def __getstate__(self) -> dict[str, Any]:
        # also for copy.copy, whose copy must not share what is found later
        return {**super().__getstate__(), "_found": copy.copy(self._result)}

    @property
    def _result(self) -> Result:
        """The result. If a worker process has sent a result, it is taken over first."""
        if (found := self._handover.received()) is not None:
            self._found.take_over(found, Choices.of(self).between_epochs())
        return self._found

    def _handing_over(self, trainer: Trainer) -> contextlib.AbstractContextManager[None]:
        """If the block fails in a worker process, hand over the result."""
        return self._handover.if_it_fails(trainer, self._found.handed_over)

    def _hand_over(self, trainer: Trainer) -> None:
        """If this is a worker process, send the result to the process that started it."""
        self._handover.send_if_due(trainer, self._found.handed_over)
