"""Calibration inputs from the training data, read by a loader of our own; the module is seen at work on them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
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
from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.hooks import run_with_hooks
from lightning_roulette.network.layers import batch_norms_of
from lightning_roulette.network.parameters import parts_of_metrics
from lightning_roulette.network.samples import bytes_of, joined, pieces_of, rows_of, tensors_of
from lightning_roulette.refit.inputs import Calibration
from lightning_roulette.refit.refitted import Refitted
from lightning_roulette.settings import Refit
from lightning_roulette.trainer.data import rebuilt
from lightning_roulette.trainer.evaluator import rounding
from lightning_roulette.trainer.isolation import IsolatedValidation
from lightning_roulette.wheel.chance import random_bits, stream

_DRAINED = (
    "RouletteWheelPruning: the training data is {}, of which a refit would take batches away. Pass a DataLoader over a "
    "data set that can be read again, or refit=None."
)


class TrainerCalibration(Calibration):
    """A module seen at work on batches of its training data, within an entered `IsolatedValidation`.

    Batches are joined where the network gives the same on them; what takes the memory of a training step looks at no
    more samples at a time than training does. With several processes each looks at the same batches, and what the first
    finds counts.

    Args:
        trainer: The Trainer.
        module: Its module.
        validation: Lets the module take its steps.
        batches: Which `calibration_batches` gave.
        seed: See `Calibration`.
        by_layer: Whether it will be asked what layers are given; only then is it worth joining batches.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        validation: IsolatedValidation,
        batches: Sequence[Any],
        seed: int,
        by_layer: bool = True,
    ) -> None:
        self._trainer = trainer
        whole = _fewer(trainer, validation, module, batches) if by_layer else batches
        pieces = _few_at_a_time(trainer, validation, batches)
        statistics: list[Tensor] = []
        for part in batch_norms_of(module).values():
            statistics += [cast(Tensor, part.running_mean), cast(Tensor, part.running_var)]
        super().__init__(
            module,
            len(whole),
            run=lambda number: _see(validation, whole[number], statistics),
            pieces=[partial(_see, validation, piece, statistics) for piece in pieces],
            seed=seed,
        )

    def refit(self, mask: Mask, how: str | Refit = "least_squares") -> Refitted:
        """See `Calibration.refit`."""
        found = super().refit(mask, how)
        if self._trainer.world_size == 1:
            return found
        device = self._trainer.strategy.root_device
        values, undone = self._trainer.strategy.broadcast((dict(found.values), dict(found.undone)))
        return Refitted({name: value.to(device) for name, value in values.items()}, undone)

    def scales(
        self, kind: str, mask: Mask, values: Mapping[str, Tensor], damping: float = 1e-3
    ) -> Mapping[str, Tensor]:
        """See `Calibration.scales`."""
        found = super().scales(kind, mask, values, damping)
        return found if self._trainer.world_size == 1 else self._trainer.strategy.broadcast(found)


def _see(validation: IsolatedValidation, batch: Any, spared: Sequence[Tensor]) -> None:
    validation.see(rebuilt(batch, copies=True), spared)


def calibration_batches(trainer: Trainer, validation: IsolatedValidation, most: int, seed: int) -> list[Any]:
    """Some batches of the training data, in a seeded order, as the module's steps take them.

    The user's loaders, their workers and iterators are left alone.

    Args:
        trainer: In a fit.
        validation: Entered.
        most: How many are read at most; fewer where they take more than 2**28 bytes.
        seed: Of the order, and of what chance transforms draw.

    Raises:
        RuntimeError: If there is none.
    """
    found: list[Any] = []
    size = 0
    for batch in validation.read_training(own_loader(trainer, seed), most, seed):
        size += bytes_of(batch)
        if found and size > limits().calibration_bytes:
            break
        found.append(batch)
    if not found:
        raise RuntimeError("RouletteWheelPruning: the training data gives no batch to refit on. Pass refit=None.")
    return found


def refuse_blind_to_training(trainer: Trainer, validation: IsolatedValidation, seed: int, remedy: str) -> None:
    """Raise where the training data cannot be read, or the module cannot take a step on it, by which it is seen.

    Args:
        trainer: Whose training data.
        validation: Entered.
        seed: Of the order in which it is read.
        remedy: The argument that makes do without.

    Raises:
        RuntimeError: With what was raised.
    """
    loader = own_loader(trainer, seed)
    try:
        batch = next(iter(validation.read_training(loader, 1, seed)), None)
    except Exception as error:
        raise RuntimeError(
            "RouletteWheelPruning: the training data, which a refit or an importance of inputs needs, cannot be read "
            f"in this process, without workers ({type(error).__name__}: {error}). Make it readable, or pass {remedy}."
        ) from error
    try:
        if batch is not None:
            validation.see(batch)
    except Exception as error:
        raise RuntimeError(
            "RouletteWheelPruning: validation_step fails on a batch of the training data, on which a refit, or an "
            f"importance of inputs, runs it ({type(error).__name__}: {error}). Define calibration_step(self, batch) in "
            f"the module, which runs the network on such a batch and need return nothing; or pass {remedy}."
        ) from error


def own_loader(trainer: Trainer, seed: int) -> Iterable[Any]:
    """Loaders over the training data that share nothing with the fit but the data set.

    Raises:
        RuntimeError: If the training data is an iterator, which can be read only once.
    """
    combined = trainer.fit_loop._combined_loader  # public only as what the user gave
    assert combined is not None
    loaders, structure = tree_flatten(combined.iterables, is_leaf=lambda one: not isinstance(one, dict | list | tuple))
    ours = [_own(loader, seed) for loader in loaders]
    if combined.iterables is combined.flattened[0] and len(ours) == 1:
        return ours[0]
    return (batch for batch, _, _ in CombinedLoader(tree_unflatten(ours, structure), mode=combined._mode))


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
        return _quiet(loader)  # a class that makes its batches in a way of its own
    if streams:
        return DataLoader(data, batch_size=loader.batch_size, collate_fn=loader.collate_fn)
    if loader.batch_sampler is not None:
        return DataLoader(data, batch_sampler=_batches(loader.batch_sampler, data, seed), collate_fn=loader.collate_fn)
    whole = isinstance(loader.sampler, BatchSampler)  # of a data set that is asked for whole batches
    sampler = _batches(loader.sampler, data, seed) if whole else _Reordered(loader.sampler, data, seed)
    return DataLoader(data, batch_size=None, sampler=sampler, collate_fn=loader.collate_fn)


def _batches(sampler: Any, data: Any, seed: int) -> Any:
    """Plain batches in an order of ours; others as a copy of the sampler makes them: they have their reason."""
    if type(sampler) is BatchSampler:
        return BatchSampler(_Reordered(sampler.sampler, data, seed), sampler.batch_size, sampler.drop_last)
    return _copied(sampler, data)


class _Reordered(Sampler[int]):
    """The samples that a sampler gives, and no others, in a seeded order that is the same in all processes.

    Args:
        sampler: Which is not asked itself, but a copy of it.
        data: That it samples, which is not copied.
        seed: Of the order.
    """

    def __init__(self, sampler: Iterable[int], data: Any, seed: int) -> None:
        within = getattr(getattr(sampler, "dataset", None), "_sampler", None)
        if isinstance(sampler, DistributedSampler) and within is not None:  # Lightning's, around the user's
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
        # one that never ends tells no length
        most = len(self._sampler) if isinstance(self._sampler, Sized) else limits().sampled_indices
        given = list(islice(_copied(self._sampler, self._data), most))
        # in an order of their own, whatever epoch the sampler is at
        return sorted(given) if all(isinstance(one, int) for one in given) else given


def _copied(sampler: Any, data: Any) -> Any:
    """A copy of a sampler, over the same data, that draws chance of its own."""
    known: dict[int, Any] = {id(data): data}
    for holder in (sampler, getattr(sampler, "sampler", None)):
        for one in getattr(holder, "__dict__", {}).values():
            if isinstance(one, torch.Generator):
                known[id(one)] = torch.Generator(one.device)
                known[id(one)].set_state(one.get_state())
    return copy.deepcopy(sampler, known)


def _quiet(loader: DataLoader[Any]) -> Iterable[Any]:
    """The same loader without workers, and with samplers and chance of its own."""
    twin = copy.copy(loader)
    samplers = {name: _copied(getattr(loader, name), loader.dataset) for name in ("sampler", "batch_sampler")}
    alone = {"num_workers": 0, "timeout": 0, "persistent_workers": False, "_iterator": None, "generator": None}
    vars(twin).update(samplers | alone)  # which a loader does not let anyone assign
    return twin


def _fewer(
    trainer: Trainer, validation: IsolatedValidation, module: LightningModule, batches: Sequence[Any]
) -> list[Any]:
    """The same samples in fewer batches, where they can be joined and the network takes them so."""
    groups: list[list[Any]] = []
    size = 0
    for batch in batches:
        size += bytes_of(batch)
        if (
            groups
            and size <= limits().joined_bytes
            and rows_of(batch) is not None
            and rows_of(groups[-1][-1]) is not None
        ):
            groups[-1].append(batch)
        else:
            groups.append([batch])
            size = bytes_of(batch)
    wholes = [_whole(group) for group in groups]
    first = next((pair for pair in zip(groups, wholes, strict=True) if len(pair[1]) < len(pair[0])), None)
    alike = first is not None and _gives_the_same(validation, module, *first)
    return [one for whole in wholes for one in whole] if trainer.strategy.broadcast(alike) else list(batches)


def _few_at_a_time(trainer: Trainer, validation: IsolatedValidation, batches: Sequence[Any]) -> list[Any]:
    """The first samples in batches that are small, unless the network takes none that are cut."""
    pieces = pieces_of(batches)
    try:
        _see(validation, pieces[0], ())
    except Exception:
        works = False
    else:
        works = True
    whole = max(rows_of(batch) or 1 for batch in batches)
    return pieces if trainer.strategy.broadcast(works) else pieces_of(batches, at_a_time=whole)


def _whole(group: list[Any]) -> list[Any]:
    whole = joined(group) if len(group) > 1 else None
    return group if whole is None else [whole]


def _gives_the_same(
    validation: IsolatedValidation, module: LightningModule, one: Sequence[Any], other: Sequence[Any]
) -> bool:
    """Whether the network's parts give the same, in sum, on the same samples in other batches, and fail on neither.

    They do not where a step needs its batch size, where the first dimension is not that of samples, or where the memory
    of the device does not hold so many.
    """
    try:
        sums = [_sums(validation, module, batches) for batches in (one, other)]
    except Exception:
        return False
    return sums[0].keys() == sums[1].keys() and all(
        torch.allclose(sums[0][part], sums[1][part], rtol=rounding(validation.trainer), atol=1e-6, equal_nan=True)
        for part in sums[0]
    )


def _sums(validation: IsolatedValidation, module: LightningModule, batches: Sequence[Any]) -> dict[nn.Module, Tensor]:
    """Sums of the outputs' absolute values and of their squares, of each part that has parameters of its own."""
    found: dict[nn.Module, Tensor] = {}
    others = parts_of_metrics(module)  # a loss or a metric is a mean over its batch
    parts = [one for one in module.modules() if one not in others and list(one.parameters(recurse=False))]

    def meet(part: nn.Module, _: Any, output: Any) -> None:
        values = [one.detach() for one in tensors_of(output) if one.is_floating_point()]
        both = [
            sum(float(torch.linalg.vector_norm(one, order, dtype=torch.float64)) ** order for one in values)
            for order in (1, 2)
        ]
        found[part] = found.get(part, 0) + torch.tensor(both, dtype=torch.float64)

    for batch in batches:
        run_with_hooks(partial(_see, validation, batch, ()), parts, after=meet)
    return found
