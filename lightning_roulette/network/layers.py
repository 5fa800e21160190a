"""Layers as affine maps: a weight as matrices, and the rows of input that it is multiplied with."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_roulette.large.devices import with_float64
from lightning_roulette.network.kinds import affine_kind_of
from lightning_roulette.network.parameters import CONVOLUTIONS, LINEAR_MAPS, aliases, owners_of, parts_of_metrics
from lightning_roulette.network.ties import ties_of

# Takes the positional and the keyword arguments of a module's forward. Returns the input of one of its layers.
Inputs = Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """An affine map `y = W x + b` that a module applies to rows `x` of its input, one map for each group of channels.

    Attributes:
        name: Name of the parameter that holds `W`.
        module: The module that applies the map.
        bias: Name of the parameter that holds `b`; None if there is no bias or if it must not change.
        outputs: The outputs of the weight that belong to this layer.
        offsets: The part of the bias that belongs to this layer.
        groups: Number of maps. Each has its own inputs.
        inputs: Returns the layer's input from the arguments of the module's forward.
        transposed: Whether the weight is a matrix of shape `(inputs, outputs)`.
    """

    name: str
    module: nn.Module
    bias: str | None
    outputs: slice
    offsets: slice
    groups: int
    inputs: Inputs
    transposed: bool = False

    def part(self, weight: Tensor) -> Tensor:
        """The part of a weight that belongs to this layer, a view with outputs as its first dimension."""
        return (weight.detach().mT if self.transposed else weight.detach())[self.outputs]

    def matrices(self, weight: Tensor) -> Tensor:
        """`W` as matrices, shape `(groups, outputs, inputs)`; a view if `weight` is contiguous."""
        part = self.part(weight)
        return part.reshape(self.groups, len(part) // self.groups, -1)

    def rows(self, arguments: tuple[Any, ...], named: Mapping[str, Any], chosen: Callable[[int], Tensor]) -> Tensor:
        """Some rows of input. A row is one position of one sample.

        Args:
            arguments: Positional arguments of the module's forward.
            named: Keyword arguments of the module's forward.
            chosen: Takes the number of rows and returns the indices of some of them.

        Returns:
            Float64, shape `(groups, rows, inputs)`.
        """
        inputs = self.inputs(arguments, named).detach()
        if isinstance(self.module, CONVOLUTIONS):
            found = _patches(self.module, inputs, chosen)
        else:
            flat = inputs.reshape(-1, inputs.shape[-1])
            found = flat[chosen(len(flat)).to(flat.device)].unsqueeze(0)
        return with_float64(found).to(torch.float64)


def layers_of(module: nn.Module, names: Collection[str]) -> tuple[list[Layer], dict[str, str]]:
    """The layers of a network that can be refitted.

    These are:

    - Linear,
    - Conv1d, Conv2d and Conv3d,
    - the projections of queries, keys and values in MultiheadAttention,
    - transformers' `Conv1D`, and classes that `register_layer` names.

    Subclasses count if they do not override `forward`.

    Args:
        module: The network.
        names: Names of some of its parameters.

    Returns:
        - The layers whose weights have these names.
        - The other parameters by name, each with the reason why it is not the weight of a layer.
    """
    shared = {name for known in aliases(module).values() if len(known) > 1 for name in known}
    shared |= {name for tie in ties_of(module) for name in tie.names}
    found: list[Layer] = []
    for prefix, part in module.named_modules():
        path = f"{prefix}." if prefix else ""
        found += [one for one in _layers(part, path, shared) if one.name in names and one.name not in shared]
    covered = {one.name for one in found}
    owners = owners_of(module)
    biases = {one.bias for one in found}
    others = {name: _why_not(*owners[name], name in shared) for name in names if name not in covered | biases}
    return found, others


def _why_not(owner: nn.Module, own: str, shared: bool) -> str:
    """The reason why a parameter is not the weight of a layer."""
    kind = type(owner).__name__
    if shared:
        return "not supported for tied weights"
    if not _computes_as_usual(owner):
        return f"not supported for {kind}: it overrides forward"
    return f"not supported for {own} of {kind}"


def _computes_as_usual(part: nn.Module) -> bool:
    """Whether a module computes what its known class computes, because nothing overrides `forward`."""
    affine = affine_kind_of(part)
    kinds = (*LINEAR_MAPS, nn.MultiheadAttention) if affine is None else (affine.kind,)
    usual = next((kind for kind in kinds if isinstance(part, kind)), None)
    if usual is None:
        return True
    names = ("forward", "_conv_forward")
    own = any(name in vars(part) for name in names)
    return not own and all(getattr(type(part), name, None) is getattr(usual, name, None) for name in names)


def batch_norms_of(module: nn.Module) -> dict[str, _BatchNorm]:
    """The batch normalisations with running statistics, by the prefix of their buffers' names.

    Those with a frozen scale and those inside metrics are left out, because they belong to networks that are not
    pruned.
    """
    inside = parts_of_metrics(module)
    return {
        f"{prefix}." if prefix else "": part
        for prefix, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.running_mean is not None and part.running_var is not None
        if part not in inside and (part.weight is None or part.weight.requires_grad)
    }


def channels(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """The input of a batch normalisation, float64, shape `(rows, channels)`.

    Args:
        arguments: Positional arguments of the module's forward.
        named: Keyword arguments of the module's forward.
    """
    inputs = with_float64(_argument(0, "input")(arguments, named).detach()).to(torch.float64)
    return inputs.movedim(1, -1).reshape(-1, inputs.shape[1])


_ALL = slice(0, None)


def _layers(part: nn.Module, path: str, shared: Collection[str]) -> list[Layer]:
    if not _computes_as_usual(part):
        return []
    if (kind := affine_kind_of(part)) is not None:
        bias = None if kind.bias is None else _free(part, path, kind.bias, shared)
        inputs = _argument(0, kind.argument)
        return [Layer(f"{path}{kind.weight}", part, bias, _ALL, _ALL, 1, inputs, kind.transposed)]
    if isinstance(part, LINEAR_MAPS):
        groups = 1 if isinstance(part, nn.Linear) else part.groups
        bias = _free(part, path, "bias", shared)
        return [Layer(f"{path}weight", part, bias, _ALL, _ALL, groups, _argument(0, "input"))]
    if isinstance(part, nn.MultiheadAttention):
        return _projections(part, path, shared)
    return []


def _projections(part: nn.MultiheadAttention, path: str, shared: Collection[str]) -> list[Layer]:
    """The projections of queries, keys and values. The module of the output projection is not called."""
    found, bias = [], _free(part, path, "in_proj_bias", shared)
    for place, word in enumerate(("query", "key", "value")):
        offsets = slice(place * part.embed_dim, (place + 1) * part.embed_dim)
        joint = part.in_proj_weight is not None
        name, outputs = ("in_proj_weight", offsets) if joint else (f"{word[0]}_proj_weight", _ALL)
        found.append(Layer(f"{path}{name}", part, bias, outputs, offsets, 1, _argument(place, word)))
    return found


def _free(part: nn.Module, path: str, own: str, shared: Collection[str]) -> str | None:
    """The name of a bias that may change; None if it is missing, frozen, tied or computed from other tensors."""
    bias, name = part._parameters.get(own), f"{path}{own}"
    return name if bias is not None and bias.requires_grad and name not in shared else None


def _argument(place: int, name: str) -> Inputs:
    def inputs(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
        found = arguments[place] if len(arguments) > place else named[name]
        assert isinstance(found, Tensor)
        return found

    return inputs


def _patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor, chosen: Callable[[int], Tensor]) -> Tensor:
    """The inputs that the kernel covers at some positions, shape `(groups, rows, inputs)`."""
    dims = len(module.kernel_size)
    batch = inputs if inputs.dim() == dims + 2 else inputs.unsqueeze(0)
    border = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = pad(batch, border, mode=mode) if any(border) else batch
    for dim in range(dims):
        reach = (module.kernel_size[dim] - 1) * module.dilation[dim] + 1
        windows = windows.unfold(dim + 2, reach, module.stride[dim])[..., :: module.dilation[dim]]
    positions = (batch.shape[0], *windows.shape[2 : 2 + dims])  # (samples, channels, positions..., kernel...)
    where = torch.unravel_index(chosen(math.prod(positions)).to(batch.device), positions)
    rows = windows.movedim(1, 1 + dims)[where]  # (rows, channels, kernel...)
    return rows.reshape(len(rows), module.groups, -1).movedim(1, 0)
