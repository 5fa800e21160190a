"""How much memory a model takes at its largest operator, and which weights are decoded within a limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from lightning_roulette.slim.export.tflm.decoding import DECODED, decoding, gets_smaller
from lightning_roulette.slim.export.tflm.flatbuffer import to_bytes
from lightning_roulette.slim.export.tflm.interpreter import Interpreter, enough
from lightning_roulette.slim.export.tflm.model import Model
from lightning_roulette.slim.export.tflm.splitting import most_parts, part, splitting


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
    return Packed(done, file, Interpreter(file, enough(done, file)).arena, dict(parts))


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
        if not parts:
            raise ValueError(_too_large(max_ram, found.arena))
        parts = _less(model, parts, _largest(found.model, parts), found.arena - max_ram)
        found = packed(model, parts)
    return found


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


def _largest(model: Model, parts: Mapping[str, int]) -> str:
    """The weight that is decoded for the operator with the largest memory; any weight where it decodes none."""
    sizes = alive(model)
    one = model.operators[sizes.index(max(sizes))]
    used = {name.removesuffix(DECODED) for name in (*one.inputs, *one.outputs)}
    pieces = {
        piece: name for name, count in parts.items() for piece in (name, *(part(name, at) for at in range(count)))
    }
    return next((pieces[name] for name in used if name in pieces), next(iter(parts)))


def _less(model: Model, parts: Mapping[str, int], name: str, excess: int) -> dict[str, int]:
    """The parts with one weight in more parts, such that each is smaller by the excess, or plain."""
    weight = model.tensors[name]
    room = weight.size // parts[name] - excess
    count = max(ceil(weight.size / room), parts[name] + 1) if room > 0 else weight.size
    others = {other: number for other, number in parts.items() if other != name}
    return {**others, name: count} if count <= most_parts(model, name) and gets_smaller(weight, count) else others


def _too_large(max_ram: int, plain: int) -> str:
    return (
        f"max_ram={max_ram} is too little: TensorFlow Lite Micro takes {plain} bytes for this network although no "
        "weight is decoded. Allow that much, or use format='c', which decodes no weights and keeps nothing for each "
        "operator in memory."
    )
