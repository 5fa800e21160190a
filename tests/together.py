"""Processes that are threads: each has its shard, and sums with the others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_roulette.core.shards import Shards


def rows_of(
    weights: dict[str, Tensor], rank: int, ranks: int, whole: tuple[str, ...] = ()
) -> dict[str, tuple[int, int]]:
    """The flat entries that a process answers for, as FSDP2 deals rows; what all hold is the first one's."""
    spans = {}
    for name, weight in weights.items():
        if name in whole:
            spans[name] = (0, weight.numel()) if rank == 0 else (0, 0)
            continue
        most, row = -(-weight.shape[0] // ranks), weight.numel() // weight.shape[0]
        spans[name] = tuple(min(place * most, weight.shape[0]) * row for place in (rank, rank + 1))
    return spans


def together(ranks: int, work: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """What `work` returns, or raises, in each of so many processes; it is given its number and what sums."""
    barrier, given, found = threading.Barrier(ranks, timeout=60), [torch.empty(0)] * ranks, [None] * ranks

    def adder(rank: int) -> Callable[[Tensor], Tensor]:
        def add(values: Tensor) -> Tensor:
            given[rank] = values
            barrier.wait()
            assert len({(one.shape, one.dtype) for one in given}) == 1
            total = torch.stack(given).sum(0, dtype=values.dtype)
            barrier.wait()
            return total

        return add

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank, adder(rank))
        except Exception as error:
            found[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def on_shards(
    weights: dict[str, Tensor],
    ranks: int,
    work: Callable[[Shards, dict[str, Tensor]], Any],
    whole: tuple[str, ...] = (),
) -> list[Any]:
    """What `work` returns or raises in each process, given its shards and its flat part of the weights."""

    def one(rank: int, add: Callable[[Tensor], Tensor]) -> Any:
        shards = Shards(rows_of(weights, rank, ranks, whole), rank, ranks, add)
        own = {name: weight.reshape(-1)[slice(*shards.spans[name])] for name, weight in weights.items()}
        return work(shards, own)

    return together(ranks, one)
