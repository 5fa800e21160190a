"""Weights alone in the usual file formats: writing and reading them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.network.state_dicts import WrongStateDict, state_dict_in
from lightning_roulette.slim.files.container import write_whole
from lightning_roulette.slim.files.tensors import check_tensors, state_of

_OF_TORCH = (".pt", ".pth", ".ckpt", ".bin")
_SAFETENSORS = ".safetensors"


def save_weights(model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> int:
    """Write the state dict of a network alone, without optimizers, masks and history.

    The suffix of the path says the format:

    - `.safetensors`: can be read without running code, and by other libraries. Needs the package safetensors. Tied
      weights are stored under each of their names.
    - `.pt`, `.pth`, `.ckpt` or `.bin`: a file of `torch.save`, which `torch.load(path, weights_only=True)` reads.

    Zeros take as many bytes as other weights: see `save_compressed` for a small file. The file is written beside its
    place and then moved there.

    Args:
        model: A module or its state dict.
        path: The file. It is replaced if it exists.

    Returns:
        The size of the file, in bytes.

    Raises:
        ImportError: If safetensors is needed and not installed.
        TypeError: If the state dict holds something else than tensors.
        ValueError: If the suffix is another one.
        OSError: If the file cannot be written.
    """
    suffix = Path(path).suffix
    if suffix not in (_SAFETENSORS, *_OF_TORCH):
        raise ValueError(f"path is {os.fspath(path)!r}, but must end with {', '.join((_SAFETENSORS, *_OF_TORCH))}.")
    state = state_of(model)
    check_tensors(state)
    plain = {name: _alone(one.detach().cpu()) for name, one in state.items()}
    if suffix in _OF_TORCH:
        return write_whole(path, lambda file: torch.save(plain, file))
    content = _safetensors("writing").save({name: one.contiguous().clone() for name, one in plain.items()})
    return write_whole(path, lambda file: file.write(content))


def _alone(tensor: Tensor) -> Tensor:
    """Return a tensor without the rest of the memory of which it is a part: torch would write all of it."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.itemsize else tensor


def read_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state dict in a file of safetensors, or of torch without any Python objects.

    Raises:
        ImportError: If safetensors is needed and not installed.
        ValueError: If the file cannot be read.
        OSError: If there is no such file.
    """
    content = Path(path)
    if content.suffix == _SAFETENSORS:
        library, raw = _safetensors("reading"), content.read_bytes()
        try:
            return dict(sorted(library.load(raw).items()))  # it has no order of its own
        except Exception as error:
            raise ValueError(f"path is {os.fspath(path)!r}, but safetensors cannot read it ({error}).") from error
    with content.open("rb") as file:
        try:
            return state_dict_in(torch.load(file, map_location="cpu", weights_only=True))
        except WrongStateDict as error:
            raise ValueError(f"path is {os.fspath(path)!r}, but {error}") from None
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(
                f"path is {os.fspath(path)!r}, but it is no file of weights: neither of save_compressed, nor of "
                "safetensors, nor one that torch.load reads with weights_only=True."
            ) from error


def _safetensors(what: str) -> Any:
    try:
        from safetensors import torch as library
    except ImportError as error:
        raise ImportError(f"{what} safetensors needs the package safetensors. Run: pip install safetensors") from error
    return library
