"""Pruning of a network that is trained already: no training step is taken."""

from __future__ import annotations

import os
from difflib import get_close_matches
from inspect import signature
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_roulette.settings import CALIBRATED
from lightning_roulette.trainer.callback import RouletteWheelPruning
from lightning_roulette.trainer.lightning_names import (
    in_both,
    in_package_of,
    refuse_foreign_trainer,
    refuse_mixed_packages,
)
from lightning_roulette.trainer.loading import resolved
from lightning_roulette.trainer.search_loop import only_searching, search_loop
from lightning_roulette.trainer.show.log import log
from lightning_roulette.trainer.validation.muting import callbacks_of


def prune(
    trainer: Trainer,
    model: LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
    ckpt_path: str | os.PathLike[str] | None = None,
    weights_only: bool | None = None,
    **arguments: Any,
) -> RouletteWheelPruning:
    """Prune a trained network, without any training step.

    The search is that of `RouletteWheelPruning` at the end of a fit, with the same files, logs and progress bar. The
    network is pruned in place. Everything is set up as in `trainer.fit`: `setup`, `configure_model` and `on_fit_start`
    of the module and the data module are called with the stage "fit". No optimizer is configured, and no hooks of
    training are called. The module needs a `validation_step`, but no `training_step` and no `configure_optimizers`.

    Batches of the training data are only used as inputs, for the refit and the importance. Without training data,
    `refit=None` and the importance `"magnitude"` are used, and a log line says so.

    The Trainer is afterwards as it was before: its callbacks and their states, its epoch and global step, its metrics
    and its optimizers. Its callbacks are not called, except progress bars, `HoldZeros` and those in
    `Validation(keep_callbacks=)`. To train the pruned network further, pass the returned callback to a Trainer. It
    holds the zeros.

    Args:
        trainer: The Trainer. Its devices, precision, loggers and limits apply. If a `RouletteWheelPruning` is among its
            callbacks and no `arguments` are given, this one is used and returned.
        model: The trained network.
        train_dataloaders: Training data, or a `LightningDataModule`; see `Trainer.fit`.
        val_dataloaders: Validation data, which judges the candidates; see `Trainer.fit`.
        datamodule: Data module with both.
        ckpt_path: Where the weights are. None: in `model`, as it is.

            - The path of a Lightning checkpoint, full or with weights alone.
            - The path of a file of `torch.save` with a state dict, or of a `.safetensors` file. If the names of the
              module have a prefix that the names in the file lack, such as `net.`, it is added.
            - `"best"` or `"last"`: the file of the Trainer's `ModelCheckpoint`, from an earlier fit.
            - With FSDP2, also a folder with a distributed checkpoint.
        weights_only: Whether only tensors and plain values may be read from the file; see `torch.load`. Pass False only
            for files that you trust.
        arguments: Arguments of `RouletteWheelPruning`, except `at_epoch`.

    Returns:
        The callback, with `report`, `mask`, `mask_at`, `weights_at` and `best_model_path` as after a fit.

    Raises:
        TypeError: If `trainer` is not a Trainer, if `model` is not a LightningModule of the same package, or if an
            argument has the wrong type.
        ValueError: If an argument is out of range, if `at_epoch` is given, if an argument needs training data and there
            is none, or if the checkpoint does not exist, cannot be read or does not fit the module.
        RuntimeError: If the candidates cannot be judged; see `RouletteWheelPruning`.

    Examples:
        Prune a checkpoint:

            model = Classifier()
            pruning = prune(Trainer(), model, datamodule=data, ckpt_path="epoch=29.ckpt", tolerance=0.01)
            print(pruning.report)
    """
    refuse_foreign_trainer(trainer)
    module = getattr(model, "_orig_mod", model)  # of a network that torch.compile has wrapped
    refuse_mixed_packages(trainer, model=module, train_dataloaders=train_dataloaders, datamodule=datamodule)
    if not isinstance(module, in_both(LightningModule)):
        raise TypeError(
            f"model is {type(model).__name__}, but must be a LightningModule with a validation_step, by which "
            "candidates are judged. For a plain PyTorch loop, call lightning_roulette.search."
        )
    if isinstance(train_dataloaders, in_both(LightningDataModule)):
        train_dataloaders, datamodule = None, train_dataloaders
    if datamodule is not None and not isinstance(datamodule, in_both(LightningDataModule)):
        raise TypeError(f"datamodule is {datamodule!r}, but must be a LightningDataModule, an instance and no class.")
    if trainer.barebones:
        raise ValueError("the Trainer has barebones=True, and logs no metrics. Pass a Trainer without it.")
    pruning = _callback_of(trainer, arguments)
    has_training_data = _has_training_data(trainer, module, train_dataloaders, datamodule)
    if not has_training_data:
        _refuse_what_needs_training_data(arguments, pruning)
    path = resolved(trainer, ckpt_path)
    loop = search_loop(trainer, pruning, path, weights_only)
    with only_searching(trainer, module, loop, pruning, pruning.validation.keep_callbacks):
        trainer.fit(model, train_dataloaders, val_dataloaders, datamodule)
    return pruning


def _callback_of(trainer: Trainer, arguments: dict[str, Any]) -> RouletteWheelPruning:
    """Return the Trainer's callback if no arguments are given, or else a new one."""
    if arguments.get("at_epoch") is not None:
        raise ValueError(
            f"at_epoch is {arguments['at_epoch']!r}, but prune takes no training step. Leave at_epoch out, or pass "
            "RouletteWheelPruning to a Trainer and call fit."
        )
    for name in arguments:
        if name not in (known := signature(RouletteWheelPruning).parameters):
            close = get_close_matches(name, [*known, *signature(prune).parameters], n=1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"prune has no argument {name!r}.{meant} It has those of fit and RouletteWheelPruning.")
    own = [one for one in callbacks_of(trainer) if isinstance(one, RouletteWheelPruning)]
    if arguments or not own:
        return RouletteWheelPruning(**arguments)
    if len(own) > 1:
        raise ValueError(f"the Trainer has {len(own)} callbacks RouletteWheelPruning. Keep one of them.")
    if not isinstance(own[0].at_epoch, int | None):
        raise ValueError(
            f"the Trainer's RouletteWheelPruning has at_epoch={own[0].at_epoch!r}, which prunes between epochs, but "
            "prune takes no training step. Pass arguments to prune; the Trainer's callback is then not used."
        )
    if own[0].at_epoch is not None:
        log.info("RouletteWheelPruning: at_epoch has no effect here, because nothing is trained.")
    own[0].forget()
    return own[0]


def _has_training_data(
    trainer: Trainer, module: LightningModule, loaders: Any, data: LightningDataModule | None
) -> bool:
    given = loaders is not None or in_package_of(trainer, is_overridden)(
        "train_dataloader", module if data is None else data
    )
    return given and trainer.limit_train_batches != 0


def _refuse_what_needs_training_data(arguments: dict[str, Any], pruning: RouletteWheelPruning) -> None:
    """Raise if an argument that was given explicitly needs training data."""
    refit, importance = arguments.get("refit", "auto"), pruning.wheel.importance
    if refit not in (None, "auto"):
        argument, remedy = f"refit is {refit!r}", "refit=None"
    elif importance in CALIBRATED:
        argument, remedy = f"the importance of the wheel is {importance!r}", "Wheel(importance='magnitude')"
    else:
        return
    raise ValueError(
        f"{argument}, which needs inputs from training data, but there is none. Pass train_dataloaders or a datamodule "
        f"with a train_dataloader (no labels are used), or pass {remedy}."
    )
