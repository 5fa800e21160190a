"""What is refused before training starts. Every message says what to do about it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_roulette.large.shards import Shards
from lightning_roulette.network.coupling.graph import graph_package
from lightning_roulette.network.coverage import coverage_of, largest_class
from lightning_roulette.network.parameters import has_lazy_parameters, prunable_parameters, skipped_parameters
from lightning_roulette.refit_settings import refit_of
from lightning_roulette.report.names import shortened
from lightning_roulette.search.arguments import beyond_shards
from lightning_roulette.trainer.choices import Choices
from lightning_roulette.trainer.lightning_names import in_both, in_package_of
from lightning_roulette.trainer.validation.muting import callbacks_of
from lightning_roulette.trainer.with_result import WithResult


def refuse_trainer(
    trainer: Trainer, callback: Callback, keep_callbacks: Sequence[str], at_epoch: int | Sequence[int] | None
) -> None:
    """Raise if the arguments of the callback do not fit the Trainer.

    Raises:
        ValueError: If an epoch of `at_epoch` lies beyond `max_epochs`, or `keep_callbacks` names no callback of the
            Trainer.
        RuntimeError: If the Trainer has another callback that prunes.
    """
    if (number := sum(isinstance(one, WithResult) for one in callbacks_of(trainer))) > 1:
        raise RuntimeError(
            f"RouletteWheelPruning: the Trainer has {number} of these callbacks, but only one search can prune a "
            "network at a time. Keep one of them. To choose layers, pass include. To prune in several steps, pass "
            "several epochs as at_epoch."
        )
    kinds = [type(one).__name__ for one in callbacks_of(trainer) if one is not callback]
    for name in keep_callbacks:
        if name not in kinds:
            raise ValueError(
                f"keep_callbacks names {name!r}, but the Trainer's other callbacks are {', '.join(kinds) or 'none'}. "
                "Add it to the Trainer, or leave it out of keep_callbacks."
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
            f"at_epoch ends with {at_epoch[-1]}, but the Trainer stops after max_epochs={last}, and the last level "
            f"must be trained before it is judged. The last epoch of at_epoch may be {last - 1} at most."
        )


def refuse_sharding(trainer: Trainer, choices: Choices) -> None:
    """Raise if the strategy shards weights and this is not supported.

    Raises:
        RuntimeError: If the strategy is not supported, or if an argument needs whole weights.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy, in_both(FSDPStrategy, DeepSpeedStrategy)):
        how = "flat buffers without the shapes of the weights"
        if isinstance(strategy, in_both(DeepSpeedStrategy)):
            how = "partitions that only it can write to"
        raise RuntimeError(
            f"the strategy is {name}, which shards weights into {how}, but RouletteWheelPruning must write to single "
            "weights. Use a single device or 'ddp', or for sharded weights ModelParallelStrategy (FSDP2)."
        )
    if not isinstance(strategy, in_both(ModelParallelStrategy)):
        return
    why, at_epoch = beyond_shards(choices.wheel, refit_of(choices.refit)), choices.at_epoch
    if not why and isinstance(at_epoch, Sequence):
        why = f"at_epoch is {at_epoch!r}, and pruning between epochs needs whole weights. Pass one epoch."
    if not why and strategy.device_mesh["tensor_parallel"].size() > 1:
        sizes = f"data_parallel_size={trainer.world_size}, tensor_parallel_size=1"
        why = f"tensor parallelism is not supported. Pass {sizes}, and call fully_shard on the module."
    if why:
        raise RuntimeError(f"the strategy is {name}, which shards weights, but {why}")


def refuse_shrink(trainer: Trainer, shrink: bool) -> None:
    """Raise if dead units cannot be removed here.

    Raises:
        ImportError: If the extra `units` is not installed.
        RuntimeError: If the strategy shards weights.
    """
    if not shrink:
        return
    graph_package()
    if isinstance(trainer.strategy, in_both(ModelParallelStrategy)):
        raise RuntimeError(
            f"shrink is True and the strategy is {type(trainer.strategy).__name__}, which shards weights, but units "
            "are removed from whole weights. Leave shrink out, load pruned.ckpt on one device, and call save_shrunk."
        )


def refuse_several_processes(trainer: Trainer, confidence: float | None) -> None:
    """Raise if a certificate cannot be given because there are several processes.

    Raises:
        RuntimeError: If there is a `confidence` and more than one process.
    """
    if confidence is not None and trainer.world_size > 1:
        raise RuntimeError(
            f"confidence is {confidence} and there are {trainer.world_size} processes, but a certificate needs all "
            "samples in one process. Train on one device, or leave confidence out."
        )


def nothing_to_do(trainer: Trainer) -> bool:
    """Return whether this fit cannot search at all, and warn if so."""
    why = None
    if trainer.barebones:
        why = "barebones=True logs no metrics"
    elif trainer.max_epochs == 0 or trainer.max_steps == 0:
        why = "the Trainer trains for no epoch, and so calls no hook at the end of training"
    if why is not None:
        warnings.warn(f"RouletteWheelPruning does nothing in this fit: {why}.", stacklevel=3)
    return why is not None


def warn_of_early_stopping(trainer: Trainer, at_epoch: int | Sequence[int] | None) -> None:
    """Warn if an EarlyStopping may end the training of the network that was cut before it has recovered."""
    last = trainer.max_epochs
    if at_epoch is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    first = at_epoch if isinstance(at_epoch, int) else at_epoch[0]
    for one in callbacks_of(trainer):
        if not isinstance(one, in_both(EarlyStopping)) or (last not in (None, -1) and one.patience >= last):
            continue
        enough = "longer than the network needs to recover" if last in (None, -1) else f"of {last} (max_epochs)"
        rank_zero_warn(
            f"RouletteWheelPruning: EarlyStopping watches {one.monitor!r} with patience={one.patience}, and compares "
            f"the network that is cut at epoch {first} with the best score before the cut. If the cut lowers the "
            "score, training may stop before the network has recovered. Pass EarlyStopping a patience "
            f"{enough}. Or stop a first fit early, and prune in a second fit without EarlyStopping.",
            stacklevel=3,
        )


def validates_before(trainer: Trainer, epochs: int | None) -> bool:
    """Return whether the Trainer validates within the first `epochs` epochs. None: before training ends."""
    every, last = trainer.check_val_every_n_epoch, trainer.max_epochs if epochs is None else epochs
    return every is None or last is None or last == -1 or every <= last


def refuse_without_validation(trainer: Trainer, module: LightningModule) -> None:
    """Raise if candidates cannot be validated.

    Raises:
        RuntimeError: If there is no `validation_step`, no validation data, or `limit_val_batches=0`.
    """
    if trainer.enable_validation:
        return
    if not in_package_of(trainer, is_overridden)("validation_step", module):
        why = f"{type(module).__name__} has no validation_step, which judges the candidates. Define one."
    elif trainer.limit_val_batches == 0:
        why = "limit_val_batches is 0, so candidates cannot be judged. Allow some validation batches."
    else:
        why = "there is no validation data to judge candidates on. Pass val_dataloaders, or define them."
    raise RuntimeError(f"RouletteWheelPruning: {why}")


def find_prunable(
    module: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, nn.Parameter]:
    """Return the prunable parameters. They may be empty only if lazy parameters have no shape before the first forward.

    Raises:
        ValueError: If there is none, if a pattern matches nothing, or if weights are not sharded by rows.
    """
    found = prunable_parameters(module, include=include, exclude=exclude)
    if not found and not has_lazy_parameters(module):
        skipped = skipped_parameters(module, include=include, exclude=exclude)
        raise ValueError(f"no parameter of {type(module).__name__} is prunable. {_why_nothing(module, skipped)}")
    Shards.of(found)
    return found


def warn_of_little(module: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None) -> None:
    """Warn if less than half of the network is prunable, and the user named no parameters.

    Frozen weights do not count, as the user chose not to change them.
    """
    if include is not None or exclude is not None or has_lazy_parameters(module):
        return
    coverage = coverage_of(module, skipped_parameters(module))
    if 2 * coverage.prunable < coverage.matrices - coverage.frozen:
        rank_zero_warn(
            f"RouletteWheelPruning: {coverage.sentence} The sparsity is a share of the prunable weights only. To prune "
            "others too, name all weights to prune with include=[...], or call register_layer for a class of linear "
            "layers of your own. If this is as you want it, name what is skipped with exclude=[...].",
            stacklevel=3,
        )


def _why_nothing(module: nn.Module, skipped: Mapping[str, str]) -> str:
    """Return sentences that name the class with most weights, and say what to do."""
    largest = largest_class(module)
    if largest is None:
        return "It has no weights in matrices. Pass include=[...] to name other parameters."
    kind, share, names = largest
    why = skipped[names[0]]
    head = f"{share:.0%} of its weights in matrices belong to {kind.__name__} ({shortened(names)}: {why})."
    reasons = "; ".join(f"{name}: {other}" for name, other in list(skipped.items())[:8])
    return f"{head} {_remedy(why, kind, names[0])} All reasons: {reasons}."


def _remedy(why: str, kind: type[nn.Module], name: str) -> str:
    """Return what to do about a parameter that is skipped."""
    patterns = f"include=['*.{name.rpartition('.')[2]}']" if "." in name else f"include=[{name!r}]"
    if why == "frozen":
        return f"Unfreeze them, or pass {patterns} to prune frozen weights."
    if why in ("excluded", "not included"):
        return "Change include or exclude."
    if why.endswith(f" of {(word := kind.__name__)}"):
        own = kind.__module__.partition(".")[0] != "torch" and not issubclass(kind, nn.Embedding)
        weight = name.rpartition(".")[2]
        layer = word if weight == "weight" else f"{word}, weight={weight!r}"
        register = (
            f"If {word} multiplies its input by a matrix, call register_layer({layer}). Or pass" if own else "Pass"
        )
        return f"{register} {patterns} to prune them by name."
    return "Such parameters cannot be pruned. Pass include=[...] to name others."
