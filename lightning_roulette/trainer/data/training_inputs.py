"""Calibration inputs from the training data: the module takes steps on batches of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_roulette.large.communication import Communication
from lightning_roulette.large.limits import limits
from lightning_roulette.large.processes import ONE_PROCESS, Processes
from lightning_roulette.large.shards import any_sharded
from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.containers import rebuilt
from lightning_roulette.network.hooks import run_with_hooks
from lightning_roulette.network.layers import batch_norms_of
from lightning_roulette.network.parameters import parts_of_metrics
from lightning_roulette.network.samples import bytes_of, joined, pieces_of, rows_of, tensors_of
from lightning_roulette.refit.inputs import ALL, LESSON, Calibration
from lightning_roulette.refit.refitted import Refitted
from lightning_roulette.refit.turns import Turns
from lightning_roulette.trainer.data.own_loader import own_loader
from lightning_roulette.trainer.data.reading import rounding
from lightning_roulette.trainer.processes import processes_of
from lightning_roulette.trainer.show.log import log
from lightning_roulette.trainer.validation.isolation import IsolatedValidation

_LEAST_PARTS = 8  # that batches are joined to, for as many processes to share


class TrainerCalibration(Calibration):
    """A `Calibration` on batches of training data, on which the module takes its own steps.

    - Batches are joined if the network gives the same on them.
    - Gradients take the memory of a training step, so they use at most as many samples at a time as training does.
      Gradient steps of a refit use 64 samples of a training batch, or all of it if the module fails on some.
    - With several processes, each runs a share of the batches that one process would run; see `Processes`. If the steps
      of the module communicate, all run the same batches at the same time. The results of the first process count,
      unless the weights are sharded: then the sums of all processes count.

    Args:
        trainer: A Trainer in `fit`.
        module: Its module.
        validation: Entered while the calibration is used.
        batches: Batches that `calibration_batches` gave, all of them in every process.
        seed: See `Calibration`.
        by_layer: Whether the inputs of layers will be asked for. Only then are batches joined.
        cache_bytes: See `Calibration`.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        validation: IsolatedValidation,
        batches: Sequence[Any],
        seed: int,
        by_layer: bool = True,
        cache_bytes: int = 2**31,
    ) -> None:
        self._trainer = trainer
        every = _fewer(trainer, validation, module, batches) if by_layer else batches
        whole_size = max(rows_of(batch) or 1 for batch in batches)
        takes_few = _takes_few(trainer, validation, batches)
        pieces = pieces_of(batches) if takes_few else pieces_of(batches, at_a_time=whole_size)
        lessons = pieces_of(batches, ALL, LESSON) if takes_few else batches
        self._shares = _sharing(trainer, validation, pieces[0])
        self._sharded = any_sharded(module.parameters())
        whole, pieces, lessons = (self._shares.share(one) for one in (every, pieces, lessons))
        statistics: list[Tensor] = []
        for part in batch_norms_of(module).values():
            statistics += [cast(Tensor, part.running_mean), cast(Tensor, part.running_var)]
        super().__init__(
            module,
            len(whole),
            run=lambda number: validation.step(rebuilt((*whole, every[0])[number], copies=True)),
            around=partial(validation.seeing, statistics),
            pieces=[partial(_see, validation, piece, statistics) for piece in pieces],
            lessons=[partial(_see, validation, lesson, statistics) for lesson in lessons],
            seed=seed,
            cache_bytes=cache_bytes,
            processes=processes_of(trainer) if self._sharded else self._shares,
        )

    def _agreed(self, turns: Turns) -> Turns:
        # a module whose steps communicate must take them in the same order in all processes
        return turns if self._shares.ranks == self._trainer.world_size else self._trainer.strategy.broadcast(turns)

    def _agreed_refit(self, mask: Mask, found: Refitted) -> Refitted:
        if self._trainer.world_size == 1 or self._sharded:  # shards are not sent, and all processes agreed on them
            return found
        device = self._trainer.strategy.root_device
        flags = None if found.mask is None else found.mask.stored
        ours = dict(found.values), dict(found.undone), flags
        values, undone, flags = self._trainer.strategy.broadcast(ours)
        chosen = None if flags is None else Mask({name: one.to(mask.flags[name].device) for name, one in flags.items()})
        return Refitted({name: value.to(device) for name, value in values.items()}, undone, chosen)

    def _agreed_scales(self, found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return found if self._trainer.world_size == 1 else self._trainer.strategy.broadcast(found)

    def _say(self, sentence: str) -> None:
        if self._trainer.is_global_zero:
            log.info(f"RouletteWheelPruning: {sentence}")


def calibration_batches(trainer: Trainer, validation: IsolatedValidation, most: int, seed: int) -> list[Any]:
    """Return batches of the training data, in a seeded order, as the steps of the module take them.

    The loaders of the fit, their workers and their iterators are left alone.

    Args:
        trainer: A Trainer in `fit`.
        validation: Entered.
        most: The largest number of batches. Fewer are read if they take more than 2**28 bytes.
        seed: Seed of the order, and of the random numbers that transforms draw.

    Raises:
        RuntimeError: If there is no batch.
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
    """Raise if the training data cannot be read, or if the module cannot take a step on it.

    Args:
        trainer: A Trainer in `fit`.
        validation: Entered.
        seed: Seed of the order in which the data is read.
        remedy: The argument that needs no training data, for the error message.

    Raises:
        RuntimeError: If either fails. The message holds the error.
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
            "RouletteWheelPruning: validation_step fails on a batch of the training data, and a refit or an importance "
            f"of inputs runs it there ({type(error).__name__}: {error}). Define calibration_step(self, batch) in the "
            f"module, which runs the network on such a batch and need not return anything; or pass {remedy}."
        ) from error


def _see(validation: IsolatedValidation, batch: Any, spared: Sequence[Tensor]) -> None:
    validation.see(rebuilt(batch, copies=True), spared)


def _fewer(
    trainer: Trainer, validation: IsolatedValidation, module: LightningModule, batches: Sequence[Any]
) -> list[Any]:
    """Return the same samples in fewer batches, if they can be joined and the network gives the same on them."""
    groups = _groups(batches)
    wholes = [_whole(group) for group in groups]
    first = next((pair for pair in zip(groups, wholes, strict=True) if len(pair[1]) < len(pair[0])), None)
    alike = first is not None and all(_gives_the_same(validation, module, *pair) for pair in _first_two_and_all(*first))
    return [one for whole in wholes for one in whole] if trainer.strategy.broadcast(alike) else list(batches)


def _groups(batches: Sequence[Any]) -> list[list[Any]]:
    """Return neighbouring batches that may be joined: of known numbers of samples, and not too large together.

    They do not depend on the number of processes, so that one process uses the rows that several use.
    """
    groups: list[list[Any]] = []
    most = min(limits().joined_bytes, -(-sum(bytes_of(batch) for batch in batches) // _LEAST_PARTS))
    size = 0
    for batch in batches:
        size += bytes_of(batch)
        small = size <= most
        if groups and small and rows_of(batch) is not None and rows_of(groups[-1][-1]) is not None:
            groups[-1].append(batch)
        else:
            groups.append([batch])
            size = bytes_of(batch)
    return groups


def _first_two_and_all(group: list[Any], whole: list[Any]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield neighbouring batches and what they are joined to: two of them, which take little time, and then all."""
    if len(group) > 2:
        yield group[:2], _whole(group[:2])
    yield group, whole


def _whole(group: list[Any]) -> list[Any]:
    whole = joined(group) if len(group) > 1 else None
    return group if whole is None else [whole]


def _sharing(trainer: Trainer, validation: IsolatedValidation, batch: Any) -> Processes:
    """Return the processes that share batches. It is this one alone if the steps of the module communicate."""
    processes = processes_of(trainer)
    if processes.ranks == 1:
        return processes
    with Communication() as communication:
        run_with_hooks(partial(_see, validation, batch, ()), ())
    return ONE_PROCESS if processes.anywhere(communication.seen) else processes


def _takes_few(trainer: Trainer, validation: IsolatedValidation, batches: Sequence[Any]) -> bool:
    """Return whether the module can take a step on a part of a batch."""
    try:
        _see(validation, pieces_of(batches, at_a_time=LESSON)[0], ())
    except Exception:
        works = False
    else:
        works = True
    return trainer.strategy.broadcast(works)


def _gives_the_same(
    validation: IsolatedValidation, module: LightningModule, one: Sequence[Any], other: Sequence[Any]
) -> bool:
    """Return whether the sums of the outputs of each part agree on the same samples in other batches.

    They do not if

    - a step depends on its batch size;
    - the first dimension does not count samples;
    - a step fails, for example because the memory of the device is too small.
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
    """Return the sums of absolute values and of squares of the outputs of each part that has parameters of its own."""
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
