"""Pictures of a search and of its masks, as tensors for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_roulette.mask.mask import Mask
from lightning_roulette.report.optional import imported
from lightning_roulette.report.plot import EXTRA
from lightning_roulette.report.report import SearchReport
from lightning_roulette.trainer.show.points import largest

SIZE = (5.6, 3.9)  # of the picture of scores, in inches. It can be read on a card of TensorBoard.
MOST_MASKS = 8  # pictures of masks
MOST_PIXELS = 2**18  # weights of a layer whose mask is drawn

_KEPT, _PRUNED, _BETWEEN = 0, 255, 160  # black, white and grey
_SIDE = 256  # small masks are enlarged to about this many pixels


def scores(report: SearchReport, over: str) -> Tensor:
    """Return the picture of `SearchReport.plot` over one of its axes.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    return _drawn(SIZE, lambda axes: report.plot(over, axes=axes))


def densities(mask: Mask) -> Tensor:
    """Return bars of the share of weights that is kept in the largest layers, and in the dense network.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    bars = [(short, mask.counts[name], mask.flags[name].numel()) for name, short in largest(mask).items()]
    return _drawn((SIZE[0], 1.0 + 0.3 * len(bars)), lambda axes: _draw_bars(axes, bars))


def masks(mask: Mask) -> dict[str, Tensor]:
    """Return pictures of the masks of the first small layers, by short names. Kept weights are black.

    The kernels of a convolution are apart from each other.
    """
    names = [(name, short) for name, short in largest(mask).items() if mask.flags[name].numel() <= MOST_PIXELS]
    return {short: _pixels(mask[name]) for name, short in names[:MOST_MASKS]}


def _drawn(size: tuple[float, float], draw: Callable[[Any], object]) -> Tensor:
    """Return a figure as a tensor of shape `(3, height, width)`, uint8. The figure is none of pyplot's."""
    matplotlib = imported("matplotlib", "the picture", EXTRA)
    figure = imported("matplotlib.figure", "the picture", EXTRA)
    backend = imported("matplotlib.backends.backend_agg", "the picture", EXTRA)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        canvas = backend.FigureCanvasAgg(figure.Figure(figsize=size, dpi=110, layout="constrained"))
        draw(canvas.figure.add_subplot())
        canvas.draw()
    width, height = canvas.get_width_height()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).view(height, width, 4)
    return pixels[..., :3].permute(2, 0, 1)


def _draw_bars(axes: Any, bars: list[tuple[str, int, int]]) -> None:
    names = [short for short, _, _ in bars]
    axes.barh(names, [1.0] * len(bars), color="0.85", label="before")
    shares = axes.barh(names, [kept / max(1, size) for _, kept, size in bars], color="tab:blue", label="after")
    axes.bar_label(shares, [f" {kept:,} of {size:,}" for _, kept, size in bars], fontsize="x-small")
    axes.set(xlim=(0, 1), xlabel="share of the weights that is kept")
    axes.invert_yaxis()
    axes.legend(fontsize="x-small", loc="lower right")


def _pixels(kept: Tensor) -> Tensor:
    """Return a mask as a grey picture of shape `(1, height, width)`, uint8, wider than high."""
    shades = torch.full(kept.shape, _PRUNED, dtype=torch.uint8).masked_fill_(kept.cpu(), _KEPT)
    flat = _tiled(shades) if kept.ndim > 2 else shades.reshape(-1, shades.shape[-1])
    wide = flat if flat.shape[1] >= flat.shape[0] else flat.T
    times = max(1, _SIDE // wide.shape[1])
    return wide.repeat_interleave(times, 0).repeat_interleave(times, 1).unsqueeze(0)


def _tiled(shades: Tensor) -> Tensor:
    """Return the kernels of a convolution beside each other: a row for each output, a column for each input."""
    outputs, inputs, *kernel, width = shades.shape
    height = math.prod(kernel)
    padded = torch.nn.functional.pad(shades.reshape(outputs, inputs, height, width), (0, 1, 0, 1), value=_BETWEEN)
    return padded.permute(0, 2, 1, 3).reshape(outputs * (height + 1), inputs * (width + 1))
