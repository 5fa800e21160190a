"""Whether units can leave a network, tried on the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.network.coupling.cutting import Cut
from lightning_roulette.network.coupling.graph import tensors_in
from lightning_roulette.network.coupling.groups import Group, Member
from lightning_roulette.network.lending import lent, named_tensors

_CLOSE = 1e-6  # allowed difference, relative to the largest output
_ALIKE, _ROUNDINGS = 1e-5, 8  # the same for sums of another order, and at least so many roundings
_SCALE = 10.0  # how far other values of producers exceed their largest entry
_CHANGES = 2  # of the producers
_FAR = 1e3  # an entry that exceeds the median by so much does not count as the largest


def outputs_of(run: Callable[[], Any]) -> list[Tensor]:
    """Copies of what a network returns, without gradients."""
    with torch.no_grad():
        return [one.clone() for one in tensors_in(run())]


def are_same(
    first: Sequence[Tensor], second: Sequence[Tensor], share_of: Callable[[Tensor], float] = lambda _: _CLOSE
) -> bool:
    """Whether two outputs are finite and equal to a share of their largest entries; whole numbers are equal.

    Args:
        first: An output.
        second: Another one.
        share_of: Returns the share for a tensor of the first one. By default six digits are equal.
    """
    return len(first) == len(second) and all(
        is_within(one, other, share_of(one)) for one, other in zip(first, second, strict=True)
    )


def _returns(run: Callable[[], Any], expected: Sequence[Tensor]) -> bool:
    """Whether a network returns these outputs, but for the rounding of sums in another order."""
    return are_same(expected, outputs_of(run), _of_sums)


def _of_sums(one: Tensor) -> float:
    numbers = one.is_floating_point() or one.is_complex()
    return max(_ALIKE, _ROUNDINGS * torch.finfo(one.dtype).eps) if numbers else _ALIKE


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


def why_it_stays(cut: Cut, group: Group, run: Callable[[], Any]) -> str:
    """Why the units of a group cannot leave a network; empty if they can.

    Some units are tried, then the others. Their numbers have no divisor in common, in case the network needs a multiple
    of something.

    - Their consumers are set to zero, and their producers to other values. The output may not depend on these values.
    - They are cut out of the network. It must return the same.

    Weights, buffers and sizes have their old values afterwards.

    Args:
        cut: Of the network, as `borrowed` lends it, without changes.
        group: Two units or more.
        run: Calls the network once.
    """
    trial = _Trial(cut.network, group, run)
    chance = torch.Generator().manual_seed(0)
    some = torch.zeros(group.size, dtype=torch.bool)
    some[torch.randperm(group.size, generator=chance)[: _share(group.size)]] = True
    for chosen in (some, ~some):
        expected = trial.outputs(chosen)
        if not all(are_same(expected, trial.outputs(chosen, chance)) for _ in range(_CHANGES)):
            return f"the output still depends on its {group.word} when nothing reads them"
        try:
            if reason := cut.remove(group, chosen, partial(_returns, run, expected)):
                return reason
        finally:
            cut.take_back()
    return ""


def _share(size: int) -> int:
    """The largest number of at most half of the size that has no divisor in common with it."""
    return next(one for one in range(size // 2, 0, -1) if math.gcd(one, size) == 1)


class _Trial:
    """Calls of a network with other weights of a group."""

    def __init__(self, network: nn.Module, group: Group, run: Callable[[], Any]) -> None:
        every = named_tensors(network)
        self._tensors = {one.name: every[one.name].detach() for one in (*group.producers, *group.consumers)}
        self._group, self._run = group, run

    def outputs(self, chosen: Tensor, chance: torch.Generator | None = None) -> list[Tensor]:
        """What the network returns if the consumers of the chosen units are zero.

        Args:
            chosen: Shape `(size,)`, bool.
            chance: If given, the producers of the chosen units have other values.
        """
        tensors = self._tensors
        with lent(tensors):
            if chance is not None:
                for member in self._group.producers:
                    _write(tensors, member, chosen, lambda part, name: _other(part, name, chance))
            for member in self._group.consumers:
                _write(tensors, member, chosen, lambda part, _: torch.zeros_like(part))
            return outputs_of(self._run)


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
