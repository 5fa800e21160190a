"""HoldZeros: keeps pruned weights at zero in further training."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from torch import Tensor

from lightning_roulette.checks import check_words
from lightning_roulette.large.bits import Bits
from lightning_roulette.large.shards import reshard
from lightning_roulette.mask.mask import Mask, apply_mask, breaks, fill_pruned, fits
from lightning_roulette.network.lending import copy_into, leave_inference_mode, named_tensors
from lightning_roulette.network.parameters import aliases, parameters_like, prunable_parameters
from lightning_roulette.network.zeros import ZeroHold
from lightning_roulette.trainer.lightning_names import EitherCallback, in_both
from lightning_roulette.trainer.validation.muting import callbacks_of

_log = logging.getLogger("lightning_roulette")


class Zeros:
    """The zeros that a callback holds at present, if any."""

    def __init__(self) -> None:
        self._hold: ZeroHold | None = None

    def hold(self, trainer: Trainer, module: LightningModule, mask: Mask, afresh: bool = True) -> None:
        """Prune `module` by `mask`, and hold its zeros through every optimizer of the Trainer.

        Zeros that were held before are released.

        Args:
            trainer: A Trainer in `fit`.
            module: The module that it trains.
            mask: Which weights are kept.
            afresh: Whether the optimizers may remember the network before it was pruned.

        Raises:
            ValueError: If the mask does not fit the module. The module is then unchanged.
        """
        self.release()
        apply_mask(module, mask)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        self._hold = ZeroHold(parameters, mask, trainer.optimizers, afresh)

    def fill(self) -> None:
        """Set the pruned weights to zero now."""
        if self._hold is not None:
            self._hold.fill()

    def fill_after_step(self) -> None:
        """Set the pruned weights to zero if there is an optimizer whose steps cannot be watched."""
        if self._hold is not None and self._hold.misses_steps:
            self._hold.fill()

    def release(self) -> None:
        """Hold nothing from now on; the weights stay as they are."""
        if self._hold is not None:
            self._hold.release()
        self._hold = None

    def __bool__(self) -> bool:
        return self._hold is not None


def load_into_average(trainer: Trainer, module: LightningModule) -> None:
    """Make a WeightAveraging continue from the module as it is now, because it did not see that weights were loaded."""
    for one in callbacks_of(trainer):
        average = getattr(one, "_average_model", None)  # lightning has no public name for it
        if isinstance(one, in_both(WeightAveraging)) and average is not None:
            now, averaged = named_tensors(module), named_tensors(average.module)
            copy_into(averaged, {name: now[name] for name in averaged})


def held_by_others(trainer: Trainer, module: LightningModule, callback: Callback) -> Mask | None:
    """Return what the other callbacks of a Trainer hold at zero, and set it to zero. None if they hold nothing.

    Args:
        trainer: A Trainer in `fit`.
        module: The module that it trains.
        callback: The callback that asks.

    Returns:
        A mask by the first names of the parameters.
    """
    others = [one for one in callbacks_of(trainer) if isinstance(one, ZeroHolder) and one is not callback]
    masks = [mask for one in others if (mask := one.filled(trainer, module))]
    first = {name: own for own, names in aliases(module).items() for name in names}
    found: dict[str, Bits] = {}
    for mask in masks:
        for name, flags in mask.flags.items():
            own = first[name]
            bits = flags.to("cpu").bits()
            found[own] = found[own] & bits if own in found else bits
    return Mask(found) if found else None


def place_before_checkpoints(trainer: Trainer, callback: Callback) -> None:
    """Move `callback` behind all callbacks that change weights, and before those that save checkpoints."""
    rest = [one for one in callbacks_of(trainer) if one is not callback]
    first = next((i for i, one in enumerate(rest) if isinstance(one, in_both(Checkpoint))), len(rest))
    # in a new list, because Lightning iterates over the old one at this moment
    trainer.callbacks = [*rest[:first], callback, *rest[first:]]  # type: ignore[attr-defined]


class ZeroHolder(EitherCallback):
    """Base class of callbacks that hold zeros in training."""

    def __init__(self) -> None:
        self._zeros = Zeros()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_zeros": Zeros()}  # hooks belong to one run, so that a copy holds nothing

    def held(self) -> Mask | None:
        """Return the mask whose zeros are held; None if no zeros are held."""
        raise NotImplementedError

    def filled(self, trainer: Trainer, module: LightningModule) -> Mask | None:
        """Set the pruned weights to zero now, and return the mask whose zeros are held; None if no zeros are held.

        Args:
            trainer: A Trainer in `fit`.
            module: The module that it trains.
        """
        self._zeros.fill()
        return self.held()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the pruned weights to zero, because a hook of the module may have written to them since the step."""
        self._zeros.fill()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Set the pruned weights to zero if there is an optimizer whose steps cannot be watched."""
        self._zeros.fill_after_step()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the pruned weights to zero, because weight averaging has loaded its own weights."""
        self._zeros.fill()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before the first batch, set the pruned weights to zero: the module may have loaded averaged weights."""
        if batch_idx == 0:
            self._zeros.fill()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the pruned weights to zero, because weight averaging has loaded its own weights."""
        self._zeros.fill()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set the pruned weights of the checkpoint to zero, because weight averaging replaces its weights."""
        self._zeros.fill()
        if (mask := self.held()) is None or not fits(mask, pl_module) or breaks(mask, pl_module):
            return
        weights, names = checkpoint["state_dict"], aliases(pl_module)
        for name, kept in mask.items():
            for alias in names.get(name, [name]):
                if alias in weights:
                    weights[alias] = weights[alias].clone()
                    fill_pruned({name: weights[alias]}, {name: kept})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the pruned weights to zero a last time, and hold nothing from now on."""
        if stage == "fit":
            self._zeros.fill()
        self._zeros.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hold nothing from now on: after an error Lightning does not call `teardown`."""
        self._zeros.release()


class HoldZeros(ZeroHolder):
    """Keeps pruned weights at exactly zero in further training.

    Use it to fine-tune a pruned network. `RouletteWheelPruning` holds the zeros of its own network itself. With both in
    one Trainer, a pruned network is pruned further: its zeros stay zero in the search, and count as pruned.

    It works with:

    - any optimizer: momentum, weight decay, LBFGS, and optimizers that are not torch's;
    - gradient accumulation, gradient clipping, manual optimization and mixed precision;
    - weight averaging callbacks;
    - hooks of the module that write weights, such as a mean teacher: zeros are written again before each batch, before
      each validation and when training ends;
    - weights that `fully_shard` has sharded (FSDP2).

    Checkpoints keep the parameter names of the module.

    Args:
        mask: Which weights are kept.

            - None: the zeros that the prunable weights have when training starts.
            - A `Mask`, or a dictionary from parameter names to bool tensors, True = kept.
            - The path of a file that `Mask.load` reads, such as `pruned.ckpt`.
        exclude: Glob patterns over names of parameters whose zeros are not held. Use it for parameters that are zero
            before they are trained, such as the second matrix of a LoRA adapter. Without a mask, a parameter that is
            entirely zero is held too, since a search may have pruned all of it, and a warning names it.

    Raises:
        TypeError: If a tensor of the mask is not bool, or `exclude` is not a list of patterns.
        ValueError: When training starts, if the module lacks a parameter of the mask, or has it in another shape, or if
            a pattern of `exclude` matches no parameter.

    Examples:
        Fine-tune a pruned network:

            model = MyModule.load_from_checkpoint("pruned.ckpt")
            Trainer(callbacks=[HoldZeros()], max_epochs=3).fit(model, data)

        Train LoRA adapters on it, whose matrices `lora_B` start at zero:

            model = WithAdapters(MyModule.load_from_checkpoint("pruned.ckpt"))
            Trainer(callbacks=[HoldZeros(exclude=["*lora_*"])], max_epochs=3).fit(model, data)
    """

    def __init__(
        self, mask: Mapping[str, Tensor] | str | os.PathLike[str] | None = None, *, exclude: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        if exclude is not None:
            check_words("exclude", exclude, "patterns over parameter names")
        self.exclude = exclude
        self.mask: Mask | None = None
        if mask is not None:
            self.mask = Mask.load(mask) if isinstance(mask, str | os.PathLike) else Mask(mask)
        self._held: Mask | None = None

    def held(self) -> Mask | None:
        """Return the mask that was passed, or the mask of the zeros found when training started, less `exclude`."""
        return self._held

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place between callbacks that change weights and callbacks that save them."""
        if stage == "fit":
            self._held = None
            leave_inference_mode(pl_module)
            place_before_checkpoints(trainer, self)

    def filled(self, trainer: Trainer, module: LightningModule) -> Mask | None:
        """Set the pruned weights to zero now, and return the mask whose zeros are held.

        If nothing was held in this fit yet, because nothing is trained, it begins now.

        Args:
            trainer: A Trainer in `fit`.
            module: The module that it trains.
        """
        if self._held is None:
            self.on_train_start(trainer, module)
        return super().filled(trainer, module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the zeros, if no mask was passed, and hold them."""
        left_out = set() if self.exclude is None else parameters_like(pl_module, self.exclude, "exclude")
        found = _mask_of_zeros(pl_module, left_out) if self.mask is None else self.mask
        self._held = Mask({name: kept for name, kept in found.stored.items() if name not in left_out})
        self._zeros.hold(trainer, pl_module, self._held)
        if self.mask is None:
            _warn_of_all_zero(pl_module, self._held)
        if not self._held:
            warnings.warn("HoldZeros found no zeros to hold. Was a pruned checkpoint loaded?", stacklevel=2)
        elif trainer.is_global_zero:
            _log.info(f"HoldZeros: holds {self._held.sparsity:.2%} of {self._held.size:,} weights at zero.")


def _mask_of_zeros(module: LightningModule, left_out: Collection[str]) -> Mask:
    reshard(module)
    with _unfrozen(module):  # frozen weights may be trained later
        found = prunable_parameters(module)
    zeros = Mask.of_nonzeros({name: one for name, one in found.items() if name not in left_out})
    sizes = {name: flags.numel() for name, flags in zeros.flags.items()}
    return Mask({name: kept for name, kept in zeros.stored.items() if zeros.counts[name] < sizes[name]})


@contextlib.contextmanager
def _unfrozen(module: LightningModule) -> Iterator[None]:
    frozen = [one for one in module.parameters() if one.is_floating_point() and not one.requires_grad]
    try:
        for one in frozen:
            one.requires_grad_(True)
        yield
    finally:
        for one in frozen:
            one.requires_grad_(False)


def _warn_of_all_zero(module: LightningModule, held: Mask) -> None:
    """Warn of parameters that are entirely zero, which may be adapters that are not trained yet."""
    parameters = dict(module.named_parameters())
    names = [name for name, count in held.counts.items() if count == 0 and parameters[name].requires_grad]
    if names:
        some = ", ".join(repr(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")
        rank_zero_warn(
            f"HoldZeros: all weights of {some} are zero, and stay zero, so they are not trained. This is right for a "
            "layer that was pruned entirely. An adapter that starts at zero must be left out: pass the mask of the "
            f"pruned network, as in HoldZeros('pruned.ckpt'), or HoldZeros(exclude={names[:8]!r}).",
            stacklevel=3,
        )
