"""Multiply-adds of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_roulette.network.hooks import run_with_hooks
from lightning_roulette.network.kinds import affine_kind_of
from lightning_roulette.network.parameters import CONVOLUTIONS, TRANSPOSED

# a weight, and how often each of its entries is multiplied in a call
Use: TypeAlias = tuple[Tensor, int]
_ARGUMENTS = ("input", "query", "key", "value")  # of forward, where they are passed by name


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiplications of a weight with an input, and additions of the product, in a forward pass.

    Attributes:
        dense: With all weights.
        effective: With the weights that are not zero.
    """

    dense: int
    effective: int


def multiply_adds(model: nn.Module, run: Callable[[], object]) -> MultiplyAdds:
    """The multiply-adds of the layers of a network while it runs.

    These layers are counted: linear, convolutional (grouped and transposed ones too) and recurrent ones, the
    projections of attention, and layers that `register_layer` names. Products of activations with each other, as those
    of queries with keys, have no weights and are not counted; nor are calls of functions with weights of no such layer.

    Args:
        model: The network.
        run: Runs it once.
    """
    found = [0, 0]

    def add(weight: Tensor, times: int) -> None:
        found[0] += times * weight.numel()
        found[1] += times * int(weight.count_nonzero())

    _see_uses(model, run, add)
    return MultiplyAdds(*found)


def positions_of(model: nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """How often an entry of each parameter is multiplied while a network runs, by the name of the parameter.

    Layers are those of `multiply_adds`. If entries of a parameter are multiplied unequally often, it is their mean.
    Weights that are computed from parameters, as those of a weight normalisation, are left out.

    Args:
        model: The network.
        run: Runs it once.
    """
    parameters, found = dict(model.named_parameters()), dict[str, int]()

    def add(weight: Tensor, times: int) -> None:
        if (name := _owner(parameters, weight)) is not None:
            found[name] = found.get(name, 0) + times * weight.numel()

    _see_uses(model, run, add)
    return {name: times / max(1, parameters[name].numel()) for name, times in found.items()}


def _owner(parameters: Mapping[str, Tensor], weight: Tensor) -> str | None:
    """Return the name of the parameter in whose memory a weight begins, as a part of an attention's weight does."""
    place = weight.data_ptr()
    inside = (name for name, one in parameters.items() if one.data_ptr() <= place < one.data_ptr() + one.nbytes)
    return next(inside, None)


def _see_uses(model: nn.Module, run: Callable[[], object], add: Callable[[Tensor, int], None]) -> None:
    """Run a network, and tell of each weight that is used, and how often each of its entries is."""

    def count(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
        inputs = [*arguments, *(named[name] for name in _ARGUMENTS if name in named)]
        for weight, times in _uses(module, inputs, output):
            add(weight, times)

    calls: dict[int, tuple[tuple[Any, ...], Mapping[str, Any]]] = {}

    def before(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        calls[id(module)] = arguments, named

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        count(module, *calls.pop(id(module), (arguments, {})), output)

    run_with_hooks(run, [one for one in model.modules() if _is_counted(one)], before=before, after=after)


def _is_counted(module: nn.Module) -> bool:
    kinds = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
    return isinstance(module, kinds) or affine_kind_of(module) is not None


def _uses(module: nn.Module, inputs: list[Any], output: Any) -> Iterator[Use]:
    """Yield the weights of a module, and how often each entry is multiplied in a call."""
    if isinstance(module, nn.MultiheadAttention):
        yield from _of_attention(module, inputs[:3])
    elif isinstance(module, nn.RNNBase):
        data = inputs[0].data if isinstance(inputs[0], PackedSequence) else inputs[0]
        yield from ((one, _times(data.numel(), data.shape[-1])) for one in _matrices(module))
    elif isinstance(module, nn.RNNCellBase):
        yield from ((one, _times(inputs[0].numel(), inputs[0].shape[-1])) for one in _matrices(module))
    elif isinstance(module, TRANSPOSED):
        yield module.weight, _times(inputs[0].numel(), module.in_channels)
    elif isinstance(module, CONVOLUTIONS):
        yield module.weight, _times(output.numel(), module.out_channels)
    elif (kind := affine_kind_of(module)) is not None:
        weight = getattr(module, kind.weight)
        yield weight, _times(output.numel(), kind.matrix(weight).shape[0])
    elif isinstance(module, nn.Linear):
        yield module.weight, _times(output.numel(), module.out_features)


def _times(entries: int, each: int) -> int:
    """Return how often a weight is multiplied, for so many numbers with `each` in a row; 0 for an empty layer."""
    return entries // each if each else 0


def _matrices(module: nn.Module) -> list[Tensor]:
    return [one for name, one in module.named_parameters(recurse=False) if name.startswith("weight")]


def _of_attention(module: nn.MultiheadAttention, inputs: list[Any]) -> Iterator[Use]:
    whole = module.in_proj_weight
    parts = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight) if whole is None else whole.chunk(3)
    rows = [_times(one.numel(), one.shape[-1]) for one in inputs]
    yield from zip(parts, rows, strict=True)
    yield module.out_proj.weight, rows[0]
