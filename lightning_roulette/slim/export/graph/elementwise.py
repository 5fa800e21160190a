"""Activations, sums, reshapes and final functions of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from lightning_roulette.slim.export.graph.builder import Builder, Refused, Seen, path_of, shape_of
from lightning_roulette.slim.export.graph.weighted import normalise
from lightning_roulette.slim.export.operations import Activate, Activation, Add, Final


def relu(build: Builder, node: Node, x: Node) -> None:
    """`max(x, 0)`."""
    _activate(build, node, x, "relu")


def relu6(build: Builder, node: Node, x: Node) -> None:
    """`min(max(x, 0), 6)`."""
    _activate(build, node, x, "relu6")


def clamp(build: Builder, node: Node, x: Node, min: Any = None, max: Any = None) -> None:
    """A clamp that is `relu` or `relu6`."""
    if min != 0 or max not in (None, 6):
        raise Refused(f"from {min} to {max}: only from 0, or from 0 to 6")
    _activate(build, node, x, "relu" if max is None else "relu6")


def hardtanh(build: Builder, node: Node, x: Node, min_val: Any = -1.0, max_val: Any = 1.0) -> None:
    """`torch.nn.functional.hardtanh` that is `relu6`."""
    clamp(build, node, x, min_val, max_val)


def clamp_min(build: Builder, node: Node, x: Node, min: Any) -> None:
    """A clamp from below that is `relu`."""
    clamp(build, node, x, min)


def add(build: Builder, node: Node, x: Any, y: Any, alpha: Any = 1) -> None:
    """The sum of two values, or of a value and constants."""
    if x in build.seen and isinstance(y, Node) and y in build.seen:
        if alpha != 1:
            raise Refused(f"with alpha={alpha}")
        _sum(build, node, x, y)
        return
    value, other = (x, y) if x in build.seen else (y, x)
    factor = alpha if x in build.seen else 1
    if x not in build.seen and alpha != 1:
        raise Refused(f"with alpha={alpha}")
    _affine(build, node, value, 1.0, factor * _per_channel(build, value, other))


def subtract(build: Builder, node: Node, x: Any, y: Any, alpha: Any = 1) -> None:
    """A value less constants, or constants less a value."""
    if x in build.seen:
        _affine(build, node, x, 1.0, -alpha * _per_channel(build, x, y))
    else:
        _affine(build, node, y, -float(alpha), _per_channel(build, y, x))


def subtract_from(build: Builder, node: Node, x: Any, y: Any, alpha: Any = 1) -> None:
    """A constant less a value."""
    subtract(build, node, y, x, alpha)


def multiply(build: Builder, node: Node, x: Any, y: Any) -> None:
    """The product of a value and constants."""
    value, other = (x, y) if x in build.seen else (y, x)
    _affine(build, node, value, _per_channel(build, value, other), 0.0)


def divide(build: Builder, node: Node, x: Any, y: Any) -> None:
    """A value divided by constants."""
    if x not in build.seen:
        raise Refused("of a constant by a value")
    _affine(build, node, x, 1 / _per_channel(build, x, y), 0.0)


def same(build: Builder, node: Node, x: Any, *_: Any, **__: Any) -> None:
    """What changes nothing, or the shape alone."""
    before = build.given(x)
    shape = tuple(node.meta["val"].shape)
    if not shape or shape[0] != build.graph.rows:
        raise Refused(f"to the shape {shape}, which does not begin with the batch")
    build.seen[node] = Seen(before.value, shape_of(node))


def dropout(build: Builder, node: Node, x: Any, _: float, training: bool = False) -> None:
    """A dropout, which changes nothing in evaluation."""
    if training:
        raise Refused("that is active in evaluation")
    same(build, node, x)


def flattened_last(build: Builder, node: Node, x: Any, order: Sequence[int]) -> None:
    """A permutation that leaves the order of the elements as it is, because all moved dimensions but one are 1."""
    shape = (build.graph.rows, *build.given(x).shape)
    kept = [one % len(shape) for one in order if shape[one] != 1]
    if kept != sorted(kept):
        raise Refused(f"of the order {tuple(order)} on a tensor of shape (n, {', '.join(map(str, shape[1:]))})")
    same(build, node, x)


def final(kind: Final) -> Any:
    """Return the translation of a function that the network applies last."""

    def translate(build: Builder, node: Node, x: Any, dim: int = 1, *_: Any, **__: Any) -> None:
        shape = build.given(x).shape
        if kind != "sigmoid" and (len(shape) != 1 or dim not in (1, -1)):
            raise Refused(f"over the dimension {dim} of a tensor of rank {len(shape) + 1}: only over classes")
        if not _ends(node):
            raise Refused("that is not the last operation")
        build.final = kind
        same(build, node, x)

    return translate


def _ends(node: Node) -> bool:
    """Return whether only operations that keep all elements follow."""
    quiet = ("view", "reshape", "squeeze", "unsqueeze", "flatten", "clone", "contiguous", "alias", "detach")
    return all(
        user.op == "output" or (any(f"aten.{one}" in str(user.target) for one in quiet) and _ends(user))
        for user in node.users
    )


def _activate(build: Builder, node: Node, x: Any, activation: Activation) -> None:
    value = build.given(x).value
    build.add(node, Activate(value, build.new(node.name, value.shape), activation))


def _sum(build: Builder, node: Node, x: Any, y: Any) -> None:
    first, second = build.given(x), build.given(y)
    if first.shape != second.shape:
        raise Refused(f"of values of the shapes {first.shape} and {second.shape}")
    other = build.as_shape(y, first.value.shape)
    build.add(node, Add(first.value, other, build.new(node.name, first.value.shape)))


def _affine(build: Builder, node: Node, x: Any, scale: Any, shift: Any) -> None:
    scale, shift = (torch.as_tensor(one, dtype=torch.float64) for one in (scale, shift))
    normalise(build, node, x, ".".join(filter(None, (path_of(node), node.name))), scale, shift)


def _per_channel(build: Builder, value: Any, other: Any) -> Any:
    """Return a constant as one number, or as one for each channel of a value.

    Raises:
        Refused: If it differs within a channel, or `value` is a constant too.
    """
    shape, constant = build.given(value).shape, build.constant(other)
    assert constant is not None
    if constant.numel() == 1:
        return constant.reshape(())
    aligned = constant.reshape((1,) * (len(shape) + 1 - constant.ndim) + tuple(constant.shape))
    if constant.ndim > len(shape) + 1 or tuple(aligned.shape) != (1, shape[0], *(1,) * (len(shape) - 1)):
        raise Refused(f"with a constant of shape {tuple(constant.shape)}: only one number, or one for each channel")
    return aligned.reshape(-1)
