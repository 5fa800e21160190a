"""Which weights of a network are kept."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import UninitializedParameter

from lightning_roulette.large.bits import Bits, Flags, as_stored, is_small, packed_if_large
from lightning_roulette.large.devices import device_for_bits
from lightning_roulette.large.masking import fill, pruned_parts
from lightning_roulette.large.shards import anywhere, filled, nonzeros, reshard
from lightning_roulette.mask.levels import levels_in, winner_in


class Mask(Mapping[str, Tensor]):
    """Parameter name to a bool tensor of the parameter's shape, **True where the weight is kept**.

    `child <= parent` tells whether `child` keeps only weights that `parent` keeps. A mask never changes.

    Tensors with more than `limits().unpacked_entries` entries are packed at one bit per weight. They are unpacked at
    each access.

    Args:
        kept: Parameter name to bool tensor or `Bits`.

    Raises:
        TypeError: If a tensor is not bool.
    """

    def __init__(self, kept: Mapping[str, Tensor | Bits]) -> None:
        if not isinstance(kept, Mask):
            _check_types(kept)
        self._flags = {name: packed_if_large(flags) for name, flags in flags_of(kept).items()}
        self._counts: dict[str, int] | None = None
        self._digest = b""

    @classmethod
    def full(cls, weights: Mapping[str, Tensor]) -> Mask:
        """The mask that keeps every weight.

        Args:
            weights: Weights by parameter name.
        """
        return cls({name: _uniform(True, weight) for name, weight in weights.items()})

    @classmethod
    def nothing(cls, weights: Mapping[str, Tensor]) -> Mask:
        """The mask that keeps no weight.

        Args:
            weights: Weights by parameter name.
        """
        return cls({name: _uniform(False, weight) for name, weight in weights.items()})

    @classmethod
    def thinned(cls, weights: Mapping[str, Tensor]) -> Mask:
        """The mask that keeps all but every eighth weight.

        Args:
            weights: Weights by parameter name.
        """
        return cls({name: _thinned(weight) for name, weight in weights.items()})

    @classmethod
    def of_nonzeros(cls, weights: Mapping[str, Tensor]) -> Mask:
        """The mask that keeps the weights which are not zero.

        Args:
            weights: Weights by parameter name.
        """
        return cls(nonzeros(weights))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mask:
        """Read the winner's mask from a file.

        Args:
            path: A path, or the URL of a file system that fsspec knows, such as `s3://bucket/pruned.ckpt`, of one of

                - a checkpoint of `RouletteWheelPruning`,
                - a distributed checkpoint, which is a folder with a file `meta.pt`,
                - the file that an interrupted search leaves,
                - the file of measured weights that is written beside a checkpoint which does not hold them.

        Returns:
            The mask on the CPU, True = kept.

        Raises:
            ValueError: If the file has no mask.
        """
        stored = _read(os.fspath(path))
        states = [stored, *stored.get("callbacks", {}).values()] if isinstance(stored, dict) else []
        for state in states:
            if isinstance(state, dict) and "pruned_at" in state:
                return cls(levels_in(state).kept_at(winner_in(state)))
        raise ValueError(
            f"{os.fspath(path)} holds no mask of RouletteWheelPruning. Pass its pruned.ckpt (`best_model_path`) or the "
            "file of an interrupted search."
        )

    def __getitem__(self, name: str) -> Tensor:
        return self._flags[name].unpacked()

    def __contains__(self, name: object) -> bool:
        return name in self._flags  # Mapping's own method would unpack the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._flags)

    def __len__(self) -> int:
        return len(self._flags)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self.keys() == other.keys() and all(one.equals(other.flags[name]) for name, one in self._flags.items())

    __hash__ = None  # type: ignore[assignment]

    def __le__(self, other: Mask) -> bool:
        """Whether every weight that is kept here is kept in `other`."""
        return self.keys() == other.keys() and all(one.within(other.flags[name]) for name, one in self._flags.items())

    def __repr__(self) -> str:
        return f"Mask({len(self)} parameters, {self.survivors} of {self.size} weights kept)"

    @property
    def flags(self) -> Mapping[str, Flags]:
        """The same mapping, with operations that do not unpack large tensors."""
        return self._flags

    @property
    def stored(self) -> Mapping[str, Tensor | Bits]:
        """The same mapping, with large tensors packed."""
        return {name: flags.stored for name, flags in self._flags.items()}

    @property
    def size(self) -> int:
        """Number of weights, kept or not."""
        return sum(flags.numel() for flags in self._flags.values())

    @property
    def nbytes(self) -> int:
        """Memory of the mask in bytes."""
        return sum(flags.nbytes for flags in self._flags.values())

    @property
    def counts(self) -> Mapping[str, int]:
        """Parameter name to the number of kept weights."""
        if self._counts is None:
            self._counts = {name: flags.count() for name, flags in self._flags.items()}
        return self._counts

    @property
    def survivors(self) -> int:
        """Number of kept weights."""
        return sum(self.counts.values())

    @property
    def digest(self) -> bytes:
        """A hash of 16 bytes. Different masks of one network have equal hashes with a probability of 2**-128."""
        if not self._digest:
            digest = blake2b(digest_size=16)
            for flags in self._flags.values():
                digest.update(flags.digested())
            self._digest = digest.digest()
        return self._digest

    @property
    def sparsity(self) -> float:
        """Share of all weights that is pruned, in [0, 1]."""
        return 1 - self.survivors / self.size if self.size else 0.0

    @property
    def densities(self) -> dict[str, float]:
        """Parameter name to the share of its weights that is kept, in [0, 1]."""
        return {name: self.counts[name] / max(1, flags.numel()) for name, flags in self._flags.items()}

    def cpu(self) -> Mask:
        """The same mask on the CPU."""
        return Mask({name: flags.to("cpu").stored for name, flags in self._flags.items()})


def flags_of(mask: Mapping[str, Tensor | Bits]) -> Mapping[str, Flags]:
    """Each tensor of a mask, or of a plain mapping, as `Flags`. Nothing is unpacked."""
    return mask.flags if isinstance(mask, Mask) else {name: as_stored(kept) for name, kept in mask.items()}


def _read(path: str) -> Any:
    if "://" not in path:
        file = os.path.join(path, "meta.pt") if os.path.isdir(path) else path
        return torch.load(file, map_location="cpu", weights_only=True)
    # torch and lightning depend on fsspec; a local path does not need it
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    files, file = url_to_fs(path)
    with files.open(f"{file}/meta.pt" if files.isdir(file) else file, "rb") as opened:
        return torch.load(opened, map_location="cpu", weights_only=True)


def _check_types(kept: Mapping[str, Tensor | Bits]) -> None:
    for name, tensor in kept.items():
        if isinstance(tensor, Tensor) and tensor.dtype != torch.bool:
            raise TypeError(f"the mask of {name!r} is {tensor.dtype}, but must be torch.bool (True = kept).")


def sparsity(tensors: Mapping[str, Tensor]) -> float:
    """Share of all entries that are zero, in [0, 1]. For a `Mask` this is the share that is pruned.

    Args:
        tensors: Weights or a mask, by name. Without entries the share is 0.

    Examples:
        >>> sparsity({"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([0.0, -2.0])})
        0.5
    """
    size = sum(tensor.numel() for tensor in tensors.values())
    return 1 - sum(int(tensor.count_nonzero()) for tensor in tensors.values()) / size if size else 0.0


def apply_mask(module: nn.Module, mask: Mapping[str, Tensor] | str | os.PathLike[str]) -> None:
    """Set the pruned weights of `module` to zero, in place. Parameters keep their identity and their names.

    Args:
        module: A module with a parameter of the same shape for each name in the mask. A mask that was made for a
            LightningModule fits that module, not a network inside it.
        mask: Parameter name to bool tensor, True = kept; or the path of a file that `Mask.load` reads.

    Raises:
        TypeError: If a tensor of the mask is not bool. The module is unchanged.
        ValueError: If the module lacks a name, a shape differs or is not known yet, or the file has no mask. The module
            is unchanged.
    """
    kept = Mask.load(mask) if isinstance(mask, str | os.PathLike) else Mask(mask)
    reshard(module)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, flags in kept.flags.items():
        if name not in parameters:
            raise ValueError(f"the mask names {name!r}, but the module has no such parameter: {_some(parameters)}.")
        if isinstance(parameters[name], UninitializedParameter):
            raise ValueError(
                f"the mask names {name!r}, but the parameter belongs to a lazy layer and has no shape yet. Call the "
                "module once on a batch before, or load its weights from a checkpoint."
            )
        if parameters[name].shape != flags.shape:
            raise ValueError(
                f"the mask of {name!r} has shape {tuple(flags.shape)}, but the parameter has "
                f"{tuple(parameters[name].shape)}. Is it a mask of this network?"
            )
    fill_pruned({name: parameters[name] for name in kept}, kept)


def fits(mask: Mapping[str, Tensor], module: nn.Module) -> bool:
    """Whether `module` has the parameters that `mask` names, with the same shapes."""
    found = dict(module.named_parameters(remove_duplicate=False))
    known = {name: one.shape for name, one in found.items() if not isinstance(one, UninitializedParameter)}
    return all(known.get(name) == flags.shape for name, flags in flags_of(mask).items())


def breaks(mask: Mapping[str, Tensor], module: nn.Module) -> bool:
    """Whether a weight of `module` is not zero although `mask` prunes it.

    If the weights are sharded, all processes must call this function.

    Args:
        mask: A mask that fits the module.
        module: The network.
    """
    reshard(module)
    found = dict(module.named_parameters(remove_duplicate=False))
    ours = {name: found[name].detach() for name in mask}
    here = any(
        bool(part[gone].any())
        for name, flags in flags_of(mask).items()
        for part, gone in pruned_parts(ours[name], flags)
    )
    return anywhere(here, ours)


@torch.no_grad()
def fill_pruned(tensors: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> None:
    """Write zero, in place, wherever `mask` is False. NaN, infinity and -0.0 become zero too."""
    for name, flags in flags_of(mask).items():
        fill(tensors[name].detach(), flags)


def _uniform(value: bool, weight: Tensor) -> Tensor | Bits:
    return filled(value, weight) if is_small(weight) else Bits.filled(value, weight.shape, device_for_bits(weight))


def _thinned(weight: Tensor) -> Tensor | Bits:
    if is_small(weight):
        kept = filled(True, weight).flatten()
        kept[::8] = False
        return kept.view(weight.shape)
    every = Bits.filled(True, weight.shape, device_for_bits(weight))
    return Bits(every.packed & 0b11111110, weight.shape)


def _some(names: Mapping[str, object], most: int = 8) -> str:
    listed = ", ".join(repr(name) for name in list(names)[:most])
    return f"it has {listed}{', ...' if len(names) > most else ''}" if names else "it has none"
