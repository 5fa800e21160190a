"""Units that are rectangles of a weight matrix."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from lightning_roulette.network.layers import Columns
from lightning_roulette.network.refittable import layers_of
from lightning_roulette.unit import Block
from lightning_roulette.wheel.units.units import Cost, Part, Units


def blocks_of(network: nn.Module, names: Collection[str], block: Block, cost: Cost | None = None) -> Units:
    """Return the blocks of a network's weights.

    The rows of a matrix are the outputs of its layer, and its columns are the inputs. A block of a convolution has
    neighbouring output channels and neighbouring input channels at one position of the kernel. Blocks at the end of a
    matrix, or of one group of a convolution, may be smaller. Each weight keeps one block.

    Args:
        network: The network.
        names: Names of its weights that may be pruned.
        block: The size of a block.
        cost: What weights cost. None: each costs 1.

    Raises:
        ValueError: If no weight is a matrix of a layer.
    """
    layers, why = layers_of(network, names)
    tensors = dict(network.named_parameters())
    labels = {name: torch.full(tensors[name].shape, -1) for layer in layers for name in layer.names}
    groups: dict[str, int] = {}
    start = 0
    for name, numbers in labels.items():  # a weight may hold the matrices of several layers
        for columns in (one for layer in layers for one in layer.columns if one.name == name):
            count = _label(columns, numbers, block, start)
            groups[name] = groups.get(name, 0) + count
            start += count
    if not groups:
        raise ValueError(f"unit is {block!r}, but no weight is a matrix of a layer. Choose another unit.")
    return Units(
        "block",
        groups,
        tuple(Part(name, one) for name, one in labels.items()),
        cost or Cost.of_weights(list(names)),
        kept_whole=why,
    )


def _label(columns: Columns, labels: Tensor, block: Block, start: int) -> int:
    """Write the numbers of the blocks of a matrix into the labels of its weight. Return how many there are."""
    view = columns.view(labels)
    maps, outputs, inputs, *kernel = view.shape
    positions = torch.Size(kernel).numel()
    row, column = torch.arange(outputs) // block.rows, torch.arange(inputs) // block.columns
    rows, across = int(row[-1]) + 1, int(column[-1]) + 1
    place = torch.arange(maps * positions).view(maps, 1, 1, positions)
    numbers = (place * rows + row.view(1, -1, 1, 1)) * across + column.view(1, 1, -1, 1)
    view.copy_(numbers.view(view.shape) + start)
    return maps * positions * rows * across
