"""A file of a network without dead units, from which a new process builds it without a trace."""

from __future__ import annotations

import inspect
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_roulette.network.coupling.narrow_attention import NarrowAttention
from lightning_roulette.slim.files.container import write_whole
from lightning_roulette.slim.removal.removal import Removal, removal_of

_Module = TypeVar("_Module", bound=nn.Module)
_KEY, _VERSION = "lightning_roulette_shrunk", 1


def save_shrunk(model: nn.Module, path: str | os.PathLike[str], example_input: Any) -> nn.Module:
    """Write a network without its dead units into a file that `load_shrunk` reads.

    The file holds the weights, the sizes of the layers, and the arguments that a LightningModule saved by
    `save_hyperparameters`, if these are plain values. `torch.load(path, weights_only=True)` reads it.

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
    write_whole(path, lambda file: torch.save(contents_of(found), file))
    return found.model


def contents_of(found: Removal) -> dict[str, Any]:
    """Return what a file holds of a module without dead units: tensors and plain values."""
    # the class of a narrow attention is known by its heads
    sizes = {name: {key: one for key, one in each.items() if key != "__class__"} for name, each in found.sizes.items()}
    arguments = dict(getattr(found.model, "hparams", {}))
    # LightningCLI adds the name of what makes the module, and leaves objects as descriptions
    by_cli = arguments.pop("_instantiator", None) is not None
    described = {name for name, one in arguments.items() if by_cli and isinstance(one, Mapping) and "class_path" in one}
    plain = {name: one for name, one in arguments.items() if name not in described and _is_plain(one)}
    return {
        _KEY: _VERSION,
        "state_dict": dict(found.model.state_dict()),
        "sizes": sizes,
        "hyper_parameters": plain,
        "hyper_parameters_name": getattr(found.model, "_hparams_name", None),
        "not_plain": sorted(arguments.keys() - plain.keys()),
    }


def _is_plain(value: Any) -> bool:
    """Whether `torch.load` reads a value with `weights_only=True`."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # it cannot be pickled, or is of a class that weights_only refuses
        return False
    return True


def load_shrunk(path: str | os.PathLike[str], kind: Callable[..., _Module], /, **arguments: Any) -> _Module:
    """Build a network without dead units from its file. Nothing is traced, and no extra is needed.

    Args:
        path: A file that `save_shrunk` or a search with `shrink=True` wrote.
        kind: The class of the network, or a function that returns a module of its first size. It is called with those
            of the arguments in the file that it takes.
        **arguments: Further arguments of `kind`. They replace those that the file holds.

    Returns:
        The module, on the CPU.

    Raises:
        TypeError: If `kind` cannot be called with the arguments.
        ValueError: If the file is another one, if it does not fit the module, or if an argument is missing that is no
            plain value.
    """
    contents = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(contents, Mapping) or contents.get(_KEY) != _VERSION:
        raise ValueError(f"{os.fspath(path)!r} is no file of save_shrunk. Load a checkpoint by load_from_checkpoint.")
    taken = _taken(kind)
    missing = [name for name in contents.get("not_plain", ()) if name not in arguments and name in taken]
    if missing:
        raise ValueError(
            f"{os.fspath(path)!r} does not hold the arguments {', '.join(missing)} of the module, as they are no plain "
            f"values. Pass them: load_shrunk(path, kind, {missing[0]}=...)."
        )
    held = contents["hyper_parameters"]
    if (whole := contents.get("hyper_parameters_name")) in taken.names:  # one argument that holds all of them
        held = {whole: held}
    given = {name: one for name, one in held.items() if name in taken} | arguments
    try:
        module = kind(**given)
    except TypeError as error:
        raise TypeError(
            f"{getattr(kind, '__name__', kind)!r} cannot be called with {', '.join(given) or 'no arguments'}, which "
            f"{os.fspath(path)!r} and the call gave: {error}. Pass the class of the network, and its other arguments: "
            "load_shrunk(path, kind, name=value)."
        ) from error
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


@dataclass(frozen=True)
class _Taken:
    """The names of the arguments that a function takes.

    Attributes:
        names: Those that are named.
        all: Whether it takes any others, too.
    """

    names: frozenset[str]
    all: bool

    def __contains__(self, name: object) -> bool:
        return self.all or name in self.names


def _taken(kind: Callable[..., nn.Module]) -> _Taken:
    try:
        parameters = inspect.signature(kind).parameters.values()
    except ValueError:  # of a function whose arguments are not known
        return _Taken(frozenset(), all=True)
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    names = frozenset(one.name for one in parameters if one.kind not in various)
    return _Taken(names, any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters))


def _resize(part: nn.Module, sizes: Mapping[str, Any]) -> None:
    if "heads_left" in sizes:
        part.__class__ = NarrowAttention
    for name, size in sizes.items():
        setattr(part, name, size)


def _widen(module: nn.Module, name: str, value: Tensor) -> None:
    """Put an empty tensor of the shape and the type of a value into its place."""
    owner, _, own = name.rpartition(".")
    part = module.get_submodule(owner)
    if (parameter := part._parameters.get(own)) is not None and _differs(parameter, value):
        parameter.data = torch.empty_like(value)  # what is tied to it stays tied
    elif (buffer := part._buffers.get(own)) is not None and _differs(buffer, value):
        part._buffers[own] = torch.empty_like(value)


def _differs(tensor: Tensor, value: Tensor) -> bool:
    return tensor.shape != value.shape or tensor.dtype != value.dtype
