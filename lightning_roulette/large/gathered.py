"""Sharded weights, gathered from all processes: a layer at a time, or only the values that a mask keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b

import torch
from torch import Tensor, nn

from lightning_roulette.large.bits import Flags
from lightning_roulette.large.processes import ONE_PROCESS, Processes
from lightning_roulette.large.shards import (
    Shards,
    is_owner,
    is_sharded,
    local,
    mesh_of,
    part_of,
    span,
    start_of,
    sum_over,
)


def holders_of(module: nn.Module, processes: Processes) -> Processes:
    """Return the processes that hold the shards of a network; the given ones if there are no shards.

    Raises:
        ValueError: If others are given.
    """
    sharded = {name: one for name, one in module.named_parameters() if is_sharded(one)}
    if (shards := Shards.of(dict(list(sharded.items())[:1]))) is None:
        return processes
    if processes is ONE_PROCESS:
        return Processes(shards.rank, shards.ranks, shards.add)
    if (processes.rank, processes.ranks) != (shards.rank, shards.ranks):
        raise ValueError(
            f"processes is number {processes.rank} of {processes.ranks}, but the weights of the network are sharded, "
            f"and this is number {shards.rank} of {shards.ranks} that hold them. Leave processes out."
        )
    return processes


def blank(tensor: Tensor) -> Tensor:
    """A tensor with the shape of a whole tensor, and any values; the tensor itself if it is not sharded."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=local(tensor).device) if is_sharded(tensor) else tensor


def gathered(tensor: Tensor, processes: Processes) -> Tensor:
    """A new tensor with the rows of all processes; the tensor itself if it is not sharded.

    Args:
        tensor: The tensor.
        processes: Those that hold its rows. All call this.
    """
    return processes.add(_others_zero(tensor))[0] if is_sharded(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """As `gathered`, by the processes that hold the rows, without a look at whether another failed."""
    return sum_over(mesh_of(tensor), local(tensor).device, _others_zero(tensor)) if is_sharded(tensor) else tensor


def gathered_all(tensors: Mapping[str, Tensor], names: Iterable[str], processes: Processes) -> dict[str, Tensor]:
    """Some of these tensors, each as `gathered` gives it."""
    return {name: gathered(tensors[name], processes) for name in names}


@contextmanager
def whole(tensors: Mapping[str, Tensor], names: Iterable[str], processes: Processes) -> Iterator[dict[str, Tensor]]:
    """Inside the block, whole tensors of these names. What is written to them is in the tensors after the block."""
    found = gathered_all(tensors, names, processes)
    yield found
    for name, one in found.items():
        if one is not tensors[name]:
            write_rows(tensors[name], one)


def write_rows(tensor: Tensor, values: Tensor) -> None:
    """Write the values of a whole tensor into the part of a tensor that this process holds, in place."""
    local(tensor.detach()).copy_(_rows_of(values, tensor))


def kept_values(tensor: Tensor, kept: Flags) -> Tensor:
    """The values of a whole tensor that a mask keeps, in order of index. They are on the device of the tensor.

    If the tensor is sharded, all processes call this, and each gets the values of all. No whole tensor is needed.
    """
    own = local(tensor.detach())[part_of(kept, tensor).to(local(tensor).device)]
    if not is_sharded(tensor):
        return own
    found = own.new_zeros(kept.count())
    if is_owner(tensor):
        begin = _kept_before(tensor, kept)
        found[begin : begin + len(own)] = own
    return sum_over(mesh_of(tensor), found.device, found)


def put_kept_values(tensor: Tensor, kept: Flags, values: Tensor) -> None:
    """Write the values that a mask keeps into the part of a tensor that this process holds, in place.

    Args:
        tensor: The tensor.
        kept: The mask of the whole tensor.
        values: What `kept_values` returned.
    """
    own, begin = part_of(kept, tensor).to(local(tensor).device), _kept_before(tensor, kept)
    local(tensor)[own] = values[begin : begin + int(own.count_nonzero())].to(local(tensor).device)


def together(digest: str, tensors: Mapping[str, Tensor]) -> str:
    """A digest of the digests of all processes; the digest itself if no tensor is sharded.

    Args:
        digest: Hexadecimal digits, as many in all processes.
        tensors: Those that this process digested, each with its own rows.
    """
    if (shards := Shards.of(tensors)) is None:
        return digest
    every = shards.each(torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8))
    return blake2b(bytes(every.flatten().tolist()), digest_size=len(digest) // 2).hexdigest()


def _kept_before(tensor: Tensor, kept: Flags) -> int:
    """How many of the kept values come before those that this process holds."""
    start = start_of(tensor)
    return kept.span(0, start).count() if start else 0


def _others_zero(tensor: Tensor) -> Tensor:
    """A whole tensor with the rows that this process owns, and zero in the others."""
    found = torch.zeros_like(blank(tensor))
    if is_owner(tensor):
        _rows_of(found, tensor).copy_(local(tensor.detach()))
    return found


def _rows_of(whole: Tensor, tensor: Tensor) -> Tensor:
    """The view of the rows that this process holds of a tensor."""
    start, stop = span(tensor)
    return whole.reshape(-1)[start:stop].view(local(tensor).shape)
