"""A layer whose decoded weight is too large, as several layers that each compute some of its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np

from lightning_roulette.slim.export.tflm.model import Model, Operator, Scales, StoredTensor

LAYERS = ("FULLY_CONNECTED", "CONV_2D")  # whose weights have outputs first
LARGEST_CONCATENATION = 10  # inputs that the runtime's operator takes
LEAST_ROWS = 2  # a layer of one output is computed with other rounding


def most_parts(model: Model, name: str) -> int:
    """Into how many parts the weight can be split; 1 where it cannot."""
    readers = [one for one in model.operators if name in one.inputs]
    if len(readers) != 1 or readers[0].code not in LAYERS:
        return 1
    return max(model.tensors[name].shape[0] // LEAST_ROWS, 1)


def part(name: str, number: int) -> str:
    """The name of a part of a tensor."""
    return f"{name}:{number}"


def splitting(model: Model, parts: Mapping[str, int]) -> Model:
    """The model with each named weight in that many parts by its outputs, whose outputs are concatenated."""
    operators: list[Operator] = []
    tensors: list[StoredTensor] = []
    for one in model.operators:
        count = max((parts.get(name, 1) for name in one.inputs), default=1)
        more, added = _split(model, one, count) if count > 1 else ([one], [])
        operators += more
        tensors += added
    return model.with_operators(operators, tensors)


def _split(model: Model, one: Operator, count: int) -> tuple[list[Operator], list[StoredTensor]]:
    source, weight, bias = one.inputs
    output = model.tensors[one.outputs[0]]
    edges = np.linspace(0, model.tensors[weight].shape[0], count + 1).astype(int).tolist()
    operators, tensors, outputs = [], [], []
    for number, (start, stop) in enumerate(pairwise(edges)):
        rows = [_rows(model.tensors[name], number, start, stop) for name in (weight, bias)]
        piece = replace(output, name=part(output.name, number), shape=(*output.shape[:-1], stop - start))
        operators.append(replace(one, inputs=(source, *(tensor.name for tensor in rows)), outputs=(piece.name,)))
        tensors += [*rows, piece]
        outputs.append(piece)
    joins, joined = _concatenated(outputs, output)
    return [*operators, *joins], [*tensors, *joined]


def _rows(tensor: StoredTensor, number: int, start: int, stop: int) -> StoredTensor:
    assert tensor.data is not None
    data = tensor.data[start:stop]
    scales = tensor.scales
    if scales is not None and len(scales.values) > 1:
        scales = Scales(scales.values[start:stop], scales.zero_point, scales.axis)
    return replace(tensor, name=part(tensor.name, number), shape=data.shape, data=data, scales=scales)


def _concatenated(pieces: list[StoredTensor], output: StoredTensor) -> tuple[list[Operator], list[StoredTensor]]:
    """The operators that join the pieces along the last dimension, at most ten at a time."""
    operators, tensors = [], []
    level = 0
    while len(pieces) > LARGEST_CONCATENATION:
        level += 1
        groups = [pieces[at : at + LARGEST_CONCATENATION] for at in range(0, len(pieces), LARGEST_CONCATENATION)]
        pieces = []
        for number, group in enumerate(groups):
            width = sum(piece.shape[-1] for piece in group)
            joined = replace(output, name=f"{output.name}:{level}:{number}", shape=(*output.shape[:-1], width))
            operators.append(_concatenation(group, joined))
            pieces.append(joined)
        tensors += pieces
    return [*operators, _concatenation(pieces, output)], tensors


def _concatenation(pieces: list[StoredTensor], output: StoredTensor) -> Operator:
    options = {"axis": len(output.shape) - 1}
    return Operator("CONCATENATION", tuple(piece.name for piece in pieces), (output.name,), "Concatenation", options)
