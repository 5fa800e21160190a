"""Masks: which weights are kept, how a network is lent in pruned form, and how masks are stored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy
import torch
from torch import Tensor, nn

_SMALL = 1 << 20


class Mask(Mapping[str, Tensor]):
    """Which prunable weights survive: for each parameter name a bool tensor of its shape, **True where kept**.

    Masks only grow thinner down a tree: `child <= parent`. A mask is not changed once made.

    Args:
        kept: Parameter name to bool tensor.

    Raises:
        TypeError: If a tensor is not bool.
    """

    def __init__(self, kept: Mapping[str, Tensor]) -> None:
        for name, tensor in kept.items():
            if tensor.dtype != torch.bool:
                raise TypeError(f"the mask of {name!r} is {tensor.dtype}, but must be torch.bool (True = kept).")
        self._kept = dict(kept)
        self._survivors: int | None = None
        self._digest = b""

    @classmethod
    def full(cls, weights: Mapping[str, Tensor]) -> Mask:
        """The mask that keeps every weight."""
        return cls({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()})

    @classmethod
    def of_nonzeros(cls, weights: Mapping[str, Tensor]) -> Mask:
        """The mask that keeps what is not zero now."""
        return cls({name: weight.detach() != 0 for name, weight in weights.items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mask:
        """The mask in a checkpoint of `RouletteWheelPruning` or in the file it leaves when interrupted.

        Raises:
            ValueError: If the file holds no mask.
        """
        stored = torch.load(path, map_location="cpu", weights_only=True)
        states = [stored, *stored.get("callbacks", {}).values()] if isinstance(stored, dict) else []
        for state in states:
            if isinstance(state, dict) and "pruned_at" in state:
                return History.from_state(state).mask
        raise ValueError(
            f"{os.fspath(path)} holds no mask of RouletteWheelPruning. Pass its pruned.ckpt (`best_model_path`) or the "
            "file of an interrupted search."
        )

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self.keys() == other.keys() and all(torch.equal(self[name], other[name]) for name in self)

    __hash__ = None  # type: ignore[assignment]

    def __le__(self, other: Mask) -> bool:
        """Whether every weight kept here is kept in `other`."""
        return self.keys() == other.keys() and all(bool((~self[name] | other[name]).all()) for name in self)

    def __repr__(self) -> str:
        return f"Mask({len(self)} parameters, {self.survivors} of {self.size} weights kept)"

    @property
    def size(self) -> int:
        """How many weights there are, kept or not."""
        return sum(kept.numel() for kept in self.values())

    @property
    def survivors(self) -> int:
        """How many weights are kept."""
        if self._survivors is None:
            self._survivors = sum(int(kept.count_nonzero()) for kept in self.values())
        return self._survivors

    @property
    def digest(self) -> bytes:
        """Equal for equal masks of one network; for different ones with a chance of 2**-128."""
        if not self._digest:
            digest = blake2b(digest_size=16)
            for kept in self.values():
                digest.update(numpy.packbits(kept.cpu().numpy()).data)
            self._digest = digest.digest()
        return self._digest

    @property
    def sparsity(self) -> float:
        """Share of all weights that is pruned, in [0, 1]."""
        return sparsity(self)

    @property
    def densities(self) -> dict[str, float]:
        """For each parameter the share of its weights that is kept, in [0, 1]."""
        return {name: int(kept.sum()) / max(1, kept.numel()) for name, kept in self.items()}


def sparsity(tensors: Mapping[str, Tensor]) -> float:
    """Share of all entries that are zero, in [0, 1]; of a `Mask`, the share that is pruned.

    Example:
        >>> sparsity({"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([0.0, -2.0])})
        0.5
    """
    size = sum(tensor.numel() for tensor in tensors.values())
    return 1 - sum(int(tensor.count_nonzero()) for tensor in tensors.values()) / size if size else 0.0


def apply_mask(module: nn.Module, mask: Mapping[str, Tensor] | str | os.PathLike[str]) -> None:
    """Set the pruned weights of `module` to zero, in place; parameters keep their identity and their names.

    Args:
        module: Has a parameter of each name in the mask, of its shape. A mask made for a LightningModule fits that
            module, not a network inside it.
        mask: Parameter name to bool tensor, True = kept; or the path of a file that `Mask.load` reads.

    Raises:
        TypeError: If a tensor of the mask is not bool; then nothing was changed.
        ValueError: If a name is missing or a shape differs; then nothing was changed.
    """
    kept = Mask.load(mask) if isinstance(mask, str | os.PathLike) else Mask(mask)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in kept.items():
        if name not in parameters:
            raise ValueError(f"the mask names {name!r}, but the module has no such parameter: {_some(parameters)}.")
        if parameters[name].shape != tensor.shape:
            raise ValueError(
                f"the mask of {name!r} has shape {tuple(tensor.shape)}, but the parameter has "
                f"{tuple(parameters[name].shape)}. Is it a mask of this network?"
            )
    fill_pruned({name: parameters[name] for name in kept}, kept)


def fits(mask: Mapping[str, Tensor], module: nn.Module) -> bool:
    """Whether `module` has the parameters that `mask` names, in their shapes."""
    found = dict(module.named_parameters(remove_duplicate=False))
    return all(name in found and found[name].shape == kept.shape for name, kept in mask.items())


def breaks(mask: Mapping[str, Tensor], module: nn.Module) -> bool:
    """Whether a weight of `module` that `mask`, which must fit it, prunes is not zero."""
    found = dict(module.named_parameters(remove_duplicate=False))
    return any(bool(found[name].detach()[~kept.to(found[name].device)].any()) for name, kept in mask.items())


@torch.no_grad()
def fill_pruned(tensors: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> None:
    """Write zero, in place, wherever `mask` is False. Filling, as opposed to multiplying, also clears NaN and -0.0."""
    for name, kept in mask.items():
        tensors[name].detach().masked_fill_(~kept.to(tensors[name].device), 0)


@contextmanager
def applied(mask: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the pruned weights are zero; after it, every weight is bit for bit what it was.

    Values are written in place. Of a small tensor all are set aside meanwhile, which is quicker, else those removed.
    """
    pruned = {name: ~kept.to(weights[name].device) for name, kept in mask.items()}
    dense = {name: weights[name].detach() for name in mask}
    aside = {name: dense[name].clone() if _is_small(where) else dense[name][where] for name, where in pruned.items()}

    def give_back() -> None:
        for name, where in pruned.items():
            if _is_small(where):
                dense[name].copy_(aside[name])
            else:
                dense[name].masked_scatter_(where, aside[name])

    try:
        fill_pruned(weights, mask)
        yield
    finally:
        surely(give_back)


def _is_small(tensor: Tensor) -> bool:
    return tensor.numel() <= _SMALL


def surely(action: Callable[[], None]) -> None:
    """Do `action`, which may be repeated, to its end even when Ctrl-C arrives in the middle of it."""
    try:
        action()
    except KeyboardInterrupt:
        action()
        raise


class History:
    """The masks of all accepted levels in one: for each weight the level that pruned it, 0 while it is kept.

    Since masks nest, this one small integer per weight holds every level's mask.

    Args:
        pruned_at: Parameter name to int16 tensor.
        level: The level whose mask is `mask`: the winner's.
        deepest: The last level there is; None: `level`.
    """

    most_levels = torch.iinfo(torch.int16).max

    def __init__(self, pruned_at: Mapping[str, Tensor], level: int = 0, deepest: int | None = None) -> None:
        self._pruned_at, self.level = dict(pruned_at), level
        self.deepest = level if deepest is None else deepest

    @classmethod
    def of_dense(cls, weights: Mapping[str, Tensor]) -> History:
        """The history of a network of which nothing was pruned."""
        return cls({name: torch.zeros_like(weight, dtype=torch.int16) for name, weight in weights.items()})

    def pruned(self, mask: Mask) -> History:
        """The history with one level more, of this mask."""
        level = self.deepest + 1
        gone = {name: (at == 0) & ~mask[name].to(at.device) for name, at in self._pruned_at.items()}
        return History({name: at.masked_fill(gone[name], level) for name, at in self._pruned_at.items()}, level)

    def won_by(self, level: int) -> History:
        """The same levels with another winner."""
        return History(self._pruned_at, level, self.deepest)

    @property
    def mask(self) -> Mask:
        """The winner's mask."""
        return self.mask_at(self.level)

    def mask_at(self, level: int) -> Mask:
        """The mask of one accepted level; level 0 is the dense network.

        Raises:
            ValueError: If there was no such level.
        """
        if not 0 <= level <= self.deepest:
            raise ValueError(
                f"level is {level}, but must lie between 0 (dense) and {self.deepest} (the last accepted)."
            )
        return Mask({name: (at == 0) | (at > level) for name, at in self._pruned_at.items()})

    def cpu(self) -> History:
        """The same history on the CPU."""
        return History({name: at.cpu() for name, at in self._pruned_at.items()}, self.level, self.deepest)

    def state(self) -> dict[str, Any]:
        """Plain tensors and numbers, on the CPU, for a checkpoint; read back by `from_state`."""
        small = torch.uint8 if self.deepest < 256 else torch.int16
        pruned_at = {name: at.to("cpu", small) for name, at in self._pruned_at.items()}
        return {"pruned_at": pruned_at, "level": self.level, "deepest": self.deepest}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        """The history that `state` was taken from."""
        level = int(state["level"])
        pruned_at = {name: at.to(torch.int16) for name, at in state["pruned_at"].items()}
        return cls(pruned_at, level, int(state.get("deepest", level)))


def _some(names: Mapping[str, Any], most: int = 8) -> str:
    listed = ", ".join(repr(name) for name in list(names)[:most])
    return f"it has {listed}{', ...' if len(names) > most else ''}" if names else "it has none"
