"""The state of pruning between epochs: which epochs cut, and the slimmest network that held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_roulette.mask.history import History
from lightning_roulette.mask.mask import Mask, apply_mask
from lightning_roulette.network.lending import named_tensors, write
from lightning_roulette.refit.refitted import Survivors
from lightning_roulette.search.gradual import Cuts, Gradual


class BetweenEpochs:
    """A network that is pruned between epochs, with a copy of the slimmest state that kept the floor.

    Args:
        cuts: How each level is cut.
        epochs: The epochs that begin with a cut.

    Attributes:
        gradual: Judges and cuts the network, and holds the report and the masks of all levels.
        over: Whether training has ended and the winner was loaded.
        data: One number for the validation data by which the floor was set; None if it is not known.
    """

    def __init__(self, cuts: Cuts, epochs: Sequence[int]) -> None:
        self.gradual = Gradual(cuts)
        self.over = False
        self.data: int | None = None
        self._numbers = {epoch: number for number, epoch in enumerate(epochs, start=1)}
        self._kept: Survivors | None = None

    @property
    def mask(self) -> Mask | None:
        """The mask of the deepest level, which the trained network has; None before the first judgement."""
        return self.gradual.mask

    @property
    def goes_on(self) -> bool:
        """Whether the network was judged at least once, and training has not ended."""
        return not self.over and self.mask is not None

    def number_of_cut(self, epoch: int) -> int | None:
        """Return the number of the cut before an epoch, from 1; None if the epoch begins without a cut."""
        return None if self.over else self._numbers.get(epoch)

    def keep(self, module: LightningModule) -> None:
        """Copy the network to the CPU, as the slimmest that held."""
        mask = self.mask
        assert mask is not None
        tensors = named_tensors(module)
        # `Survivors` copies the pruned weights only
        self._kept = Survivors.of(mask, {name: one if name in mask else one.clone() for name, one in tensors.items()})

    def load_kept(self, module: LightningModule) -> None:
        """Write the slimmest network that held into the module, in place."""
        tensors = named_tensors(module)
        for name, value in self._all_values().items():
            there = tensors.get(name)
            if there is not None and there.shape == value.shape:
                write(there, value)
            else:  # the module has replaced this buffer since
                owner, _, attribute = name.rpartition(".")
                module.get_submodule(owner)._buffers[attribute] = value.to(module.device)
        apply_mask(module, self._history.mask)

    def weights_at(self, level: int) -> dict[str, Tensor]:
        """Return all values of the slimmest network that held, on the CPU.

        Raises:
            RuntimeError: If `level` is another level. Training has changed its weights since.
        """
        slimmest = self._history.level
        if level != slimmest or self._kept is None:
            raise RuntimeError(
                f"the weights of level {level} were not kept, because training went on from them. Only the weights of "
                f"level {slimmest}, the slimmest that held, were kept. The mask of every level is in mask_at(level)."
            )
        return self._all_values()

    def state(self) -> dict[str, Any]:
        """Return plain tensors and numbers for a checkpoint; empty before the first judgement."""
        if self._kept is None:
            return {}
        return {**self.gradual.state(), "kept": dict(self._kept.values), "over": self.over, "data": self.data}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned. An empty state comes from a single search, which is over."""
        self.gradual.restore(state)
        self.over, self.data = bool(state.get("over", True)), state.get("data")
        if state:
            self._kept = Survivors(state["kept"])

    @property
    def _history(self) -> History:
        return self.gradual.found[1]

    def _all_values(self) -> dict[str, Tensor]:
        assert self._kept is not None
        mask, kept = self._history.mask, self._kept.values
        return self._kept.spread(mask, {name: kept[name].new_empty(at.shape) for name, at in mask.items()})
