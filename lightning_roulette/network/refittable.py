"""The layers of a network that a refit can solve."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from lightning_roulette.network.attention import attention_layers
from lightning_roulette.network.kinds import AffineKind, affine_kind_of
from lightning_roulette.network.layers import Columns, Layer, argument, flat, free
from lightning_roulette.network.parameters import CONVOLUTIONS, LINEAR_MAPS, TRANSPOSED, aliases, owners_of
from lightning_roulette.network.recurrent import recurrent_layers
from lightning_roulette.network.ties import ties_of
from lightning_roulette.network.windows import output_size, patches, spread_patches

_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


def layers_of(module: nn.Module, names: Collection[str]) -> tuple[list[Layer], dict[str, str]]:
    """The layers of a network that can be refitted.

    These are:

    - Linear,
    - Conv1d, Conv2d and Conv3d, and their transposed forms,
    - the projections of MultiheadAttention,
    - LSTM, GRU and RNN,
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
    left = {*names} - shared
    found: list[Layer] = []
    for prefix, part in module.named_modules():
        whole = _layers(part, f"{prefix}." if prefix else "", shared)
        limited = [replace(one, columns=tuple(each for each in one.columns if each.name in left)) for one in whole]
        found += [one for one in limited if one.columns]
        left -= {name for one in limited for name in one.names}  # some modules apply weights of a module inside them
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
    if isinstance(owner, nn.RNNCellBase):
        return f"not supported for {kind}"
    return f"not supported for {own} of {kind}"


def _computes_as_usual(part: nn.Module) -> bool:
    """Whether a module computes what its known class computes, because nothing overrides `forward`."""
    affine = affine_kind_of(part)
    kinds = (*LINEAR_MAPS, *TRANSPOSED, nn.MultiheadAttention, *_RECURRENT) if affine is None else (affine.kind,)
    usual = next((kind for kind in kinds if isinstance(part, kind)), None)
    if usual is None:
        return True
    names = ("forward", "_conv_forward")
    own = any(name in vars(part) for name in names)
    return not own and all(getattr(type(part), name, None) is getattr(usual, name, None) for name in names)


def _layers(part: nn.Module, path: str, shared: Collection[str]) -> list[Layer]:
    if not _computes_as_usual(part):
        return []
    if (kind := affine_kind_of(part)) is not None:
        return [_affine(part, kind, path, shared)]
    if isinstance(part, nn.MultiheadAttention):
        return attention_layers(part, path, shared)
    if isinstance(part, _RECURRENT):
        return recurrent_layers(part, path, shared)
    columns = _columns(part, f"{path}weight")
    return [] if columns is None else [Layer((columns,), part, free(part, path, "bias", shared))]


def _affine(part: nn.Module, kind: AffineKind, path: str, shared: Collection[str]) -> Layer:
    columns = Columns(
        f"{path}{kind.weight}", lambda weight: kind.matrix(weight)[None], flat(argument(0, kind.argument))
    )
    return Layer((columns,), part, None if kind.bias is None else free(part, path, kind.bias, shared))


def _columns(part: nn.Module, name: str) -> Columns | None:
    """The columns of a module of torch with one weight and one input; None for other modules."""
    inputs = argument(0, "input")
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
