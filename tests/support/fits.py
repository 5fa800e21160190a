"""One way to fit in tests, and a small search for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule

from lightning_roulette import RouletteWheelPruning, Tree
from tests.support.callbacks import within
from tests.support.modules import Blobs, train_loader, val_loader


def fit(
    make_trainer,
    *callbacks: Callback,
    module: LightningModule | None = None,
    train: Any = None,
    val: Any = None,
    datamodule: LightningDataModule | None = None,
    ckpt_path: str | Path | None = None,
    seed: int | None = 0,
    **options: Any,
) -> LightningModule:
    """Train a module (`Blobs()` by default) and return it; its Trainer is `module.trainer`.

    `options` are those of the Trainer. `seed` is set just before the fit; None leaves torch's generator as it is.
    """
    module = Blobs() if module is None else module
    data = {"datamodule": datamodule}
    if datamodule is None:
        train, val = train_loader() if train is None else train, val_loader() if val is None else val
        data = {"train_dataloaders": train, "val_dataloaders": val}
    trainer = make_trainer(callbacks=list(callbacks), **options)
    if seed is not None:
        torch.manual_seed(seed)
    trainer.fit(module, **data, ckpt_path=ckpt_path)
    return module


def at_hook(fit, hook: str, action, *callbacks: Callback, times: int = 3, **options: Any) -> list:
    """Fit, call `action(trainer, module)` at the first calls of a hook, and return what each call returned."""
    found: list = []
    fit(within(hook, lambda *both: found.append(action(*both)), times), *callbacks, **options)
    assert found
    return found


def at_end(at_hook, action, *callbacks: Callback, **options: Any) -> Any:
    """Fit for one epoch, call `action(trainer, module)` at the end of training, and return what it returned."""
    (found,) = at_hook("on_train_end", action, *callbacks, **{"max_epochs": 1} | options)
    return found


def pruner(**options: Any) -> RouletteWheelPruning:
    """A search of one level with two branches and without a refit; options override."""
    usual = {"branches": 2, "tolerance": 0.2, "refit": None, "tree": Tree(0.2, max_levels=1)}
    return RouletteWheelPruning(**usual | options)
