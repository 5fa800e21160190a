"""What is refused before any work starts, each with what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_roulette.large.shards import Shards
from lightning_roulette.network.parameters import has_lazy_parameters, prunable_parameters, skipped_parameters
from lightning_roulette.search.arguments import beyond_shards
from lightning_roulette.settings import Importance, LeastSquares, refit_of
from lightning_roulette.trainer.validation.muting import callbacks_of


def refuse_foreign_trainer(trainer: Any) -> None:
    """Raise for a Trainer of the `pytorch_lightning` package, whose classes are not those of `lightning`.

    Raises:
        TypeError: If it is one.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"the Trainer is from {type(trainer).__module__.split('.')[0]!r}, but must be that of lightning.pytorch. "
            "Write `from lightning.pytorch import Trainer` (and LightningModule) instead of `pytorch_lightning`."
        )


def refuse_trainer(
    trainer: Trainer, callback: Callback, keep_callbacks: Sequence[str], at_epoch: int | Sequence[int] | None
) -> None:
    """Raise where this Trainer cannot search as asked.

    Raises:
        ValueError: If an epoch of `at_epoch` lies beyond `max_epochs`, or `keep_callbacks` names no callback of the
            Trainer.
        RuntimeError: If another callback has the same state key.
    """
    twins = [one for one in callbacks_of(trainer) if one.state_key == callback.state_key]
    if len(twins) > 1:
        raise RuntimeError(
            f"the Trainer has {len(twins)} callbacks with the state key {callback.state_key!r}, but one checkpoint can "
            "hold the state of only one. Keep one of them."
        )
    kinds = [type(one).__name__ for one in callbacks_of(trainer) if one is not callback]
    for name in keep_callbacks:
        if name not in kinds:
            raise ValueError(
                f"keep_callbacks names {name!r}, but the Trainer's other callbacks are {', '.join(kinds) or 'none'}. "
                "Add it to the Trainer, or leave it out."
            )
    last = None if trainer.fast_dev_run else trainer.max_epochs  # type: ignore[attr-defined]
    if last is None or last == -1:
        return
    if isinstance(at_epoch, int) and at_epoch > last:
        raise ValueError(
            f"at_epoch is {at_epoch}, but the Trainer stops after max_epochs={last}. "
            "Lower at_epoch, or leave it out to search when training ends."
        )
    if isinstance(at_epoch, Sequence) and at_epoch[-1] >= last:
        raise ValueError(
            f"at_epoch ends with {at_epoch[-1]}, but the Trainer stops after max_epochs={last}, and a level is judged "
            f"after some training. Let the last epoch of at_epoch be {last - 1} at most."
        )


def refuse_sharding(
    trainer: Trainer,
    refit: str | LeastSquares | None,
    importance: Importance | str | None,
    at_epoch: int | Sequence[int] | None,
) -> None:
    """Raise where the strategy shards weights in such a way, or something is asked for, that a shard cannot give.

    Raises:
        RuntimeError: If that is so.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
        how = (
            "flat buffers, in which entries have lost their places"
            if isinstance(strategy, FSDPStrategy)
            else ("partitions of its own, which it gives nobody else to write to")
        )
        raise RuntimeError(
            f"the strategy is {name}, which shards weights into {how}, but RouletteWheelPruning writes to weights by "
            "their places. Use a single device or 'ddp', or for sharded weights ModelParallelStrategy (FSDP2)."
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return
    why = beyond_shards(importance, refit_of(refit))
    if not why and isinstance(at_epoch, Sequence):
        why = f"at_epoch is {at_epoch!r}, and levels are cut between epochs on whole weights alone. Name one epoch."
    if not why and strategy.device_mesh["tensor_parallel"].size() > 1:
        how = f"data_parallel_size={trainer.world_size}, tensor_parallel_size=1"
        why = f"weights that tensor parallelism shards cannot be pruned. Pass {how}, and fully_shard the module."
    if why:
        raise RuntimeError(f"the strategy is {name}, which shards weights, but {why}")


def refuse_without_validation(trainer: Trainer, module: LightningModule) -> None:
    """Raise where candidates could not be validated.

    Raises:
        RuntimeError: If there is no `validation_step`, no validation data, or `limit_val_batches=0`.
    """
    if trainer.enable_validation:
        return
    if not is_overridden("validation_step", module):
        why = f"{type(module).__name__} has no validation_step, by which candidates are judged. Define one."
    elif trainer.limit_val_batches == 0:
        why = "limit_val_batches is 0, so that candidates cannot be judged. Allow some validation batches."
    else:
        why = (
            "there is no validation data, on which candidates are judged. Pass val_dataloaders to fit, or define them."
        )
    raise RuntimeError(f"RouletteWheelPruning: {why}")


def find_prunable(
    module: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, nn.Parameter]:
    """The prunable parameters; none at all is an error unless some get their shape only at the first forward.

    Raises:
        ValueError: If there is none, a pattern matches nothing, or weights are sharded in another way than by rows.
    """
    found = prunable_parameters(module, include=include, exclude=exclude)
    if not found and not has_lazy_parameters(module):
        skipped = skipped_parameters(module, include=include, exclude=exclude)
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:8]) or "it has no parameters"
        raise ValueError(f"no parameter of {type(module).__name__} is prunable ({reasons}). Name some with include.")
    Shards.of(found)
    return found
