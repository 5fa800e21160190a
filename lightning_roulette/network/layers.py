"""Layers as affine maps: weights as matrices, and the rows of input that they are multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_roulette.large.devices import with_float64
from lightning_roulette.network.kinds import AffineKind, affine_kind_of
from lightning_roulette.network.parameters import (
    CONVOLUTIONS,
    LINEAR_MAPS,
    TRANSPOSED,
    aliases,
    owners_of,
    parts_of_metrics,
)
from lightning_roulette.network.ties import ties_of
from lightning_roulette.network.windows import Chosen, output_size, patches, spread_patches

# Takes the positional and the keyword arguments of a module's forward, and what chooses rows. Returns some rows of
# input, shape `(groups, rows, inputs)`. A row is one position of one sample.
Rows = Callable[[tuple[Any, ...], Mapping[str, Any], Chosen], Tensor]

# Takes the positional and the keyword arguments of a module's forward. Returns one of them.
Argument = Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor]


@dataclass(frozen=True, eq=False)
class Columns:
    """Some columns of a layer's matrices: a parameter, or a part of it, and the inputs that it is multiplied with.

    Attributes:
        name: Name of the parameter.
        view: Returns a view of the parameter, or of its part, with the shape `(groups, outputs, inputs...)`.
        rows: Returns some rows of the inputs.
    """

    name: str
    view: Callable[[Tensor], Tensor]
    rows: Rows


@dataclass(frozen=True, eq=False)
class Layer:
    """An affine map `y = W x + b` that a module applies to rows `x` of its input, one map for each group of channels.

    Attributes:
        columns: What `W` is made of. Several parameters are side by side, and so are their inputs in `x`.
        module: The module that applies the map.
        bias: Name of the parameter that holds `b`; None if there is no bias or if it must not change.
        offsets: The part of the bias that belongs to this layer.
    """

    columns: tuple[Columns, ...]
    module: nn.Module
    bias: str | None
    offsets: slice = field(default_factory=lambda: slice(0, None))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that hold `W`."""
        return tuple(one.name for one in self.columns)

    def matrices(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """`W` as matrices, shape `(groups, outputs, inputs)`.

        Args:
            tensors: The parameters that hold `W`, or others of their shapes, by name.
        """
        found = [one.view(with_float64(tensors[one.name].detach())).flatten(2) for one in self.columns]
        return found[0] if len(found) == 1 else torch.cat(found, 2)

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor], matrices: Tensor) -> None:
        """Write `W` into the parameters that hold it.

        Args:
            tensors: The parameters, or others of their shapes, by name.
            matrices: Shape `(groups, outputs, inputs)`. Further columns are ignored.
        """
        start = 0
        for one in self.columns:
            view = one.view(tensors[one.name].detach())
            end = start + view[0, 0].numel()
            view.copy_(matrices[..., start:end].reshape(view.shape))
            start = end

    def rows(self, arguments: tuple[Any, ...], named: Mapping[str, Any], chosen: Chosen) -> Tensor:
        """Some rows of input.

        Args:
            arguments: Positional arguments of the module's forward.
            named: Keyword arguments of the module's forward.
            chosen: Takes the number of rows and returns the indices of some of them.

        Returns:
            Shape `(groups, rows, inputs)`, of the type of the input, but at least float32.
        """
        found = [with_float64(one.rows(arguments, named, chosen).detach()) for one in self.columns]
        whole = found[0] if len(found) == 1 else torch.cat(found, 2)
        return whole.to(torch.promote_types(whole.dtype, torch.float32))


def layers_of(module: nn.Module, names: Collection[str]) -> tuple[list[Layer], dict[str, str]]:
    """The layers of a network that can be refitted.

    These are:

    - Linear,
    - Conv1d, Conv2d and Conv3d, and their transposed forms,
    - the projections of queries, keys and values in MultiheadAttention,
    - transformers' `Conv1D`, and classes that `register_layer` names.

    Subclasses count if they do not override `forward`.

    Args:
        module: The network.
        names: Names of some of its parameters.

    Returns:
        - The layers whose weights have these names. If a layer has several weights, the others are left out of it.
        - The other parameters by name, each with the reason why it is not the weight of a layer.
    """
    shared = {name for known in aliases(module).values() if len(known) > 1 for name in known}
    shared |= {name for tie in ties_of(module) for name in tie.names}
    free = {*names} - shared
    found: list[Layer] = []
    for prefix, part in module.named_modules():
        whole = _layers(part, f"{prefix}." if prefix else "", shared)
        limited = [replace(one, columns=tuple(each for each in one.columns if each.name in free)) for one in whole]
        found += [one for one in limited if one.columns]
    covered = {name for one in found for name in (*one.names, one.bias)}
    owners = owners_of(module)
    return found, {name: _why_not(*owners[name], name in shared) for name in names if name not in covered}


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
    kinds = (*LINEAR_MAPS, *TRANSPOSED, nn.MultiheadAttention) if affine is None else (affine.kind,)
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


def _layers(part: nn.Module, path: str, shared: Collection[str]) -> list[Layer]:
    if not _computes_as_usual(part):
        return []
    if (kind := affine_kind_of(part)) is not None:
        return [_affine(part, kind, path, shared)]
    if isinstance(part, nn.MultiheadAttention):
        return _projections(part, path, shared)
    columns = _columns(part, f"{path}weight")
    return [] if columns is None else [Layer((columns,), part, _free(part, path, "bias", shared))]


def _affine(part: nn.Module, kind: AffineKind, path: str, shared: Collection[str]) -> Layer:
    columns = Columns(
        f"{path}{kind.weight}", lambda weight: kind.matrix(weight)[None], flat(_argument(0, kind.argument))
    )
    return Layer((columns,), part, None if kind.bias is None else _free(part, path, kind.bias, shared))


def _columns(part: nn.Module, name: str) -> Columns | None:
    """The columns of a module of torch with one weight and one input; None for other modules."""
    inputs = _argument(0, "input")
    if isinstance(part, nn.Linear):
        return Columns(name, lambda weight: weight[None], flat(inputs))
    if isinstance(part, CONVOLUTIONS):
        return Columns(
            name,
            lambda weight: weight.unflatten(0, (part.groups, -1)),
            lambda arguments, named, chosen: patches(part, inputs(arguments, named), chosen),
        )
    if isinstance(part, TRANSPOSED):
        return Columns(
            name,
            lambda weight: weight.unflatten(0, (part.groups, -1)).transpose(1, 2),
            lambda *given: spread_patches(part, inputs(*given[:2]), output_size(*given[:2]), given[2]),
        )
    return None


def _projections(part: nn.MultiheadAttention, path: str, shared: Collection[str]) -> list[Layer]:
    """The projections of queries, keys and values. The module of the output projection is not called."""
    found, bias = [], _free(part, path, "in_proj_bias", shared)
    for place, word in enumerate(("query", "key", "value")):
        offsets = slice(place * part.embed_dim, (place + 1) * part.embed_dim)
        joint = part.in_proj_weight is not None
        name, outputs = ("in_proj_weight", offsets) if joint else (f"{word[0]}_proj_weight", slice(0, None))
        columns = Columns(f"{path}{name}", outputs_of(outputs), flat(_argument(place, word)))
        found.append(Layer((columns,), part, bias, offsets))
    return found


def outputs_of(outputs: slice) -> Callable[[Tensor], Tensor]:
    """The view of some outputs of a weight of shape `(outputs, inputs)`, for `Columns`."""
    return lambda weight: weight[None, outputs]


def flat(argument: Argument) -> Rows:
    """Rows of an argument that a weight is multiplied with on its last dimension, for `Columns`."""

    def rows(arguments: tuple[Any, ...], named: Mapping[str, Any], chosen: Chosen) -> Tensor:
        inputs = argument(arguments, named)
        positions = inputs.reshape(-1, inputs.shape[-1])
        return positions[chosen(len(positions)).to(positions.device)].unsqueeze(0)

    return rows


def _free(part: nn.Module, path: str, own: str, shared: Collection[str]) -> str | None:
    """The name of a bias that may change; None if it is missing, frozen, tied or computed from other tensors."""
    bias, name = part._parameters.get(own), f"{path}{own}"
    return name if bias is not None and bias.requires_grad and name not in shared else None


def _argument(place: int, name: str) -> Argument:
    def argument(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
        found = arguments[place] if len(arguments) > place else named[name]
        assert isinstance(found, Tensor)
        return found

    return argument
