"""Which values share memory: those that are never needed at one time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_roulette.slim.export.operations import Activate, Program, Reshape, inputs_of


@dataclass(frozen=True)
class Memory:
    """The places of values.

    Attributes:
        size: Elements of the arena.
        offsets: For each value in the arena its first element.
        same: For each value the value in whose place it is: that of a Reshape or of an Activate in its input's place.
    """

    size: int
    offsets: Mapping[str, int]
    same: Mapping[str, str]


@dataclass(frozen=True)
class _Life:
    """A value in the arena from the operation that makes it to the last one that uses it."""

    name: str
    size: int
    first: int
    last: int


def plan(program: Program) -> Memory:
    """Return where each value is kept. The input and the output of the program are not in the arena.

    The largest values are placed first, each at the lowest place that is free as long as it is needed.
    """
    same = _shared(program)
    placed: dict[str, tuple[_Life, int]] = {}
    for life in sorted(_lives(program, same), key=lambda one: (-one.size, one.first, one.name)):
        placed[life.name] = (life, _lowest(life, list(placed.values())))
    size = max((life.size + offset for life, offset in placed.values()), default=0)
    return Memory(size, {name: offset for name, (_, offset) in placed.items()}, same)


def _shared(program: Program) -> dict[str, str]:
    """Return in whose place each value is. What is given to the program is never overwritten."""
    uses: dict[str, int] = {}
    for one in program.operations:
        for value in inputs_of(one):
            uses[value.name] = uses.get(value.name, 0) + 1
    same = {name: name for name in program.values}
    for one in program.operations:
        if isinstance(one, Reshape) or (isinstance(one, Activate) and _in_place(program, one, uses, same)):
            same[one.output.name] = same[one.input.name]
    return same


def _in_place(program: Program, one: Activate, uses: Mapping[str, int], same: Mapping[str, str]) -> bool:
    """Return whether nothing else uses the input of an activation."""
    name = one.input.name
    return uses[name] == 1 and same[name] == name != program.input.name


def _lives(program: Program, same: Mapping[str, str]) -> list[_Life]:
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, one in enumerate(program.operations):
        first.setdefault(same[one.output.name], index)
        for value in (*inputs_of(one), one.output):
            last[same[value.name]] = index
    outside = {program.input.name, same[program.output.name]}
    sizes = program.values
    return [_Life(name, sizes[name].size, first[name], last[name]) for name in first if name not in outside]


def _lowest(life: _Life, placed: Sequence[tuple[_Life, int]]) -> int:
    """Return the lowest place that no other value needs at the same time."""
    taken = sorted(
        (offset, offset + other.size)
        for other, offset in placed
        if other.first <= life.last and life.first <= other.last
    )
    place = 0
    for begin, end in taken:
        if begin - place >= life.size:
            break
        place = max(place, end)
    return place
