"""What a channel reaches in a network: the dependency graph of Torch-Pruning, which is an optional extra.

G. Fang, X. Ma, M. Song, M. Bi Mi, X. Wang, "DepGraph: towards any structural pruning", CVPR 2023. Only the graph is
used, none of the pruners.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_roulette.network.containers import parts_of
from lightning_roulette.network.kinds import AffineKind, affine_kind_of

_MISSING = (
    "Units of a network are found with the package torch-pruning. "
    "Install the extra: pip install 'lightning-roulette[units]'."
)


class _Lost(Exception):  # it is a finding, not an error
    """Channels cannot be followed."""


class Index(NamedTuple):
    """An index of a dimension that belongs to a channel of the first layer. The names are those of Torch-Pruning."""

    idx: int
    root_idx: int


@dataclass(frozen=True, eq=False)
class Reached:
    """A module, a parameter or an operation that the channels of a layer reach.

    Attributes:
        target: The module or parameter; for an operation an object of Torch-Pruning.
        name: Its name in the network; None for an operation.
        reads: Whether the channels are its inputs. Otherwise they are its outputs.
        indices: Indices of its dimension, and the channels of the first layer that they belong to.
        dim: The dimension, for a parameter.
    """

    target: Any
    name: str | None
    reads: bool
    indices: frozenset[Index]
    dim: int

    @property
    def is_output(self) -> bool:
        """Whether this is an output of the network."""
        return type(self.target).__name__ == "_OutputOp"


def reached(network: nn.Module, run: Callable[[], Any]) -> dict[str, list[Reached]]:
    """What the output channels of layers reach, by the name of the first layer, that layer itself first.

    If the channels cannot be followed to their ends, the list is empty.
    A layer that computes the channels of one before it has no entry of its own.

    Args:
        network: The network, as `borrowed` lends it.
        run: Calls it once.

    Raises:
        ImportError: If torch-pruning is not installed.
    """
    graph = _graph(network, run)
    names = {id(part): name for name, part in network.named_modules()}
    names |= {id(part): name for name, part in network.named_parameters()}
    found: dict[str, list[Reached]] = {}
    seen: set[str] = set()
    for name, part in unit_layers(network).items():
        if part in graph.module2node and name not in seen:
            try:
                found[name] = [_reached(graph, names, *one) for one in _walk(graph, part)]
            except _Lost:
                found[name] = []
            seen |= {one.name for one in found[name] if one.name is not None and not one.reads}
    return found


def unit_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that compute units: linear and convolutional ones, embeddings, and those of `register_layer`.

    Those inside of torch's attention are left out, as they are not called.
    """
    inside = {
        id(inner) for part in network.modules() if isinstance(part, nn.MultiheadAttention) for inner in part.children()
    }
    parts = {name: part for name, part in network.named_modules() if id(part) not in inside}
    return {name: part for name, part in parts.items() if _channels(part) is not None}


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors in an output of a network. Objects such as caches are not looked into."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in (parts_of(output) or {}).values() for tensor in tensors_in(part)]


def graph_package() -> Any:
    """Return Torch-Pruning.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return importlib.import_module("torch_pruning")
    except ModuleNotFoundError as error:
        raise ImportError(_MISSING) from error


def _graph(network: nn.Module, run: Callable[[], Any]) -> Any:
    kinds = {type(part): kind for part in network.modules() if (kind := affine_kind_of(part)) is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about parameters outside of layers, which are looked at here
        return _tracer(graph_package())().build_dependency(
            network,
            example_inputs=(),
            forward_fn=lambda *_: [one for one in tensors_in(run()) if one.grad_fn is not None],
            customized_pruners={kind: _Widths(one) for kind, one in kinds.items()},
            verbose=False,
        )


def _tracer(pruning: Any) -> Any:
    """Return a class of graphs that takes concatenations of positions, as those of a cache, for what they are.

    Torch-Pruning takes every concatenation for one of channels if its dimension is counted from the end.
    """

    class Graph(pruning.DependencyGraph):  # type: ignore[misc]
        def _trace(self, *arguments: Any, **named: Any) -> Any:
            nodes = super()._trace(*arguments, **named)
            for node in nodes.values():
                if node.type == pruning.ops.OPTYPE.CONCAT and not _joins_channels(node.grad_fn):
                    node.type = pruning.ops.OPTYPE.ELEMENTWISE
            return nodes

    return Graph


def _joins_channels(joining: Any) -> bool:
    """Whether an operation of autograd may concatenate channels, which are the second dimension or the last."""
    dim = getattr(joining, "_saved_dim", 1)
    return (dim - 2**64 if dim >= 2**63 else dim) in (-1, 1, 2)


class _Widths:
    """How wide a layer of an `AffineKind` is, for Torch-Pruning, which tells the two sides apart by their methods."""

    pruning_dim = -1

    def __init__(self, kind: AffineKind) -> None:
        self._kind = kind

    def get_out_channels(self, layer: nn.Module) -> int:
        """Return the number of outputs."""
        return self._kind.matrix(getattr(layer, self._kind.weight)).shape[0]

    def get_in_channels(self, layer: nn.Module) -> int:
        """Return the number of inputs."""
        return self._kind.matrix(getattr(layer, self._kind.weight)).shape[1]

    def prune_out_channels(self, layer: nn.Module, indices: Any) -> nn.Module:
        """Name the outputs; nothing is pruned here."""
        raise NotImplementedError

    def prune_in_channels(self, layer: nn.Module, indices: Any) -> nn.Module:
        """Name the inputs; nothing is pruned here."""
        raise NotImplementedError


def _channels(part: nn.Module) -> int | None:
    """Number of output channels of a layer that computes units; None for other modules."""
    if isinstance(part, _ConvNd):
        return part.out_channels
    if isinstance(part, nn.Linear):
        return part.out_features
    if isinstance(part, nn.Embedding):
        return part.embedding_dim
    kind = affine_kind_of(part)
    return None if kind is None else kind.matrix(getattr(part, kind.weight)).shape[0]


def passes_channels(part: _ConvNd) -> bool:
    """Whether each output channel of a convolution is computed from one input channel of several."""
    return bool(part.groups == part.in_channels > 1)


def _walk(graph: Any, part: nn.Module) -> Iterator[tuple[Any, Any, set[Index]]]:
    """Yield the nodes that the channels of a layer reach, each with the side on which, and their indices.

    Torch-Pruning keeps one channel for each index; here an index may belong to several channels, which makes them one
    unit.
    """
    found: dict[tuple[int, Any], tuple[Any, Any, set[Index]]] = {}
    start, bound = {Index(one, one) for one in range(_channels(part) or 0)}, _largest(graph.model)
    waiting = [(graph.module2node[part], graph.get_pruner_of_module(part).prune_out_channels, start)]
    while waiting:
        node, side, indices = waiting.pop()
        known = found.setdefault((id(node), side), (node, side, set()))[2]
        if not (fresh := indices - known):
            continue
        known |= fresh
        for link in node.dependencies:
            if link.is_triggered_by(side):
                waiting.append((link.target, link.handler, _mapped(link, fresh, bound)))
        waiting += _through(graph, node, side, fresh)
    yield from (one for one in found.values() if one[2])


def _mapped(link: Any, indices: set[Index], bound: int) -> set[Index]:
    """Return the indices at the other end of a link.

    Raises:
        _Lost: If they are none of that end, as after a rotation of halves, which Torch-Pruning takes for a longer one.
    """
    mappings = [one for one in link.index_mapping if one is not None]
    listed = sorted(indices) if mappings else []
    for mapping in mappings:
        listed = mapping(listed)
    found = {Index(one.idx, one.root_idx) for one in listed if one.root_idx is not None} if mappings else indices
    offsets = getattr(link.target.module, "offsets", None) or [bound]
    if found and max(found).idx >= min(bound, offsets[-1]):
        raise _Lost
    return found


def _largest(network: nn.Module) -> int:
    """The largest dimension of a parameter, which no index of a channel reaches."""
    return max(size for one in network.parameters() for size in one.shape)


def _through(graph: Any, node: Any, side: Any, indices: set[Index]) -> Iterator[tuple[Any, Any, set[Index]]]:
    """Yield the other side of a convolution with several output channels for each input channel.

    Torch-Pruning links both sides if there is one output channel for each.
    """
    part = node.module
    if not isinstance(part, _ConvNd) or not passes_channels(part):
        return
    each, pruner = part.out_channels // part.groups, graph.get_pruner_of_module(part)
    if each == 1:
        return
    if side == pruner.prune_in_channels:
        outputs = {Index(one.idx * each + place, one.root_idx) for one in indices for place in range(each)}
        yield node, pruner.prune_out_channels, outputs
    else:
        yield node, pruner.prune_in_channels, {Index(one.idx // each, one.root_idx) for one in indices}


def _reached(graph: Any, names: dict[int, str], node: Any, side: Any, indices: set[Index]) -> Reached:
    pruner = graph.get_pruner_of_module(node.module)
    reads = side == pruner.prune_in_channels and side != pruner.prune_out_channels
    return Reached(node.module, names.get(id(node.module)), reads, frozenset(indices), node.pruning_dim)
