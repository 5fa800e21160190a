"""Which units of a set stay, for a given number, by the squared errors of all layers that read them.

Units leave one after the other, each time the one whose loss grows the sum of the errors least when the other inputs of
the layers are solved again. Then units that left are exchanged for units that stayed while this lowers the sum. This is
optimal brain surgeon with blocks of inputs, as in Meng et al., "OSSCAR: One-shot structured pruning in vision and
language models with combinatorial optimization" (ICML 2024, arXiv:2403.12983).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_TURNS = 64  # in which all units leave at most; in a large set several leave at a time
_TRIED, _ENTRIES = 32, 2**27  # units that are tried in exchange in a sweep: fewer if the matrices have many entries
_SWEEPS = 3


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads units: the equations of its weights, as `W damped = right`.

    Attributes:
        damped: Its damped Gram matrices, float64, shape `(groups, inputs, inputs)`.
        right: Right-hand sides, float64, shape `(groups, outputs, inputs)`. A factor of an output's row is the root of
            what its squared error counts.
        columns: int64, shape `(units, most)`: the inputs of each unit, padded with -1. Other inputs stay.
    """

    damped: Tensor
    right: Tensor
    columns: Tensor

    def inputs(self, units: list[int]) -> Tensor:
        """Return the inputs of some units."""
        found = self.columns[units]
        return found[found >= 0]


def staying(readers: Sequence[Reader], alive: Tensor, given: Tensor, kinds: Tensor) -> Tensor:
    """Return which units stay, as many of each kind as are given.

    Args:
        readers: The layers that read the units.
        alive: Which units may stay, bool, shape `(units,)`.
        given: Those that stay until now, the same shape. All of them are alive.
        kinds: int64, the same shape: only units of one kind are exchanged.

    Returns:
        Bool, the same shape. The given ones if others have no smaller error.
    """
    if torch.equal(alive, given):
        return given
    wanted = torch.bincount(kinds[given], minlength=int(kinds.max()) + 1)
    found = _Elimination([_Solution.of(one, alive) for one in readers], alive.clone(), kinds)
    found.shrink(wanted)
    for _ in range(_SWEEPS):
        if not found.exchange():
            break
    before = sum(_Solution.of(one, given).explained for one in readers)
    after = sum(_Solution.of(one, found.kept).explained for one in readers)
    return found.kept if after > before else given


@dataclass(eq=False)
class _Elimination:
    """Units that leave the layers that read them.

    Attributes:
        solutions: The solution of each layer for the units that stay.
        kept: The units that stay, bool, shape `(units,)`.
        kinds: The kind of each unit, int64, the same shape.
        left: The units that have left, in this order.
    """

    solutions: list[_Solution]
    kept: Tensor
    kinds: Tensor
    left: list[int] = field(default_factory=list)

    def shrink(self, wanted: Tensor) -> None:
        """Remove units until so many of each kind are left."""
        excess = torch.bincount(self.kinds[self.kept], minlength=len(wanted)) - wanted
        at_a_time = -(-int(excess.sum()) // _TURNS)
        while bool((excess > 0).any()):
            leaving = []
            for unit in self._cheapest(self.kept & (excess > 0)[self.kinds])[:at_a_time].tolist():
                if excess[self.kinds[unit]] > 0:
                    excess[self.kinds[unit]] -= 1
                    leaving.append(unit)
            self._remove(leaving)
            self.left += leaving

    def exchange(self) -> bool:
        """Try to exchange each of the units that left last for a unit that stays. Return whether any was."""
        before, entries = list(self.left), sum(one.inverse.numel() for one in self.solutions)
        for place in range(len(self.left))[-max(1, min(_TRIED, _ENTRIES // entries)) :][::-1]:
            unit = self.left[place]
            self._insert(unit)
            self.left[place] = int(self._cheapest(self.kept & (self.kinds == self.kinds[unit]), unit)[0])
            self._remove([self.left[place]])
        return self.left != before

    def _cheapest(self, among: Tensor, first: int = -1) -> Tensor:
        """Return some units in the order of the growth of the error without them. Of equal ones `first` comes first."""
        units = among.nonzero().flatten()
        growth = torch.stack([one.growth(units) for one in self.solutions]).sum(0).cpu()
        order = growth.sort(stable=True).indices
        if first >= 0 and not bool((growth < growth[units == first]).any()):
            return units.new_tensor([first])
        return units[order]

    def _remove(self, units: list[int]) -> None:
        self.kept[units] = False
        for one in self.solutions:
            one.remove(units)

    def _insert(self, unit: int) -> None:
        self.kept[unit] = True
        for one in self.solutions:
            one.insert(unit)


@dataclass(eq=False)
class _Solution:
    """The solution of a layer for the units that stay. Both matrices are zero at the inputs of other units.

    Attributes:
        layer: The layer.
        inverse: Inverse of the part of its Gram matrices that belongs to the inputs that stay.
        weights: Its weights.
    """

    layer: Reader
    inverse: Tensor
    weights: Tensor

    @classmethod
    def of(cls, layer: Reader, kept: Tensor) -> _Solution:
        """Return the solution for some units."""
        gone = layer.columns[~kept]
        gone = gone[gone >= 0]
        part = layer.damped.clone()
        part[:, gone], part[:, :, gone] = 0.0, 0.0
        part[:, gone, gone] = 1.0
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(part)[0])
        inverse[:, gone], inverse[:, :, gone] = 0.0, 0.0
        return cls(layer, inverse, layer.right @ inverse)

    @property
    def explained(self) -> float:
        """How far the squared error is below that of a layer without inputs."""
        return float((self.layer.right * self.weights).sum())

    def growth(self, units: Tensor) -> Tensor:
        """Return by how much the squared error grows if only one unit leaves, for each of some units that stay."""
        inputs = self.layer.columns[units]
        real, at = inputs >= 0, inputs.clamp(min=0)
        block = self.inverse[:, at.unsqueeze(2), at.unsqueeze(1)]
        block = block.masked_fill(~(real.unsqueeze(2) & real.unsqueeze(1)), 0.0)
        block.diagonal(dim1=2, dim2=3).add_((~real).to(block))
        ours = self.weights[:, :, at].masked_fill(~real, 0.0).permute(0, 2, 3, 1)
        solved = torch.cholesky_solve(ours, torch.linalg.cholesky_ex(block)[0])
        return (ours * solved).sum((0, 2, 3))

    def remove(self, units: list[int]) -> None:
        """Solve without the inputs of some units that stay until now."""
        at = self.layer.inputs(units)
        own = self.inverse[:, :, at]
        share = torch.linalg.inv(own[:, at]) @ own.mT
        self.weights.baddbmm_(self.weights[:, :, at], share, alpha=-1)
        self.inverse.baddbmm_(own, share, alpha=-1)
        self.weights[:, :, at] = 0.0
        self.inverse[:, at], self.inverse[:, :, at] = 0.0, 0.0

    def insert(self, unit: int) -> None:
        """Solve with the inputs of a unit that left."""
        at = self.layer.inputs([unit])
        columns = self.layer.damped[:, :, at]
        others = self.inverse @ columns
        direction = -others
        direction[:, at] += torch.eye(len(at)).to(direction)
        share = torch.linalg.inv(columns[:, at] - columns.mT @ others) @ direction.mT
        self.weights.baddbmm_(self.layer.right[:, :, at] - self.weights @ columns, share)
        self.inverse.baddbmm_(direction, share)
