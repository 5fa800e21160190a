"""Linear layers, convolutions and batch normalisations of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lightning_roulette.slim.export.graph.builder import Builder, Normalise, Refused, path_of, shape_of
from lightning_roulette.slim.export.operations import Conv2d, Linear, Pair


def linear(build: Builder, node: Node, x: Node, weight: Node, bias: Node | None = None) -> None:
    """`torch.nn.functional.linear`."""
    _add_linear(build, node, x, weight, build.constant(weight), bias)


def matmul(build: Builder, node: Node, x: Node, weight: Node) -> None:
    """A product with a matrix of weights on the right."""
    matrix = build.constant(weight)
    if matrix is None or matrix.ndim != 2:
        raise Refused("with weights that are no matrix")
    _add_linear(build, node, x, weight, matrix.T, None)


def addmm(build: Builder, node: Node, bias: Node, x: Node, weight: Node, **factors: Any) -> None:
    """A product with a matrix of weights on the right, plus a bias."""
    if any(factor != 1 for factor in factors.values()):
        raise Refused("with beta or alpha")
    matrix = build.constant(weight)
    assert matrix is not None
    _add_linear(build, node, x, weight, matrix.T, bias)


def conv2d(
    build: Builder,
    node: Node,
    x: Node,
    weight: Node,
    bias: Node | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> None:
    """`torch.nn.functional.conv2d`."""
    kernel = build.constant(weight)
    assert kernel is not None
    _add_conv(build, node, x, weight, kernel, bias, pair(stride), padding, pair(dilation), groups)


def conv1d(
    build: Builder,
    node: Node,
    x: Node,
    weight: Node,
    bias: Node | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> None:
    """`torch.nn.functional.conv1d`, as a convolution of images of height one."""
    kernel = build.constant(weight)
    assert kernel is not None
    sides = padding if isinstance(padding, str) else (0, pair(padding)[1])
    steps = [(1, pair(one)[1]) for one in (stride, dilation)]
    _add_conv(build, node, x, weight, kernel.unsqueeze(2), bias, steps[0], sides, steps[1], groups)


def batch_norm(
    build: Builder,
    node: Node,
    x: Node,
    weight: Node | None,
    bias: Node | None,
    mean: Node | None,
    variance: Node | None,
    *rest: Any,
) -> None:
    """A batch normalisation with running statistics. `rest` is whether it trains, its momentum, epsilon and a switch.

    Some versions of torch leave the first of these out.
    """
    training, epsilon = (rest[0], rest[2]) if isinstance(rest[0], bool) else (False, rest[1])
    centre, spread = build.constant(mean), build.constant(variance)
    if training or centre is None or spread is None:
        raise Refused("without running statistics")
    scale = (spread + epsilon).rsqrt() * _or(build.constant(weight), 1.0)
    normalise(build, node, x, _name(build, weight, node), scale, _or(build.constant(bias), 0.0) - centre * scale)


def normalise(build: Builder, node: Node, x: Any, name: str, scale: Tensor, shift: Tensor) -> None:
    """Add `x * scale + shift`, where both have one element or one for each channel."""
    seen = build.given(x)
    if tuple(node.meta["val"].shape) != (build.graph.rows, *seen.shape):
        raise Refused(f"of a value of shape (n, {', '.join(map(str, seen.shape))}) that gets another shape")
    channels = seen.shape[0]
    value = seen.value if seen.value.shape[0] == channels else build.as_shape(x, seen.shape)
    factors = [one.reshape(-1).expand(channels).clone() for one in (scale, shift)]
    output = build.new(name.rpartition(".")[0] or name, value.shape)
    build.add(node, Normalise(value, output, name, factors[0], factors[1]))


def pair(sizes: Any) -> Pair:
    """Return height and width from one number, or from a list of one or two."""
    listed = [int(one) for one in sizes] if isinstance(sizes, Sequence) else [int(sizes)]
    return (listed[0], listed[-1])


def _add_linear(build: Builder, node: Node, x: Any, named: Any, weight: Tensor | None, bias: Any) -> None:
    shape = build.given(x).shape
    if len(shape) != 1 or weight is None:
        raise Refused(f"on a tensor of shape (n, {', '.join(map(str, shape))}), not (n, {shape[-1]})")
    name = _name(build, named, node)
    output = build.new(name.rpartition(".")[0] or name, shape_of(node))
    zero = torch.zeros(len(weight), dtype=torch.float64)
    added = _or(build.constant(bias), zero).expand(len(weight))
    build.add(node, Linear(build.as_shape(x, shape), output, name, weight.contiguous(), added))


def _add_conv(
    build: Builder,
    node: Node,
    x: Any,
    named: Any,
    kernel: Tensor,
    bias: Any,
    stride: Pair,
    padding: Any,
    dilation: Pair,
    groups: int,
) -> None:
    image, name, shape = build.as_image(x), _name(build, named, node), shape_of(node)
    output = build.new(name.rpartition(".")[0] or name, shape if len(shape) == 3 else (shape[0], 1, shape[1]))
    sides = [_sides(padding, index, kernel.shape[2 + index], dilation[index]) for index in range(2)]
    around = (*sides[0], *sides[1])
    added = _or(build.constant(bias), torch.zeros(len(kernel), dtype=torch.float64))
    build.add(node, Conv2d(image, output, name, kernel.contiguous(), added, stride, around, dilation, groups, "none"))


def _sides(padding: Any, index: int, kernel: int, dilation: int) -> Pair:
    """Return the padding before and after in one direction. `padding` is "same", "valid", or numbers."""
    if not isinstance(padding, str):
        return (pair(padding)[index],) * 2
    total = dilation * (kernel - 1) if padding == "same" else 0
    return (total // 2, total - total // 2)


def _name(build: Builder, weight: Any, node: Node) -> str:
    return build.names.get(weight) or ".".join(filter(None, (path_of(node), node.name)))


def _or(tensor: Tensor | None, instead: Any) -> Any:
    return instead if tensor is None else tensor
