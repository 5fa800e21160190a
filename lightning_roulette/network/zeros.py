"""Pruned weights that stay zero while an optimizer trains the network."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS

from lightning_roulette.large.bits import Flags
from lightning_roulette.large.masking import fill
from lightning_roulette.large.shards import local, part_of
from lightning_roulette.mask.mask import flags_of
from lightning_roulette.network.hooks import Removable
from lightning_roulette.network.steps import watch_loads, watch_steps, with_inner

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a float -> integers of its size


class ZeroFill:
    """Writes zero, in place, over the pruned entries of a weight, of its gradient and of an optimizer's state.

    On the CPU it uses a bitwise and with 0 where pruned and -1 (all bits set) where kept. Like `masked_fill_`, this is
    exact for NaN, infinity and -0.0. It is about ten times as fast, and it needs as much memory as the weight.

    Args:
        kept: Bool, True = kept, on the device of `weight`. For a sharded weight, the part of this process.
        weight: Gives the type, the shape and the memory format of the tensors to fill.
    """

    def __init__(self, kept: Tensor, weight: Tensor) -> None:
        self.kept, weight = kept, local(weight.detach())
        self._type = (weight.dtype, weight.device)
        self._bits: Tensor | None = None
        if type(weight) is Tensor and weight.is_cpu and weight.is_floating_point():
            # another memory format than the weight's would cost most of the speed
            self._bits = torch.empty_like(weight, dtype=_INTEGERS[weight.itemsize]).copy_(kept).neg_()

    @torch.no_grad()
    def __call__(self, tensor: Tensor | None) -> None:
        """Fill a tensor.

        Args:
            tensor: A tensor of the mask's shape. In a sparse tensor the stored entries are filled. None is ignored.
        """
        if tensor is None:
            return
        tensor = local(tensor)
        if self._bits is not None and (tensor.dtype, tensor.device) == self._type and tensor.layout == torch.strided:
            tensor.detach().view(self._bits.dtype).bitwise_and_(self._bits)
        elif tensor.layout == torch.sparse_coo:
            _fill_entries(tensor.detach(), self.kept)
        elif tensor.layout == torch.strided:
            fill(tensor.detach(), Flags(self.kept))


def _fill_entries(sparse: Tensor, kept: Tensor) -> None:
    # `coalesce` would make a new tensor; it is not needed, as entries at the same place all become zero
    where = kept.to(sparse.device)[tuple(sparse._indices())]
    sparse._values().masked_fill_(~where, 0)


class _HeldWeight:
    """A weight, its `ZeroFill`, and the version of its gradient after the last fill."""

    def __init__(self, parameter: nn.Parameter, fill: ZeroFill) -> None:
        self.parameter, self.fill = parameter, fill
        self._clean: tuple[weakref.ref[Tensor], int] | None = None

    def clean_gradient(self, _: Tensor | None = None) -> None:
        """Fill the gradient."""
        grad = self.parameter.grad
        self.fill(grad)
        self._clean = None if grad is None else (weakref.ref(grad), grad._version)

    def has_clean_gradient(self) -> bool:
        """Whether the gradient was not written to since it was filled. Writes through `.data` are not seen."""
        if (grad := self.parameter.grad) is None:
            return True
        return self._clean is not None and self._clean[0]() is grad and self._clean[1] == grad._version

    def clean_when_accumulated(self) -> Removable | None:
        """Register a hook that fills each gradient when it is accumulated. It also works for weights unfrozen later."""
        if not self.parameter.is_leaf or not self.parameter.is_floating_point():
            return None
        frozen = not self.parameter.requires_grad
        if frozen:  # torch refuses to register a hook on a frozen weight, but keeps one that is registered
            self.parameter.requires_grad_(True)
        try:
            hook: Removable = self.parameter.register_post_accumulate_grad_hook(self.clean_gradient)
            return hook
        finally:
            if frozen:
                self.parameter.requires_grad_(False)


class ZeroHold:
    """Keeps pruned weights at exactly zero, from now until `release`.

    - Weights are filled after every optimizer step.
    - Gradients are filled when they are accumulated, so that clipping sees the pruned network. They are filled again
      before the step if they may have been written to: by clipping, or by the reduction between several processes.
    - Optimizer state is filled now and whenever an optimizer loads a state. LBFGS mixes the state of all weights, so
      its state is cleared.
    - An optimizer that wraps another, as Lookahead does, is held together with the one that it wraps.

    Others that write weights, such as a mean teacher, are not seen. Call `fill` after them.

    Weights that are frozen now, and weights that are added to an optimizer later, are kept at zero too.

    Args:
        parameters: Name to parameter, at least those in `mask`.
        mask: The weights that are kept.
        optimizers: Every optimizer that steps on the parameters.
        afresh: True if the optimizers may hold state of the network before it was pruned. If False, the state of LBFGS
            is not cleared now.

    Attributes:
        misses_steps: Whether the steps of an optimizer cannot be watched. Call `fill` after each of its steps.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        mask: Mapping[str, Tensor],
        optimizers: Iterable[Any],
        afresh: bool = True,
    ) -> None:
        self._held = [
            _HeldWeight(parameters[name], _fill_of(kept, parameters[name])) for name, kept in flags_of(mask).items()
        ]
        self._hooks: list[Removable] = []
        self.misses_steps = False
        self.fill()
        for optimizer in with_inner(optimizers):
            if afresh or not isinstance(optimizer, LBFGS):
                self._forget(optimizer)
            watched = watch_steps(optimizer, self._before_step, self._after_step)
            self.misses_steps |= not watched
            self._hooks += [*watched, *watch_loads(optimizer, self._forget)]
        hooks = [one.clean_when_accumulated() for one in self._held]
        self._hooks += [hook for hook in hooks if hook is not None]
        for one in self._held:
            one.clean_gradient()

    def fill(self) -> None:
        """Set every pruned weight to zero."""
        for one in self._held:
            one.fill(one.parameter)

    def release(self) -> None:
        """Remove all hooks. The weights are not changed."""
        while self._hooks:
            self._hooks.pop().remove()

    def _before_step(self, *_: Any) -> None:
        # a reduction between processes does not raise the gradient's version
        reduced = torch.distributed.is_available() and torch.distributed.is_initialized()
        for one in self._held:
            if reduced or not one.has_clean_gradient():
                one.clean_gradient()

    def _after_step(self, *_: Any) -> None:
        self.fill()

    def _forget(self, optimizer: Any) -> None:
        state = getattr(optimizer, "state", None)
        if not isinstance(state, dict):
            return
        if isinstance(optimizer, LBFGS):
            state.clear()
            return
        for one in self._held:
            remembered = state.get(one.parameter)
            for memory in remembered.values() if isinstance(remembered, Mapping) else ():
                if isinstance(memory, Tensor) and memory.shape == one.parameter.shape:
                    one.fill(memory)


def _fill_of(kept: Flags, parameter: nn.Parameter) -> ZeroFill:
    # unpacked, because it is needed at every step
    return ZeroFill(part_of(kept, parameter).to(parameter.device), parameter)
