"""The wheel of one level whose sectors are units."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_roulette.checks import check_number
from lightning_roulette.mask.mask import Mask
from lightning_roulette.wheel.chance import log_clocks, stream
from lightning_roulette.wheel.law import Law, check_importance, smallest_positive
from lightning_roulette.wheel.units.units import Units

_ROUNDING = 1e-12  # share of a cost by which sums of floats may differ


class UnitWheel:
    """Draws units by the law of the wheel, see `law`.

    The key of a unit is `log E + sharpness * log importance`, where `E` is its exponential clock. Units leave in the
    order of their keys until what leaves meets a budget. This is the law for weights (Plackett-Luce), with two
    differences:

    - The number of draws follows from the budget. What leaves is counted entry by entry, so that an entry which two
      units share counts once. The last unit that leaves may exceed the budget.
    - Of each group the unit with the largest key stays. If `Units.steps` asks for multiples of a number, as many stay,
      and a unit waits until so many of its group leave together that a multiple stays. The last of them may exceed the
      budget with those that waited for it.

    Args:
        units: The units.
        importance: float64, shape `(units,)`: non-negative and finite for each unit that is left.
        parent: The mask from which units leave.
        sharpness: Exponent of the odds. Infinity: the least important units leave, without chance.

    Raises:
        ValueError: If an importance is negative or not finite, or `sharpness` is negative.
    """

    def __init__(self, units: Units, importance: Tensor, parent: Mask, *, sharpness: float) -> None:
        check_number("sharpness", sharpness, at_least=0, remedy="Infinity is magnitude pruning.")
        self.units, self.parent, self.sharpness = units, parent, sharpness
        self._alive = units.alive(parent)
        importance = torch.where(self._alive, importance.to(torch.float64), math.inf)
        check_importance("the units", importance[self._alive])
        self._terms = Law.of(sharpness, smallest_positive(importance[self._alive])).terms(importance)

    def spin(self, budget: float, *, seed: int, level: int, candidate: int) -> Mask:
        """Return the parent's mask without the units that leave.

        Their entries cost at least `budget`, and without the last unit less. If all units that may leave cost less,
        all of them leave.

        Args:
            budget: What is to leave, in units of the cost, above 0.
            seed: With `level`, `candidate` and the name of each group, the source of all chance.
            level: See `seed`.
            candidate: See `seed`.

        Raises:
            ValueError: If the budget is not positive, or if no unit may leave.
        """
        check_number("budget", budget, above=0)
        order, ends = self._order(lambda name: stream(seed, level, candidate, name))
        if not len(order):
            raise ValueError(
                "no unit may leave: of each group one unit is left, or as many as Neuron(multiple_of=...) says. Stop "
                "here, or prune weights instead."
            )
        least = self.units.left(self.parent) - budget + _ROUNDING * abs(budget)
        few, many = 0, len(ends)
        while many - few > 1:  # the first `few` ends are not enough
            middle = (few + many) // 2
            if self.units.left(self._without(order[: ends[middle - 1]])) <= least:
                many = middle
            else:
                few = middle
        return self._without(order[: ends[many - 1]])

    def _order(self, stream_of: Callable[[str], int]) -> tuple[Tensor, list[int]]:
        """Return the numbers of the units that may leave, in their order, and the lengths at which it may end."""
        numbers, keys, ends = [], [], []
        for name, start, stop in self.units.ranges():
            own = self._terms[start:stop].to(torch.float64)
            if not math.isinf(self.sharpness):
                own = own + log_clocks(stream_of(name), torch.arange(stop - start))
            alive = self._alive[start:stop].nonzero().flatten()
            leaving = alive[own[alive].sort(stable=True).indices][: max(0, len(alive) - self.units.step(name))]
            last = _last_of_each(len(alive), self.units.step(name))
            numbers.append(leaving + start)
            keys.append(own[leaving[last]])  # a unit leaves when the last leaves with which it leaves together
            ends.append(last == torch.arange(len(last)))
        order = torch.cat(keys).sort(stable=True).indices
        return torch.cat(numbers)[order], (torch.cat(ends)[order].nonzero().flatten() + 1).tolist()

    def _without(self, numbers: Tensor) -> Mask:
        gone = torch.zeros(self.units.count, dtype=torch.bool)
        gone[numbers] = True
        return self.units.without(self.parent, gone)


def _last_of_each(alive: int, step: int) -> Tensor:
    """Return for each unit that may leave the place of the last of those that leave with it, if multiples stay."""
    places = torch.arange(max(0, alive - step))
    first = (alive - 1) % step + 1  # of them leave first
    return (places - first).div(step, rounding_mode="floor").add(1) * step + first - 1


def importance_of_units(units: Units, importance: Mapping[str, Tensor], parent: Mask, readers_alone: bool) -> Tensor:
    """Return the importance of each unit for what it costs: float64, shape `(units,)`.

    It is the root of the sum of squares over the entries that leave with the unit, divided by the cost of what leaves:

        sqrt(sum of importance ** 2 / cost)

    Args:
        units: The units.
        importance: Name of each weight to the importance of its entries.
        parent: The mask from which units leave. Entries that it prunes do not count.
        readers_alone: Whether only the entries that read a unit count. Those that compute it are then lost for nothing.
    """
    names = dict.fromkeys(part.name for part in units.parts)
    squares = {name: importance[name].detach().to("cpu", torch.float64).square() * parent[name].cpu() for name in names}
    return for_their_costs(units, units.totals(squares, readers_alone), parent)


def for_their_costs(units: Units, squares: Tensor, parent: Mask) -> Tensor:
    """Return the root of the square of each unit's importance for what it costs, float64, shape `(units,)`."""
    return (squares / units.costs(parent).clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
