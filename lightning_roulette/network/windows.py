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
    return _grouped(
        _windows(pad(batch, border, mode=mode) if any(border) else batch, module, module.stride, chosen), module
    )


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
    spread = _spread(module, _batched(module, inputs), _more(module, inputs, size))
    return _grouped(_windows(spread, module, (1,) * len(module.kernel_size), chosen).flip(1), module)


def output_size(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Sequence[int] | None:
    """The argument `output_size` of a transposed convolution's forward."""
    size: Sequence[int] | None = arguments[1] if len(arguments) > 1 else named.get("output_size")
    return size


def _batched(module: Convolution | Transposed, inputs: Tensor) -> Tensor:
    return inputs if inputs.dim() == len(module.kernel_size) + 2 else inputs.unsqueeze(0)


def _windows(inputs: Tensor, module: Convolution | Transposed, stride: Sequence[int], chosen: Chosen) -> Tensor:
    """Some windows of the kernel, shape (rows, places in the kernel, channels).

    Channels come last in memory, so that the numbers of a place lie side by side.
    """
    sizes = inputs.shape[2:]
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(module.kernel_size, module.dilation, strict=True)]
    positions = [(size - far) // by + 1 for size, far, by in zip(sizes, reach, stride, strict=True)]
    sample, *where = torch.unravel_index(
        chosen(len(inputs) * math.prod(positions)).to(inputs.device), (len(inputs), *positions)
    )
    begin, places = sample, sample.new_zeros(1)
    for size, at, by, kernel, dilation in zip(sizes, where, stride, module.kernel_size, module.dilation, strict=True):
        begin = begin * size + at * by
        places = (places.unsqueeze(1) * size + torch.arange(kernel, device=places.device) * dilation).flatten()
    return inputs.movedim(1, -1).flatten(0, -2)[begin.unsqueeze(1) + places]


def _grouped(windows: Tensor, module: Convolution | Transposed) -> Tensor:
    """Windows in the order of a weight, shape (groups, rows, inputs)."""
    return windows.mT.reshape(len(windows), module.groups, windows.shape[1:].numel() // module.groups).movedim(1, 0)


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
