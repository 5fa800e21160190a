"""The projections of `nn.MultiheadAttention` as affine maps."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.large.precision import full_precision
from lightning_roulette.network.layers import Columns, Layer, argument, flat, free, some_outputs


def attention_layers(part: nn.MultiheadAttention, path: str, shared: Collection[str]) -> list[Layer]:
    """The projections of queries, keys and values, and the output projection, which has a higher turn.

    Args:
        part: The module.
        path: Prefix of the names of its parameters.
        shared: Names of parameters that are tied to others.
    """
    found, bias, width = [], free(part, path, "in_proj_bias", shared), part.num_heads * part.head_dim
    for place, word in enumerate(("query", "key", "value")):
        offsets = slice(place * width, (place + 1) * width)
        joint = part.in_proj_weight is not None
        name, outputs = ("in_proj_weight", offsets) if joint else (f"{word[0]}_proj_weight", slice(0, None))
        columns = Columns(f"{path}{name}", some_outputs(outputs), flat(argument(place, word)))
        found.append(Layer((columns,), part, bias, offsets))
    return [*found, _output_projection(part, f"{path}out_proj.", shared)]


def _output_projection(part: nn.MultiheadAttention, path: str, shared: Collection[str]) -> Layer:
    # the module of the projection is not called: its input is what the attention gives with an identity in its place
    def heads(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
        kind = part.out_proj.weight
        given, words = [_like(kind, one) for one in arguments], {name: _like(kind, one) for name, one in named.items()}
        with full_precision(kind.device):
            outputs: Tensor = _without_projection(part)(*given, **words)[0]
        return outputs

    columns = Columns(f"{path}weight", some_outputs(slice(0, None)), flat(heads))
    return Layer((columns,), part, free(part.out_proj, path, "bias", shared), turn=1)


def _without_projection(part: nn.MultiheadAttention) -> Any:
    """The forward of an attention whose output projection is an identity. The module is not changed."""
    weight = part.out_proj.weight
    identity = _copied(part.out_proj)
    identity._parameters = {"weight": _still(torch.eye(weight.shape[1]).to(weight)), "bias": None}
    twin = _copied(part)
    twin._parameters = {name: None if one is None else _still(one) for name, one in part._parameters.items()}
    twin._modules, twin.training = {**part._modules, "out_proj": identity}, False
    return twin.forward


def _copied(part: nn.Module) -> Any:
    # the class that FSDP2 gives a module makes no copies: it calls the constructor of the class before
    twin = object.__new__(type(part))
    twin.__dict__.update(part.__dict__)
    return twin


def _still(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _like(weight: Tensor, value: Any) -> Any:
    """An argument of the type of a weight; autocast lets both differ."""
    return value.to(weight.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
