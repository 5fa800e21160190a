"""`remove_dead`: a network without its dead units. `dead_units`: how many there are."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.network.calling import has_own_forward
from lightning_roulette.network.coupling.borrowing import borrowed
from lightning_roulette.network.coupling.coupling import coupling_of
from lightning_roulette.network.coupling.cutting import Cut
from lightning_roulette.network.coupling.groups import Coupling, Group
from lightning_roulette.report.columns import in_columns
from lightning_roulette.slim.removal.dead import DeadUnits
from lightning_roulette.slim.removal.examples import are_close, inputs_like, outputs, runs_of


@dataclass(frozen=True)
class UnitCount:
    """The units of a group: neurons, channels or heads that stand in the same layers.

    Attributes:
        name: Name of the first layer that computes them, or of the attention.
        kind: "neuron" or "head".
        units: Number of units.
        dead: Those that are without effect, and can be removed.
        constant: Those whose weights are all zero, but which stay, as their constant cannot be folded exactly: it is
            read by a convolution that pads with zeros, or by a layer without a bias.
    """

    name: str
    kind: str
    units: int
    dead: int
    constant: int


@dataclass(frozen=True, eq=False)
class DeadCount:
    """The units of a network, and how many of them are dead. As a string it is a table.

    Attributes:
        groups: The groups of units that can leave.
        left: The layers whose units cannot leave, by name, with the reason.
    """

    groups: tuple[UnitCount, ...]
    left: Mapping[str, str]

    @property
    def units(self) -> int:
        """Number of units in all groups."""
        return sum(one.units for one in self.groups)

    @property
    def dead(self) -> int:
        """Number of dead units in all groups."""
        return sum(one.dead for one in self.groups)

    def __str__(self) -> str:
        rows = [("units", "kind", "all", "dead", "constant")]
        rows += [(one.name, one.kind, f"{one.units:,}", f"{one.dead:,}", f"{one.constant:,}") for one in self.groups]
        lines = [f"{name}: {reason}" for name, reason in self.left.items()]
        return "\n".join([*in_columns(rows, left=(0, 1)), f"{self.dead:,} of {self.units:,} units are dead.", *lines])


@dataclass(frozen=True, eq=False)
class Removal:
    """A network without dead units.

    Attributes:
        model: The new module: the network, or what it is inside of.
        count: What was found in the first network.
        sizes: The attributes of modules that differ from those of the first one, by the name of the module.
    """

    model: nn.Module
    count: DeadCount
    sizes: Mapping[str, Mapping[str, Any]]


def remove_dead(model: nn.Module, example_input: Any) -> nn.Module:
    """A new network without the neurons, channels and heads that are without effect.

    A unit is dead if all weights that read it are zero. A unit whose weights are all zero gives a constant: it is dead
    if the constant is zero, or if every layer that reads it has a bias into which it can be folded exactly, which is
    so for linear layers and for convolutions without zero padding. What is left without effect by that is removed,
    too. At least one unit of each group stays.

    The new network has the same names. It is compared with the first one in evaluation mode, on the example and on
    random inputs like it: outputs differ by at most 1e-5, relative to the larger of one and the largest output. In
    training, batch normalisation and dropout see fewer units.

    Args:
        model: The network. It is not changed.
        example_input: What its forward is called with: a tensor, a tuple or list of arguments, or a mapping of named
            arguments.

    Returns:
        A module of the same class on the same device, whose layers are narrower.

    Raises:
        ImportError: If the extra `units` is not installed.
        TypeError: If `example_input` is none of these.
        ValueError: If the network cannot be called with it, if it is compiled or cannot be copied, or if rounding
            changes its outputs by more than 1e-5.
    """
    return removal_of(model, example_input).model


def dead_units(model: nn.Module, example_input: Any) -> DeadCount:
    """Count the units of a network that `remove_dead` removes.

    Args:
        model: The network. It is not changed.
        example_input: As for `remove_dead`.

    Returns:
        The number of units and of dead ones for each group of layers, and the layers that must stay whole, with the
        reason. `print` shows them as a table.

    Raises:
        ImportError: As `remove_dead`; likewise `TypeError` and `ValueError`.
    """
    return removal_of(model, example_input).count


def removal_of(model: nn.Module, example_input: Any, inside: str = "") -> Removal:
    """Remove the dead units of a network in a copy of a module; see `remove_dead`.

    Args:
        model: The module. It is not changed.
        example_input: What the forward of the network is called with.
        inside: The path of the network inside the module. Empty: the module is the network.
    """
    _refuse_own_forward(model)
    whole = _copied(model)
    network = whole.get_submodule(inside)
    coupling = coupling_of(network, example_input)
    inputs = inputs_like(network, example_input)
    expected = outputs(network, inputs)
    with borrowed(network):
        found = DeadUnits(network, coupling.groups, runs_of(network, inputs))
    _check(expected, outputs(network, inputs))
    cut = Cut(network)
    reasons = {one.name: _removed(cut, one, found.dead[one.name], expected, inputs) for one in coupling.groups}
    stuck = {name for name, reason in reasons.items() if reason}
    left = dict(coupling.left) | {name: reasons[name] for name in sorted(stuck)}
    _check(expected, outputs(network, inputs))
    counts = _counts(coupling, found, stuck)
    sizes = {f"{inside}.{name}".strip("."): each for name, each in cut.sizes.items()}
    return Removal(whole, DeadCount(counts, left), sizes)


def _refuse_own_forward(model: nn.Module) -> None:
    """Raise if a copy would call the layers of the first module, as the copy of a compiled module does."""
    for name, part in model.named_modules():
        if not has_own_forward(part):
            raise ValueError(
                f"the forward of {name or type(part).__name__} was replaced, as torch.compile does. Copies would call "
                "the layers of the first module. Pass the module as it was before."
            )


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy.

    Raises:
        ValueError: If it cannot be copied, or has no values.
    """
    if any(one.is_meta for one in (*model.parameters(), *model.buffers())):
        raise ValueError("the network is on the device meta, so its weights have no values. Load them first.")
    try:
        with torch.inference_mode(False):
            return copy.deepcopy(model)
    except RuntimeError as error:  # of weights that are computed from others and stored on the module
        raise ValueError(
            f"the network cannot be copied: {error} Weights that torch.nn.utils.prune or weight_norm computes are such "
            "tensors. Call torch.nn.utils.prune.remove, or remove_weight_norm, first."
        ) from error


def _removed(cut: Cut, group: Group, dead: Tensor, expected: list[Tensor], inputs: list[Any]) -> str:
    """Remove units if the network computes the same without them. Return why it does not; empty if it does."""
    if not bool(dead.any()):
        return ""
    reason = cut.remove(group, dead, lambda: are_close(expected, outputs(cut.network, inputs)))
    cut.take_back() if reason else cut.keep()
    return reason


def _counts(coupling: Coupling, found: DeadUnits, stuck: set[str]) -> tuple[UnitCount, ...]:
    return tuple(
        UnitCount(
            one.name,
            one.kind,
            one.size,
            min(int(found.dead[one.name].sum()), one.size - 1),
            int((found.constant[one.name] & ~found.dead[one.name]).sum()),
        )
        for one in coupling.groups
        if one.name not in stuck
    )


def _check(expected: list[Tensor], found: list[Tensor]) -> None:
    if not are_close(expected, found):
        raise ValueError(
            "The outputs of the network without its dead units differ from those of the network by more than 1e-5. "
            "Use the network as it is; in double precision (model.double()) they may differ less."
        )
