"""A file of a network without dead units, from which a new process builds it without a trace."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_roulette.slim.files.container import write_whole
from lightning_roulette.slim.removal.attention import NarrowAttention
from lightning_roulette.slim.removal.removal import removal_of

_Module = TypeVar("_Module", bound=nn.Module)
_KEY, _VERSION = "lightning_roulette_shrunk", 1


def save_shrunk(model: nn.Module, path: str | os.PathLike[str], example_input: Any) -> nn.Module:
    """Write a network without its dead units into a file that `load_shrunk` reads.

    The file holds the weights, the sizes of the layers, and the arguments that a LightningModule saved by
    `save_hyperparameters`. `torch.load(path, weights_only=True)` reads it if these are plain values.

    Args:
        model: The network. It is not changed.
        path: Where to write.
        example_input: As for `remove_dead`.

    Returns:
        The network that was written, as `remove_dead` returns it.

    Raises:
        ImportError: As `remove_dead`; likewise `TypeError` and `ValueError`.
    """
    found = removal_of(model, example_input)
    # the class of a narrow attention is known by its heads
    sizes = {name: {key: one for key, one in each.items() if key != "__class__"} for name, each in found.sizes.items()}
    contents = {
        _KEY: _VERSION,
        "state_dict": found.network.state_dict(),
        "sizes": sizes,
        "hyper_parameters": dict(getattr(model, "hparams", {})),
    }
    write_whole(path, lambda file: torch.save(contents, file))
    return found.network


def load_shrunk(path: str | os.PathLike[str], kind: Callable[..., _Module], **arguments: Any) -> _Module:
    """Build a network without dead units from its file. Nothing is traced, and no extra is needed.

    Args:
        path: A file that `save_shrunk` wrote.
        kind: The class of the network, or a function that returns a module of its first size.
        **arguments: Arguments of `kind`. They replace those that the file holds.

    Returns:
        The module, on the CPU.

    Raises:
        ValueError: If the file is another one, or if it does not fit the module.
    """
    contents = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(contents, Mapping) or contents.get(_KEY) != _VERSION:
        raise ValueError(f"{os.fspath(path)!r} is no file of save_shrunk. Load a checkpoint by load_from_checkpoint.")
    module = kind(**{**contents["hyper_parameters"], **arguments})
    try:
        for name, sizes in contents["sizes"].items():
            _resize(module.get_submodule(name), sizes)
        for name, value in contents["state_dict"].items():
            if isinstance(value, Tensor):
                _widen(module, name, value)
        module.load_state_dict(contents["state_dict"])
    except (AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} does not fit the {type(module).__name__}: {error}. Pass the class and the arguments "
            "with which the network was made that was shrunk."
        ) from error
    return module


def _resize(part: nn.Module, sizes: Mapping[str, Any]) -> None:
    if "heads_left" in sizes:
        part.__class__ = NarrowAttention
    for name, size in sizes.items():
        setattr(part, name, size)


def _widen(module: nn.Module, name: str, value: Tensor) -> None:
    """Put an empty tensor of the shape of a value into its place."""
    owner, _, own = name.rpartition(".")
    part = module.get_submodule(owner)
    if (parameter := part._parameters.get(own)) is not None and parameter.shape != value.shape:
        part._parameters[own] = nn.Parameter(torch.empty_like(value), parameter.requires_grad)
    elif (buffer := part._buffers.get(own)) is not None and buffer.shape != value.shape:
        part._buffers[own] = torch.empty_like(value)
