"""Reads a checkpoint of any kind, and loads its weights into the module of a Trainer."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_roulette.large.shards import is_sharded
from lightning_roulette.network.state_dicts import WrongStateDict, load_under_its_names, state_dict_in
from lightning_roulette.trainer.show.log import log

_HEAD = "ckpt_path is {!r}, but "
_UNREADABLE = "torch cannot read it. It is damaged, or it was not written by torch.save or by a Trainer."


def resolved(trainer: Trainer, ckpt_path: str | os.PathLike[str] | None) -> str | None:
    """Return the path of a checkpoint that exists.

    Args:
        trainer: Knows the files that "best" and "last" stand for.
        ckpt_path: A path, "best", "last", or None.

    Raises:
        TypeError: If it is not a path.
        ValueError: If there is no such file.
    """
    if ckpt_path is None:
        return None
    if not isinstance(ckpt_path, str | os.PathLike):
        raise TypeError(
            f"ckpt_path is of type {type(ckpt_path).__name__}, but must be a path, 'best', 'last' or None. To prune "
            "weights that are in memory, load them into the module and leave ckpt_path out."
        )
    path = os.fspath(ckpt_path)
    if path in ("best", "last"):
        found = getattr(trainer.checkpoint_callback, f"{path}_model_path", "")
        if not found:
            remedy = "Pass the path of a file, or leave ckpt_path out to prune the module as it is."
            if path == "last":
                remedy = f"Use ModelCheckpoint(save_last=True) in the fit before. {remedy}"
            raise ValueError(f"{_HEAD.format(path)}the Trainer knows no such checkpoint of an earlier fit. {remedy}")
        path = str(found)
    if not path or not get_filesystem(path).exists(path):
        raise ValueError(f"{_HEAD.format(path)}there is no such file. Pass the path of a checkpoint.")
    return path


def load_checkpoint(trainer: Trainer, module: LightningModule, path: str, weights_only: bool | None) -> None:
    """Load the weights of a checkpoint into a module, as the strategy of the Trainer does.

    Args:
        trainer: A Trainer whose strategy is set up.
        module: Its module.
        path: A checkpoint of Lightning, a file of torch with a state dict, a file of safetensors, or a folder that a
            strategy with shards has written.
        weights_only: See `torch.load`.

    Raises:
        ValueError: If the file cannot be read or does not fit. The module then has its old weights.
    """
    if get_filesystem(path).isdir(path):
        _load_folder(trainer, path, weights_only)
        return
    contents = _read(path, weights_only)
    if isinstance(contents, dict) and isinstance(contents.get("state_dict"), dict):
        module.on_load_checkpoint(contents)  # it may change the state dict, as in Lightning
    try:
        state = state_dict_in(contents)
    except WrongStateDict as error:
        raise ValueError(f"{_HEAD.format(path)}{error}") from None
    try:
        said = load_under_its_names(module, state, lambda given, strict: _load(module, given, strict), _strict(module))
    except WrongStateDict as error:
        raise ValueError(
            f"{_HEAD.format(path)}its weights do not fit {type(module).__name__}: {error}. Build the module as it was "
            "when the checkpoint was written."
        ) from None
    if trainer.is_global_zero:
        log.info(f"RouletteWheelPruning: the weights were loaded from {path!r}. {said}".strip())


def _strict(module: LightningModule) -> bool:
    return bool(module.strict_loading)


def _load(module: LightningModule, state: Any, strict: bool) -> None:
    if not any(is_sharded(one) for one in module.parameters()):
        module.load_state_dict(state, strict=strict)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=strict)
    set_model_state_dict(module, dict(state), options=options)


def _load_folder(trainer: Trainer, path: str, weights_only: bool | None) -> None:
    try:
        trainer.strategy.load_checkpoint(path, weights_only=weights_only)
    except Exception as error:
        raise ValueError(
            f"{_HEAD.format(path)}it is a folder that {type(trainer.strategy).__name__} cannot load "
            f"({type(error).__name__}: {error}). Pass a file with weights. For a model that was saved with "
            "save_pretrained, build the module by from_pretrained and leave ckpt_path out."
        ) from error


def _read(path: str, weights_only: bool | None) -> Any:
    if Path(path).suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with get_filesystem(path).open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if any(word in str(error) for word in ("Unsupported global", "Unsupported class")):
            raise ValueError(
                f"{_HEAD.format(path)}it holds Python objects other than tensors and plain values. If you trust the "
                "file, pass weights_only=False."
            ) from error
        raise ValueError(f"{_HEAD.format(path)}{_UNREADABLE}") from error
    except (RuntimeError, EOFError, KeyError, AttributeError, ImportError, IndexError, ValueError) as error:
        raise ValueError(f"{_HEAD.format(path)}{_UNREADABLE}") from error


def _read_safetensors(path: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise ValueError(
            f"{_HEAD.format(path)}reading it needs the package safetensors. Run `pip install safetensors`."
        ) from error
    with get_filesystem(path).open(path, "rb") as file:
        data = file.read()
    try:
        return dict(load(data))
    except SafetensorError as error:
        raise ValueError(f"{_HEAD.format(path)}safetensors cannot read it ({error}).") from error
