"""Whether the checkpoint of the winner holds the weights that were measured."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from lightning.__version__ import version
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor

from lightning_roulette.large.shards import is_sharded
from lightning_roulette.network.lending import lent, named_tensors
from lightning_roulette.network.parameters import parts_of_metrics
from lightning_roulette.network.stored import Stored
from lightning_roulette.report.names import shortened
from lightning_roulette.trainer.files import checkpoint_with_these_weights, save_weights
from lightning_roulette.trainer.fit_state import FitState
from lightning_roulette.trainer.lightning_names import in_both
from lightning_roulette.trainer.show.log import log
from lightning_roulette.trainer.validation.attributes import PlainAttributes
from lightning_roulette.trainer.validation.guard import digests_of_parameters
from lightning_roulette.trainer.validation.muting import callbacks_of

_LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_roulette"}


def rehearse_saving(fit: FitState, prunable: Collection[str]) -> None:
    """Run the hooks that change checkpoints once, and warn if the weights would be others in a file.

    Only hooks of the user are run, on a dictionary like Lightning's. None is run if a file of ModelCheckpoint shows
    that they leave these weights as they are. The module has its weights and its plain attributes back afterwards. A
    hook that fails here is ignored.

    Args:
        fit: The run, before its search.
        prunable: The names of the prunable parameters.
    """
    if fit.files is None or any(is_sharded(one) for one in fit.module.parameters()):
        return
    if _save_hooks(fit.trainer, fit.module) and checkpoint_with_these_weights(fit.trainer, fit.module):
        return
    changed = changed_by(fit.trainer, fit.module, prunable)
    if not changed or not fit.trainer.is_global_zero:
        return
    warnings.warn(
        f"RouletteWheelPruning: {' and '.join(changed)} changes the weights when a checkpoint is saved, or leaves all "
        "prunable weights out. The search does not see such changes. They are in the files of ModelCheckpoint, in "
        f"{fit.files.dense!r} and in {fit.files.pruned!r}. If the last one does not hold the weights that the search "
        f"measured, these are also written to {fit.files.weights!r}.",
        stacklevel=2,
    )


def changed_by(trainer: Trainer, module: LightningModule, prunable: Collection[str]) -> list[str]:
    """Return the names of the hooks after which a checkpoint holds other weights than the module."""
    tensors, state = _weights(module), trainer.strategy.lightning_module_state_dict()
    last = Stored.of(state, tensors, prunable)
    changed = [] if last.faithful else [f"{type(module).__name__}.state_dict"]
    if not (hooks := _save_hooks(trainer, module)):
        return changed
    with lent(tensors) as before:
        checkpoint = _like_lightning(trainer, module, state)
        for name, owner, hook in hooks:
            attributes = PlainAttributes([getattr(owner, "__dict__", {})])
            try:
                hook(checkpoint)
            except Exception as error:  # it may need what only a real checkpoint has
                log.debug(f"RouletteWheelPruning: {name} could not be tried: {error!r}")
            finally:
                attributes.restore()
            now = Stored.of(checkpoint.get("state_dict"), before, prunable)
            if now != last and not now.faithful:
                changed.append(name)
            last = now
    return changed


def read_back(fit: FitState) -> None:
    """Read the checkpoint of the winner, and write the weights beside it if it does not hold them. Never raises."""
    if isinstance(fit.trainer.strategy.checkpoint_io, in_both(AsyncCheckpointIO)):
        return  # the file is read in `read_back_late`
    _check(fit)


def read_back_late(fit: FitState) -> None:
    """The same for files that are written asynchronously. They are complete when the strategy is torn down."""
    if fit.searches and isinstance(fit.trainer.strategy.checkpoint_io, in_both(AsyncCheckpointIO)):
        _check(fit)


def warn_of_other_weights(fit: FitState) -> None:
    """Warn if the module has other weights than those that were measured, at the end of a fit."""
    if not fit.measured_weights or not fit.is_concluded or fit.result.report is None:
        return
    now = digests_of_parameters(fit.module)
    changed = [name for name, digest in fit.measured_weights.items() if now.get(name) != digest]
    if not changed:
        return
    path = fit.result.best_model_path
    where = f" The weights that were measured are in {path!r}." if path else ""
    message = (
        f"{shortened(changed)} changed after the network was measured, for example in on_train_end or on_fit_end of "
        f"the module or of another callback. The report does not describe these weights.{where}"
    )
    note(fit, message)
    if fit.trainer.is_global_zero:
        warnings.warn(f"RouletteWheelPruning: {message}", stacklevel=2)


def _check(fit: FitState) -> None:
    files, report, history = fit.files, fit.result.report, fit.result.history
    if files is None or report is None or history is None or not fit.trainer.is_global_zero:
        return
    if fit.result.best_model_path != files.pruned or any(is_sharded(one) for one in fit.module.parameters()):
        return
    if os.path.isdir(files.pruned):
        log.debug(f"RouletteWheelPruning: {files.pruned!r} is a folder, which is not read back.")
        return
    try:
        stored = Stored.of(_state_in(files.pruned), _weights(fit.module), list(history.mask))
        if stored.faithful:
            return
        weights = {name: one.detach().cpu() for name, one in named_tensors(fit.module).items()}
        save_weights(files.weights, history, report.to_dict(), weights)
    except Exception as error:
        sentence = f"The checkpoint {files.pruned!r} was not checked, because it could not be read back: {error!r}."
        note(fit, sentence)
        log.info(f"RouletteWheelPruning: {sentence}")
        return
    message = (
        f"The checkpoint {files.pruned!r} does not hold the weights that were measured: {_what(stored)}. Look at "
        f"{_suspects(fit)}. The weights that were measured are in {files.weights!r}. Load them by "
        "module.load_state_dict(torch.load(path)['state_dict'], strict=False)."
    )
    note(fit, message)
    warnings.warn(f"RouletteWheelPruning: {message}", stacklevel=2)


def note(fit: FitState, sentence: str) -> None:
    """Put a sentence into the report, which was made before."""
    fit.facts.note(sentence)
    if fit.result.report is not None:
        fit.result.report = fit.facts.added_to(fit.result.report)


def _what(stored: Stored) -> str:
    if stored.without:
        return "it has none of the prunable weights"
    some = ", ".join(repr(name) for name in stored.differing[:3]) + (", ..." if len(stored.differing) > 3 else "")
    return f"{len(stored.differing)} of {stored.found} tensors differ ({some})"


def _suspects(fit: FitState) -> str:
    names = [name for name, _, _ in _save_hooks(fit.trainer, fit.module)]
    return ", ".join(names) or "hooks of the state dict and the checkpoint plugin of the Trainer"


def _state_in(path: str) -> Any:
    """The state dict of a checkpoint that this process has just written."""
    if "://" not in path:
        try:
            stored = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        except RuntimeError:  # the file has the format of older versions of torch
            stored = torch.load(path, map_location="cpu", weights_only=False)
    else:
        with get_filesystem(path).open(path, "rb") as file:
            stored = torch.load(file, map_location="cpu", weights_only=False)
    return stored.get("state_dict")


def _weights(module: LightningModule) -> dict[str, Tensor]:
    """The parameters and buffers by name, without those of metrics."""
    inside = {id(one) for part in parts_of_metrics(module) for one in (*part.parameters(), *part.buffers())}
    return {name: one for name, one in named_tensors(module).items() if id(one) not in inside}


def _save_hooks(trainer: Trainer, module: LightningModule) -> list[tuple[str, Any, Callable[[dict[str, Any]], Any]]]:
    """The name, the owner and the call of every `on_save_checkpoint` that is the user's, in Lightning's order."""

    def of(callback: Callback) -> Callable[[dict[str, Any]], Any]:
        return lambda checkpoint: callback.on_save_checkpoint(trainer, module, checkpoint)

    calls: list[tuple[Any, Callable[[dict[str, Any]], Any]]] = [(one, of(one)) for one in callbacks_of(trainer)]
    calls.append((module, module.on_save_checkpoint))
    return [(f"{type(one).__name__}.on_save_checkpoint", one, call) for one, call in calls if _is_users(one)]


def _is_users(owner: Callback | LightningModule) -> bool:
    where = getattr(owner.on_save_checkpoint, "__module__", None) or ""
    return where.split(".")[0] not in _LIGHTNING


def _like_lightning(trainer: Trainer, module: LightningModule, state: dict[str, Any]) -> dict[str, Any]:
    return {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": version,
        "state_dict": state,
        "loops": {"fit_loop": trainer.fit_loop.state_dict()},
        "callbacks": {},
        "optimizer_states": [trainer.strategy.optimizer_state(one) for one in trainer.optimizers],
        "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "hyper_parameters": dict(module.hparams),
    }
