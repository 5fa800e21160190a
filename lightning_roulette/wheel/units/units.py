"""Units of a network: which entries of its weights leave together, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_roulette.mask.mask import Mask


@dataclass(frozen=True, eq=False)
class Part:
    """Entries of one weight, and the units with which they leave.

    Attributes:
        name: Name of the weight.
        labels: int64, of a shape that broadcasts to the shape of the weight: the number of the unit with which each
            entry leaves; -1 for entries that leave with none.
        reads: Whether the entries read the units. Otherwise they compute them.
    """

    name: str
    labels: Tensor
    reads: bool = True


@dataclass(frozen=True, eq=False)
class Cost:
    """What entries of weights cost.

    Attributes:
        counted: What is counted: `"weights"`, or a field of `Reduction`.
        each: Cost of one entry, by the name of the weight. A weight without a name here costs nothing.
        own: float64, shape `(units,)`: what else each unit costs, such as its bias. None: nothing.
        fixed: What the network costs besides, whatever leaves.
    """

    counted: str
    each: Mapping[str, float]
    own: Tensor | None = None
    fixed: float = 0.0

    @classmethod
    def of_weights(cls, names: Sequence[str]) -> Cost:
        """Every entry of the named weights costs 1."""
        return cls("weights", dict.fromkeys(names, 1.0))


@dataclass(frozen=True, eq=False)
class Units:
    """The units of a network.

    An entry of a weight leaves as soon as one of its units leaves.

    Attributes:
        kind: What a unit is, in one word, such as `"neuron"`.
        groups: Name of each group to the number of its units. Units are numbered through all groups, in this order. Of
            each group one unit stays, or as many as `steps` says.
        parts: The entries that leave with units.
        cost: What decides how much leaves, and how dear a unit is.
        multiply_adds: The multiply-adds of one sample. None: unknown.
        kept_whole: Layers whose units cannot leave, with the reason.
        steps: Name of a group to a number of which a multiple of its units stays. 1 for groups without a name here.
    """

    kind: str
    groups: Mapping[str, int]
    parts: tuple[Part, ...]
    cost: Cost
    multiply_adds: Cost | None = None
    kept_whole: Mapping[str, str] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)

    @property
    def coupled(self) -> bool:
        """Whether some entries compute a unit and others read it, as they do for neurons and heads."""
        return not all(part.reads for part in self.parts)

    @property
    def count(self) -> int:
        """Number of units."""
        return sum(self.groups.values())

    def ranges(self) -> Iterator[tuple[str, int, int]]:
        """Yield for each group its name, the number of its first unit, and that after its last."""
        start = 0
        for name, size in self.groups.items():
            yield name, start, start + size
            start += size

    def without(self, parent: Mask, gone: Tensor) -> Mask:
        """Return the parent's mask without the entries of some units.

        Args:
            parent: The mask.
            gone: bool, shape `(units,)`.
        """
        padded = torch.cat([gone, gone.new_zeros(1)])  # the label -1 is its last entry
        stored = dict(parent.stored)
        for name, parts in self._by_name().items():
            kept = parent[name]
            for part in parts:
                kept = kept & ~padded[part.labels].to(kept.device)
            stored[name] = kept
        return Mask(stored)

    def totals(self, values: Mapping[str, Tensor], readers_alone: bool = False) -> Tensor:
        """Return for each unit the sum over its entries, each counted once: float64, shape `(units,)`.

        Args:
            values: Name of each weight to a tensor of its shape.
            readers_alone: Whether only entries that read units are summed.
        """
        sums = torch.zeros(self.count + 1, dtype=torch.float64)  # the last one is that of the label -1
        for name, parts in self._by_name().items():
            chosen = [part for part in parts if part.reads or not readers_alone]
            for place, part in enumerate(chosen):
                ours = values[name].to("cpu", torch.float64)
                for other in chosen[:place]:
                    ours = ours * (part.labels != other.labels)  # entries that leave with the same unit by both
                labels = torch.where(part.labels < 0, self.count, part.labels).flatten()
                sums.index_add_(0, labels, ours.sum_to_size(part.labels.shape).flatten())
        return sums[:-1]

    def alive(self, mask: Mask) -> Tensor:
        """Return whether a mask keeps any entry of each unit: bool, shape `(units,)`.

        Args:
            mask: The mask.
        """
        return self.totals(mask) > 0

    def removable(self, mask: Mask) -> int:
        """Return how many units may still leave: of each group all but one, or but its step.

        Args:
            mask: The mask.
        """
        alive = self.alive(mask)
        return sum(max(0, int(alive[start:stop].sum()) - self.step(name)) for name, start, stop in self.ranges())

    def step(self, group: str) -> int:
        """Return the number of which a multiple of the units of a group stays.

        Args:
            group: Name of the group.
        """
        return self.steps.get(group, 1)

    def costs(self, mask: Mask) -> Tensor:
        """Return what leaves with each unit if it is the only one that leaves: float64, shape `(units,)`.

        Args:
            mask: The mask.
        """
        each = {name: self.cost.each.get(name, 0.0) * mask[name].to(torch.float64) for name in self._by_name()}
        return self.totals(each) + (0.0 if self.cost.own is None else self.cost.own * self.alive(mask))

    def left(self, mask: Mask, cost: Cost | None = None) -> float:
        """Return what the network of a mask costs.

        Args:
            mask: The mask.
            cost: What is counted. None: `cost` of the units.
        """
        cost = cost or self.cost
        own = 0.0 if cost.own is None else float(cost.own[self.alive(mask)].sum())
        return cost.fixed + own + sum(cost.each.get(name, 0.0) * count for name, count in mask.counts.items())

    def whole(self, mask: Mask, cost: Cost | None = None) -> float:
        """Return what the network costs without any pruning, as `left` does. The mask may be any of the network.

        Args:
            mask: Any mask of the network.
            cost: What is counted. None: `cost` of the units.
        """
        cost = cost or self.cost
        own = 0.0 if cost.own is None else float(cost.own.sum())
        sizes = {name: flags.numel() for name, flags in mask.flags.items()}
        return cost.fixed + own + sum(cost.each.get(name, 0.0) * size for name, size in sizes.items())

    def _by_name(self) -> dict[str, list[Part]]:
        found: dict[str, list[Part]] = {}
        for part in self.parts:
            found.setdefault(part.name, []).append(part)
        return found
