"""The inputs that the kernel of a convolution covers, as rows, also for transposed convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

# Takes the number of rows and returns the indices of some of them.
Chosen = Callable[[int], Tensor]


def patches(module: Convolution, inputs: Tensor, chosen: Chosen) -> Tensor:
    """The inputs that the kernel of a convolution covers at some positions of its output.

    Args:
        module: The convolution.
        inputs: Its input, with or without a batch dimension.
        chosen: Chooses among the positions of all samples.

    Returns:
        Shape `(groups, rows, inputs)`. The inputs of a row are in the order of the weight's: channels, then kernel.
    """
    border = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    batch = _batched(module, inputs)
    windows = _windows(pad(batch, border, mode=mode) if any(border) else batch, module, module.stride)
    return _grouped(_rows(windows, len(module.kernel_size), chosen), module.groups)


def spread_patches(module: Transposed, inputs: Tensor, size: Sequence[int] | None, chosen: Chosen) -> Tensor:
    """The inputs that a transposed convolution adds up at some positions of its output.

    A transposed convolution is a convolution, with the kernel mirrored, of its spread input: `stride - 1` zeros between
    neighbours and zeros around them (Dumoulin and Visin 2016, arXiv:1603.07285).

    Args:
        module: The transposed convolution.
        inputs: Its input, with or without a batch dimension.
        size: The argument `output_size` of its forward.
        chosen: Chooses among the positions of all samples.

    Returns:
        Shape `(groups, rows, inputs)`. The inputs of a row are in the order of the weight's: channels, then kernel.
    """
    dims = len(module.kernel_size)
    windows = _windows(_spread(module, _batched(module, inputs), _more(module, inputs, size)), module, (1,) * dims)
    return _grouped(_rows(windows, dims, chosen).flip(tuple(range(2, 2 + dims))), module.groups)


def output_size(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Sequence[int] | None:
    """The argument `output_size` of a transposed convolution's forward."""
    size: Sequence[int] | None = arguments[1] if len(arguments) > 1 else named.get("output_size")
    return size


def _batched(module: Convolution | Transposed, inputs: Tensor) -> Tensor:
    return inputs if inputs.dim() == len(module.kernel_size) + 2 else inputs.unsqueeze(0)


def _windows(inputs: Tensor, module: Convolution | Transposed, stride: Sequence[int]) -> Tensor:
    """All windows of the kernel, a view of shape (samples, channels, positions..., kernel...)."""
    for dim, (size, dilation) in enumerate(zip(module.kernel_size, module.dilation, strict=True)):
        inputs = inputs.unfold(dim + 2, (size - 1) * dilation + 1, stride[dim])[..., ::dilation]
    return inputs


def _rows(windows: Tensor, dims: int, chosen: Chosen) -> Tensor:
    """Some of the windows, shape (rows, channels, kernel...)."""
    positions = (windows.shape[0], *windows.shape[2 : 2 + dims])
    where = torch.unravel_index(chosen(math.prod(positions)).to(windows.device), positions)
    return windows.movedim(1, 1 + dims)[where]


def _grouped(rows: Tensor, groups: int) -> Tensor:
    return rows.reshape(len(rows), groups, -1).movedim(1, 0)


def _more(module: Transposed, inputs: Tensor, size: Sequence[int] | None) -> list[int]:
    """How much longer the output is than the shortest one, for each dimension."""
    stride, kernel, dilation = list(module.stride), list(module.kernel_size), list(module.dilation)
    wanted = None if size is None else list(size)
    return module._output_padding(inputs, wanted, stride, _padding(module), kernel, len(kernel), dilation)


def _padding(module: Transposed) -> list[int]:
    return list(cast("tuple[int, ...]", module.padding))  # a word is refused by transposed convolutions


def _spread(module: Transposed, batch: Tensor, more: Sequence[int]) -> Tensor:
    """The input with zeros between its entries and around them."""
    shape = [(size - 1) * stride + 1 for size, stride in zip(batch.shape[2:], module.stride, strict=True)]
    spread = batch.new_zeros(*batch.shape[:2], *shape)
    places = (slice(None), slice(None), *(slice(None, None, stride) for stride in module.stride))
    spread[places] = batch
    reach = [(size - 1) * dilation for size, dilation in zip(module.kernel_size, module.dilation, strict=True)]
    borders = [(far - less, far - less + end) for far, less, end in zip(reach, _padding(module), more, strict=True)]
    return pad(spread, [one for border in reversed(borders) for one in border])  # a negative border is cut off
