"""Pooling and padding of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from lightning_roulette.slim.export.graph.builder import Builder, Refused, shape_of
from lightning_roulette.slim.export.graph.weighted import pair
from lightning_roulette.slim.export.operations import Pad, Padding, Pair, Pool2d, Value


@dataclass(frozen=True)
class _Windows:
    """Height and width of windows, of the step between them, of the padding on each side, and of the step inside."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def after(self, index: int, size: int, count: int) -> int:
        """Return the padding after an input of this size that as many windows need."""
        span = self.dilation[index] * (self.kernel[index] - 1) + 1
        return max(self.padding[index], (count - 1) * self.stride[index] + span - size - self.padding[index])


def max_pool(
    build: Builder,
    node: Node,
    x: Node,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> None:
    """Max pooling of images or of sequences. The shape of the output tells `ceil_mode`."""
    window = _pair(kernel, node, 1)
    step = _pair(stride, node, 1) if _given(stride) else window
    windows = _Windows(window, step, _pair(padding, node, 0), _pair(dilation, node, 1))
    _pool(build, node, build.as_image(x), "max", windows, _counts(node))


def mean_pool(
    build: Builder,
    node: Node,
    x: Node,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> None:
    """Average pooling of images or of sequences. Padding that counts becomes an operation of its own."""
    if divisor_override is not None:
        raise Refused("with divisor_override")
    window, around = _pair(kernel, node, 1), _pair(padding, node, 0)
    step, image = _pair(stride, node, 1) if _given(stride) else window, build.as_image(x)
    if count_include_pad and any(around):
        padded = _pad(build, node, image, (around[0], around[0], around[1], around[1]))
        build.operations.append(padded)
        image, around = padded.output, (0, 0)
    _pool(build, node, image, "mean", _Windows(window, step, around), _counts(node))


def adaptive_mean_pool(build: Builder, node: Node, x: Node, size: Any) -> None:
    """Adaptive average pooling to sizes that divide the sizes of the input."""
    image, counts = build.as_image(x), _counts(node)
    _, height, width = image.shape
    if height % counts[0] or width % counts[1]:
        raise Refused(f"from {(height, width)} to {counts}, which does not divide it")
    window = (height // counts[0], width // counts[1])
    _pool(build, node, image, "mean", _Windows(window, window), counts)


def mean(build: Builder, node: Node, x: Node, dims: Any, keepdim: bool = False, **_: Any) -> None:
    """A mean over height, width or both."""
    rank = len(build.given(x).shape) + 1
    over = {int(one) % rank for one in (dims if isinstance(dims, Sequence) else [dims])}
    if not over or not over <= set(range(2, rank)):
        raise Refused(f"over the dimensions {sorted(over)}: only over height, width or length")
    image = build.as_image(x)
    height, width = image.shape[1:]
    window = (height if rank - 2 in over and rank == 4 else 1, width if rank - 1 in over else 1)
    _pool(build, node, image, "mean", _Windows(window, window), (height // window[0], width // window[1]))


def pad(build: Builder, node: Node, x: Node, sides: Sequence[int], *how: Any) -> None:
    """`torch.nn.functional.pad` with zeros around images or sequences."""
    amounts = [int(one) for one in sides] + [0] * (4 - len(sides))
    if any(one not in (0, None, "constant") for one in how) or len(amounts) > 4 or min(amounts) < 0:
        raise Refused("with anything but zeros around height and width")
    left, right, above, below = amounts
    build.add(node, _pad(build, node, build.as_image(x), (above, below, left, right)))


def _pad(build: Builder, node: Node, image: Value, padding: Padding) -> Pad:
    height, width = image.shape[1] + sum(padding[:2]), image.shape[2] + sum(padding[2:])
    return Pad(image, build.new(f"{node.name}_padded", (image.shape[0], height, width)), padding)


def _pool(build: Builder, node: Node, image: Value, kind: Any, windows: _Windows, counts: Pair) -> None:
    """Add a pooling. Windows that reach beyond the input (`ceil_mode`) get padding below and on the right."""
    below, right = (windows.after(index, image.shape[1 + index], counts[index]) for index in range(2))
    padding = (windows.padding[0], below, windows.padding[1], right)
    output = build.new(node.name, (image.shape[0], *counts))
    pool = Pool2d(image, output, kind, windows.kernel, windows.stride, padding, windows.dilation)
    build.add(node, pool)


def _counts(node: Node) -> Pair:
    """Return the height and width of a node; the height of a sequence is one."""
    shape = shape_of(node)
    return (1 if len(shape) == 2 else shape[1], shape[-1])


def _pair(sizes: Any, node: Node, along_height: int) -> Pair:
    return (along_height, pair(sizes)[1]) if len(shape_of(node)) == 2 else pair(sizes)


def _given(stride: Any) -> bool:
    return bool(stride) or isinstance(stride, int)
