"""Whether the output of a network depends on units whose consumers are zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.network.coupling.graph import tensors_in
from lightning_roulette.network.coupling.groups import Group, Member
from lightning_roulette.network.lending import lent, named_tensors

_CLOSE = 1e-6  # allowed difference, relative to the largest output
_SCALE = 10.0  # how far other values of producers exceed their largest entry
_CHANGES = 2  # of the producers
_FAR = 1e3  # an entry that exceeds the median by so much does not count as the largest


def outputs_of(run: Callable[[], Any]) -> list[Tensor]:
    """Copies of what a network returns, without gradients."""
    with torch.no_grad():
        return [one.clone() for one in tensors_in(run())]


def are_same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two outputs are finite and equal to six digits of their largest entries; whole numbers are equal."""
    return len(first) == len(second) and all(is_within(*pair, _CLOSE) for pair in zip(first, second, strict=True))


def is_within(one: Tensor, other: Tensor, share: float, least: float = 0.0) -> bool:
    """Whether two outputs are finite, and differ by at most a share of the largest entry; whole numbers are equal.

    Entries that exceed 1000 times the median of the different sizes do not count as the largest, as -1e9 for classes
    that a network rules out. They may differ by a share of themselves.

    Args:
        one: An output.
        other: Another one, of the same type.
        share: The share.
        least: What counts as the largest entry if that is smaller.
    """
    if one.shape != other.shape or not one.numel():
        return one.shape == other.shape
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    difference, sizes = (one - other).abs(), one.abs()
    largest = max(least, float(sizes.max()))
    if not bool(difference.isfinite().all() and difference.max() <= share * largest):
        return False
    if not bool(difference.any()):
        return True
    usual = min(largest, max(least, _FAR * _median(sizes)))
    return bool((difference <= share * sizes.clamp(min=usual)).all())


def _median(sizes: Tensor) -> float:
    """The median of the different numbers above zero; 0 if there are none."""
    different = sizes[sizes > 0].unique()
    return float(different[(len(different) - 1) // 2]) if len(different) else 0.0


def is_separate(network: nn.Module, group: Group, run: Callable[[], Any]) -> bool:
    """Whether the output does not depend on what computes units, if what reads them is zero.

    One half of the units is tried, then the other: their consumers are set to zero, and their producers to other
    values. Weights and buffers have their old values afterwards.

    Args:
        network: The network, as `borrowed` lends it.
        group: The units.
        run: Calls the network once.
    """
    every = named_tensors(network)
    tensors = {one.name: every[one.name].detach() for one in (*group.producers, *group.consumers)}
    chance = torch.Generator().manual_seed(0)
    half = torch.rand(group.size, generator=chance) < 0.5

    def outputs(chosen: Tensor, changed: bool) -> list[Tensor]:
        with lent(tensors):
            for member in group.producers if changed else ():
                _write(tensors, member, chosen, lambda part, name: _other(part, name, chance))
            for member in group.consumers:
                _write(tensors, member, chosen, lambda part, _: torch.zeros_like(part))
            return outputs_of(run)

    for chosen in (half, ~half):
        expected = outputs(chosen, changed=False)
        if not all(are_same(expected, outputs(chosen, changed=True)) for _ in range(_CHANGES)):
            return False
    return True


def _other(part: Tensor, name: str, chance: torch.Generator) -> Tensor:
    """Values of both signs; of variances, positive ones."""
    noise = torch.randn(part.shape, generator=chance).to(part)
    return (noise.abs() if name.endswith("running_var") else noise) * _SCALE * (1 + part.abs().max())


def _write(
    tensors: Mapping[str, Tensor], member: Member, chosen: Tensor, value: Callable[[Tensor, str], Tensor]
) -> None:
    """Give the entries of the chosen units other values."""
    places = (chosen[member.units.clamp(min=0)] & (member.units >= 0)).nonzero().flatten()
    tensor = tensors[member.name]
    places = places.to(tensor.device)
    if len(places):
        part = tensor.index_select(member.dim, places)
        tensor.index_copy_(member.dim, places, value(part, member.name))
