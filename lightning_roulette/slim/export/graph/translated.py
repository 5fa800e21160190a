"""Each node of a graph becomes an operation, a constant, or a line that says why it cannot."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from lightning_roulette.slim.export.graph import elementwise, weighted, windows
from lightning_roulette.slim.export.graph.builder import Builder, Refused, Seen, path_of, shape_of
from lightning_roulette.slim.export.graph.captured import Captured
from lightning_roulette.slim.export.operations import Value

_Translate = Callable[..., None]

# by the name of the operator, without its overload
_TRANSLATIONS: dict[str, _Translate] = {
    "linear": weighted.linear,
    "matmul": weighted.matmul,
    "mm": weighted.matmul,
    "addmm": weighted.addmm,
    "conv1d": weighted.conv1d,
    "conv2d": weighted.conv2d,
    "batch_norm": weighted.batch_norm,
    "_native_batch_norm_legit_no_training": weighted.batch_norm,
    "max_pool1d": windows.max_pool,
    "max_pool2d": windows.max_pool,
    "avg_pool1d": windows.mean_pool,
    "avg_pool2d": windows.mean_pool,
    "adaptive_avg_pool1d": windows.adaptive_mean_pool,
    "adaptive_avg_pool2d": windows.adaptive_mean_pool,
    "mean": windows.mean,
    "pad": windows.pad,
    "constant_pad_nd": windows.pad,
    "relu": elementwise.relu,
    "relu6": elementwise.relu6,
    "hardtanh": elementwise.hardtanh,
    "clamp": elementwise.clamp,
    "clamp_min": elementwise.clamp_min,
    "add": elementwise.add,
    "sub": elementwise.subtract,
    "rsub": elementwise.subtract_from,
    "mul": elementwise.multiply,
    "div": elementwise.divide,
    "softmax": elementwise.final("softmax"),
    "_softmax": elementwise.final("softmax"),
    "log_softmax": elementwise.final("log_softmax"),
    "_log_softmax": elementwise.final("log_softmax"),
    "sigmoid": elementwise.final("sigmoid"),
    "dropout": elementwise.dropout,
    "feature_dropout": elementwise.dropout,
    "alpha_dropout": elementwise.dropout,
    "permute": elementwise.flattened_last,
}
_MADE = ("ones", "zeros", "full", "arange", "eye", "scalar_tensor")  # constants that a forward makes
_SHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view")
_COPIES = ("clone", "contiguous", "alias", "detach", "to", "_to_copy", "lift_fresh_copy")
_TRANSLATIONS |= dict.fromkeys((*_SHAPES, *_COPIES), elementwise.same)


def translated(graph: Captured, name: str) -> Builder:
    """Return what the nodes of a graph become. The input of the network gets the name `name`."""
    given = [node for node in graph.nodes if node.op == "placeholder" and node.name not in graph.constants]
    build = Builder(graph, Value(name, shape_of(given[0])))
    build.new(name, build.input.shape)
    for node in graph.nodes:
        if node.op == "placeholder":
            _begin(build, node)
        elif node.op == "call_function":
            _compute(build, node)
    return build


def _begin(build: Builder, node: Node) -> None:
    if node.name in build.graph.constants:
        build.constants[node] = build.graph.constants[node.name]
        build.names[node] = build.graph.names[node.name]
    else:
        build.seen[node] = Seen(build.input, build.input.shape)


def _compute(build: Builder, node: Node) -> None:
    needed, made = node.all_input_nodes, _operator(node) in _MADE
    if (needed or made) and all(one in build.constants for one in needed):
        _compute_constant(build, node)
        return
    operator = _operator(node)
    changed = node.args[0] if operator.endswith("_") else None
    if not node.users and changed is None:
        return
    translate = _TRANSLATIONS.get(operator.removesuffix("_"), _TRANSLATIONS.get(operator))
    try:
        if translate is None:
            raise Refused("")
        _check_options(translate, build, node)
        translate(build, node, *node.args, **node.kwargs)
    except Refused as reason:
        _refuse(build, node, str(reason))
    if isinstance(changed, Node):
        build.seen[changed] = build.seen[node]


def _check_options(translate: _Translate, build: Builder, node: Node) -> None:
    """Check that a translation knows all options of a node."""
    try:
        inspect.signature(translate).bind(build, node, *node.args, **node.kwargs)
    except TypeError:
        options = ", ".join(f"{key}={one!r}" for key, one in node.kwargs.items())
        raise Refused(f"with {options or 'more arguments'}") from None


def _compute_constant(build: Builder, node: Node) -> None:
    """Compute what depends on weights alone, such as a weight times its mask."""

    def value(argument: Any) -> Any:
        return build.constants[argument] if isinstance(argument, Node) else argument

    arguments, named = torch.fx.node.map_aggregate((node.args, node.kwargs), value)
    assert callable(node.target)
    with torch.no_grad():
        build.constants[node] = node.target(*arguments, **named)
    for one in node.all_input_nodes[:1]:
        if one in build.names:
            build.names[node] = build.names[one]


def _refuse(build: Builder, node: Node, reason: str) -> None:
    """Note what cannot be expressed, and go on as if it had been."""
    place = path_of(node)
    where = f" in {place!r}" if place else ""
    build.refused.append(" ".join(filter(None, (f"{_operator(node)}{where}", reason))))
    shape = shape_of(node) if isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].ndim else ()
    build.seen[node] = Seen(build.new(node.name, shape), shape)


def _operator(node: Node) -> str:
    """Return the name of the operator of a node, without its overload."""
    return str(node.target).removeprefix("aten.").rpartition(".")[0] or str(node.target)
