"""Weights that lie in several processes: which of them this one answers for, and what all of them agree on.

With FSDP2 (`fully_shard`) a parameter is a DTensor: each process holds some of its rows. A mask is that of the whole
network in every process, at a bit a weight; of importance and keys each process makes those of its own weights, and no
tensor of weights is ever gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_roulette.large.bits import Bits, flat_part
from lightning_roulette.large.limits import limits


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this process may hold but a part."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, which is what is written to: the tensor itself, if it is a plain one."""
    return cast(Tensor, cast(Any, tensor).to_local()) if is_sharded(tensor) else tensor


def start_of(tensor: Tensor) -> int:
    """Where in the flattened tensor that begins.

    Raises:
        ValueError: If this process does not hold all of it, nor rows of it one after the other.
    """
    return _rows_before(cast(Any, tensor)) if is_sharded(tensor) else 0


def _rows_before(tensor: Any) -> int:
    placements, mesh = tensor.placements, tensor.device_mesh
    if all(one.is_replicate() for one in placements):
        return 0
    # a strided shard, of tensor parallelism, is a Shard too
    if mesh.ndim == 1 and type(placements[0]).__name__ == "Shard" and placements[0].is_shard(0):
        rows = -(-tensor.shape[0] // mesh.size())
        first = min(rows * mesh.get_local_rank(), tensor.shape[0])
        if len(tensor.to_local()) == min(first + rows, tensor.shape[0]) - first:
            return int(first * (tensor.numel() // tensor.shape[0]))
    raise ValueError(
        f"a weight of shape {tuple(tensor.shape)} is placed {tuple(placements)} on a mesh of {mesh.ndim} dimensions, "
        "but each process must hold rows of it, one after the other, as fully_shard(module, mesh=...) deals them over "
        "a mesh of one dimension. Shard the module so, without tensor parallelism, or prune on one device."
    )


def part_of(kept: Tensor | Bits, tensor: Tensor) -> Tensor:
    """Of a mask of the whole tensor what concerns the part that this process holds: bool, of its shape."""
    ours = local(tensor)
    if ours is tensor:
        return kept if isinstance(kept, Tensor) else kept.unpacked()
    return span_of(kept, *_span(tensor)).view(ours.shape)


def span_of(kept: Tensor | Bits, start: int, stop: int) -> Tensor:
    """Entries of a flattened mask, bool."""
    if start == stop:
        return torch.empty(0, dtype=torch.bool, device=kept.device)
    return kept.part(start, stop) if isinstance(kept, Bits) else flat_part(kept, start, stop)


def _span(tensor: Tensor) -> tuple[int, int]:
    start = start_of(tensor)
    return start, start + local(tensor).numel()


@dataclass(frozen=True, eq=False)
class Shards:
    """Which weights this process answers for, and how it agrees with the others.

    Every weight has one process that answers for it: of what all hold, the first.

    Attributes:
        spans: Parameter name to where in the flattened parameter this process's weights begin and end.
        rank: The number of this process.
        ranks: How many processes there are.
        add: The sum of a tensor over all processes, the same in each; all must call it alike.
    """

    spans: Mapping[str, tuple[int, int]]
    rank: int
    ranks: int
    add: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Shards | None:
        """Those of a network; None if all its weights are plain tensors.

        Raises:
            ValueError: If weights are not dealt by rows, or over meshes of different processes.
        """
        sharded = {name: cast(Any, weight) for name, weight in weights.items() if is_sharded(weight)}
        if not sharded:
            return None
        meshes = {tuple(one.device_mesh.mesh.flatten().tolist()): one.device_mesh for one in sharded.values()}
        spans = {name: _span(weight) for name, weight in weights.items()}
        mesh = next(iter(meshes.values()))
        if len(meshes) > 1 or mesh.ndim != 1:
            raise ValueError(
                f"the weights lie on {len(meshes)} meshes, of {mesh.ndim} dimensions, but must lie on one, of one "
                "dimension. Give every fully_shard the same mesh, or prune on one device."
            )
        rank, device = mesh.get_local_rank(), local(next(iter(sharded.values()))).device
        others = {name: (0, 0) for name in weights if rank and not _holds_rows(weights[name])}

        def add(values: Tensor) -> Tensor:
            total = values.to(device, copy=True)
            torch.distributed.all_reduce(total, group=mesh.get_group())
            return total.to(values.device)

        return cls({**spans, **others}, rank, mesh.size(), add)

    def own(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that this process answers for, flat, not copied where they are contiguous."""
        sizes = {name: stop - start for name, (start, stop) in self.spans.items()}
        return {
            name: local(weight.detach()).reshape(-1)[: sizes[name]] if sizes[name] else _none(local(weight))
            for name, weight in weights.items()
        }

    def own_mask(self, mask: Mapping[str, Tensor | Bits]) -> dict[str, Tensor | Bits]:
        """What a mask of the whole network says of them, flat; packed where it is packed."""
        return {
            name: _packed_span(kept, *self.spans[name]) if isinstance(kept, Bits) else span_of(kept, *self.spans[name])
            for name, kept in mask.items()
        }

    def whole(self, own: Mapping[str, Tensor | Bits], shapes: Mapping[str, torch.Size]) -> dict[str, Bits]:
        """The mask of the whole network that the processes' parts, each flat, make up."""
        found = {name: Bits.filled(False, shape, own[name].device) for name, shape in shapes.items()}
        found = {name: Bits(bits.packed.clone(), bits.shape) for name, bits in found.items()}
        for name, kept in own.items():
            for begin in range(0, kept.numel(), limits().packed_entries):
                end = min(begin + limits().packed_entries, kept.numel())
                found[name].put(self.spans[name][0] + begin, span_of(kept, begin, end))
        # no bit is that of two processes, so that none is carried
        total = self.add(torch.cat([bits.packed for bits in found.values()]))
        parts = total.split([len(bits.packed) for bits in found.values()])
        return {
            name: Bits(part.to(bits.device), bits.shape)
            for (name, bits), part in zip(found.items(), parts, strict=True)
        }

    def each(self, values: Tensor) -> Tensor:
        """What each process has, by its number: shape `(ranks, *values.shape)`."""
        table = values.new_zeros(self.ranks, *values.shape)
        table[self.rank] = values
        return self.add(table)

    def least(self, value: float) -> float:
        """The least of the processes' numbers."""
        return float(self.each(torch.tensor(value, dtype=torch.float64)).min())

    def anywhere(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.add(torch.tensor(int(here))) > 0)


def anywhere(here: bool, tensors: Mapping[str, Tensor]) -> bool:
    """Whether it is so in any of the processes that the tensors lie in."""
    shards = Shards.of(tensors)
    return here if shards is None else shards.anywhere(here)


def hold_shards_alone(module: nn.Module) -> None:
    """Let a network that FSDP2 shards hold its shards alone again.

    After a forward without a backward its outermost module keeps the whole weights, which its parameters then are; the
    next forward would see these, whatever was written to the shards.
    """
    for part in module.modules():
        if hasattr(part, "set_reshard_after_forward") and hasattr(part, "unshard"):
            cast(Any, part).reshard()


def _holds_rows(tensor: Tensor) -> bool:
    return is_sharded(tensor) and not all(one.is_replicate() for one in cast(Any, tensor).placements)


def _none(tensor: Tensor) -> Tensor:
    return tensor.detach().new_empty(0)


def _packed_span(kept: Bits, start: int, stop: int) -> Bits:
    found = Bits.empty(torch.Size([stop - start]), kept.device)
    for begin, end in found.blocks():
        found.write(begin, kept.part(start + begin, start + end))
    return found
