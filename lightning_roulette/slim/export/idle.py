"""Outputs of layers that do nothing are removed: those that are constant, and those that nothing uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_roulette.network.coupling.check import is_within
from lightning_roulette.slim.export.operations import (
    Activate,
    Add,
    Conv2d,
    Linear,
    Operation,
    Pad,
    Pool2d,
    Program,
    Reshape,
    Value,
    Weighted,
    inputs_of,
)
from lightning_roulette.slim.export.reference import run

_Between: TypeAlias = Pool2d | Pad | Reshape | Activate | Conv2d


@dataclass(frozen=True, eq=False)
class _Link:
    """A layer whose outputs reach one other layer and nothing else.

    Attributes:
        first: The layer that makes them.
        between: Operations on the way that keep channels apart. Convolutions among them are depthwise.
        last: The layer that uses them.
    """

    first: Weighted
    between: tuple[_Between, ...]
    last: Weighted


def slimmed(program: Program, example: Tensor) -> Program:
    """Return a program without idle outputs; the program itself where rounding makes their outputs differ."""
    slim = without_idle(program)
    expected, found = run(program, example), run(slim, example)
    return slim if is_within(expected, found, 1e-5, 1.0) else program


def without_idle(program: Program) -> Program:
    """Return a program with the same outputs, up to rounding, in which no removable output of a layer is idle.

    An output is idle if all weights of the next layer for it are zero, or if all its own weights are zero: it is then
    the constant that its bias gives, and is added to the biases of the next layer. Outputs are removed between two
    layers with only depthwise convolutions, pooling, padding, activations and reshapes between them. A depthwise
    convolution loses the same channels; one whose weights are zero is constant, too. Other grouped convolutions and
    sums keep theirs.
    """
    while True:
        found = next(((link, idle) for link in _links(program) if bool((idle := _idle(link)).any())), None)
        if found is None:
            return program
        program = _removed(program, *found)


def _links(program: Program) -> Iterator[_Link]:
    users: dict[str, list[Operation]] = {}
    for one in program.operations:
        for value in inputs_of(one):
            users.setdefault(value.name, []).append(one)
    for one in program.operations:
        if isinstance(one, (Linear, Conv2d)) and _separate(one) and (link := _link(program, one, users)):
            yield link


def _link(program: Program, first: Weighted, users: Mapping[str, list[Operation]]) -> _Link | None:
    """Return the link that begins with a layer, if there is one."""
    between: list[_Between] = []
    value = first.output
    while value.name != program.output.name and len(users[value.name]) == 1:
        (one,) = users[value.name]
        if isinstance(one, (Linear, Conv2d)) and _separate(one):
            return _Link(first, tuple(between), one)
        if isinstance(one, (Linear, Add)) or not _keeps_channels_apart(one, len(first.weight)):
            return None
        between.append(one)
        value = one.output
    return None


def _separate(layer: Weighted) -> bool:
    return isinstance(layer, Linear) or layer.groups == 1


def _keeps_channels_apart(one: _Between, channels: int) -> bool:
    if isinstance(one, Conv2d):
        return one.groups == len(one.weight) == channels
    return one.output.shape[0] % channels == 0


def _idle(link: _Link) -> Tensor:
    """Return which outputs of the first layer may be removed, bool. One output is always kept."""
    uses = _by_output(link).ne(0).flatten(2).any(2).any(0)
    idle = ~uses | _constants(link)[0]
    if bool(idle.all()):
        idle[0] = False
    return idle


def _by_output(link: _Link) -> Tensor:
    """Return the weights of the last layer, shape `(its outputs, outputs of the first layer, ...)`."""
    return link.last.weight.reshape(len(link.last.weight), len(link.first.weight), -1)


def _constants(link: _Link) -> tuple[Tensor, Tensor]:
    """Return which outputs of the first layer are constant where the last one reads them, bool, and what they are."""
    value = torch.zeros(len(link.first.weight), dtype=torch.float64)
    known = torch.zeros(len(value), dtype=torch.bool)
    for one in (link.first, *link.between):
        if _is_padded(one):
            known &= value == 0
        if isinstance(one, (Linear, Conv2d)):
            weights = one.weight.double().flatten(1)
            value = one.bias.double() + torch.where(known, value, 0.0) * weights.sum(1)
            known = known | ~weights.ne(0).any(1)
        if isinstance(one, (Linear, Conv2d, Activate)) and one.activation != "none":
            value = value.clamp(0, 6 if one.activation == "relu6" else None)
    return known & (value == 0) if _is_padded(link.last) else known, value


def _is_padded(one: Operation) -> bool:
    return isinstance(one, Pad) or (isinstance(one, Conv2d) and any(one.padding))


def _removed(program: Program, link: _Link, idle: Tensor) -> Program:
    """Return the program without some outputs of the first layer of a link."""
    constant = torch.where(idle, _constants(link)[1], 0.0)
    weights = _by_output(link)
    bias = link.last.bias.double() + weights.double().flatten(2).sum(2) @ constant
    kept = ~idle
    left = weights[:, kept].reshape(len(weights), -1, *link.last.weight.shape[2:])
    values = {one.output.name: _smaller(one.output, kept) for one in (link.first, *link.between)}
    first = replace(link.first, weight=link.first.weight[kept], bias=link.first.bias[kept])
    last = replace(link.last, weight=left, bias=bias.float())
    changed: dict[str, Operation] = {link.first.output.name: first, link.last.output.name: last}
    for one in link.between:
        if isinstance(one, Conv2d):
            part = replace(one, weight=one.weight[kept], bias=one.bias[kept], groups=int(kept.sum()))
            changed[one.output.name] = part
    operations = (_with_values(changed.get(one.output.name, one), values) for one in program.operations)
    return replace(program, operations=tuple(operations))


def _smaller(value: Value, kept: Tensor) -> Value:
    channels = value.shape[0] // len(kept) * int(kept.sum())
    return Value(value.name, (channels, *value.shape[1:]))


def _with_values(one: Operation, values: Mapping[str, Value]) -> Operation:
    """Return an operation whose values have their new shapes."""
    if isinstance(one, Add):  # no value of a link is summed
        return one
    output = values.get(one.output.name, one.output)
    return replace(one, input=values.get(one.input.name, one.input), output=output)
