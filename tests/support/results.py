"""What tests compare: weights, files, reports without times, and how sparse a network is while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from lightning_roulette import Mask, prunable_parameters, sparsity

WEIGHTS = ("net.0.weight", "net.2.weight")


def copied(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def load(path: str | Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def sparsity_of(path: str | Path) -> float:
    """The sparsity of `Blobs` in a checkpoint."""
    return sparsity({name: load(path)["state_dict"][name] for name in WEIGHTS})


def nonzeros(module) -> Mask:
    """Where the prunable weights of a module are not zero."""
    return Mask.of_nonzeros(prunable_parameters(module))


def told(pruning) -> dict[str, Any]:
    """The report without its time."""
    return pruning.report.to_dict() | {"seconds": None}


class Sparsities(Callback):
    """The sparsity of the network before each training batch."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.found.append(sparsity(prunable_parameters(pl_module)))


class PowerCut(Callback):
    """Raises an error before a training batch, the second of the third epoch by default."""

    def __init__(self, epoch: int = 2, batch: int = 1) -> None:
        self.at = (epoch, batch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            raise RuntimeError("power cut")


class SavesAtEnd(Callback):
    """Saves a checkpoint at the end of an epoch."""

    def __init__(self, path: str | Path, epoch: int) -> None:
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)
