"""`to_sparse`: sparse weights where they are faster. `to_dense` takes it back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_roulette.checks import check_number
from lightning_roulette.network.calling import caller_of
from lightning_roulette.network.hooks import run_with_hooks
from lightning_roulette.network.modes import evaluating
from lightning_roulette.slim.measuring.timing import Latency, latencies
from lightning_roulette.slim.removal.examples import is_close
from lightning_roulette.slim.sparse.layers import Sparse, Way, padding_of, sparse_layer
from lightning_roulette.slim.sparse.table import SparseLayer, SparseNetwork

_LEAST_SPARSITY = 0.5  # below it no format of sparse weights is faster
_TOLERANCE = 1e-5  # of outputs, as a share of the largest
_SECONDS = 0.05  # for each way to multiply a weight
_DENSE, _SPARSE = "dense network", "sparse network"

Dense = nn.Linear | nn.Conv2d


@dataclass(frozen=True, eq=False)
class Trial:
    """A dense network that was timed with sparse weights, too.

    Attributes:
        layers: Its linear layers and convolutions.
        places: Layers, and those with a sparse weight that are to take their places; none if the network is not faster.
        dense: The time of the network with dense weights.
        sparse: The time with sparse weights, by turns with the other; None if there are no places.
    """

    layers: tuple[SparseLayer, ...]
    places: Mapping[Dense, Sparse]
    dense: Latency
    sparse: Latency | None


def to_sparse(model: nn.Module, example_input: Any, min_speedup: float = 1.1) -> SparseNetwork:
    """Store weights as sparse tensors (CSR) where this makes a layer faster. Return the measured times.

    Each linear layer and each convolution with one group is timed with a dense and with a sparse weight, on the input
    that it gets for `example_input`. It is converted if the sparse weight is faster by `min_speedup` and gives the same
    outputs, up to 1e-5 of the largest. The result holds for this machine, this number of threads and this batch size.
    If the converted network is not faster than the dense one, all layers stay dense.

    The model is changed in place, and is for inference afterwards: sparse weights are not trained. Its state dict has
    the same names and dense values as before. `to_dense` converts it back.

    Args:
        model: A pruned network, on the CPU.
        example_input: What the network is called with: a tensor, a tuple or list of arguments, or a mapping of named
            arguments. Use the batch size of later use.
        min_speedup: Smallest `dense time / sparse time` of a layer that is converted. At least 1.

    Returns:
        The seconds of each layer with dense and with sparse weights, which of them were converted, and the seconds of
        the network before and after. `print` shows them as a table.

    Raises:
        TypeError: If `model` is no module, or `example_input` is none of these.
        ValueError: If `min_speedup` is smaller than 1, or `example_input` has no sample.

    Examples:
        >>> from torch.nn.utils import prune
        >>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        >>> prune.remove(prune.random_unstructured(model[0], "weight", 0.99), "weight").weight.shape
        torch.Size([512, 512])
        >>> found = to_sparse(model, torch.rand(64, 512))
        >>> print(f"{found.layers[0].sparsity:.2f}")
        0.99
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, but must be a torch.nn.Module.")
    check_number("min_speedup", min_speedup, at_least=1, remedy="1 converts every layer that is faster.")
    trial = tried(model, caller_of(model, example_input)(None), min_speedup)
    _replace(model, trial.places)
    return SparseNetwork(trial.layers, trial.dense.seconds, (trial.sparse or trial.dense).seconds)


def to_dense(model: nn.Module) -> nn.Module:
    """Give every layer that `to_sparse` converted its dense weight again. Return the model, changed in place.

    A layer is a new object. The parameters of its bias are the same as before.

    Args:
        model: The network.
    """
    _replace(model, {part: part.dense() for part in model.modules() if isinstance(part, Sparse)})
    return model


def tried(model: nn.Module, call: Callable[[], Any], min_speedup: float = 1.1) -> Trial:
    """Time a network with dense and with sparse weights. It is afterwards as it was.

    Args:
        model: The network.
        call: Calls it.
        min_speedup: See `to_sparse`.
    """
    with evaluating(model):
        inputs = _inputs(model, call)
        found = {layer: _measured(name, layer, model, inputs, min_speedup) for layer, name in _layers(model).items()}
        rows = tuple(row for row, _ in found.values())
        places = {layer: way for layer, (_, way) in found.items() if way is not None}
        if not places:
            return Trial(rows, {}, latencies({_DENSE: call})[_DENSE], None)
        with _switched(model, places) as switch:
            dense = _run(call)
            switch(_SPARSE)
            alike = _alike(dense, _run(call))
            times = latencies({_DENSE: call, _SPARSE: call}, prepare=switch)
    if alike and times[_SPARSE].seconds < times[_DENSE].seconds:
        return Trial(rows, places, times[_DENSE], times[_SPARSE])
    return Trial(tuple(map(_kept, rows)), {}, times[_DENSE], None)


@contextmanager
def _switched(model: nn.Module, places: Mapping[Dense, Sparse]) -> Iterator[Callable[[str], None]]:
    """Yield what puts sparse layers into their places, or the dense ones, which are there afterwards."""
    owners = [(model.get_submodule(name.rpartition(".")[0]), name, layer) for name, layer in _named(model, places)]

    def switch(which: str) -> None:
        for owner, name, layer in owners:
            setattr(owner, name.rpartition(".")[2], places[layer] if which == _SPARSE else layer)

    try:
        yield switch
    finally:
        switch(_DENSE)


def _run(call: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return call()


def _layers(model: nn.Module) -> dict[Dense, str]:
    """Return the layers whose weight is theirs alone, with their names. Subclasses may use the weight in other ways."""
    return {part: name for name, part in model.named_modules() if type(part) in (nn.Linear, nn.Conv2d)}


def _inputs(model: nn.Module, call: Callable[[], Any]) -> dict[nn.Module, Tensor]:
    """Return the largest input of each layer in one run of the network."""
    found: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        x = args[0] if args else named.get("input")
        if isinstance(x, Tensor) and (layer not in found or x.numel() > found[layer].numel()):
            found[layer] = x.clone()

    run_with_hooks(call, _layers(model), before=keep)
    return found


def _measured(
    name: str, layer: Dense, model: nn.Module, inputs: Mapping[nn.Module, Tensor], min_speedup: float
) -> tuple[SparseLayer, Sparse | None]:
    """Return the times of a layer, and the layer with a sparse weight if it is to be used."""
    sparsity = float((layer.weight == 0).double().mean()) if layer.weight.numel() else 0.0
    row = SparseLayer(name, tuple(layer.weight.shape), sparsity)
    if reason := _refused(layer, model, inputs.get(layer), sparsity):
        return replace(row, reason=reason), None
    x, ways = inputs[layer], {way: sparse_layer(layer, way) for way in get_args(Way)}
    with torch.no_grad():
        ways = {way: one for way, one in ways.items() if _alike(layer(x), one(x))}
    calls = {"dense": layer, **ways}
    times = latencies({name: partial(one, x) for name, one in calls.items()}, _SECONDS)
    dense, best = times["dense"].seconds, min(ways, key=lambda way: times[way].seconds, default=None)
    sparse = None if best is None else times[best].seconds
    row = replace(row, dense=dense, sparse=sparse)
    if best is None or sparse is None:
        return replace(row, reason="the outputs differ"), None
    if dense < min_speedup * sparse:
        return replace(row, reason=f"not {min_speedup:g} times as fast"), None
    return replace(row, converted=True), ways[best]


def _refused(layer: Dense, model: nn.Module, x: Tensor | None, sparsity: float) -> str:
    """Return why a layer cannot have a sparse weight, or an empty string."""
    weight = layer.weight
    users = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    modules = sum(part is layer for _, part in model.named_modules(remove_duplicate=False))
    reasons = {
        "it is the whole model": layer is model,
        "few zeros": sparsity < _LEAST_SPARSITY,
        "not called": x is None,
        "not on the CPU": weight.device.type != "cpu",
        f"its type is {str(weight.dtype).removeprefix('torch.')}": weight.dtype not in (torch.float32, torch.float64),
        "its weight is shared": users[id(weight)] > modules,
        "it has hooks or a parametrisation": bool(
            layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or len(list(layer.children()))
        ),
        "it has groups, or padding that is not zeros or not equal on both sides": _unusual(layer),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _unusual(layer: Dense) -> bool:
    if isinstance(layer, nn.Linear):
        return False
    reach = [dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    uneven = layer.padding == "same" and any(one % 2 for one in reach)
    return layer.groups != 1 or uneven or (layer.padding_mode != "zeros" and any(padding_of(layer)))


def _alike(first: Any, second: Any) -> bool:
    """Whether outputs are equal up to 1e-5 of the largest entry of each tensor, and the same ones are finite."""
    if isinstance(first, Tensor):
        return is_close(first, second, _TOLERANCE, least=0.0)
    if isinstance(first, Mapping):
        return all(_alike(first[key], second[key]) for key in first)
    if isinstance(first, (tuple, list)):
        return all(map(_alike, first, second))
    return True


def _replace(model: nn.Module, places: Mapping[Any, nn.Module]) -> None:
    """Replace modules under all of their names."""
    for name, part in _named(model, places):
        places[part].train(part.training)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, places[part])


def _named(model: nn.Module, places: Mapping[Any, nn.Module]) -> list[tuple[str, Any]]:
    """Return the modules that are to be replaced, under all of their names."""
    return [(name, part) for name, part in model.named_modules(remove_duplicate=False) if part in places]


def _kept(row: SparseLayer) -> SparseLayer:
    return replace(row, converted=False, reason="the whole network is not faster") if row.converted else row
