"""Pruning in turn with training: which epochs cut, and the slimmest network that held, kept while training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_roulette.mask.mask import apply_mask
from lightning_roulette.network.lending import named_tensors, write
from lightning_roulette.refit.refitted import Survivors
from lightning_roulette.search.gradual import Cuts, Gradual


class BetweenEpochs(Gradual):
    """A network that is pruned between epochs, and of which the slimmest state that held is kept.

    Args:
        cuts: How it is cut.
        epochs: Before which epochs.

    Attributes:
        over: Whether training has ended, and the winner was loaded.
    """

    def __init__(self, cuts: Cuts, epochs: Sequence[int]) -> None:
        super().__init__(cuts)
        self._places = {epoch: place for place, epoch in enumerate(epochs, start=1)}
        self._kept: Survivors | None = None
        self.over = False

    def place(self, epoch: int) -> int | None:
        """The number of the cut before an epoch, from 1; None if there is none."""
        return None if self.over else self._places.get(epoch)

    def keep(self, module: LightningModule) -> None:
        """Keep the network as it is, on the CPU: its level has held."""
        mask = self.mask
        assert mask is not None
        tensors = named_tensors(module)
        # survivors are picked into new tensors; the rest would be the network's own
        self._kept = Survivors.of(mask, {name: one if name in mask else one.clone() for name, one in tensors.items()})

    def load_kept(self, module: LightningModule) -> None:
        """Make the network the slimmest that held, in place."""
        assert self.history is not None
        tensors = named_tensors(module)
        for name, value in self._spread().items():
            there = tensors.get(name)
            if there is not None and there.shape == value.shape:
                write(there, value)
            else:  # a buffer that was replaced since
                owner, _, attribute = name.rpartition(".")
                module.get_submodule(owner)._buffers[attribute] = value.to(module.device)
        apply_mask(module, self.history.mask)

    def weights_at(self, level: int) -> dict[str, Tensor]:
        """All values of the slimmest network that held, on the CPU.

        Raises:
            RuntimeError: If that is another level: training went on from it, and its weights are gone.
        """
        assert self.history is not None
        if level != self.history.level or self._kept is None:
            raise RuntimeError(
                f"the weights of level {level} are not kept, as training went on from them: only those of level "
                f"{self.history.level} are, the slimmest that held. The masks of all levels are there: mask_at(level)."
            )
        return self._spread()

    def _spread(self) -> dict[str, Tensor]:
        assert self.history is not None
        assert self._kept is not None
        mask, kept = self.history.mask, self._kept.values
        return self._kept.spread(mask, {name: kept[name].new_empty(at.shape) for name, at in mask.items()})

    def state(self) -> dict[str, Any]:
        """What a resume goes on from, the kept network included."""
        if self._kept is None:
            return {}
        return {**super().state(), "kept": dict(self._kept.values), "over": self.over}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; if it is empty, a search has already done what was to be done."""
        super().restore(state)
        self.over = bool(state.get("over", True))
        if state:
            self._kept = Survivors(state["kept"])
