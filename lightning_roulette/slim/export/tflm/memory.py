"""How much memory a model takes at its largest operator, and which weights are decoded within a limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from lightning_roulette.slim.export.tflm.decoding import DECODED, decoding, gets_smaller
from lightning_roulette.slim.export.tflm.flatbuffer import to_bytes
from lightning_roulette.slim.export.tflm.interpreter import arena
from lightning_roulette.slim.export.tflm.model import Model
from lightning_roulette.slim.export.tflm.splitting import most_parts, part, splitting

GROWTH = 1.25  # of the number of parts, from one try to the next


@dataclass(frozen=True)
class Packed:
    """A model with some weights encoded.

    Attributes:
        model: The model, its DECODE operators included.
        file: Its bytes.
        arena: Bytes of memory that the runtime uses.
        parts: By the name of an encoded weight, in how many parts it is decoded. A weight that is not here is plain.
    """

    model: Model
    file: bytes
    arena: int
    parts: Mapping[str, int] = field(default_factory=dict)


def packed(model: Model, parts: Mapping[str, int]) -> Packed:
    """The model with the named weights encoded in so many parts, and the memory that the runtime uses for it."""
    split = splitting(model, parts)
    names = [part(name, number) for name, count in parts.items() if count > 1 for number in range(count)]
    names += [name for name, count in parts.items() if count == 1]
    done = decoding(split, [name for name in names if gets_smaller(split.tensors[name])])
    file = to_bytes(done)
    return Packed(done, file, arena(done, file), dict(parts))


def smallest(model: Model, max_ram: int | None) -> Packed:
    """The model with each weight encoded that gets smaller by it, as far as the memory allows.

    A weight whose decoded values do not fit is split by its outputs, into as few parts as fit; where no split fits, it
    stays plain.

    Args:
        model: The model with plain weights.
        max_ram: The largest arena in bytes, by the runtime on this machine; None: no limit.

    Raises:
        ValueError: If the model takes more memory than `max_ram` without any decoded weight.
    """
    parts = {name: 1 for name, tensor in model.tensors.items() if gets_smaller(tensor)}
    found = packed(model, parts)
    while max_ram is not None and found.arena > max_ram:
        if not found.parts:
            raise ValueError(_too_large(max_ram, found.arena))
        found = _less(model, found, max_ram)
    return found


def _less(model: Model, found: Packed, max_ram: int) -> Packed:
    """The model with the weight that takes most memory in more parts, or plain where that does not help."""
    name = _largest(found)
    more = _more(model.tensors[name].size, found.parts[name], max_ram)
    if more <= most_parts(model, name) and gets_smaller(model.tensors[name], more):
        tried = packed(model, {**found.parts, name: more})
        if _need(tried, name) < _need(found, name):  # each part takes some memory itself
            return tried
    return packed(model, {other: 1 for other in found.parts if other != name})


def _more(size: int, parts: int, max_ram: int) -> int:
    """The next number of parts to try: at least so many that one fits alone, else a quarter more."""
    return max(ceil(size / max_ram), ceil(parts * GROWTH), parts + 1)


def alive(model: Model) -> list[int]:
    """The bytes of computed tensors that live while each operator runs."""
    birth = {name: 0 for name in model.inputs}
    death = {name: len(model.operators) for name in model.outputs}
    for number, one in enumerate(model.operators):
        birth.update({name: number for name in one.outputs})
        death.update({name: max(number, death.get(name, 0)) for name in one.inputs})
    return [
        sum(model.tensors[name].size for name, start in birth.items() if start <= number <= death.get(name, start))
        for number in range(len(model.operators))
    ]


def _largest(found: Packed) -> str:
    """The weight that is decoded for the operator with the largest memory; any weight where it decodes none."""
    needs = {name: _own(found.model, name, count) for name, count in found.parts.items()}
    return max(needs, key=lambda name: needs[name])


def _need(found: Packed, name: str) -> int:
    """The arena if this weight's operators were the largest: their tensors, and what is kept for all operators."""
    return found.arena - max(alive(found.model)) + _own(found.model, name, found.parts[name])


def _own(model: Model, name: str, count: int) -> int:
    """The bytes that live at the largest of the operators that read the weight's pieces."""
    pieces = {piece + DECODED for piece in (name, *(part(name, number) for number in range(count)))}
    sizes = zip(alive(model), model.operators, strict=True)
    return max((size for size, one in sizes if pieces & {*one.inputs}), default=0)


def _too_large(max_ram: int, plain: int) -> str:
    return (
        f"max_ram={max_ram} is too little: TensorFlow Lite Micro takes {plain} bytes for this network although no "
        "weight is decoded. Allow that much, or use format='c', which decodes no weights and keeps nothing for each "
        "operator in memory."
    )
