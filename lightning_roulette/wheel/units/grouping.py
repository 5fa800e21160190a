"""`units_of`: the units of a network, found by how its layers are coupled."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.network.coupling.coupling import coupling_of
from lightning_roulette.network.coupling.groups import Coupling, Group, Member
from lightning_roulette.network.lending import named_tensors
from lightning_roulette.network.parameters import prunable_parameters
from lightning_roulette.unit import Block, Head, Neuron, NofM, Reduction, Unit, Weight, unit_of
from lightning_roulette.wheel.units.blocks import blocks_of
from lightning_roulette.wheel.units.costs import Groups, costs_of
from lightning_roulette.wheel.units.nofm import neighbours_of
from lightning_roulette.wheel.units.units import Cost, Part, Units

# what finds units without tracing: a function of the network, the names of its prunable weights, the unit, and what
# weights cost (None: each costs 1)
FINDERS: dict[type[Unit], Callable[[nn.Module, Collection[str], Any, Cost | None], Units]] = {
    Block: blocks_of,
    NofM: neighbours_of,
}


def units_of(
    network: nn.Module,
    example_input: Any = None,
    *,
    unit: str | Unit = "neuron",
    weights: Mapping[str, Tensor] | None = None,
    target: Reduction | None = None,
) -> Units:
    """Return the units of a network, for `search`.

    Neurons and heads are found by tracing the network. A group of them is left out, with the reason in `kept_whole`, if
    not all of its weights are prunable, or if the output of the network would still depend on a unit after it has left;
    see `coupling_of`.

    Args:
        network: The network.
        example_input: What its forward is called with: a tensor, a tuple of arguments, or a mapping of named arguments.
            The first dimension of its tensors counts the samples. None: without an example, for an `NofM` or a `Block`
            without a target.
        unit: What leaves as a whole, see `Wheel`.
        weights: The prunable weights by name. None: `prunable_parameters(network)`.
        target: What decides how much leaves, as in `Tree(target=...)`. None: units cost their weights.

    Returns:
        For each unit the weights that are zero without it, and its cost; and what was left out, with the reason.

    Raises:
        ImportError: If the extra `units` is not installed.
        TypeError: If `unit` is no unit, or `example_input` is none of these.
        ValueError: If the network cannot be called with the input, if it is needed and None, or if no unit may leave.
    """
    kind, weights = unit_of(unit), prunable_parameters(network) if weights is None else weights
    if isinstance(kind, Weight):
        raise ValueError("unit is Weight(), but single weights need no units. Leave units out of the search.")
    if not isinstance(kind, Neuron | Head) and type(kind) not in FINDERS:
        known = ", ".join(f"{one.__name__}(...)" for one in FINDERS)
        raise TypeError(f"unit is {kind!r}, but nothing finds such units. Pass 'neuron', 'head' or one of {known}.")
    if example_input is None and (target is not None or isinstance(kind, Neuron | Head)):
        raise ValueError(
            f"example_input is None, but {kind!r} with the target {target!r} needs one. Pass a batch of inputs."
        )
    if isinstance(kind, Neuron | Head):
        return _coupled(network, example_input, kind, weights, target)
    find = FINDERS[type(kind)]
    if example_input is None:
        return find(network, list(weights), kind, None)
    cost, multiply_adds = costs_of(Groups(network, (), weights), target, example_input)
    return replace(find(network, list(weights), kind, cost), multiply_adds=multiply_adds)


def _coupled(
    network: nn.Module,
    example_input: Any,
    kind: Neuron | Head,
    weights: Mapping[str, Tensor],
    target: Reduction | None,
) -> Units:
    """Return neurons or heads."""
    groups, kept_whole = _movable(coupling_of(network, example_input), kind, weights, named_tensors(network))
    cost, multiply_adds = costs_of(Groups(network, tuple(groups), weights), target, example_input)
    used = [one for one in groups if any(member.name in multiply_adds.each for member in one.consumers)]
    kept_whole |= {one.name: "the network does not use it on the example" for one in groups if one not in used}
    word = type(kind).__name__.lower()
    if not used:
        why = "; ".join(f"{name or 'the layer'}: {reason}" for name, reason in list(kept_whole.items())[:3])
        raise ValueError(f"no {word} of this network may leave ({why}). Pass unit='weight'.")
    found = Groups(network, tuple(used), weights)
    if len(used) < len(groups):
        cost, multiply_adds = costs_of(found, target, example_input)
    steps = {name: _step(group, kind) for name, group in zip(found.sizes, used, strict=True)}
    return Units(word, found.sizes, tuple(_parts(found)), cost, multiply_adds, kept_whole, steps)


def _movable(
    coupling: Coupling, kind: Unit, weights: Collection[str], tensors: Mapping[str, Tensor]
) -> tuple[list[Group], dict[str, str]]:
    """Return the groups of this kind whose weights are all prunable, and the layers of others with the reason."""
    groups, kept_whole = [], {}
    for group in coupling.groups:
        if isinstance(kind, Neuron) or group.kind == "head":
            if fixed := [name for name in _matrices(group, tensors) if name not in weights]:
                kept_whole[group.name] = f"{fixed[0]} is not prunable"
            elif group.size <= (step := _step(group, kind)):
                kept_whole[group.name] = f"it has {group.size} {group.word}, of which a multiple of {step} stays"
            else:
                groups.append(group)
    return groups, kept_whole | (dict(coupling.left) if isinstance(kind, Neuron) else {})


def _step(group: Group, kind: Unit) -> int:
    """Return the number of which a multiple of the units stays: each may be several channels, as a head is."""
    if not isinstance(kind, Neuron):
        return 1
    channels = group.consumers[0] if group.kind == "head" else group.producers[0]
    each = int((channels.units >= 0).sum()) // group.size
    return kind.multiple_of // math.gcd(kind.multiple_of, each)


def _matrices(group: Group, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the names of all that must be pruned for a unit to leave: what reads it, and what multiplies for it."""
    yield from (one.name for one in group.consumers)
    for one in group.producers:
        if tensors[one.name].dim() > 1 and "bias" not in one.name.rpartition(".")[2]:
            yield one.name


def _parts(found: Groups) -> Iterator[Part]:
    """Yield the entries of prunable weights that leave with units."""
    for start, group in zip(found.starts, found.groups, strict=True):
        for members, reads in ((group.producers, False), (group.consumers, True)):
            for one in members:
                if one.name in found.weights:
                    yield Part(one.name, _labels(one, start, found.weights[one.name].dim()), reads)


def _labels(member: Member, start: int, dims: int) -> Tensor:
    """Return the numbers of the units of a dimension, in a shape that broadcasts to the tensor."""
    numbers = torch.where(member.units < 0, -1, member.units + start)
    return numbers.view([-1 if dim == member.dim else 1 for dim in range(dims)])
