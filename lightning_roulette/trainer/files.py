"""Where a search writes, and what it never overwrites."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_roulette.large.shards import is_sharded
from lightning_roulette.mask.history import History


@dataclass(frozen=True)
class RunFiles:
    """The files of one search, in one folder, under one version.

    Attributes:
        pruned: Checkpoint of the winner.
        dense: Checkpoint of the network before the winner was loaded.
        interrupted: The accepted levels of a search that did not end.
    """

    pruned: str
    dense: str
    interrupted: str

    @property
    def folder(self) -> str:
        """Where they lie."""
        return self.pruned.rpartition("/")[0]

    @classmethod
    def next_to(cls, trainer: Trainer, dirpath: str | os.PathLike[str] | None) -> RunFiles | None:
        """Files that do not exist yet, or None if nothing is to be written.

        They lie in `dirpath`, else beside the Trainer's checkpoints; with checkpointing disabled and no `dirpath`, and
        with `fast_dev_run`, nothing is written. Rank 0 decides.
        """
        folder = _folder(trainer, dirpath)
        if folder is None:
            return None
        files = next(one for one in cls._versions(folder) if not one._exist()) if trainer.is_global_zero else None
        return trainer.strategy.broadcast(files)

    @classmethod
    def _versions(cls, folder: str) -> Iterator[RunFiles]:
        version = 0
        while True:
            tail = f"-v{version}" if version else ""
            names = (f"pruned{tail}.ckpt", f"dense{tail}.ckpt", f"interrupted{tail}.pt")
            yield cls(*(f"{folder.rstrip('/')}/{name}" for name in names))
            version += 1

    def _exist(self) -> bool:
        return any(get_filesystem(path).exists(path) for path in (self.pruned, self.dense, self.interrupted))


def _folder(trainer: Trainer, dirpath: str | os.PathLike[str] | None) -> str | None:
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    if dirpath is not None:
        return os.fspath(dirpath)
    beside = [folder for one in trainer.checkpoint_callbacks if (folder := getattr(one, "dirpath", None))]
    if beside:
        return str(beside[0])
    if not trainer.checkpoint_callbacks:
        return None
    return os.path.join(trainer.log_dir or trainer.default_root_dir, "checkpoints")


def refuse_dirpath(dirpath: str | os.PathLike[str] | None) -> None:
    """Raise if nothing could be written there.

    Raises:
        TypeError: If it is no path.
        ValueError: If the path, or the nearest of its parents that exists, is not a folder that may be written to.
    """
    if not isinstance(dirpath, str | os.PathLike | None):
        raise TypeError(f"dirpath is {dirpath!r}, but must be the path of a folder.")
    if dirpath is None or "://" in os.fspath(dirpath):  # a remote folder tells only when written to
        return
    nearest = os.path.abspath(dirpath)
    while not os.path.exists(nearest):
        nearest = os.path.dirname(nearest)
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK):
        raise ValueError(
            f"dirpath is {os.fspath(dirpath)!r}, but must be a folder that can be written to, or made: {nearest!r} is "
            "not one. Name another."
        )


def let_epoch_begin(checkpoint: dict[str, Any]) -> None:
    """Make a checkpoint saved as an epoch starts one from which that epoch runs.

    Lightning keeps the batch counters of the epoch before until the next one runs its first batch; a resume would take
    the epoch for done.
    """
    loop = checkpoint["loops"]["fit_loop"]
    for progress in ("epoch_loop.batch_progress", "epoch_loop.scheduler_progress"):
        loop[progress]["current"] = dict.fromkeys(loop[progress]["current"], 0)
    loop["epoch_loop.batch_progress"]["is_last_batch"] = False


def checkpoint_with_these_weights(trainer: Trainer, module: LightningModule) -> str | None:
    """A file of a ModelCheckpoint that holds, bit for bit, what `module` is now; None if there is none.

    Where weights lie in several processes no file is looked into.
    """
    found = None
    if trainer.is_global_zero and not any(is_sharded(weight) for weight in module.parameters()):
        paths = [
            path
            for one in trainer.checkpoint_callbacks
            if isinstance(one, ModelCheckpoint)
            for path in (one.last_model_path, one.best_model_path)
            if path
        ]
        found = next((path for path in dict.fromkeys(paths) if _holds(path, module)), None)
    return trainer.strategy.broadcast(found)


def _holds(path: str, module: LightningModule) -> bool:
    try:
        with get_filesystem(path).open(path, "rb") as file:
            stored = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        now = module.state_dict()
        return stored.keys() == now.keys() and all(_equal(stored[name], value) for name, value in now.items())
    except Exception:  # gone, with contents that only a trusting load would read, or that cannot be compared
        return False


def _equal(stored: Any, value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return bool(stored == value)
    return stored.dtype == value.dtype and torch.equal(stored, value.cpu())


def save_accepted_levels(
    path: str, history: History, report: Mapping[str, Any], weights: Mapping[str, torch.Tensor]
) -> None:
    """Write a file that `Mask.load` and `apply_mask` read; it appears whole or not at all.

    Args:
        path: Of the file.
        history: The masks.
        report: Its plain form.
        weights: Those of the last level, and what else a refit changed there; empty if there was no refit.
    """
    files = get_filesystem(path)
    files.makedirs(os.path.dirname(path), exist_ok=True)
    with files.open(f"{path}.part", "wb") as file:
        torch.save({**history.state(), "report": dict(report), "weights": dict(weights)}, file)
    files.mv(f"{path}.part", path)
