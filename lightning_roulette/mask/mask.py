"""Masks: which weights are kept, how a network is lent in pruned form, and how masks are stored."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from lightning_roulette.large.bits import Bits, flat_part
from lightning_roulette.large.limits import limits
from lightning_roulette.large.shards import Shards, anywhere, hold_shards_alone, is_sharded, local, part_of, start_of


class Mask(Mapping[str, Tensor]):
    """Which prunable weights survive: for each parameter name a bool tensor of its shape, **True where kept**.

    Masks only grow thinner down a tree: `child <= parent`. A mask is not changed once made.

    Large tensors are packed, at a bit a weight, and unpacked each time one is asked for.

    Args:
        kept: Parameter name to bool tensor, or to `Bits`.

    Raises:
        TypeError: If a tensor is not bool.
    """

    def __init__(self, kept: Mapping[str, Tensor | Bits]) -> None:
        for name, tensor in (kept.stored if isinstance(kept, Mask) else kept).items():
            if isinstance(tensor, Tensor) and tensor.dtype != torch.bool:
                raise TypeError(f"the mask of {name!r} is {tensor.dtype}, but must be torch.bool (True = kept).")
        self._kept = {name: _stored(tensor) for name, tensor in _as_they_lie(kept)}
        self._counts: dict[str, int] | None = None
        self._digest = b""

    @classmethod
    def full(cls, weights: Mapping[str, Tensor]) -> Mask:
        """The mask that keeps every weight."""
        return cls({name: _uniform(True, weight) for name, weight in weights.items()})

    @classmethod
    def nothing(cls, weights: Mapping[str, Tensor]) -> Mask:
        """The mask that keeps no weight."""
        return cls({name: _uniform(False, weight) for name, weight in weights.items()})

    @classmethod
    def of_nonzeros(cls, weights: Mapping[str, Tensor]) -> Mask:
        """The mask that keeps what is not zero now."""
        if (shards := Shards.of(weights)) is not None:
            own = {name: weight != 0 for name, weight in shards.own(weights).items()}
            return cls(shards.whole(own, {name: weight.shape for name, weight in weights.items()}))
        return cls({name: _stored(weight.detach() != 0) for name, weight in weights.items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mask:
        """The mask in a checkpoint of `RouletteWheelPruning` or in the file it leaves when interrupted.

        Of a distributed checkpoint, which is a folder, its `meta.pt` is read.

        Raises:
            ValueError: If the file holds no mask.
        """
        file = os.path.join(path, "meta.pt") if os.path.isdir(path) else path
        stored = torch.load(file, map_location="cpu", weights_only=True)
        states = [stored, *stored.get("callbacks", {}).values()] if isinstance(stored, dict) else []
        for state in states:
            if isinstance(state, dict) and "pruned_at" in state:
                return History.from_state(state).mask
        raise ValueError(
            f"{os.fspath(path)} holds no mask of RouletteWheelPruning. Pass its pruned.ckpt (`best_model_path`) or the "
            "file of an interrupted search."
        )

    def __getitem__(self, name: str) -> Tensor:
        kept = self._kept[name]
        return kept if isinstance(kept, Tensor) else kept.unpacked()

    def __contains__(self, name: object) -> bool:
        return name in self._kept  # that of a Mapping would make the tensor to tell

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self.keys() == other.keys() and all(
            _equal(kept, other.stored[name]) for name, kept in self._kept.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __le__(self, other: Mask) -> bool:
        """Whether every weight kept here is kept in `other`."""
        return self.keys() == other.keys() and all(
            _within(kept, other.stored[name]) for name, kept in self._kept.items()
        )

    def __repr__(self) -> str:
        return f"Mask({len(self)} parameters, {self.survivors} of {self.size} weights kept)"

    @property
    def stored(self) -> Mapping[str, Tensor | Bits]:
        """The same mapping with large tensors as they are kept: packed."""
        return self._kept

    @property
    def size(self) -> int:
        """How many weights there are, kept or not."""
        return sum(kept.numel() for kept in self._kept.values())

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        return sum(kept.packed.nbytes if isinstance(kept, Bits) else kept.nbytes for kept in self._kept.values())

    @property
    def counts(self) -> Mapping[str, int]:
        """For each parameter how many of its weights are kept."""
        if self._counts is None:
            self._counts = {name: _count(kept) for name, kept in self._kept.items()}
        return self._counts

    @property
    def survivors(self) -> int:
        """How many weights are kept."""
        return sum(self.counts.values())

    @property
    def digest(self) -> bytes:
        """Equal for equal masks of one network; for different ones with a chance of 2**-128."""
        if not self._digest:
            digest = blake2b(digest_size=16)
            for kept in self.stored.values():
                packed = kept.packed if isinstance(kept, Bits) else numpy.packbits(kept.cpu().numpy())
                digest.update(packed.cpu().contiguous().numpy().data if isinstance(packed, Tensor) else packed.data)
            self._digest = digest.digest()
        return self._digest

    @property
    def sparsity(self) -> float:
        """Share of all weights that is pruned, in [0, 1]."""
        return 1 - self.survivors / self.size if self.size else 0.0

    @property
    def densities(self) -> dict[str, float]:
        """For each parameter the share of its weights that is kept, in [0, 1]."""
        return {name: self.counts[name] / max(1, kept.numel()) for name, kept in self._kept.items()}

    def cpu(self) -> Mask:
        """The same mask on the CPU."""
        return Mask({name: kept.to("cpu") for name, kept in self._kept.items()})


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
    hold_shards_alone(module)
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
    """Whether a weight of `module` that `mask`, which must fit it, prunes is not zero.

    Where the weights lie in several processes, all of them must ask.
    """
    hold_shards_alone(module)
    found = dict(module.named_parameters(remove_duplicate=False))
    ours = {name: found[name].detach() for name in mask}
    here = any(bool(part[gone].any()) for name, kept in _as_they_lie(mask) for part, gone in _parts(ours[name], kept))
    return anywhere(here, ours)


@torch.no_grad()
def fill_pruned(tensors: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> None:
    """Write zero, in place, wherever `mask` is False. Filling, as opposed to multiplying, also clears NaN and -0.0."""
    for name, kept in _as_they_lie(mask):
        _fill(tensors[name].detach(), kept)


def _fill(tensor: Tensor, kept: Tensor | Bits) -> None:
    for part, gone in _parts(tensor, kept):
        part.masked_fill_(gone, 0)


def _parts(tensor: Tensor, kept: Tensor | Bits) -> Iterator[tuple[Tensor, Tensor]]:
    """What this process holds of a tensor, a large one some rows at a time; and where each part is pruned."""
    ours = local(tensor)
    if _is_small(kept):
        yield ours, ~part_of(kept, tensor).to(ours.device)
        return
    if not ours.numel():
        return
    start, row = start_of(tensor), ours[0].numel()
    rows = max(1, limits().masked_entries // row)
    for first in range(0, len(ours), rows):
        part = ours[first : first + rows]
        flat = (start + first * row, start + first * row + part.numel())
        stays = kept.part(*flat) if isinstance(kept, Bits) else flat_part(kept, *flat)
        yield part, ~stays.view(part.shape).to(part.device)


def _as_they_lie(mask: Mapping[str, Tensor | Bits]) -> Iterator[tuple[str, Tensor | Bits]]:
    """Names and tensors, packed where they are."""
    return iter((mask.stored if isinstance(mask, Mask) else mask).items())


def _stored(kept: Tensor | Bits) -> Tensor | Bits:
    """Packed if it is large."""
    if isinstance(kept, Bits):
        return kept if not _is_small(kept) else kept.unpacked()
    return kept if _is_small(kept) else Bits.of(kept.to(_device_of_bits(kept)))


def _uniform(value: bool, weight: Tensor) -> Tensor | Bits:
    if _is_small(weight):
        return torch.full_like(weight, value, dtype=torch.bool) if not is_sharded(weight) else _plain(value, weight)
    return Bits.filled(value, weight.shape, _device_of_bits(weight))


def _plain(value: bool, weight: Tensor) -> Tensor:
    """Of the shape of the whole weight, in every process."""
    return torch.full(weight.shape, value, device=local(weight).device)


def _is_small(tensor: Tensor | Bits) -> bool:
    return tensor.numel() <= limits().unpacked_entries


def _unpacked(kept: Tensor | Bits) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.unpacked()


def _count(kept: Tensor | Bits) -> int:
    return kept.count() if isinstance(kept, Bits) else int(kept.count_nonzero())


def _equal(one: Tensor | Bits, other: Tensor | Bits) -> bool:
    if isinstance(one, Bits) and isinstance(other, Bits):
        return one.equals(other)
    return torch.equal(_unpacked(one), _unpacked(other))


def _within(one: Tensor | Bits, other: Tensor | Bits) -> bool:
    if isinstance(one, Bits) and isinstance(other, Bits):
        return not bool(one.but(other).packed.any())
    return bool((~_unpacked(one) | _unpacked(other)).all())


class History:
    """The masks of all accepted levels in one: for each weight the level that pruned it, 0 while it is kept.

    Since masks nest, this one small number per weight holds every level's mask. Each takes as many bits as the number
    of the deepest level has.

    Args:
        planes: Parameter name to the bits of the numbers: the lowest bit of each, then the next, and so on.
        full: Parameter name to bits of its shape, all of them True.
        level: The level whose mask is `mask`: the winner's.
        deepest: The last level there is; None: `level`.
    """

    most_levels = torch.iinfo(torch.int16).max

    def __init__(
        self, planes: Mapping[str, Sequence[Bits]], full: Mapping[str, Bits], level: int = 0, deepest: int | None = None
    ) -> None:
        self._planes, self._full, self.level = planes, full, level
        self.deepest = level if deepest is None else deepest

    @classmethod
    def of_dense(cls, weights: Mapping[str, Tensor]) -> History:
        """The history of a network of which nothing was pruned."""
        full = {name: Bits.filled(True, one.shape, _device_of_bits(one)) for name, one in weights.items()}
        return cls({name: [] for name in full}, full)

    def pruned(self, mask: Mask) -> History:
        """The history with one level more, of this mask."""
        level = self.deepest + 1
        planes = {}
        for name, known in self._planes.items():
            gone = self._full[name].but(_bits(mask.stored[name]).to(self._full[name].device))
            planes[name] = _numbered(known, gone.but(_any(known, gone)), level)
        return History(planes, self._full, level)

    def won_by(self, level: int) -> History:
        """The same levels with another winner."""
        return History(self._planes, self._full, level, self.deepest)

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
        return Mask(
            {
                name: self._full[name].but(_up_to(planes, level, self._full[name]))
                for name, planes in self._planes.items()
            }
        )

    def cpu(self) -> History:
        """The same history on the CPU."""
        planes = {name: [plane.to("cpu") for plane in known] for name, known in self._planes.items()}
        return History(planes, {n: one.to("cpu") for n, one in self._full.items()}, self.level, self.deepest)

    def state(self) -> dict[str, Any]:
        """Plain tensors and numbers, on the CPU, for a checkpoint; read back by `from_state`.

        `pruned_at` holds the numbers; but of each tensor that `packed` names, with its shape, one row for each bit of
        the numbers, packed as in `Bits`.
        """
        there = self.cpu()
        packed = {name: list(full.shape) for name, full in self._full.items() if not _is_small(full)}
        pruned_at = {
            name: there._rows(name)
            if name in packed
            else there._numbers(name).to(torch.uint8 if self.deepest < 256 else torch.int16)
            for name, planes in there._planes.items()
        }
        return {"pruned_at": pruned_at, "packed": packed, "level": self.level, "deepest": self.deepest}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        """The history that `state` was taken from."""
        level, packed = int(state["level"]), state.get("packed", {})
        shapes = {name: torch.Size(packed.get(name, at.shape)) for name, at in state["pruned_at"].items()}
        planes = {
            name: [Bits(row, shapes[name]) for row in at] if name in packed else _planes(at)
            for name, at in state["pruned_at"].items()
        }
        full = {name: Bits.filled(True, shape, state["pruned_at"][name].device) for name, shape in shapes.items()}
        return cls(planes, full, level, int(state.get("deepest", level)))

    def _rows(self, name: str) -> Tensor:
        """The bits of a parameter's numbers, uint8, shape `(bits, bytes)`."""
        rows = torch.empty(len(self._planes[name]), len(self._full[name].packed), dtype=torch.uint8)
        for row, plane in zip(rows, self._planes[name], strict=True):
            row.copy_(plane.packed)
        return rows

    def _numbers(self, name: str) -> Tensor:
        """For each weight of a parameter the level that pruned it."""
        numbers = torch.zeros(self._full[name].shape, dtype=torch.int16)
        for place, plane in enumerate(self._planes[name]):
            numbers += plane.unpacked().to(torch.int16) << place
        return numbers


def _numbered(planes: Sequence[Bits], where: Bits, number: int) -> list[Bits]:
    """The bits of numbers that are zero in some places when another number stands there."""
    none = Bits.filled(False, where.shape, where.device)
    known = [*planes, *[none] * (number.bit_length() - len(planes))]
    return [plane | where if number >> place & 1 else plane for place, plane in enumerate(known)]


def _planes(numbers: Tensor) -> list[Bits]:
    """The bits of numbers."""
    highest = int(numbers.max()) if numbers.numel() else 0
    return [Bits.of((numbers & (1 << place)) != 0) for place in range(highest.bit_length())]


def _any(planes: Sequence[Bits], like: Bits) -> Bits:
    """Where a number is not zero."""
    found = Bits.filled(False, like.shape, like.device)
    for plane in planes:
        found = found | plane
    return found


def _up_to(planes: Sequence[Bits], most: int, full: Bits) -> Bits:
    """Where a number is at least 1 and at most `most`."""
    none = Bits.filled(False, full.shape, full.device)
    above, same = none, full
    for place in reversed(range(max(most.bit_length(), len(planes)))):
        plane = planes[place] if place < len(planes) else none
        if most >> place & 1:
            same = same & plane
        else:
            above, same = above | (same & plane), same.but(plane)
    return _any(planes, full).but(above)


def _bits(kept: Tensor | Bits) -> Bits:
    return kept if isinstance(kept, Bits) else Bits.of(kept)


def _device_of_bits(tensor: Tensor) -> torch.device:
    """Where packed bits of a tensor lie: not on Apple's MPS, whose integers are not all that the CPU's are."""
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


def _some(names: Mapping[str, Any], most: int = 8) -> str:
    listed = ", ".join(repr(name) for name in list(names)[:most])
    return f"it has {listed}{', ...' if len(names) > most else ''}" if names else "it has none"
