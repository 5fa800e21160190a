"""Layers as affine maps: weights as matrices, and the rows of input that they are multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_roulette.large.devices import with_float64
from lightning_roulette.network.parameters import (
    parts_of_metrics,
)
from lightning_roulette.network.windows import Chosen

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
        turn: Layers of one module are solved in this order, as the inputs of later ones depend on those before.
        recurrent: Whether its inputs depend on its own outputs at other rows.
    """

    columns: tuple[Columns, ...]
    module: nn.Module
    bias: str | None
    offsets: slice = field(default_factory=lambda: slice(0, None))
    turn: int = 0
    recurrent: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that hold `W`."""
        return tuple(one.name for one in self.columns)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters that a refit of the layer may change."""
        return self.names if self.bias is None else (*self.names, self.bias)

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
    """The input of a batch normalisation, float32 or float64, shape `(samples, channels, positions)`.

    Args:
        arguments: Positional arguments of the module's forward.
        named: Keyword arguments of the module's forward.
    """
    inputs = with_float64(argument(0, "input")(arguments, named).detach())
    return inputs.to(torch.promote_types(inputs.dtype, torch.float32)).unsqueeze(-1).flatten(2)


def some_outputs(outputs: slice) -> Callable[[Tensor], Tensor]:
    """The view of some outputs of a weight of shape `(outputs, inputs)`, for `Columns`."""
    return lambda weight: weight[None, outputs]


def flat(inputs_of: Argument) -> Rows:
    """Rows of an argument that a weight is multiplied with on its last dimension, for `Columns`."""

    def rows(arguments: tuple[Any, ...], named: Mapping[str, Any], chosen: Chosen) -> Tensor:
        inputs = inputs_of(arguments, named)
        positions = inputs.reshape(-1, inputs.shape[-1])
        return positions[chosen(len(positions)).to(positions.device)].unsqueeze(0)

    return rows


def free(part: nn.Module, path: str, own: str, shared: Collection[str]) -> str | None:
    """The name of a bias that may change; None if it is missing, frozen, tied or computed from other tensors."""
    bias, name = part._parameters.get(own), f"{path}{own}"
    return name if bias is not None and bias.requires_grad and name not in shared else None


def argument(place: int, name: str) -> Argument:
    """The argument of a forward at a place, or of a name."""

    def found_in(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
        found = arguments[place] if len(arguments) > place else named[name]
        assert isinstance(found, Tensor)
        return found

    return found_in
