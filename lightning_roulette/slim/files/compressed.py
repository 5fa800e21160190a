"""Compressed files: the weights of a network, with the positions and values of the survivors entropy-coded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.state_dicts import WrongStateDict, load_under_its_names
from lightning_roulette.slim.files.coder import Reader, Writer, entropy_coder
from lightning_roulette.slim.files.container import packed, unpacked, write_whole
from lightning_roulette.slim.files.content import Content, by_role, deflated, inflated, others
from lightning_roulette.slim.files.header import Damaged, Header, flat, nested
from lightning_roulette.slim.files.narrowed import survivors_of
from lightning_roulette.slim.files.tensors import check_tensors, entry_of, state_of
from lightning_roulette.values import Codebook, values_of

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed file that was read.

    Attributes:
        values: How the survivors were stored, in words.
        state: Name to tensor. Tied names have one tensor.
        kept: Name to the weights that are stored, of every tensor with at least two dimensions.
        spent: Name to the bits that the tensor takes; 0 for a name that is tied to an earlier one.
        size: The bytes of the file.
    """

    values: str
    state: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    spent: Mapping[str, float]
    size: int


def save_compressed(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    values: str | Codebook = "float32",
    *,
    mask: Mapping[str, Tensor] | None = None,
) -> int:
    """Write the weights of a pruned network into a small file, and return its bytes.

    The positions and the values of the survivors are entropy-coded with models that learn for each tensor, output,
    input and kernel position. Biases, buffers and normalisations are always stored as they are. So are the shapes and
    types. Tied weights are stored once. The file is written beside its place and then moved there.

    `values` says how the weights of tensors with at least two dimensions are stored:

    - `"float32"`: as they are, bit for bit, whatever their type. Use it if nothing may change. The sign of a zero takes
      up to a bit where some are -0.0, as negative weights times a mask of zeros are; the others do not keep it.
    - `"float16"`: rounded to float16. Two of four bytes less, and almost never a change of the accuracy.
    - `"int8"`: whole multiples, up to 127, of one scale for each index of the first dimension. No survivor becomes
      zero. Measure the accuracy of the network afterwards.
    - `Codebook(bits)`: at most `2**bits` values for each tensor, found by k-means. Smaller than int8 for 3 to 5 bits.
      Measure the accuracy afterwards.

    What is read has the types of the network, with rounded values.

    Args:
        model: A module or its state dict. Its weights are not changed.
        path: The file. It is replaced if it exists.
        values: One of the choices above.
        mask: Parameter name to bool tensor, True = kept, such as `pruning.mask`. Survivors that are zero are then
            stored as survivors, which `load_mask` returns. None: weights that are not zero are the survivors.

    Returns:
        The size of the file in bytes.

    Raises:
        ImportError: If constriction is not installed.
        TypeError: If the state dict holds something else than dense tensors.
        ValueError: If an argument is wrong, or if weights cannot be rounded. No file is written then.
        OSError: If the file cannot be written.
    """
    entropy_coder()
    content = compressed(state_of(model), values_of(values), mask)
    return write_whole(path, lambda file: file.write(content))


def compressed(state: Mapping[str, Tensor], values: str | Codebook, mask: Mapping[str, Tensor] | None = None) -> bytes:
    """The content of a compressed file. See `save_compressed`."""
    check_tensors(state)
    state = flat(nested(state))  # in the order in which the names are read
    tied = _tied(state)
    entries = [entry_of(name, one) for name, one in state.items() if name not in tied]
    flags = _flags(mask, state, tied)
    stored = {
        one.name: survivors_of(one.name, state[one.name], values, flags.get(one.name))
        for one in entries
        if one.is_matrix
    }
    entries = [replace(one, signed=one.is_matrix and stored[one.name].negative is not None) for one in entries]
    content = Content(writer := Writer())
    for one in entries:
        if one.is_matrix:
            content.matrix(one, stored[one.name])
    for group in by_role(entries):
        content.vectors(group, state)
    sections = [*writer.sections(), deflated(others(entries), state)]
    sizes = tuple(len(one) for one in sections)
    return packed(Header(str(values), tuple(entries), tied, tuple(state), sizes), sections)


@overload
def load_compressed(
    path: str | os.PathLike[str],
    model: None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]: ...


@overload
def load_compressed(
    path: str | os.PathLike[str],
    model: _Model,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> _Model: ...


def load_compressed(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Read a file that `save_compressed` wrote.

    Args:
        path: The file.
        model: A module that is filled. None: a state dict is returned.
        device: The tensors, or the module, are moved there.
        dtype: Floating-point tensors, or those of the module, are converted. None: they have the type that they had.

    Returns:
        The module, or a dictionary from names to tensors.

    Raises:
        ImportError: If constriction is not installed.
        TypeError: If `dtype` is not a floating-point type.
        ValueError: If the file is truncated, altered or of another kind, or does not fit the module. The module then
            has its old weights.
        OSError: If the file cannot be read.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is {dtype!r}, but must be a floating-point type, such as torch.float16, or None.")
    state = dict(read_compressed(path).state)
    if model is None:
        moved = {id(one): one.to(device, dtype if one.is_floating_point() else None) for one in state.values()}
        return {name: moved[id(one)] for name, one in state.items()}
    try:
        load_under_its_names(model, state, lambda given, strict: model.load_state_dict(given, strict=strict))
    except WrongStateDict as error:
        raise ValueError(f"{_head(path)}its weights do not fit {type(model).__name__}: {error}.") from None
    return model.to(device, dtype)


def load_mask(path: str | os.PathLike[str]) -> Mask:
    """The survivors in a file of `save_compressed`: the mask of every tensor with at least two dimensions.

    Args:
        path: The file.

    Raises:
        ImportError: If constriction is not installed.
        ValueError: If the file is truncated, altered or of another kind.
    """
    return Mask(read_compressed(path).kept)


def read_compressed(path: str | os.PathLike[str]) -> Compressed:
    """Read a compressed file as a whole. See `load_compressed`."""
    entropy_coder()
    content = Path(path).read_bytes()
    try:
        return _read(*unpacked(content), len(content))
    except Damaged as error:
        raise ValueError(f"{_head(path)}{error}. Pass a file that save_compressed wrote.") from None
    except Exception as error:
        # its checksum is right, so it was made by someone else, who made a mistake
        raise ValueError(f"{_head(path)}its content cannot be decoded ({type(error).__name__}: {error}).") from error


def _read(header: Header, sections: list[bytes], size: int) -> Compressed:
    if len(sections) != 4:
        raise Damaged(f"it has {len(sections)} sections instead of 4")
    content = Content(reader := Reader(sections[:3]))
    matrices = [one for one in header.entries if one.is_matrix]
    stored = {one.name: (one, content.matrix(one, None)) for one in matrices}
    tensors = {name: survivors.tensor(one) for name, (one, survivors) in stored.items()}
    for group in by_role(header.entries):
        tensors |= content.vectors(group, None)
    if not reader.is_at_end:
        raise Damaged("it is longer than its tensors")
    as_they_are = others(header.entries)
    tensors |= inflated(as_they_are, sections[3])
    bits = 8 * len(sections[3]) / max(sum(one.nbytes for one in as_they_are), 1)
    spent = content.spent | {one.name: bits * one.nbytes for one in as_they_are}
    return Compressed(
        header.values,
        {name: tensors[header.tied.get(name, name)] for name in header.names},
        {name: torch.from_numpy(survivors.kept) for name, (_, survivors) in stored.items()},
        {name: spent.get(name, 0.0) for name in header.names},
        size,
    )


def _tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are the same part of memory as an earlier one, with the name of that one."""
    first: dict[object, str] = {}
    tied = {}
    for name, one in state.items():
        lazy = (one.is_conj(), one.is_neg())  # what torch does to the numbers when they are read
        place = (one.device, one.data_ptr(), one.dtype, tuple(one.shape), one.stride(), one.numel() or name, lazy)
        if (known := first.setdefault(place, name)) != name:
            tied[name] = known
    return tied


def _flags(
    mask: Mapping[str, Tensor] | None, state: Mapping[str, Tensor], tied: Mapping[str, str]
) -> dict[str, Tensor]:
    """The mask of each tensor that is stored."""
    flags = {tied.get(name, name): one for name, one in (mask or {}).items()}
    for name, one in flags.items():
        if name not in state or one.shape != state[name].shape or one.dtype != torch.bool:
            what = "is no tensor of the network" if name not in state else "must be bool tensors of the same shape"
            raise ValueError(f"mask has {name!r}, which {what}. Pass the mask of this network, such as pruning.mask.")
    return flags


def _head(path: str | os.PathLike[str]) -> str:
    return f"path is {os.fspath(path)!r}, but "
