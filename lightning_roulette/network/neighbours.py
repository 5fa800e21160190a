"""Groups of neighbouring inputs of a layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_roulette.network.layers import Layer


def neighbours(layer: Layer, tensors: Mapping[str, Tensor], size: int) -> Tensor | None:
    """The inputs of a layer's matrices in groups of neighbours: int64, shape `(groups, size)`.

    Neighbours are inputs of a linear layer that follow one another. For a convolution they are input channels that
    follow one another, at the same position of the kernel. Sparse tensor cores want this axis: in a matrix whose
    columns are ordered by position and then by channel, as for images with the channels last, groups lie side by side.
    NVIDIA's ASP groups convolutions alike (`create_mask` of `apex.contrib.sparsity`).

    Args:
        layer: The layer.
        tensors: Its parameters, or others of their shapes, by name.
        size: Inputs of a group.

    Returns:
        Indices of columns of `layer.matrices`. Each column is in one group. None if the inputs of a parameter, or the
        channels of one group of a convolution, cannot be divided into groups of this size.
    """
    found, start = [], 0
    for one in layer.columns:
        channels, *kernel = one.view(tensors[one.name]).shape[2:]
        if channels % size:
            return None
        columns = torch.arange(start, start := start + channels * int(torch.Size(kernel).numel()))
        found.append(columns.view(channels // size, size, -1).mT.reshape(-1, size))
    return torch.cat(found)
