"""Weights that are sharded over several processes.

With FSDP2 (`fully_shard`) a parameter is a DTensor, and each process holds some of its rows. Every process stores the
masks of the whole network. It computes importance and keys for its own weights only. A refit gathers one layer at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_roulette.large.bits import Bits, Flags, as_stored
from lightning_roulette.large.limits import limits


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether one of these tensors is a DTensor."""
    return any(is_sharded(tensor) for tensor in tensors)


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, as a view; any other tensor itself."""
    return cast(Tensor, cast(Any, tensor).to_local()) if is_sharded(tensor) else tensor


def mesh_of(tensor: Tensor) -> Any:
    """The mesh of processes that hold a DTensor."""
    return cast(Any, tensor).device_mesh


def start_of(tensor: Tensor) -> int:
    """The index in the flattened tensor at which the part of this process begins.

    Raises:
        ValueError: If this process holds neither the whole tensor nor consecutive rows of it.
    """
    return _rows_before(cast(Any, tensor)) if is_sharded(tensor) else 0


def _rows_before(tensor: Any) -> int:
    placements, mesh = tensor.placements, tensor.device_mesh
    if all(one.is_replicate() for one in placements):
        return 0
    # the strided shards of tensor parallelism derive from Shard
    if mesh.ndim == 1 and type(placements[0]).__name__ == "Shard" and placements[0].is_shard(0):
        rows = -(-tensor.shape[0] // mesh.size())
        first = min(rows * mesh.get_local_rank(), tensor.shape[0])
        if len(tensor.to_local()) == min(first + rows, tensor.shape[0]) - first:
            return int(first * (tensor.numel() // tensor.shape[0]))
    raise ValueError(
        f"a weight of shape {tuple(tensor.shape)} is placed {tuple(placements)} on a mesh of {mesh.ndim} dimensions, "
        "but each process must hold consecutive rows of it. Shard the module with fully_shard(module, mesh=...) over a "
        "mesh of one dimension and without tensor parallelism, or prune on one device."
    )


def part_of(kept: Flags, tensor: Tensor) -> Tensor:
    """The part of a mask for the part of a tensor that this process holds. It is bool and has the shape of that part.

    Args:
        kept: The mask of the whole tensor.
        tensor: The tensor.
    """
    ours = local(tensor)
    return kept.unpacked() if ours is tensor else kept.part(*span(tensor)).view(ours.shape)


def nonzeros(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor | Bits]:
    """The mask of the entries that are not zero. Every process gets the masks of the whole tensors."""
    if (shards := Shards.of(tensors)) is None:
        return {name: tensor.detach() != 0 for name, tensor in tensors.items()}
    own = {name: tensor != 0 for name, tensor in shards.own(tensors).items()}
    return shards.whole(own, {name: tensor.shape for name, tensor in tensors.items()})


def filled(value: bool, tensor: Tensor) -> Tensor:
    """A bool tensor with the shape of a whole tensor, in which every entry is `value`."""
    if is_sharded(tensor):
        return torch.full(tensor.shape, value, device=local(tensor).device)
    return torch.full_like(tensor, value, dtype=torch.bool)


def span(tensor: Tensor) -> tuple[int, int]:
    """The first index in the flattened tensor of the part that this process holds, and the index after its last."""
    start = start_of(tensor)
    return start, start + local(tensor).numel()


@dataclass(frozen=True, eq=False)
class Shards:
    """The weights that this process owns, and how it agrees with the other processes.

    Exactly one process owns each weight. If all processes hold a weight, the first process owns it.

    Attributes:
        spans: Parameter name to the start and end of the owned weights in the flattened parameter.
        rank: Number of this process.
        ranks: Number of processes.
        add: Returns the sum of a tensor over all processes. All processes must call it with the same shape and type.
    """

    spans: Mapping[str, tuple[int, int]]
    rank: int
    ranks: int
    add: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Shards | None:
        """The shards of a network; None if no weight is sharded.

        Raises:
            ValueError: If weights are not sharded by rows, or if they are sharded over meshes of different processes.
        """
        sharded = {name: cast(Any, weight) for name, weight in weights.items() if is_sharded(weight)}
        if not sharded:
            return None
        meshes = {tuple(one.device_mesh.mesh.flatten().tolist()): one.device_mesh for one in sharded.values()}
        spans = {name: span(weight) for name, weight in weights.items()}
        mesh = next(iter(meshes.values()))
        if len(meshes) > 1 or mesh.ndim != 1:
            raise ValueError(
                f"the weights are on {len(meshes)} meshes of {mesh.ndim} dimensions, but must be on one mesh of one "
                "dimension. Give every fully_shard the same mesh, or prune on one device."
            )
        rank, device = mesh.get_local_rank(), local(next(iter(sharded.values()))).device
        others = {name: (0, 0) for name in weights if rank and not _holds_rows(weights[name])}

        return cls({**spans, **others}, rank, mesh.size(), partial(sum_over, mesh, device))

    def own(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that this process owns, flat; views where they are contiguous."""
        sizes = {name: stop - start for name, (start, stop) in self.spans.items()}
        return {
            name: local(weight.detach()).reshape(-1)[: sizes[name]] if sizes[name] else _none(local(weight))
            for name, weight in weights.items()
        }

    def own_mask(self, mask: Mapping[str, Tensor | Bits]) -> dict[str, Tensor | Bits]:
        """The part of a whole network's mask for the owned weights, flat; packed where the mask is packed."""
        return {name: as_stored(kept).span(*self.spans[name]).stored for name, kept in mask.items()}

    def whole(self, own: Mapping[str, Tensor | Bits], shapes: Mapping[str, torch.Size]) -> dict[str, Bits]:
        """The mask of the whole network, made from the parts of all processes.

        Args:
            own: The part of this process, flat.
            shapes: Shapes of the whole parameters.
        """
        parts = {name: as_stored(kept) for name, kept in own.items()}
        found = {name: Bits.filled(False, shape, parts[name].device) for name, shape in shapes.items()}
        found = {name: Bits(bits.packed.clone(), bits.shape) for name, bits in found.items()}
        for name, kept in parts.items():
            for begin in range(0, kept.numel(), limits().packed_entries):
                end = min(begin + limits().packed_entries, kept.numel())
                found[name].put(self.spans[name][0] + begin, kept.part(begin, end))
        # a bit is set in at most one process, so the sum has no carry
        total = self.add(torch.cat([bits.packed for bits in found.values()]))
        packed = total.split([len(bits.packed) for bits in found.values()])
        return {
            name: Bits(part.to(bits.device), bits.shape)
            for (name, bits), part in zip(found.items(), packed, strict=True)
        }

    def each(self, values: Tensor) -> Tensor:
        """The values of every process, by process number: shape `(ranks, *values.shape)`."""
        table = values.new_zeros(self.ranks, *values.shape)
        table[self.rank] = values
        return self.add(table)

    def least(self, value: float) -> float:
        """The smallest of the processes' numbers."""
        return float(self.each(torch.tensor(value, dtype=torch.float64)).min())

    def anywhere(self, here: bool) -> bool:
        """Whether `here` is True in at least one process."""
        return bool(self.add(torch.tensor(int(here))) > 0)


def anywhere(here: bool, tensors: Mapping[str, Tensor]) -> bool:
    """Whether `here` is True in at least one of the processes that hold the tensors."""
    shards = Shards.of(tensors)
    return here if shards is None else shards.anywhere(here)


def reshard(module: nn.Module) -> None:
    """Make every module that FSDP2 shards use its shards again.

    After a forward without a backward, the outermost module keeps its gathered weights as parameters. Its next forward
    would use these, and ignore values that were written to the shards.
    """
    for part in module.modules():
        if hasattr(part, "set_reshard_after_forward") and hasattr(part, "unshard"):
            cast(Any, part).reshard()


def is_owner(tensor: Tensor) -> bool:
    """Whether this process owns the rows that it holds. The first one owns those that all hold."""
    return _holds_rows(tensor) or mesh_of(tensor).get_local_rank() == 0


def _holds_rows(tensor: Tensor) -> bool:
    return is_sharded(tensor) and not all(one.is_replicate() for one in cast(Any, tensor).placements)


def _none(tensor: Tensor) -> Tensor:
    return tensor.detach().new_empty(0)


def sum_over(mesh: Any, device: torch.device, values: Tensor) -> Tensor:
    """The sum of a tensor over all processes of a mesh, computed on a device. All of them call this."""
    total = values.to(device, copy=True)
    torch.distributed.all_reduce(total, group=mesh.get_group())
    return total.to(values.device)
