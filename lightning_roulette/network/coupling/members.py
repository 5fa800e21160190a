"""From what channels reach to the units of a group, or to the reason why they cannot leave."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_roulette.network.coupling.graph import Reached, passes_channels
from lightning_roulette.network.coupling.groups import Group, Member
from lightning_roulette.network.kinds import affine_kind_of
from lightning_roulette.network.parameters import TRANSPOSED

_MIXING = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm) if hasattr(nn, "RMSNorm") else (nn.LayerNorm, nn.GroupNorm)


class Immovable(Exception):  # it is a finding, not an error
    """Units cannot leave; the message is the reason."""


@dataclass(frozen=True, eq=False)
class _Axis:
    """One dimension of a tensor along which channels lie.

    Attributes:
        name: Name of the tensor in the network.
        dim: The dimension.
        size: Its size.
        period: Indices that differ by a multiple of it are one unit, as the groups of a convolution keep equal sizes.
        reads: Whether the channels are inputs.
        indices: Index of the dimension for each channel that lies there, shape `(k,)`.
        channels: The channel of the first layer, shape `(k,)`.
    """

    name: str
    dim: int
    size: int
    period: int
    reads: bool
    indices: Tensor
    channels: Tensor


def group_of(name: str, found: Sequence[Reached], shared: Collection[str]) -> Group:
    """The units that the output channels of a layer belong to.

    Args:
        name: Name of the layer.
        found: What the channels reach, the layer itself first.
        shared: Names of parameters that are tied to others.

    Raises:
        Immovable: If they cannot leave.
    """
    if not found:
        raise Immovable("its units cannot be followed")
    for one in found:
        _check(one)
    axes = [axis for one in found for axis in _axes(one)]
    if not any(axis.reads for axis in axes):
        raise Immovable("its units are outputs of the network, or no layer reads them")
    if tied := next((axis.name for axis in axes if axis.name in shared), None):
        raise Immovable(f"{tied} is tied to another parameter")
    numbers = _united(axes)
    members = [Member(axis.name, axis.dim, _units(axis, numbers)) for axis in axes]
    return Group(
        name,
        "neuron",
        int(numbers.max()) + 1,
        tuple(one for one, axis in zip(members, axes, strict=True) if not axis.reads),
        tuple(one for one, axis in zip(members, axes, strict=True) if axis.reads),
    )


def _check(one: Reached) -> None:
    """Raise if the channels reach what they cannot leave."""
    if one.is_output:
        raise Immovable("its units are outputs of the network")
    if isinstance(one.target, _MIXING):
        raise Immovable(f"its units pass {one.name}, which mixes them")
    if isinstance(one.target, nn.MultiheadAttention):
        raise Immovable(f"its units pass {one.name}, whose width is divided into heads")
    if isinstance(one.target, nn.RNNBase | nn.RNNCellBase):
        raise Immovable(f"its units pass the recurrent layer {one.name}")
    if isinstance(one.target, TRANSPOSED) and passes_channels(one.target):
        raise Immovable(f"its units pass {one.name}, a transposed convolution of single channels")


def _axes(one: Reached) -> Iterator[_Axis]:
    """Yield the dimensions of tensors on which channels lie where they reach a module or a parameter."""
    if one.name is None:
        return
    if isinstance(one.target, nn.Parameter):
        yield _axis(one, one.name, one.target, one.dim % one.target.dim())
        return
    prefix = f"{one.name}." if one.name else ""
    for own, tensor, dim in _dimensions(one.target, one.reads):
        if tensor is None:
            raise Immovable(f"{prefix}{own} is computed from other parameters")
        yield _axis(one, prefix + own, tensor, dim)


def _dimensions(part: nn.Module, reads: bool) -> Iterator[tuple[str, Tensor | None, int]]:
    """Yield the tensors of a module that have a dimension for its inputs, or for its outputs."""
    kind = affine_kind_of(part)
    if isinstance(part, _ConvNd) and passes_channels(part) and reads:
        return  # what is read here leaves with the outputs
    if isinstance(part, nn.Linear | _ConvNd) or kind is not None:
        weight, bias = ("weight", "bias") if kind is None else (kind.weight, kind.bias)
        turned = isinstance(part, TRANSPOSED) if kind is None else kind.transposed
        yield weight, part._parameters.get(weight), int(reads != turned)
        if not reads and bias is not None and getattr(part, bias, None) is not None:
            yield bias, part._parameters.get(bias), 0
    elif isinstance(part, _NormBase):
        for own in ("weight", "bias", "running_mean", "running_var"):
            if getattr(part, own) is not None:
                yield own, getattr(part, own), 0
    elif isinstance(part, nn.PReLU):
        if part.num_parameters > 1:
            yield "weight", part.weight, 0
    elif isinstance(part, nn.Embedding):
        yield "weight", part._parameters.get("weight"), 1


def _axis(one: Reached, name: str, tensor: Tensor, dim: int) -> _Axis:
    pairs = torch.tensor(sorted(one.indices), dtype=torch.int64).reshape(-1, 2)
    size = tensor.shape[dim]
    width, groups = _width(one, size)
    if int(pairs[:, 0].max()) >= width:
        raise Immovable(f"its units cannot be followed to {one.name}")
    return _Axis(name, dim, size, width // groups, one.reads, pairs[:, 0] % size, pairs[:, 1])


def _width(one: Reached, size: int) -> tuple[int, int]:
    """Number of channels on a side of a layer, and into how many groups of one size they are divided."""
    if not isinstance(one.target, _ConvNd):
        return size, 1
    width = one.target.in_channels if one.reads else one.target.out_channels
    return width, 1 if passes_channels(one.target) else one.target.groups


def _united(axes: Sequence[_Axis]) -> Tensor:
    """Number of the unit of each channel of the first layer: channels that share an index are one unit."""
    channels = max(int(axis.channels.max()) for axis in axes) + 1
    labels, before = torch.arange(channels), torch.full((channels,), -1)
    while not torch.equal(labels, before):
        before = labels.clone()
        for axis in axes:
            places = axis.indices % axis.period
            least = torch.full((axis.period,), channels).scatter_reduce(0, places, labels[axis.channels], "amin")
            labels = labels.scatter_reduce(0, axis.channels, least[places], "amin")
    numbers: Tensor = torch.unique(labels, return_inverse=True)[1]
    return numbers


def _units(axis: _Axis, numbers: Tensor) -> Tensor:
    units = torch.full((axis.size,), -1)
    units[axis.indices] = numbers[axis.channels]
    return units
