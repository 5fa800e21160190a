"""What competes for its place in a layer: weights of an output, neighbours, or blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_roulette.network.layers import Layer
from lightning_roulette.network.neighbours import neighbours
from lightning_roulette.refit.solvers.pieces import Blocks, Pieces, Segments, Singly
from lightning_roulette.wheel.units.nofm import Neighbours
from lightning_roulette.wheel.units.units import Part, Units


def pieces_of(layer: Layer, tensors: Mapping[str, Tensor], units: Units | None) -> Pieces | None:
    """Return the pieces of a layer among which is chosen. None if nothing is chosen in it.

    Args:
        layer: The layer.
        tensors: Its parameters, or others of their shapes, by name.
        units: Neighbours or blocks. None: single weights.
    """
    if units is None:
        return Singly()
    if isinstance(units, Neighbours):
        inputs = neighbours(layer, tensors, units.rule.of)
        return None if inputs is None else Segments(inputs.to(tensors[layer.names[0]].device))
    labels = labels_in(layer, tensors, units.parts)
    ends = [stop for _, _, stop in units.ranges()]
    return Blocks.of(labels, ends) if bool((labels >= 0).any()) else None


def labels_in(layer: Layer, tensors: Mapping[str, Tensor], parts: Iterable[Part]) -> Tensor:
    """Return the number of the unit of each entry of a layer's matrices, shape `(groups, outputs, inputs)`.

    It is -1 for entries that are in no unit, and for a bias.

    Args:
        layer: The layer.
        tensors: Its parameters, or others of their shapes, by name.
        parts: What belongs to units. No entry is in several of them.
    """
    labels = {name: torch.full(tensors[name].shape, -1, device=tensors[name].device) for name in layer.names}
    for part in parts:
        if part.name in labels:
            labels[part.name] = torch.maximum(labels[part.name], part.labels.to(labels[part.name].device))
    found = layer.matrices(labels)
    return found if layer.bias is None else torch.cat([found, torch.full_like(found[..., :1], -1)], 2)
