"""`coupling_of`: the units of a network that can leave it, each group checked on the network itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from lightning_roulette.network.calling import caller_of
from lightning_roulette.network.coupling.borrowing import borrowed, without_zeros
from lightning_roulette.network.coupling.check import are_same, outputs_of, why_it_stays
from lightning_roulette.network.coupling.cutting import Cut
from lightning_roulette.network.coupling.graph import reached, unit_layers
from lightning_roulette.network.coupling.groups import Coupling, Group
from lightning_roulette.network.coupling.heads import heads_of
from lightning_roulette.network.coupling.members import Immovable, group_of
from lightning_roulette.network.coupling.remembering import remembering
from lightning_roulette.network.lending import named_tensors
from lightning_roulette.network.parameters import aliases
from lightning_roulette.network.samples import rows_of, taken
from lightning_roulette.network.ties import ties_of

_SAMPLES = 2  # that the network is called with


def coupling_of(network: nn.Module, example_input: Any) -> Coupling:
    """The units of a network, found by tracing it and checked by changing it.

    A unit is a row of a linear layer or an output channel of a convolution, with all that is coupled to it by batch
    normalisations, sums, products, concatenations, flattening and grouped convolutions; or a head of an attention.
    Each group is tried. What reads some of its units is set to zero and what computes them to other values: the output
    must not change. Then these units are cut out: the output must be the same again. A group for which it is not is
    left out, and its layers are named in `Coupling.left`. For these trials, zeros in the weights are replaced, as what
    nothing reads tells nothing.

    The network is called some times in evaluation mode, and is bit for bit as it was afterwards.

    Args:
        network: The network, with all its weights on one device.
        example_input: What its forward is called with: a tensor, a tuple or list of arguments, or a mapping of named
            arguments. Two samples of it are used; all of it if the network does not take two, as with the nodes of a
            graph and their adjacency matrix.

    Raises:
        ImportError: If the extra `units` is not installed.
        TypeError: If `example_input` is none of these.
        ValueError: If the network cannot be called with it, or returns no numbers.
    """
    with borrowed(network):
        run = _caller(network, example_input)
        if not _is_function(run):
            reason = "two calls of the network with equal inputs differ, or their outputs are not finite"
            return Coupling((), dict.fromkeys(unit_layers(network), reason))
        neurons, left = _neurons(network, run)
        heads, others = _heads(network)
        found = _Checked(left | others)
        cut, again = Cut(network), remembering(run)
        with without_zeros(network, [one for guesses in (*neurons.values(), *heads.values()) for one in guesses]):
            for computing, guesses in (neurons | heads).items():
                found.add(computing, guesses, lambda group: why_it_stays(cut, group, again))
    return Coupling(tuple(found.groups), found.left)


def _caller(network: nn.Module, example_input: Any) -> Callable[[], Any]:
    """Return what calls the network with two samples, or with the whole example if it does not take two."""
    whole, rows = caller_of(network, example_input)(None), rows_of(example_input)
    if rows is None or rows <= _SAMPLES:
        return whole
    run = caller_of(network, taken(example_input, slice(0, _SAMPLES)))(None)
    try:
        outputs_of(run)
    except Exception:  # what counts as samples may be something else, or be written in the code
        return whole
    return run


def _is_function(run: Callable[[], Any]) -> bool:
    try:
        first = outputs_of(run)
    except Exception as error:
        raise ValueError(
            f"The network cannot be called with example_input ({type(error).__name__}: {error}). "
            "Pass what its forward takes: a tensor, a tuple of arguments, or a mapping of named arguments."
        ) from error
    if not any(one.is_floating_point() or one.is_complex() for one in first):
        raise ValueError(
            "The network returns no tensor of floating-point or complex numbers, so it cannot be traced. "
            "Its forward must return its predictions: a tensor, or a container of tensors."
        )
    return are_same(first, outputs_of(run))


class _Checked:
    """Groups that were checked.

    Attributes:
        groups: Those that can leave.
        left: The layers whose units cannot, with the reason.
    """

    def __init__(self, left: dict[str, str]) -> None:
        self.groups: list[Group] = []
        self.left = left

    def add(self, names: frozenset[str], guesses: Sequence[Group], why: Callable[[Group], str]) -> None:
        """Add the first of the guesses for which there is no reason to stay.

        Args:
            names: The layers that compute the units.
            guesses: What the units may be.
            why: Returns why the units of a group cannot leave.
        """
        for group in guesses:
            if not (reason := why(group)):
                self.groups.append(group)
                self.left = {name: one for name, one in self.left.items() if name not in names}
                return
        self.left |= dict.fromkeys(names, reason)


def _neurons(network: nn.Module, run: Callable[[], Any]) -> tuple[dict[frozenset[str], list[Group]], dict[str, str]]:
    """Return the groups that the graph shows, each under the layers that compute it, and why others have none."""
    layers, shared = unit_layers(network), _shared(network)
    groups: dict[frozenset[str], list[Group]] = {}
    left = dict.fromkeys(layers, "it cannot be traced")
    try:
        found = reached(network, run)
    except ImportError:
        raise
    except Exception as error:  # of Torch-Pruning, which expects other operations
        return {}, dict.fromkeys(layers, f"the network cannot be traced ({type(error).__name__}: {error})")
    for name, targets in found.items():
        computing = {name, *(one.name for one in targets if one.name in layers and not one.reads)}
        names = frozenset(one for one in computing if one is not None)
        try:
            group = group_of(name, targets, shared)
        except Immovable as why:
            left |= dict.fromkeys(names, str(why))
            continue
        if group.size < 2:
            left |= dict.fromkeys(names, "it has a single unit")
        else:
            groups[names] = [group]
    return groups, left


def _heads(network: nn.Module) -> tuple[dict[frozenset[str], list[Group]], dict[str, str]]:
    """Return what the heads of each attention may be, and why others have none."""
    shared, known = _shared(network), named_tensors(network).keys()
    groups: dict[frozenset[str], list[Group]] = {}
    left: dict[str, str] = {}
    for name, guesses in heads_of(network).items():
        names = {member.name for one in guesses for member in (*one.producers, *one.consumers)}
        if tied := sorted(names & shared):
            left[name] = f"{tied[0]} is tied to another parameter"
        elif missing := sorted(names - known):
            left[name] = f"{missing[0]} is computed from other parameters"
        else:
            groups[frozenset({name})] = guesses
    return groups, left


def _shared(network: nn.Module) -> set[str]:
    """Names of parameters that have several names, or share memory."""
    several: Iterable[list[str]] = (names for names in aliases(network).values() if len(names) > 1)
    return {name for names in [*several, *(tie.names for tie in ties_of(network))] for name in names}
