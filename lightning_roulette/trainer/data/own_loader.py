"""A loader over the training data that shares only the data set with the fit. The fit reads its data as before."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from lightning_roulette.large.limits import limits
from lightning_roulette.trainer.validation.loop import combined_like, training_loader
from lightning_roulette.wheel.chance import random_bits, stream

_DRAINED = (
    "RouletteWheelPruning: the training data is {}, from which a refit would take batches away. Pass a DataLoader over "
    "a data set that can be read again, or refit=None."
)


def own_loader(trainer: Trainer, seed: int) -> Iterable[Any]:
    """Return a loader over the training data, in a seeded order that is the same in all processes.

    It has no workers, and samplers and random generators of its own.

    Args:
        trainer: A Trainer in `fit`.
        seed: Seed of the order.

    Raises:
        RuntimeError: If the training data is an iterator, which can be read only once.
    """
    combined = training_loader(trainer)
    loaders, structure = tree_flatten(combined.iterables, is_leaf=lambda one: not isinstance(one, dict | list | tuple))
    ours = [_own(loader, seed) for loader in loaders]
    if combined.iterables is combined.flattened[0] and len(ours) == 1:
        return ours[0]
    return (batch for batch, _, _ in combined_like(combined, tree_unflatten(ours, structure)))


def _own(loader: Any, seed: int) -> Iterable[Any]:
    if not isinstance(loader, DataLoader):
        if iter(loader) is loader:
            raise RuntimeError(_DRAINED.format("an iterator"))
        return cast(Iterable[Any], loader)
    data = loader.dataset
    streams = isinstance(data, IterableDataset) or not isinstance(data, Sized)
    if streams and (again := cast(Any, data)) is iter(again):
        raise RuntimeError(_DRAINED.format("a data set that is its own iterator"))
    if any(getattr(type(loader), name) is not getattr(DataLoader, name) for name in ("__iter__", "_get_iterator")):
        return _without_workers(loader)  # a subclass that makes its batches in its own way
    if streams:
        return DataLoader(data, batch_size=loader.batch_size, collate_fn=loader.collate_fn)
    if loader.batch_sampler is not None:
        return DataLoader(data, batch_sampler=_batches(loader.batch_sampler, data, seed), collate_fn=loader.collate_fn)
    whole = isinstance(loader.sampler, BatchSampler)  # the data set is asked for whole batches
    sampler = _batches(loader.sampler, data, seed) if whole else _Reordered(loader.sampler, data, seed)
    return DataLoader(data, batch_size=None, sampler=sampler, collate_fn=loader.collate_fn)


def _batches(sampler: Any, data: Any, seed: int) -> Any:
    """Return plain batches in our own order; for another batch sampler a copy, to keep its choice of batches."""
    if type(sampler) is BatchSampler:
        return BatchSampler(_Reordered(sampler.sampler, data, seed), sampler.batch_size, sampler.drop_last)
    return _copied(sampler, data)


class _Reordered(Sampler[int]):
    """The indices that a sampler gives, in a seeded order that is the same in all processes.

    Args:
        sampler: The sampler. A copy of it is asked.
        data: The data set that it samples. It is not copied.
        seed: Seed of the order.
    """

    def __init__(self, sampler: Iterable[int], data: Any, seed: int) -> None:
        within = getattr(getattr(sampler, "dataset", None), "_sampler", None)
        if isinstance(sampler, DistributedSampler) and within is not None:  # lightning wraps the user's sampler
            sampler = within
        self._sampler, self._data, self._seed = sampler, data, seed

    def __iter__(self) -> Iterator[int]:
        given = self._given()
        order = random_bits(stream(self._seed, 0, 0, "calibration"), torch.arange(len(given))).argsort().tolist()
        return (given[place] for place in order)

    def _given(self) -> Sequence[int]:
        if type(self._sampler) in (RandomSampler, SequentialSampler, DistributedSampler):
            source = cast(Any, self._sampler)
            return range(len(source.dataset if hasattr(source, "dataset") else source.data_source))
        # a sampler without a length may never end
        most = len(self._sampler) if isinstance(self._sampler, Sized) else limits().sampled_indices
        given = list(islice(_copied(self._sampler, self._data), most))
        # sorted, so that the order does not depend on the epoch of the sampler
        return sorted(given) if all(isinstance(one, int) for one in given) else given


def _copied(sampler: Any, data: Any) -> Any:
    """Return a copy of a sampler, over the same data, with random generators of its own in the same state."""
    known: dict[int, Any] = {id(data): data}
    for holder in (sampler, getattr(sampler, "sampler", None)):
        for one in getattr(holder, "__dict__", {}).values():
            if isinstance(one, torch.Generator):
                known[id(one)] = torch.Generator(one.device)
                known[id(one)].set_state(one.get_state())
    return copy.deepcopy(sampler, known)


def _without_workers(loader: DataLoader[Any]) -> Iterable[Any]:
    """Return the same loader without workers, and with samplers and random generators of its own."""
    twin = copy.copy(loader)
    samplers = {name: _copied(getattr(loader, name), loader.dataset) for name in ("sampler", "batch_sampler")}
    alone = {"num_workers": 0, "timeout": 0, "persistent_workers": False, "_iterator": None, "generator": None}
    vars(twin).update(samplers | alone)  # a DataLoader refuses assignments to these
    return twin
