"""Which weights leave together, and how much of a network is to leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from lightning_roulette.checks import as_group, check_choice, check_count, check_number

NAMED = ("weight", "neuron", "head")


class Unit:
    """Which weights leave together: a base class."""


@dataclass(frozen=True)
class Weight(Unit):
    """Single weights leave.

    Use it for the smallest files, and for devices whose kernels skip zeros. It needs nothing.
    """


@dataclass(frozen=True)
class Neuron(Unit):
    """Whole neurons and channels leave: rows of linear layers and output channels of convolutions.

    With a neuron leaves all that is coupled with it: batch normalisations, the columns of the layers that read it, and
    through residual additions the same neuron of other layers. The inner width of an attention leaves by whole heads.
    Use it for networks that become smaller and faster on every device. It needs the extra `units` and an example of the
    network's input.

    Args:
        multiple_of: The numbers of neurons or channels that stay in a layer are multiples of this, at least 1. Many
            kernels need as long for 33 channels as for 40. Layers with no more than this stay whole.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not allowed.
    """

    multiple_of: int = 1

    def __post_init__(self) -> None:
        check_count("multiple_of", self.multiple_of)


@dataclass(frozen=True)
class Head(Unit):
    """Whole heads of attention leave, and nothing else.

    Use it for transformers whose other widths must stay. It needs the extra `units` and an example of the network's
    input.
    """


@dataclass(frozen=True)
class NofM(Unit):
    """Of each group of `of` neighbouring weights of a chosen layer, `kept` stay.

    Use 2 of 4 for GPUs with sparse tensor cores. It needs layers whose number of inputs is a multiple of `of`.

    Args:
        kept: Weights that stay in a group, at least 1.
        of: Weights in a group, more than `kept`.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not allowed.
    """

    kept: int
    of: int

    def __post_init__(self) -> None:
        check_count("kept", self.kept)
        check_count("of", self.of)
        if self.of <= self.kept:
            raise ValueError(f"of is {self.of} and kept {self.kept}, but a group must have more weights than it keeps.")


@dataclass(frozen=True)
class Block(Unit):
    """Rectangles of each weight matrix leave.

    Use it for kernels that skip blocks of zeros. It needs nothing.

    Args:
        rows: Rows of a block, at least 1. Blocks at the end of a matrix may have fewer.
        columns: Columns of a block, at least 1. Blocks at the end of a matrix may have fewer.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not allowed.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        check_count("rows", self.rows)
        check_count("columns", self.columns)


_KINDS: dict[str, Unit] = {"weight": Weight(), "neuron": Neuron(), "head": Head()}


def unit_of(unit: str | Unit | Mapping[str, Any]) -> Unit:
    """Return which weights leave together.

    Args:
        unit: One of

            - `"weight"`, `"neuron"` or `"head"`.
            - A `Weight`, `Neuron`, `Head`, `NofM` or `Block`, which is returned.
            - A mapping from the fields of `Neuron`, `NofM` or `Block` to their values.

    Raises:
        TypeError: If `unit` is none of these types.
        ValueError: If `unit` is another word, or a field is not allowed.
    """
    if isinstance(unit, Unit):
        return unit
    if isinstance(unit, Mapping):
        kind = next((one for one in (Neuron, Block) if unit.keys() & {field.name for field in fields(one)}), NofM)
        if missing := [one.name for one in fields(kind) if one.default is MISSING and one.name not in unit]:
            raise TypeError(f"unit is {dict(unit)!r}, but a {kind.__name__} needs {' and '.join(missing)}, too.")
        found: Unit = as_group("unit", unit, kind)
        return found
    if not isinstance(unit, str):
        raise TypeError(f"unit is {unit!r}, but must be one of {', '.join(NAMED)}, or a NofM(...) or Block(...).")
    check_choice("unit", unit, NAMED, remedy="Or pass a NofM(...) or a Block(...).")
    return _KINDS[unit]


COUNTED = ("multiply_adds", "parameters", "latency")


@dataclass(frozen=True)
class Reduction:
    """How much of a network is to leave, in what it costs. Exactly one field is given.

    Units leave by their importance for what they cost, so the choice of the field also changes which units leave.

    Args:
        multiply_adds: Share of the multiply-adds of one sample, in (0, 1). For devices that compute.
        parameters: Share of the entries of all parameters, biases and normalisations among them, in (0, 1). For devices
            with little memory.
        latency: Share of the time of one forward pass, in (0, 1), by the time that each layer takes on this machine.
            For a network that runs here.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not allowed, or if not exactly one is given.
    """

    multiply_adds: float | None = None
    parameters: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        given = {name: share for name in COUNTED if (share := getattr(self, name)) is not None}
        if len(given) != 1:
            said = ", ".join(given) or "nothing"
            raise ValueError(f"Reduction was given {said}, but needs exactly one of {', '.join(COUNTED)}.")
        for name, share in given.items():
            check_number(name, share, above=0, below=1, remedy="It is the share that leaves.")

    @property
    def counted(self) -> str:
        """What is counted: the name of the field that is given."""
        return next(name for name in COUNTED if getattr(self, name) is not None)

    @property
    def share(self) -> float:
        """The share that leaves."""
        return float(getattr(self, self.counted))
