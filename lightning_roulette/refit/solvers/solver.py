"""The base class of solvers. They prepare Gram sums once, then solve for one set of kept weights after another."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lightning_roulette.refit.gram import GramSums


class Prepared(ABC):
    """Gram sums that a solver has prepared."""

    @abstractmethod
    def solve(self, kept: Tensor, start: Tensor) -> Tensor:
        """Return the matrix with the smallest damped squared error among matrices that are zero where not kept.

        Each output's row `w` minimises `sum((w . x - y) ** 2) + ridge * |w - start| ** 2` over the rows of the sums.

        Args:
            kept: Bool, shape `(groups, outputs, inputs)`. True where an entry may differ from zero.
            start: Float64, the same shape.

        Returns:
            Float64, the same shape.
        """


class Solver(ABC):
    """A way to solve for the kept weights of a layer."""

    @abstractmethod
    def init(self, sums: GramSums) -> Prepared:
        """Do the work that does not depend on which weights are kept."""
