"""The files that a search writes. It never overwrites the files of another run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_roulette.large.shards import is_sharded
from lightning_roulette.mask.history import History
from lightning_roulette.trainer.lightning_names import in_both


@dataclass(frozen=True)
class RunFiles:
    """The files of one search, in one folder and with one version number.

    Attributes:
        pruned: Path of the checkpoint of the winner.
        dense: Path of the checkpoint of the network before the winner was loaded.
        interrupted: Path of the accepted levels of a search that did not end.
        weights: Path of the weights of the winner, written only if the checkpoint does not hold them.
        shrunk: Path of the winner without its dead units.
    """

    pruned: str
    dense: str
    interrupted: str
    weights: str
    shrunk: str

    @property
    def folder(self) -> str:
        """The folder of the files."""
        return self.pruned.rpartition("/")[0]

    @classmethod
    def next_to(cls, trainer: Trainer, dirpath: str | os.PathLike[str] | None) -> RunFiles | None:
        """Return paths at which no files exist yet; None if nothing is to be written. Rank 0 decides.

        - With `fast_dev_run` nothing is written.
        - With a `dirpath` the files are in that folder.
        - Without one the files are beside the checkpoints of the Trainer. If it writes no checkpoints, nothing is
          written.
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
            names = ("pruned.ckpt", "dense.ckpt", "interrupted.pt", "pruned-weights.pt", "shrunk.ckpt")
            yield cls(*(f"{folder.rstrip('/')}/{tail.join(os.path.splitext(name))}" for name in names))
            version += 1

    def _exist(self) -> bool:
        return any(get_filesystem(path).exists(path) for path in astuple(self))


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
    """Raise if nothing can be written to `dirpath`.

    Raises:
        TypeError: If it is not a path.
        ValueError: If the path, or its nearest existing parent, is not a folder with permission to write.
    """
    if not isinstance(dirpath, str | os.PathLike | None):
        raise TypeError(f"dirpath is {dirpath!r}, but must be the path of a folder.")
    if dirpath is None or "://" in os.fspath(dirpath):  # a remote folder cannot be tested
        return
    nearest = os.path.abspath(dirpath)
    while not os.path.exists(nearest):
        nearest = os.path.dirname(nearest)
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK):
        raise ValueError(
            f"dirpath is {os.fspath(dirpath)!r}, but must be a folder that can be written to or created, and "
            f"{nearest!r} is not one. Pass another path."
        )


def let_epoch_begin(checkpoint: dict[str, Any]) -> None:
    """Reset the batch counters of a checkpoint that is saved when an epoch begins, so that a resume trains that epoch.

    Lightning keeps the counters of the last epoch until the first batch of the next one. With them a resume would skip
    the epoch.
    """
    loop = checkpoint["loops"]["fit_loop"]
    for progress in ("epoch_loop.batch_progress", "epoch_loop.scheduler_progress"):
        loop[progress]["current"] = dict.fromkeys(loop[progress]["current"], 0)
    loop["epoch_loop.batch_progress"]["is_last_batch"] = False


def checkpoint_with_these_weights(trainer: Trainer, module: LightningModule) -> str | None:
    """Return a checkpoint with exactly the weights of `module`: of a ModelCheckpoint, or the one that was loaded.

    None if there is none.

    With sharded weights no file is read, and the result is None.
    """
    found = None
    if trainer.is_global_zero and not any(is_sharded(weight) for weight in module.parameters()):
        paths = [
            path
            for one in trainer.checkpoint_callbacks
            if isinstance(one, in_both(ModelCheckpoint))
            for path in (one.last_model_path, one.best_model_path)
            if path
        ]
        paths += [os.fspath(trainer.ckpt_path)] if trainer.ckpt_path is not None else []
        found = next((path for path in dict.fromkeys(paths) if _holds(path, module)), None)
    return trainer.strategy.broadcast(found)


def _holds(path: str, module: LightningModule) -> bool:
    try:
        with get_filesystem(path).open(path, "rb") as file:
            stored = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        now = module.state_dict()
        return stored.keys() == now.keys() and all(_equal(stored[name], value) for name, value in now.items())
    except Exception:  # the file is gone, or `weights_only` refuses it, or its contents cannot be compared
        return False


def _equal(stored: Any, value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return bool(stored == value)
    return stored.dtype == value.dtype and torch.equal(stored, value.cpu())


def save_accepted_levels(
    path: str, history: History, report: Mapping[str, Any], weights: Mapping[str, torch.Tensor]
) -> None:
    """Write a file that `Mask.load` and `apply_mask` read. If writing fails, no incomplete file has its name.

    Args:
        path: Path of the file.
        history: The masks.
        report: The report as plain values.
        weights: The weights of the last level and all values that its refit changed; empty without a refit.
    """
    write_file(path, {**history.state(), "report": dict(report), "weights": dict(weights)})


def save_weights(path: str, history: History, report: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    """Write weights and masks into a file that `Mask.load` and `apply_mask` read.

    `torch.load(path)["state_dict"]` are the weights, for `module.load_state_dict(..., strict=False)`.
    """
    write_file(path, {**history.state(), "report": dict(report), "state_dict": dict(weights)})


def write_file(path: str, contents: Mapping[str, Any]) -> None:
    """Write tensors and plain values. If writing fails, no incomplete file has its name."""
    files = get_filesystem(path)
    files.makedirs(os.path.dirname(path), exist_ok=True)
    with files.open(f"{path}.part", "wb") as file:
        torch.save(dict(contents), file)
    files.mv(f"{path}.part", path)
