"""A network that is looked at, and left as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lightning_roulette.network.coupling.groups import Group
from lightning_roulette.network.lending import lent, named_tensors
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
def without_zeros(network: nn.Module, groups: Iterable[Group]) -> Iterator[None]:
    """Inside the block the zeros in the matrices of groups are other numbers, of the size of the others.

    Args:
        network: The network, as `borrowed` lends it.
        groups: The groups.
    """
    every = named_tensors(network)
    names = {member.name for one in groups for member in (*one.producers, *one.consumers)}
    chosen = {name: every[name].detach() for name in sorted(names) if every[name].dim() > 1}
    chosen = {name: one for name, one in chosen.items() if bool((one == 0).any())}
    chance = torch.Generator().manual_seed(0)
    with lent(chosen):
        for one in chosen.values():
            noise, zeros = torch.randn(one.shape, generator=chance).to(one), one == 0
            size = one[~zeros].square().mean().sqrt() if not bool(zeros.all()) else one[0].numel() ** -0.5
            one.copy_(torch.where(zeros, noise * size, one))
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
