"""HoldZeros: pruned weights stay zero while a Trainer trains on."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from torch import Tensor

from lightning_roulette.large.shards import reshard
from lightning_roulette.mask.mask import Mask, apply_mask, breaks, fill_pruned, fits
from lightning_roulette.network.lending import copy_into, named_tensors
from lightning_roulette.network.parameters import aliases, prunable_parameters
from lightning_roulette.network.zeros import ZeroHold
from lightning_roulette.trainer.validation.muting import callbacks_of

_log = logging.getLogger("lightning_roulette")


def hold_zeros(trainer: Trainer, module: LightningModule, mask: Mask, afresh: bool = True) -> ZeroHold:
    """Prune `module` by `mask` and hold its zeros through every optimizer of the Trainer.

    Args:
        trainer: In a fit.
        module: What it trains.
        mask: Which weights are kept.
        afresh: Whether the optimizers may remember the network before it was pruned.

    Raises:
        ValueError: If the mask is not one of this module; then nothing was changed.
    """
    apply_mask(module, mask)
    return ZeroHold(dict(module.named_parameters(remove_duplicate=False)), mask, trainer.optimizers, afresh)


def average_becomes(trainer: Trainer, module: LightningModule) -> None:
    """Let a WeightAveraging go on from the module as it is: it knows nothing of what was loaded."""
    for one in callbacks_of(trainer):
        average = getattr(one, "_average_model", None)  # nothing public leads there
        if isinstance(one, WeightAveraging) and average is not None:
            now, averaged = named_tensors(module), named_tensors(average.module)
            copy_into(averaged, {name: now[name] for name in averaged})


def place_before_checkpoints(trainer: Trainer, callback: Callback) -> None:
    """Let `callback` run after everything that still changes weights and before everything that saves them."""
    rest = [one for one in callbacks_of(trainer) if one is not callback]
    first = next((i for i, one in enumerate(rest) if isinstance(one, Checkpoint)), len(rest))
    # a new list: Lightning is going through the old one now
    trainer.callbacks = [*rest[:first], callback, *rest[first:]]  # type: ignore[attr-defined]


class ZeroHolder(Callback):
    """A callback that may hold zeros: the hooks that this takes, whatever is held and since when."""

    _hold: ZeroHold | None = None

    def held(self) -> Mask | None:
        """Which weights are kept, None if nothing is held."""
        raise NotImplementedError

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Fill after the step of an optimizer that is not torch's."""
        if self._hold is not None and self._hold.misses_steps:
            self._hold.fill()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill, as weight averaging has put its own weights in."""
        if self._hold is not None:
            self._hold.fill()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill, as weight averaging has put its own weights in."""
        if self._hold is not None:
            self._hold.fill()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save zeros, as weight averaging has put its own weights in; of a network that holds them."""
        if (mask := self.held()) is None or not fits(mask, pl_module) or breaks(mask, pl_module):
            return
        weights, names = checkpoint["state_dict"], aliases(pl_module)
        for name, kept in mask.items():
            for alias in names.get(name, [name]):
                if alias in weights:
                    weights[alias] = weights[alias].clone()
                    fill_pruned({name: weights[alias]}, {name: kept})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hold nothing any more; the zeros are in the weights."""
        if self._hold is not None:
            self._hold.release()
        self._hold = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hold nothing any more: Lightning tears no callback down after an error."""
        self.teardown(trainer, pl_module, "fit")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_hold": None}  # hooks belong to one run


class HoldZeros(ZeroHolder):
    """Holds pruned weights at zero, exactly, while a `Trainer` fits: to fine-tune a pruned network.

    Works through any optimizer (momentum, weight decay, LBFGS), gradient accumulation and clipping, manual
    optimization, mixed precision and weight averaging, and on weights that `fully_shard` has sharded (FSDP2). Names in
    checkpoints stay those of the module.

    Args:
        mask: Which weights are kept, by name in the LightningModule; or a file that `Mask.load` reads; or None: the
            zeros that its prunable weights have when training starts.

    Example:
        model = MyModule.load_from_checkpoint("pruned.ckpt")
        Trainer(callbacks=[HoldZeros()], max_epochs=3).fit(model, data)

    Raises:
        ValueError: When training starts, if the mask names no such parameter or has another shape.
    """

    def __init__(self, mask: Mapping[str, Tensor] | str | os.PathLike[str] | None = None) -> None:
        self.mask: Mask | None = None
        if mask is not None:
            self.mask = Mask.load(mask) if isinstance(mask, str | os.PathLike) else Mask(mask)
        self._held: Mask | None = None

    def held(self) -> Mask | None:
        """The mask that was given, or that of the zeros found when training started."""
        return self._held

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place between those who change weights and those who save them."""
        if stage == "fit":
            place_before_checkpoints(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the zeros, if no mask was given, and hold them."""
        self._held = self.mask if self.mask is not None else _found(pl_module)
        self._hold = hold_zeros(trainer, pl_module, self._held)
        if not self._held:
            warnings.warn("HoldZeros found no zeros to hold: was a pruned checkpoint loaded?", stacklevel=2)
        elif trainer.is_global_zero:
            _log.info(f"HoldZeros: {self._held.sparsity:.2%} of {self._held.size:,} weights are held at zero.")


def _found(module: LightningModule) -> Mask:
    reshard(module)
    zeros = Mask.of_nonzeros(prunable_parameters(module))
    with_zeros = {name: kept for name, kept in zeros.items() if not bool(kept.all())}
    return Mask(with_zeros)
