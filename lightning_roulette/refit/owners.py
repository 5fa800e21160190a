"""The modules that use weights, and their calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_roulette.large.processes import Processes
from lightning_roulette.network.hooks import run_with_hooks
from lightning_roulette.network.parameters import aliases, owners_of
from lightning_roulette.network.ties import ties_of
from lightning_roulette.refit.backward_run import channel_of, first_floating

# for each weight, the modules that use it: path, module, and whether it has the weight in the same shape
Owners = Mapping[str, Sequence[tuple[str, nn.Module, bool]]]


def weight_owners(module: nn.Module, names: Sequence[str]) -> Owners:
    """Return the modules that use weights.

    A tied weight has several owners. If it is another view of the same memory, its shape may be another.
    """
    known, owner_of = aliases(module), owners_of(module)
    first = {alias: name for name, all_names in known.items() for alias in all_names}
    views = {name: tie.names for tie in ties_of(module) for name in tie.names}

    def of(name: str) -> list[tuple[str, nn.Module, bool]]:
        own = first[name]
        every = [(alias, one == own) for one in dict.fromkeys((own, *views.get(own, ()))) for alias in known[one]]
        return [(alias.rpartition(".")[0], owner_of[alias][0], same) for alias, same in every]

    return {name: of(name) for name in names}


def around(owners: Owners, parts: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Return the owners and all modules around them."""
    return [parts[path] for own in owners.values() for prefix, *_ in own for path in _outwards(prefix)]


def observed(
    owners: Owners, parts: Mapping[str, nn.Module], calls: Container[nn.Module], processes: Processes
) -> dict[str, list[nn.Module]]:
    """Return, for each weight, its owners that are called. For an owner that is not, the nearest one around it that is.

    Args:
        owners: The owners of the weights.
        parts: The modules of the network by path.
        calls: The modules that the network calls in this process.
        processes: Those that share the calls.
    """
    called = processes.any_of(list(dict.fromkeys(around(owners, parts))), calls)

    def nearest(path: str) -> nn.Module | None:
        return next((parts[outer] for outer in _outwards(path) if parts[outer] in called), None)

    return {name: [part for prefix, *_ in own if (part := nearest(prefix)) is not None] for name, own in owners.items()}


def caller(path: str, parts: Mapping[str, nn.Module]) -> nn.Module:
    """Return what is called where a module's weights are used: the module itself, or the attention around it."""
    around = parts[path.rpartition(".")[0]]
    return around if isinstance(around, nn.MultiheadAttention) else parts[path]


def calls_in(
    piece: Callable[[], object], parts: Sequence[nn.Module], rows: Counter[nn.Module] | None = None
) -> Counter[nn.Module]:
    """Run the network and return how often it calls each of these modules. Count the rows of their outputs, too."""
    calls: Counter[nn.Module] = Counter()

    def count(part: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        calls[part] += 1
        _, found = first_floating(output)
        if rows is not None and found is not None:
            rows[part] += found.numel() // max(1, found.shape[channel_of(part, found)])

    run_with_hooks(piece, dict.fromkeys(parts), after=count)
    return calls


def _outwards(path: str) -> Iterator[str]:
    """Yield a module's path and those of all modules around it, innermost first."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""
