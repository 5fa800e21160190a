"""Several processes: threads that each have a shard and sum with the others, and two real ones under Lightning."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_roulette.large.shards import Shards
from tests.support.runs import run_script


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


class _Meeting:
    """Where all threads wait for one another, until one leaves for good.

    Unlike `threading.Barrier`, whose `abort` also reaches threads that were released and have not yet woken.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks, self._waiting, self._round, self._left = ranks, 0, 0, False
        self._changed = threading.Condition()

    def wait(self) -> None:
        """Until all are here; raises `ConnectionError` if one is gone."""
        with self._changed:
            this, self._waiting = self._round, self._waiting + 1
            if self._waiting == self._ranks:
                self._waiting, self._round = 0, this + 1
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._left or self._round > this, timeout=60)
            if self._round == this:
                raise ConnectionError("another process is gone")

    def leave(self) -> None:
        """For good."""
        with self._changed:
            self._left = True
            self._changed.notify_all()


def together(ranks: int, work: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """What `work` returns, or raises, in each of so many processes; it is given its number and what sums."""
    meeting, given, found = _Meeting(ranks), [torch.empty(0)] * ranks, [None] * ranks

    def adder(rank: int) -> Callable[[Tensor], Tensor]:
        def add(values: Tensor) -> Tensor:
            given[rank] = values
            meeting.wait()
            assert len({(one.shape, one.dtype) for one in given}) == 1
            total = torch.stack(given).sum(0, dtype=values.dtype)
            meeting.wait()
            return total

        return add

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank, adder(rank))
        except Exception as error:
            found[rank] = error
            meeting.leave()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    with _switches():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found


@contextmanager
def _switches() -> Iterator[None]:
    """Set what threads that overlap would turn on for one another, or leave turned off."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        torch.compiler.set_stance("default")


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


def two_processes(script: str, folder: Path, weights: dict[str, Tensor]) -> list[dict[str, Any]]:
    """What each of two processes has put into `folder`, as `rank0.pt` and `rank1.pt`.

    Args:
        script: A file of tests, which is run with `folder` and starts the second process itself.
        folder: Where the weights are, as `trained.pt`.
        weights: Of a trained network.
    """
    torch.save(weights, folder / "trained.pt")
    run_script(script, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
