"""Units of weights of which each few neighbours keep some: as 2 of 4, which sparse tensor cores multiply.

A unit is a layer. It is taken or left as a whole: of each group of neighbouring inputs (see `neighbours`) of each of
its outputs, all but `kept` weights leave.

    chance   E, exponential of rate 1, one for each weight and one for each layer (see `chance`)
    weight   key = log E + sharpness * log importance
    group    the weights with the smallest keys leave (Plackett-Luce, as in `law`)
    layer    key = log E + sharpness * log sqrt(sum of importance ** 2 / cost), over the weights that leave in it
    level    layers are taken in the order of their keys until what leaves meets the budget
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_roulette.checks import check_number
from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.layers import Layer
from lightning_roulette.network.neighbours import neighbours
from lightning_roulette.network.refittable import layers_of
from lightning_roulette.unit import NofM
from lightning_roulette.wheel.chance import stream
from lightning_roulette.wheel.law import Law, check_importance, keys_of, smallest_positive
from lightning_roulette.wheel.units.units import Cost, Part, Units

_ROUNDING = 1e-12  # share of a cost by which sums of floats may differ


@dataclass(frozen=True, eq=False)
class Neighbours(Units):
    """Layers of which each group of neighbours can lose some weights.

    Each layer is a group of its own, with one unit, which may leave. It is alive while it keeps more weights than its
    groups keep in the end.

    Attributes:
        layers: The layer of each group.
        inputs: The columns of its matrices, in groups of neighbours; see `neighbours`.
        rule: How many weights of a group stay.
    """

    layers: Mapping[str, Layer] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    rule: NofM = field(default_factory=lambda: NofM(2, 4))

    def alive(self, mask: Mask) -> Tensor:
        """Return which layers can be taken: bool, shape `(units,)`."""
        counts = (self.grouped(layer, mask).sum(-1) for layer in self.groups)
        return torch.tensor([bool((one > self.rule.kept).any()) for one in counts])

    def removable(self, mask: Mask) -> int:
        """Return the number of layers that can be taken."""
        return int(self.alive(mask).sum())

    def grouped(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the entries of a layer in groups: shape `(maps, outputs, groups, neighbours)`.

        Args:
            name: One of `groups`.
            tensors: The weights, or others of their shapes, by name.
        """
        layer = self.layers[name]
        matrices = layer.matrices({one: tensors[one] for one in layer.names})
        return matrices[..., self.inputs[name].to(matrices.device)]

    def thinned(self, parent: Mask, leaving: Mapping[str, Tensor]) -> Mask:
        """Return the parent's mask without some entries.

        Args:
            parent: The mask.
            leaving: The entries by the name of their layer, bool, in the shape that `grouped` returns.
        """
        flags: dict[str, Tensor] = {}
        for name, entries in leaving.items():
            layer = self.layers[name]
            for one in layer.names:
                flags.setdefault(one, parent[one].clone())
            matrices = layer.matrices(flags).clone()
            columns = self.inputs[name].flatten().to(matrices.device)
            matrices[..., columns] = matrices[..., columns] & ~entries.flatten(2)
            layer.write(flags, matrices)
        return Mask({**parent.stored, **flags})


class NofMWheel:
    """Draws what leaves in each layer, and which layers are taken; see the module.

    Args:
        units: The layers.
        importance: Name of each weight to the importance of its entries.
        parent: The mask from which weights leave.
        sharpness: Exponent of the odds. Infinity: the least important leave, without chance.
        factors: Factor of the importance of each layer, by its name. None: no factors.

    Raises:
        ValueError: If an importance is negative or not finite, or `sharpness` is negative.
    """

    def __init__(
        self,
        units: Neighbours,
        importance: Mapping[str, Tensor],
        parent: Mask,
        *,
        sharpness: float,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        check_number("sharpness", sharpness, at_least=0, remedy="Infinity is magnitude pruning.")
        self._units, self._parent, self._sharpness, self._factors = units, parent, sharpness, factors
        alive = units.alive(parent).tolist()
        self._names = [name for name, may in zip(units.groups, alive, strict=True) if may]
        of_layers = {one for name in self._names for one in units.layers[name].names}
        self._importance = {one: importance[one].detach().cpu() for one in importance if one in of_layers}
        for name, values in self._importance.items():
            check_importance(name, values)

    def spin(self, budget: float, *, seed: int, level: int, candidate: int) -> Mask:
        """Return the parent's mask without what leaves.

        It costs at least `budget`, and without the last layer less. If all layers cost less, all are taken.

        Args:
            budget: What is to leave, in units of the cost, above 0.
            seed: With `level`, `candidate` and the names of layers and weights, the source of all chance.
            level: See `seed`.
            candidate: See `seed`.

        Raises:
            ValueError: If the budget is not positive, or if no layer can be taken.
        """
        check_number("budget", budget, above=0)
        if not self._names:
            raise ValueError(
                f"no layer can be taken: each group of {self._units.rule.of} keeps {self._units.rule.kept}."
            )
        streams = _Streams(seed, level, candidate, math.isinf(self._sharpness))
        leaving = self._leaving(streams)
        costs = {name: self._cost(name, entries) for name, entries in leaving.items()}
        taken: dict[str, Tensor] = {}
        for name in self._order(leaving, costs, streams):
            if sum(costs[one] for one in taken) >= budget * (1 - _ROUNDING):
                break
            taken[name] = leaving[name]
        return self._units.thinned(self._parent, taken)

    def _leaving(self, streams: _Streams) -> dict[str, Tensor]:
        """Return for each layer the entries that leave if it is taken."""
        law = Law.of(self._sharpness, min(smallest_positive(one) for one in self._importance.values()))
        keys = {}
        for name, values in self._importance.items():
            own = keys_of(law.terms(values.flatten()), streams.of(name), torch.arange(values.numel()))
            keys[name] = own.view(values.shape)
        found = {}
        for name in self._names:
            kept = self._units.grouped(name, self._parent).cpu()
            found[name] = smallest_of_each(self._units.grouped(name, keys), kept, self._units.rule.kept)
        return found

    def _order(self, leaving: Mapping[str, Tensor], costs: Mapping[str, float], streams: _Streams) -> list[str]:
        """Return the layers in the order of their keys."""
        each = []
        for name, entries in leaving.items():
            squares = self._units.grouped(name, self._importance).to(torch.float64).square()
            total = float(squares[entries].sum()) / max(costs[name], torch.finfo(torch.float64).tiny)
            each.append((self._factors or {}).get(name, 1.0) * math.sqrt(total))
        importance = torch.tensor(each, dtype=torch.float64)
        terms = Law.of(self._sharpness, smallest_positive(importance)).terms(importance)
        first = torch.zeros(1, dtype=torch.int64)
        own = [
            keys_of(term, streams.of(f"layer {name}"), first)
            for term, name in zip(terms.split(1), leaving, strict=True)
        ]
        return [self._names[place] for place in torch.cat(own).argsort(stable=True).tolist()]

    def _cost(self, name: str, entries: Tensor) -> float:
        """Return what entries of a layer cost."""
        each = {
            one: torch.full(values.shape, self._units.cost.each.get(one, 0.0), dtype=torch.float64)
            for one, values in self._importance.items()
            if one in self._units.layers[name].names
        }
        return float(self._units.grouped(name, each)[entries].sum())


@dataclass(frozen=True)
class _Streams:
    """Streams of chance of one candidate; none if there is no chance."""

    seed: int
    level: int
    candidate: int
    silent: bool

    def of(self, name: str) -> int | None:
        return None if self.silent else stream(self.seed, self.level, self.candidate, name)


def smallest_of_each(keys: Tensor, kept: Tensor, stay: int) -> Tensor:
    """Return where the smallest keys of each group are, such that a number of entries stay. Ties leave in order.

    Args:
        keys: A group is the last dimension.
        kept: Which entries are left, bool, the same shape.
        stay: How many entries of a group stay. Groups with fewer lose none.
    """
    order = keys.masked_fill(~kept, math.inf).argsort(dim=-1, stable=True)
    first = torch.arange(keys.shape[-1]) < kept.sum(-1, keepdim=True) - stay
    return torch.zeros_like(kept).scatter_(-1, order, first)


def neighbours_of(network: nn.Module, names: Collection[str], rule: NofM, cost: Cost | None = None) -> Neighbours:
    """Return the layers of a network that can keep some of each few neighbours.

    Args:
        network: The network.
        names: Names of its weights that may be pruned.
        rule: How many weights of how many stay.
        cost: What weights cost. None: each costs 1.

    Raises:
        ValueError: If no layer has such groups.
    """
    found, why = layers_of(network, names)
    tensors = dict(network.named_parameters())
    layers: dict[str, Layer] = {}
    inputs: dict[str, Tensor] = {}
    for layer in found:
        if (groups := neighbours(layer, tensors, rule.of)) is None:
            why.update(dict.fromkeys(layer.names, f"its number of inputs is no multiple of {rule.of}"))
        else:
            name = _name_of(layer, layers)
            layers[name], inputs[name] = layer, groups
    if not layers:
        raise ValueError(
            f"unit is {rule!r}, but no layer has a number of inputs that is a multiple of {rule.of}. Choose another "
            "unit."
        )
    return Neighbours(
        "layer",
        dict.fromkeys(layers, 1),
        tuple(Part(one, torch.full([1] * tensors[one].dim(), -1)) for layer in layers.values() for one in layer.names),
        cost or Cost.of_weights(list(names)),
        kept_whole=why,
        layers=layers,
        inputs=inputs,
        rule=rule,
    )


def _name_of(layer: Layer, others: Collection[str]) -> str:
    """Return a name for a layer. Several layers may be parts of one weight."""
    first = " and ".join(layer.names)
    number = sum(one == first or one.startswith(f"{first}, part ") for one in others)
    return f"{first}, part {number + 1}" if number else first
