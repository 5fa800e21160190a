"""Lending a network's weights: written to inside a block, bit for bit what they were after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_roulette.large.bits import Bits
from lightning_roulette.large.shards import is_sharded, local
from lightning_roulette.mask.mask import _as_they_lie, _count, _fill, _is_small, _parts


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a network by all their names."""
    return {**dict(module.named_buffers()), **dict(module.named_parameters(remove_duplicate=False))}


@contextmanager
def lent(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Inside the block the tensors may be written to; after it they are bit for bit what they were. Gives copies."""
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        yield before
    finally:
        surely(lambda: copy_into(tensors, before))


def copy_into(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into tensors, in place."""
    for name, value in values.items():
        write(tensors[name], value)


@torch.no_grad()
def write(tensor: Tensor, value: Tensor) -> None:
    """Write a value into a tensor, in place; of an expanded one into the entries that stand for all."""
    if tensor.layout == torch.strided and 0 in tensor.stride():
        for dim, step in enumerate(tensor.stride()):
            if step == 0 and tensor.shape[dim] > 1:
                tensor, value = tensor.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    tensor.copy_(value)


def surely(action: Callable[[], None]) -> None:
    """Do `action`, which may be repeated, to its end even when Ctrl-C arrives in the middle of it."""
    try:
        action()
    except KeyboardInterrupt:
        action()
        raise


@contextmanager
def applied(mask: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the pruned weights are zero; after it, every weight is bit for bit what it was.

    Values are written in place. Of a small tensor all are set aside meanwhile, which is quicker, else those removed.
    """
    kept = {name: ours for name, ours in _as_they_lie(mask) if _is_small(ours) or _count(ours) < ours.numel()}
    dense = {name: weights[name].detach() for name in kept}
    aside = {name: _set_aside(dense[name], kept[name]) for name in kept}

    def give_back() -> None:
        for name, values in aside.items():
            _put_back(dense[name], kept[name], values)

    try:
        for name, ours in kept.items():
            _fill(dense[name], ours)
        yield
    finally:
        surely(give_back)


def _set_aside(weight: Tensor, kept: Tensor | Bits) -> Tensor:
    """What pruning overwrites: of a large tensor the removed values in order of index."""
    if _is_small(kept):
        return local(weight).clone()
    if is_sharded(weight):
        removed = sum(int(gone.count_nonzero()) for _, gone in _parts(weight, kept))
    else:
        removed = kept.numel() - _count(kept)
    aside = local(weight).new_empty(removed)
    place = 0
    for part, gone in _parts(weight, kept):
        values = part[gone]
        aside[place : place + len(values)] = values
        place += len(values)
    return aside


def _put_back(weight: Tensor, kept: Tensor | Bits, aside: Tensor) -> None:
    if _is_small(kept):
        local(weight).copy_(aside)
        return
    place = 0
    for part, gone in _parts(weight, kept):
        part.masked_scatter_(gone, aside[place:])
        place += int(gone.count_nonzero())
