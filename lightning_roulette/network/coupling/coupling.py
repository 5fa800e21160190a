"""`coupling_of`: the units of a network that can leave it, each group checked on the network itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from lightning_roulette.network.calling import caller_of
from lightning_roulette.network.coupling.borrowing import borrowed
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
    left out, and its layers are named in `Coupling.left`.

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
        again = remembering(run)
        neurons, left = _neurons(network, run, again)
        heads, others = _heads(network, again)
    return Coupling((*neurons, *heads), left | others)


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


def _neurons(
    network: nn.Module, run: Callable[[], Any], again: Callable[[], Any]
) -> tuple[list[Group], dict[str, str]]:
    layers, shared, cut = unit_layers(network), _shared(network), Cut(network)
    groups: list[Group] = []
    left = dict.fromkeys(layers, "it cannot be traced")
    try:
        found = reached(network, run)
    except ImportError:
        raise
    except Exception as error:  # of Torch-Pruning, which expects other operations
        return [], dict.fromkeys(layers, f"the network cannot be traced ({type(error).__name__}: {error})")
    for name, targets in found.items():
        computing = {name, *(one.name for one in targets if one.name in layers and not one.reads)}
        try:
            group = group_of(name, targets, shared)
            reason = "it has a single unit" if group.size < 2 else why_it_stays(cut, group, again)
        except Immovable as why:
            reason = str(why)
        if not reason:
            groups.append(group)
            left = {one: why for one, why in left.items() if one not in computing}
        else:
            left |= {one: reason for one in computing if one is not None}
    return groups, left


def _heads(network: nn.Module, run: Callable[[], Any]) -> tuple[list[Group], dict[str, str]]:
    shared, known, cut = _shared(network), named_tensors(network).keys(), Cut(network)
    groups: list[Group] = []
    left: dict[str, str] = {}
    for name, guesses in heads_of(network).items():
        names = {member.name for one in guesses for member in (*one.producers, *one.consumers)}
        if tied := sorted(names & shared):
            left[name] = f"{tied[0]} is tied to another parameter"
        elif missing := sorted(names - known):
            left[name] = f"{missing[0]} is computed from other parameters"
        else:
            for group in guesses:
                if not (reason := why_it_stays(cut, group, run)):
                    groups.append(group)
                    break
            else:
                left[name] = reason
    return groups, left


def _shared(network: nn.Module) -> set[str]:
    """Names of parameters that have several names, or share memory."""
    several: Iterable[list[str]] = (names for names in aliases(network).values() if len(names) > 1)
    return {name for names in [*several, *(tie.names for tie in ties_of(network))] for name in names}
