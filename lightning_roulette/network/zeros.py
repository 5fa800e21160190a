"""Zeros that stay zero while any optimizer trains on."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_roulette.large.shards import is_sharded, local, part_of
from lightning_roulette.mask.mask import fill_pruned
from lightning_roulette.network.hooks import Removable

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> integers of its size


class ZeroFill:
    """Writes zero, in place, over the pruned entries of a weight, of its gradients and of what optimizers remember.

    On the CPU by a bitwise and with 0 where pruned, -1 (all ones) where kept: exact as `masked_fill_` is, NaN, infinity
    and -0.0 included, and some ten times as fast. This takes as much memory as the weight does.

    Args:
        kept: Bool, True = kept; on the device of `weight`. Of a sharded weight what concerns this process's part.
        weight: What is to be filled again and again; only its type, shape and memory format count here.
    """

    def __init__(self, kept: Tensor, weight: Tensor) -> None:
        self.kept, weight = kept, weight if not is_sharded(weight) else local(weight.detach())
        self._type = (weight.dtype, weight.device)
        self._bits: Tensor | None = None
        if type(weight) in (Tensor, nn.Parameter) and weight.is_cpu and weight.is_floating_point():
            # a memory format unlike that of the weight would cost most of what this gains
            self._bits = torch.empty_like(weight, dtype=_BITS[weight.itemsize], requires_grad=False).copy_(kept).neg_()

    @torch.no_grad()
    def __call__(self, tensor: Tensor | None) -> None:
        """Fill `tensor`, of the shape of the mask; None has nothing to fill, a sparse tensor the entries it stores."""
        if tensor is None:
            return
        tensor = local(tensor)
        if self._bits is not None and (tensor.dtype, tensor.device) == self._type and tensor.layout == torch.strided:
            tensor.detach().view(self._bits.dtype).bitwise_and_(self._bits)
        elif tensor.layout == torch.sparse_coo:
            _fill_entries(tensor.detach(), self.kept)
        elif tensor.layout == torch.strided:
            fill_pruned({"": tensor}, {"": self.kept})


def _fill_entries(sparse: Tensor, kept: Tensor) -> None:
    # not coalesced, which would make another tensor: entries of the same place add up to zero, too
    where = kept.to(sparse.device)[tuple(sparse._indices())]
    sparse._values().masked_fill_(~where, 0)


class _HeldWeight:
    """A weight, how it is filled, and whether its gradient has been since it was last written."""

    def __init__(self, parameter: nn.Parameter, fill: ZeroFill) -> None:
        self.parameter, self.fill = parameter, fill
        self._clean: tuple[weakref.ref[Tensor], int] | None = None

    def clean_gradient(self, _: Tensor | None = None) -> None:
        """Fill the gradient."""
        grad = self.parameter.grad
        self.fill(grad)
        self._clean = None if grad is None else (weakref.ref(grad), grad._version)

    def has_clean_gradient(self) -> bool:
        """Whether nothing was written to the gradient since; a write through `.data` goes unseen."""
        if (grad := self.parameter.grad) is None:
            return True
        return self._clean is not None and self._clean[0]() is grad and self._clean[1] == grad._version

    def clean_when_accumulated(self) -> Removable | None:
        """Fill each gradient as it is accumulated, those of a weight that is frozen now and thawed later, too."""
        if not self.parameter.is_leaf or not self.parameter.is_floating_point():
            return None
        frozen = not self.parameter.requires_grad
        if frozen:  # torch takes no hook then; one that is there already stays
            self.parameter.requires_grad_(True)
        try:
            hook: Removable = self.parameter.register_post_accumulate_grad_hook(self.clean_gradient)
            return hook
        finally:
            if frozen:
                self.parameter.requires_grad_(False)


class ZeroHold:
    """Holds pruned weights at zero, exactly, from now until `release`.

    Pruned entries are filled after every optimizer step. Their gradients are cleared as they are accumulated, so that
    clipping sees the pruned network, and before the step, if they may have been written anew: by clipping, or where
    there are several processes by the reduction. What the optimizers remember of them is cleared now, and whenever
    they load a state. LBFGS mixes the memories of all weights: it forgets everything.

    Weights that are frozen now, and such as come to an optimizer later, are held like the others.

    Args:
        parameters: Name to parameter, at least those in `mask`.
        mask: Which weights are kept.
        optimizers: Every optimizer that steps on the parameters. Those without `register_step_post_hook` are not
            torch's; call `fill` after their steps.
        afresh: Whether the optimizers may remember the network before it was pruned; else LBFGS forgets nothing.

    Attributes:
        misses_steps: Whether there is such an optimizer.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        mask: Mapping[str, Tensor],
        optimizers: Iterable[Optimizer],
        afresh: bool = True,
    ) -> None:
        # needed at every step, a mask is not packed here
        kept = {name: part_of(kept, parameters[name]).to(parameters[name].device) for name, kept in mask.items()}
        self._held = [_HeldWeight(parameters[name], ZeroFill(kept[name], parameters[name])) for name in kept]
        self._hooks: list[Removable] = []
        self.misses_steps = False
        self.fill()
        for optimizer in optimizers:
            if afresh or not isinstance(optimizer, LBFGS):
                self._forget(optimizer)
            if not hasattr(optimizer, "register_step_post_hook"):
                self.misses_steps = True
            else:
                self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
                self._hooks.append(optimizer.register_step_post_hook(self._after_step))
                self._hooks.append(optimizer.register_load_state_dict_post_hook(self._forget))
        hooks = [one.clean_when_accumulated() for one in self._held]
        self._hooks += [hook for hook in hooks if hook is not None]
        for one in self._held:
            one.clean_gradient()

    def fill(self) -> None:
        """Set every pruned weight to zero."""
        for one in self._held:
            one.fill(one.parameter)

    def release(self) -> None:
        """Take all hooks off; the zeros stay until somebody changes them."""
        while self._hooks:
            self._hooks.pop().remove()

    def _before_step(self, *_: Any) -> None:
        # a reduction writes where torch counts no writes
        reduced = torch.distributed.is_available() and torch.distributed.is_initialized()
        for one in self._held:
            if reduced or not one.has_clean_gradient():
                one.clean_gradient()

    def _after_step(self, *_: Any) -> None:
        self.fill()

    def _forget(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, LBFGS):
            optimizer.state.clear()
            return
        for one in self._held:
            for memory in optimizer.state.get(one.parameter, {}).values():
                if isinstance(memory, Tensor) and memory.shape == one.parameter.shape:
                    one.fill(memory)
