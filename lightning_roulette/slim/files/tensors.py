"""Tensors as bits of NumPy, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_roulette.large.shards import is_sharded
from lightning_roulette.network.state_dicts import WrongStateDict, state_dict_in
from lightning_roulette.slim.files.floats import LAYOUTS, Bits
from lightning_roulette.slim.files.header import OTHERS, Entry

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def name_of(dtype: torch.dtype) -> str:
    """The name of a type, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def state_of(model: Any) -> dict[str, Tensor]:
    """The state dict of a module, or in a mapping.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(model, nn.Module):
        return dict(model.state_dict())
    if not isinstance(model, Mapping):
        raise TypeError(f"model is of type {type(model).__name__}, but must be a module or a state dict.")
    if not model or any(isinstance(one, Tensor) for one in model.values()):
        return dict(model)
    try:
        return state_dict_in(model)
    except WrongStateDict as error:
        raise TypeError(f"model is a dictionary, but {error}") from None


def check_tensors(state: Mapping[str, Any]) -> None:
    """Check that every value can be stored.

    Raises:
        TypeError: If one is no tensor, or of a type that is not supported.
        ValueError: If one is sharded, sparse, quantised or has no values.
    """
    for name, one in state.items():
        if not isinstance(name, str) or not isinstance(one, Tensor):
            raise TypeError(
                f"the state dict has a {type(one).__name__} for {name!r}, but only tensors can be stored. Remove it."
            )
        if one.is_quantized or (name_of(one.dtype) not in LAYOUTS and name_of(one.dtype) not in OTHERS):
            raise TypeError(f"{name} has the type {one.dtype}, which cannot be stored. Convert it.")
        if is_sharded(one):
            raise ValueError(f"{name} is sharded, but must be whole. Gather the state dict first.")
        if one.is_meta or one.layout != torch.strided:
            what = "has no values" if one.is_meta else f"has the layout {one.layout}"
            raise ValueError(f"{name} {what}, but must be a dense tensor.")


def entry_of(name: str, tensor: Tensor) -> Entry:
    """The entry of a tensor in a header."""
    return Entry(name, name_of(tensor.dtype), tuple(tensor.shape))


def bits_of(tensor: Tensor) -> npt.NDArray[Any]:
    """The bits of each number as unsigned integers of its width, in the order of its indices."""
    plain = tensor.detach().cpu().resolve_neg().contiguous().reshape(-1)
    as_integers: npt.NDArray[Any] = plain.view(_INTEGERS[plain.itemsize]).numpy()
    return as_integers.view(_UNSIGNED[plain.itemsize])


def from_bits(bits: Bits, entry: Entry) -> Tensor:
    """The tensor whose numbers have these bits."""
    size = LAYOUTS[entry.dtype].width // 8
    integers = torch.from_numpy(bits.astype(_UNSIGNED[size]).view(f"i{size}"))
    return integers.view(getattr(torch, entry.dtype)).reshape(entry.shape)


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor, in the order of its indices: the first byte of each entry, then the second of each."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    by_entry = plain.view(torch.uint8).numpy().reshape(len(plain), plain.itemsize)
    content: bytes = by_entry.T.tobytes()
    return content


def from_bytes(content: bytes, entry: Entry) -> Tensor:
    """The tensor of these bytes."""
    by_entry = np.frombuffer(content, np.uint8).reshape(OTHERS[entry.dtype], entry.size).T.copy()
    return torch.from_numpy(by_entry).reshape(-1).view(getattr(torch, entry.dtype)).reshape(entry.shape)
