"""Parameters that share memory: several parameters over one storage, as views of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightning_roulette.large.shards import is_sharded


@dataclass(frozen=True)
class Tie:
    """Different parameters that share memory.

    Attributes:
        names: Their names, in the module's order. Each is the first name of its parameter.
        whole: The first of them that holds all entries of the others; None if there is none.
    """

    names: tuple[str, ...]
    whole: str | None


def ties_of(module: nn.Module) -> list[Tie]:
    """The ties between the parameters of a module, views and transposes of each other included.

    Parameters that are different parts of one buffer are not tied. A parameter with several names is not a tie either:
    see `aliases`. Sharded parameters are left out.
    """
    parameters = dict(module.named_parameters())
    order = {name: place for place, name in enumerate(parameters)}
    places = [place for name, one in parameters.items() if (place := _Place.of(name, one)) is not None]
    places.sort(key=lambda one: (one.device, one.start))
    found: list[Tie] = []
    for together in _connected(places):
        names = tuple(sorted((one.name for one in together), key=order.__getitem__))
        by_name = {one.name: one for one in together}
        whole = (name for name in names if all(by_name[name].holds(one) for one in together))
        found.append(Tie(names, next(whole, None)))
    return sorted(found, key=lambda tie: order[tie.names[0]])


def shared_with_buffers(module: nn.Module) -> dict[str, str]:
    """The parameters that share memory with a buffer, by name, with the name of the buffer."""
    buffers = [place for name, one in module.named_buffers() if (place := _Place.of(name, one)) is not None]
    if not buffers:
        return {}
    parameters = [place for name, one in module.named_parameters() if (place := _Place.of(name, one)) is not None]
    places = sorted([*buffers, *parameters], key=lambda one: (one.device, one.start))
    known = {id(one) for one in buffers}
    found: dict[str, str] = {}
    for together in _connected(places):
        theirs = [one.name for one in together if id(one) in known]
        found |= {one.name: theirs[0] for one in together if theirs and id(one) not in known}
    return found


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a parameter lies in memory: from one address to another. The entries between may have gaps."""

    name: str
    tensor: Tensor
    device: str
    start: int
    end: int

    @classmethod
    def of(cls, name: str, parameter: Tensor) -> _Place | None:
        """Return the place of a parameter or buffer; None if it has no memory that could be shared."""
        lazy = isinstance(parameter, UninitializedParameter | UninitializedBuffer)
        if lazy or parameter.is_meta or is_sharded(parameter) or parameter.layout != torch.strided:
            return None
        tensor = parameter.detach()
        try:
            start = tensor.data_ptr()  # two storages may have one memory, as those of NumPy arrays
        except (RuntimeError, NotImplementedError):  # a tensor without a storage, as some quantised ones
            return None
        if not tensor.numel() or not start:
            return None
        reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        return cls(name, tensor, str(tensor.device), start, start + reach * tensor.itemsize)

    @property
    def dense(self) -> bool:
        """Whether the entries fill all bytes from start to end, each once."""
        filled = 1
        for step, size in sorted(zip(self.tensor.stride(), self.tensor.shape, strict=True)):
            if size > 1 and step != filled:
                return False
            filled *= size
        return True

    def entries(self) -> Tensor:
        """The addresses of all entries, in bytes, each once."""
        found = torch.tensor([self.start])
        for size, step in zip(self.tensor.shape, self.tensor.stride(), strict=True):
            found = (found.unsqueeze(1) + torch.arange(size) * step * self.tensor.itemsize).flatten()
        entries: Tensor = found.unique()
        return entries

    def overlaps(self, other: _Place) -> bool:
        """Whether the two have an entry in common."""
        if self.device != other.device or self.end <= other.start or other.end <= self.start:
            return False
        if (self.dense and other.dense) or self.tensor.itemsize != other.tensor.itemsize:
            return True
        return bool(torch.isin(self.entries(), other.entries()).any())

    def holds(self, other: _Place) -> bool:
        """Whether every entry of the other is an entry of this one, of the same type."""
        if self is other:
            return True
        if self.tensor.dtype != other.tensor.dtype or other.start < self.start or other.end > self.end:
            return False
        return self.dense or bool(torch.isin(other.entries(), self.entries()).all())


def _connected(places: Sequence[_Place]) -> Iterator[list[_Place]]:
    """Yield the groups of at least two places in which each overlaps another.

    Args:
        places: Places sorted by device and start.
    """
    groups: list[list[_Place]] = []
    for one in places:
        ended = [group for group in groups if all(_is_over(other, one) for other in group)]
        yield from (group for group in ended if len(group) > 1)
        touched = [group for group in groups if any(one.overlaps(other) for other in group)]
        groups = [group for group in groups if group not in ended and group not in touched]
        groups.append([one, *(other for group in touched for other in group)])
    yield from (group for group in groups if len(group) > 1)


def _is_over(one: _Place, following: _Place) -> bool:
    """Whether a place ends before a following one, in sorted places, begins."""
    return one.device != following.device or one.end <= following.start
