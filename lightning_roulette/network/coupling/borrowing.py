"""A network that is looked at, and left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lightning_roulette.network.lending import lent
from lightning_roulette.network.modes import evaluating


@contextmanager
def borrowed(network: nn.Module) -> Iterator[None]:
    """Inside the block a network is in evaluation mode, and all its parameters take part in the graph of autograd.

    Afterwards its modes, its buffers, its hooks, and which parameters want gradients are as before, and so are the
    states of the generators of random numbers, in case a forward draws some.
    """
    devices = {one.device.index for one in network.parameters() if one.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(sorted(devices)))
        stack.enter_context(evaluating(network))
        stack.enter_context(lent(dict(network.named_buffers())))
        stack.enter_context(_with_gradients(network))
        stack.enter_context(_same_hooks(network))
        yield


@contextmanager
def _with_gradients(network: nn.Module) -> Iterator[None]:
    before = {one: one.requires_grad for one in network.parameters() if one.is_floating_point()}
    try:
        for one in before:
            one.requires_grad_(True)
        yield
    finally:
        for one, wants in before.items():
            one.requires_grad_(wants)


@contextmanager
def _same_hooks(network: nn.Module) -> Iterator[None]:
    """Remove the hooks that an interrupted trace leaves."""
    before = {part: set(part._forward_hooks) for part in network.modules()}
    try:
        yield
    finally:
        for part, keys in before.items():
            for key in part._forward_hooks.keys() - keys:
                del part._forward_hooks[key]
