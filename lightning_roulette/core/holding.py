"""Zeros that stay zero while any optimizer trains on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_roulette.core.masks import fill_pruned


class Removable(Protocol):
    """What a torch hook leaves in the hand of the one who registered it."""

    def remove(self) -> None:
        """Take the hook off."""
        ...


class ZeroHold:
    """Holds pruned weights at zero, exactly, from now until `release`.

    Pruned entries are filled after every optimizer step; their gradients are cleared as they are accumulated, so that
    clipping sees the pruned network, and again before the step, as a distributed reduction may have written them anew;
    what the optimizers remember of them is cleared now. LBFGS mixes the memories of all weights: it forgets everything.

    Args:
        parameters: Name to parameter, at least those in `mask`.
        mask: Which weights are kept.
        optimizers: Every optimizer that steps on the parameters. Those without `register_step_post_hook` are not
            torch's; call `fill` after their steps.

    Attributes:
        misses_steps: Whether there is such an optimizer.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], mask: Mapping[str, Tensor], optimizers: Iterable[Optimizer]
    ) -> None:
        self._parameters = {name: parameters[name] for name in mask}
        # as it is needed at every step, it is not packed
        self._mask = {name: kept.to(parameters[name].device) for name, kept in mask.items()}
        self._hooks: list[Removable] = []
        self.misses_steps = False
        self.fill()
        for optimizer in optimizers:
            self._forget(optimizer)
            if not hasattr(optimizer, "register_step_post_hook"):
                self.misses_steps = True
            else:
                self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
                self._hooks.append(optimizer.register_step_post_hook(self._after_step))
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and parameter.is_leaf:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._gradient_filler(name)))
        self._fill_gradients()

    def fill(self) -> None:
        """Set every pruned weight to zero."""
        fill_pruned(self._parameters, self._mask)

    def release(self) -> None:
        """Take all hooks off; the zeros stay until somebody changes them."""
        while self._hooks:
            self._hooks.pop().remove()

    def _gradient_filler(self, name: str) -> Any:
        def fill_gradient(parameter: Tensor) -> None:
            self._fill_gradients([name])

        return fill_gradient

    def _fill_gradients(self, names: Iterable[str] | None = None) -> None:
        grads = {name: self._parameters[name].grad for name in names or self._parameters}
        # a sparse gradient takes no filling; its weights are filled after the step
        dense = {name: grad for name, grad in grads.items() if grad is not None and not grad.is_sparse}
        fill_pruned(dense, {name: self._mask[name] for name in dense})

    def _before_step(self, *_: Any) -> None:
        self._fill_gradients()

    def _after_step(self, *_: Any) -> None:
        self.fill()

    @torch.no_grad()
    def _forget(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, LBFGS):
            optimizer.state.clear()
            return
        for name, parameter in self._parameters.items():
            for memory in optimizer.state.get(parameter, {}).values():
                if isinstance(memory, Tensor) and memory.shape == parameter.shape:
                    memory.masked_fill_(~self._mask[name].to(memory.device), 0)
