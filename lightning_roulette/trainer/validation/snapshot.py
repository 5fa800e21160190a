"""The state that a validation may change and that is put back: module, learning rates, loaders, random states."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeGuard

import numpy
import torch

# Private in lightning 2.6. The public isolate_rng does not restore the states after an exception.
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer
from torchmetrics import Metric, MetricCollection, MetricTracker

from lightning_roulette.large.shards import reshard
from lightning_roulette.network.lending import write
from lightning_roulette.trainer.validation.attributes import PlainAttributes
from lightning_roulette.trainer.validation.positions import Position, streams_of


class Snapshot:
    """The state that a validation may change, at the time of the snapshot.

    It holds buffers, submodules, training modes and torchmetrics objects of the module, the settings of optimizers and
    learning rate schedulers, and the states of the global random generators. Generators and epochs of loaders are
    added by `watch`.

    Args:
        trainer: A Trainer in `fit`.
        module: Its module.
        restless: Parameters that a validation may change.

    Attributes:
        carries: Whether what a validation changes in the module stays for now.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, restless: Sequence[Tensor] = ()) -> None:
        self._module = module
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        schedulers = _with_inner([config.scheduler for config in trainer.lr_scheduler_configs])
        rates = [one for group in groups for one in group.values() if isinstance(one, Tensor)]
        parts = list(module.modules())
        self._modes = {part: part.training for part in parts}
        # a validation may add buffers, and modules with a MetricTracker
        holders: list[dict[str, Any]] = [one for part in parts for one in (part._buffers, part._modules)]
        self._members = [(holder, dict(holder)) for holder in holders]
        buffers = {id(one): one for part in parts for one in part._buffers.values() if _has_values(one)}
        self._values = [(one, one.detach().clone()) for one in (*buffers.values(), *rates, *restless)]
        objects = [part for part in parts if isinstance(part, Metric | MetricCollection | MetricTracker)]
        self._metrics = [one for one in objects if isinstance(one, Metric)]
        self._attributes = PlainAttributes([*groups, *(vars(one) for one in (*schedulers, *objects))])
        # a schedule-free optimizer, for example, notes whether it is in evaluation mode
        self._settings = [(vars(one), _settings_of(one)) for one in trainer.optimizers]
        self._generators: dict[torch.Generator, Tensor] = {}
        self._epochs: dict[Any, int] = {}
        self._positions: dict[int, Position] = {}  # by the id of the stream
        self.carries = False
        self._random, self._grad = _random_states(), torch.is_grad_enabled()

    def watch(self, loaders: Iterable[Any]) -> None:
        """Add the random generators, epochs and positions of loaders that are not in the snapshot yet."""
        loaders = list(loaders)
        for holder in (part for loader in loaders for part in _parts_of(loader)):
            if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
                self._generators.setdefault(generator, generator.get_state())
            if hasattr(holder, "set_epoch") and isinstance(epoch := getattr(holder, "epoch", None), int):
                self._epochs.setdefault(holder, epoch)
        self.watch_streams(loaders)

    def watch_streams(self, loaders: Iterable[Any]) -> None:
        """Add the positions alone of loaders that are not in the snapshot yet."""
        for stream in streams_of(loaders):
            if id(stream) not in self._positions:
                self._positions[id(stream)] = Position(stream)

    def lost_positions(self) -> list[str]:
        """Return names of what loaders remember between passes and cannot be put back."""
        return [name for position in self._positions.values() for name in position.lost]

    def begin(self) -> None:
        """Put back the random states, and reset the metrics: each validation begins like this."""
        self._restore_random_states()
        for metric in self._metrics:
            metric.reset()  # an update may write in place into the tensors that a metric holds

    def restore(self) -> None:
        """Put everything back."""
        self.restore_module()
        for holder, epoch in self._epochs.items():
            holder.epoch = epoch
        for position in self._positions.values():
            position.restore()
        self._restore_random_states()

    def restore_module(self, but: Collection[Tensor] = ()) -> None:
        """Put back the module and learning rates, but not the values of some buffers. `begin` does the rest."""
        spared = {id(buffer) for buffer in but}
        reshard(self._module)  # otherwise the next validation would see the gathered weights of this one
        if self.carries:
            return
        for holder, members in self._members:
            holder.clear()
            holder.update(members)
        for buffer, values in self._values:
            if id(buffer) not in spared:
                write(buffer, values)
        self._attributes.restore()
        for attributes, settings in self._settings:
            attributes.update(settings)
        for part, training in self._modes.items():
            vars(part)["training"] = training  # an assignment would go through the checks of nn.Module
        torch.set_grad_enabled(self._grad)

    def _restore_random_states(self) -> None:
        _set_rng_states(self._random)
        for generator, state in self._generators.items():
            generator.set_state(state)


def seed_global_generators(seed: int) -> None:
    """Set the global random generators, inside a block that puts them back. Transforms draw from them."""
    torch.manual_seed(int(seed))
    numpy.random.seed(int(seed) % 2**32)  # noqa: NPY002
    random.seed(int(seed))


def _random_states() -> dict[str, Any]:
    return _collect_rng_states(include_cuda=torch.cuda.is_available() and torch.cuda.is_initialized())


def _settings_of(optimizer: Any) -> dict[str, Any]:
    """The attributes of an optimizer that are numbers, texts or None."""
    return {name: one for name, one in vars(optimizer).items() if isinstance(one, bool | int | float | str | None)}


def _with_inner(schedulers: Sequence[Any]) -> list[Any]:
    """Learning rate schedulers, and the schedulers inside them."""
    inner = [one for outer in schedulers for one in getattr(outer, "_schedulers", ())]
    return [*schedulers, *(_with_inner(inner) if inner else [])]


def _has_values(buffer: Tensor | None) -> TypeGuard[Tensor]:
    return buffer is not None and not isinstance(buffer, UninitializedBuffer)


def _parts_of(loader: Any) -> list[Any]:
    """A loader and its samplers. Each may have a random generator of its own."""
    batches = getattr(loader, "batch_sampler", None)
    parts = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    return [part for part in parts if part is not None]
