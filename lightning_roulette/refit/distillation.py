"""Distillation: gradient steps that bring the outputs of a pruned network closer to those of the dense network.

No labels are needed, because the dense network gives the targets, as in Hinton, Vinyals and Dean, "Distilling the
knowledge in a neural network" (2015). The distance is the squared error of the outputs, not a divergence of classes, so
that it fits networks of any kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_roulette.large.processes import Processes
from lightning_roulette.network.hooks import hooked
from lightning_roulette.network.layers import batch_norms_of
from lightning_roulette.network.lending import copy_into, write
from lightning_roulette.refit.backward_run import NoGradients
from lightning_roulette.refit.held_out import ONE_IN
from lightning_roulette.refit.outputs import LastOutputs
from lightning_roulette.refit.owners import around, calls_in, observed, weight_owners
from lightning_roulette.refit.solved import affine_of
from lightning_roulette.wheel.chance import random_bits, stream

_RATE = 0.01  # of the first step, in units of the root mean square of a tensor's values
_NOISE = 1e-4  # smaller derivatives, in units of the root mean square of all, take smaller steps: they may be rounding
_LEAST = 2  # pieces of a process whose targets are kept whatever the memory


class Distillation:
    """A network with pieces of data, on which pruned versions of it learn from the dense one.

    One piece in eight takes no part in the steps, and judges them.

    Args:
        module: The network. It must be dense here.
        names: Names of the weights that masks prune.
        pieces: Functions that each run the network on some samples. Only the first ones are used if there are more than
            steps, or if the outputs of the dense network on all of them take more than `memory`.
        steps: Number of steps.
        seed: Seed of the order of the pieces.
        processes: Those that share the pieces. They all call the same methods.
        memory: Bytes for the outputs of the dense network.

    Raises:
        NoGradients: If the outputs of the network cannot be differentiated.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        pieces: Sequence[Callable[[], object]],
        steps: int,
        seed: int,
        processes: Processes,
        memory: int,
    ) -> None:
        self._module, self._steps, self._seed, self._processes = module, steps, seed, processes
        owners, parts = weight_owners(module, names), dict(module.named_modules(remove_duplicate=False))
        called = set(calls_in(pieces[0], around(owners, parts))) if pieces else set()
        using = [part for its in observed(owners, parts, called, processes).values() for part in its]
        self._last = LastOutputs(dict.fromkeys([*using, *batch_norms_of(module).values()]))
        self._targets: list[list[Tensor]] = []
        self._pieces = [one for own, one in enumerate(pieces) if processes.number(own) < max(_LEAST, steps)]
        weights = {name: module.get_parameter(name) for name in names}
        with _differentiable([*{**affine_of(module), **weights}.values()]):
            self._see_targets(memory)
        self._weights = self._weights_of_outputs()
        counts = processes.each(torch.tensor(len(self._targets))).tolist()
        numbers = sorted(rank + own * len(counts) for rank, count in enumerate(counts) for own in range(count))
        self._judging = [number for number in numbers if number % ONE_IN == 1]
        self._teaching = [number for number in numbers if number % ONE_IN != 1]

    def taught(self, tensors: Mapping[str, Tensor], norms: bool, settle: Callable[[], object]) -> str:
        """Take the steps in the pruned network, in place. Values that are zero stay zero.

        Steps are those of Adam. The rate of a tensor begins at a hundredth of the root mean square of its values other
        than zero, and falls to zero as a cosine.

        Args:
            tensors: Parameters and buffers of the network by name. The parameters among them take steps.
            norms: Whether batch normalisations use the statistics of each piece in the steps.
            settle: Called after the steps, to compute running statistics.

        Returns:
            Why the network is as it was, in a sentence. Empty if the steps brought its outputs on the pieces that judge
            closer to the targets.
        """
        if not self._judging:
            return "no gradient steps are taken: there is one piece of calibration inputs, and they need two."
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        own = {id(one): one for one in tensors.values() if isinstance(one, nn.Parameter) and one.is_floating_point()}
        parameters = list(own.values())
        with _differentiable(parameters):
            first = self._distance()
            self._descend(parameters, norms)
            settle()
            last = self._distance()
        if last < first:
            return ""
        copy_into(tensors, before)
        return "gradient steps did not bring the outputs closer to the dense network's, and are not kept."

    def _descend(self, parameters: Sequence[nn.Parameter], norms: bool) -> None:
        values = [_wide(one.detach()).clone() for one in parameters]  # steps may be too small for half precision
        free = [value != 0 for value in values]
        rates = [_RATE * _size(value[kept]) for value, kept in zip(values, free, strict=True)]
        adam = torch.optim.Adam([{"params": [value], "lr": rate} for value, rate in zip(values, rates, strict=True)])
        for step in range(self._steps):
            found = self._derivatives(parameters, self._piece_of(step), norms)
            if not step:
                adam.param_groups = [group | {"eps": _NOISE * _size_of_all(found)} for group in adam.param_groups]
            for value, derivative, kept in zip(values, found, free, strict=True):
                value.grad = derivative * kept
            for group, rate in zip(adam.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * step / self._steps)) / 2
            adam.step()
            for parameter, value in zip(parameters, values, strict=True):
                write(parameter, value)
            torch.clear_autocast_cache()  # it may hold casts of the old values

    def _piece_of(self, step: int) -> int:
        """Return the number of the piece of a step. Each piece is taken once before one is taken again."""
        turn, place = divmod(step, len(self._teaching))
        bits = random_bits(stream(self._seed, turn, 0, "distillation"), torch.arange(len(self._teaching)))
        return self._teaching[int(bits.argsort()[place])]

    def _derivatives(self, parameters: Sequence[nn.Parameter], number: int, norms: bool) -> Sequence[Tensor]:
        """Return the derivatives of the distance on a piece, float32 or float64, in all processes."""
        found = [torch.zeros_like(_wide(one.detach())) for one in parameters]
        if (own := self._processes.own(number)) is not None:
            with _batch_statistics(self._module) if norms else nullcontext():
                distance = self._distance_on(own)
            given = torch.autograd.grad(distance, parameters, allow_unused=True)
            found = [zeros if one is None else _wide(one) for zeros, one in zip(found, given, strict=True)]
        return self._processes.add(*found)

    def _distance(self) -> float:
        """Return the distance on the pieces that judge; infinite if it is not a number."""
        own = [one for number in self._judging if (one := self._processes.own(number)) is not None]
        found = sum(float(self._distance_on(one).detach()) for one in own)
        (total,) = self._processes.add(torch.tensor(found, dtype=torch.float64))
        return float(total) if bool(total.isfinite()) else math.inf

    def _distance_on(self, own: int) -> Tensor:
        outputs, targets = self._last.of(own, self._pieces[own]), self._targets[own]
        if [one.shape for one in outputs] != [one.shape for one in targets]:
            raise NoGradients("the network's outputs have other shapes after its weights have changed")
        with torch.enable_grad():
            pairs = zip(self._weights, outputs, targets, strict=False)
            apart = [weight * (_wide(one) - _wide(target)).square().sum() for weight, one, target in pairs]
            return torch.stack(apart).sum()

    def _see_targets(self, memory: int) -> None:
        """Note the outputs of the dense network."""
        size = 0
        for number, piece in enumerate(self._pieces):
            found = [one.detach().clone() for one in self._last.of(number, piece)]
            size += sum(one.numel() * one.element_size() for one in found)
            if size > memory and number >= _LEAST:
                break
            self._targets.append(found)

    def _weights_of_outputs(self) -> list[float]:
        """Return factors that make the outputs of all places equally large, over all processes."""
        most = max((len(one) for one in self._targets), default=0)
        places = int(self._processes.each(torch.tensor(most)).max())
        sums = torch.zeros(places, 2, dtype=torch.float64)
        for found in self._targets:
            for place, one in enumerate(found):
                sums[place] += torch.tensor([float(_wide(one).square().sum()), one.numel()], dtype=torch.float64)
        (sums,) = self._processes.add(sums)
        return [float(count / square) if square > 0 else 1.0 for square, count in sums.tolist()]


def _wide(values: Tensor) -> Tensor:
    """Return values in float32, or in float64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _size_of_all(tensors: Sequence[Tensor]) -> float:
    """Return the root mean square of all values of some tensors."""
    squares = sum(float(one.square().sum()) for one in tensors)
    return math.sqrt(squares / sum(one.numel() for one in tensors))


def _size(values: Tensor) -> float:
    """Return the root mean square; 0 of no values."""
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


@contextmanager
def _differentiable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let parameters need gradients inside the block, frozen ones too."""
    before = [one.requires_grad for one in parameters]
    try:
        for one in parameters:
            one.requires_grad_(True)
        yield
    finally:
        for one, needed in zip(parameters, before, strict=True):
            one.requires_grad_(needed)


@contextmanager
def _batch_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch normalisations use the statistics of their input inside the block, where it has more than one row.

    Those that would ask other processes are left alone.
    """
    norms = [one for one in batch_norms_of(module).values() if not isinstance(one, nn.SyncBatchNorm)]
    before = [one.training for one in norms]

    def begin(part: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        given = cast(Tensor, (*arguments, *named.values())[0])
        part.training = given.numel() > given.shape[1]

    def end(part: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        part.training = False

    try:
        with hooked(norms, before=begin, after=end):
            yield
    finally:
        for one, training in zip(norms, before, strict=True):
            one.training = training
