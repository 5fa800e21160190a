"""Units of a network: neurons, channels and heads, each with the entries that compute it and those that read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["neuron", "head"]


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of a tensor along which the entries belong to units.

    Attributes:
        name: Name of the parameter or buffer in the network's state dict.
        dim: The dimension.
        units: The unit of each index of that dimension, int64, on the CPU; -1 where the index belongs to no unit.
    """

    name: str
    dim: int
    units: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """Units that stand in the same layers. Each may leave the network, with its entries in all members.

    If the entries of a unit in the consumers are zero, then the output of the network does not depend on its entries
    in the producers.

    Attributes:
        name: Name of the first layer that computes them; of the attention, if they are heads.
        kind: "neuron" or "head". A channel of a convolution is a neuron.
        size: Number of units.
        producers: What computes them: rows of weights, biases, the parameters and buffers of batch normalisations.
        consumers: What reads them: columns of weights.
    """

    name: str
    kind: Kind
    size: int
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]

    @property
    def word(self) -> str:
        """What its units are called in messages."""
        return "heads" if self.kind == "head" else "units"


@dataclass(frozen=True, eq=False)
class Coupling:
    """The units of a network.

    Attributes:
        groups: Groups of units, neurons before heads.
        left: The layers whose units cannot leave, by name, with the reason.
    """

    groups: tuple[Group, ...]
    left: Mapping[str, str]
