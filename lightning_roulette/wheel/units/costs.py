"""What units cost: weights, multiply-adds, parameters, or time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.network.calling import caller_of
from lightning_roulette.network.coupling.groups import Group
from lightning_roulette.network.hooks import run_with_hooks
from lightning_roulette.network.modes import evaluating
from lightning_roulette.network.multiply_adds import multiply_adds, positions_of
from lightning_roulette.network.samples import rows_of
from lightning_roulette.unit import Reduction
from lightning_roulette.wheel.units.units import Cost

_RUNS = 15  # that are timed


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of a network whose units may leave.

    Attributes:
        network: The network.
        groups: The groups.
        weights: The prunable weights by name.
    """

    network: nn.Module
    groups: Sequence[Group]
    weights: Mapping[str, Tensor]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of units by name of the group, which is unique here."""
        return {group.name if first else f"{group.name} ({group.kind})": group.size for group, first in self._firsts()}

    @property
    def starts(self) -> list[int]:
        """Number of the first unit of each group."""
        return [0, *accumulate(group.size for group in self.groups)][:-1]

    def _firsts(self) -> list[tuple[Group, bool]]:
        names = [group.name for group in self.groups]
        return [(group, names.index(group.name) == place) for place, group in enumerate(self.groups)]


def costs_of(found: Groups, target: Reduction | None, example_input: Any) -> tuple[Cost, Cost]:
    """Return what a target counts, and the multiply-adds of one sample.

    Args:
        found: The groups.
        target: The target. None: weights are counted.
        example_input: What the network is called with.
    """
    run, samples = caller_of(found.network, example_input)(None), rows_of(example_input) or 1
    with evaluating(found.network), torch.no_grad():
        work = cost_in_multiply_adds(found.network, found.weights, run, samples)
        return _cost(found, target, run, work), work


def cost_in_multiply_adds(
    network: nn.Module, weights: Mapping[str, Tensor], run: Callable[[], object], samples: int
) -> Cost:
    """Return the multiply-adds of one sample.

    Args:
        network: The network.
        weights: The prunable weights by name. What others multiply is fixed.
        run: Runs the network on so many samples. It is called once.
        samples: Number of samples.
    """
    counted: list[int] = []
    found = positions_of(network, lambda: counted.append(multiply_adds(network, run).dense))
    each = {name: times / samples for name, times in found.items() if name in weights}
    whole = counted[0] / samples
    return Cost("multiply_adds", each, None, whole - sum(each[name] * weights[name].numel() for name in each))


def _cost(found: Groups, target: Reduction | None, run: Callable[[], object], work: Cost) -> Cost:
    if target is None:
        return Cost.of_weights(list(found.weights))
    if target.counted == "multiply_adds":
        return work
    return _parameters(found) if target.counted == "parameters" else _latency(found, run)


def _parameters(found: Groups) -> Cost:
    """Every entry of a parameter costs 1. Biases and normalisations leave with their units."""
    others = {name: one for name, one in found.network.named_parameters() if name not in found.weights}
    own = torch.zeros(sum(group.size for group in found.groups), dtype=torch.float64)
    for start, group in zip(found.starts, found.groups, strict=True):
        for member in (one for one in group.producers if one.name in others):
            each = others[member.name].numel() // len(member.units)
            own[start : start + group.size] += each * torch.bincount(
                member.units[member.units >= 0], minlength=group.size
            )
    rest = sum(one.numel() for one in others.values()) - float(own.sum())
    return Cost("parameters", dict.fromkeys(found.weights, 1.0), own, rest)


def _latency(found: Groups, run: Callable[[], object]) -> Cost:
    """Every entry of a weight costs its share of the seconds of its layer. The rest of the network is fixed."""
    layers: dict[nn.Module, list[str]] = {}
    for name in found.weights:
        layers.setdefault(_layer_of(found.network, name), []).append(name)
    seconds, whole = _seconds(run, list(layers))
    each = {
        name: seconds[layer] / sum(found.weights[one].numel() for one in names)
        for layer, names in layers.items()
        for name in names
    }
    return Cost("latency", each, None, max(0.0, whole - sum(seconds.values())))


def _layer_of(network: nn.Module, name: str) -> nn.Module:
    """Return the module whose calls use a weight."""
    path = name.rpartition(".")[0]
    outer = network.get_submodule(path.rpartition(".")[0])
    return outer if isinstance(outer, nn.MultiheadAttention) else network.get_submodule(path)


def _seconds(run: Callable[[], object], layers: Sequence[nn.Module]) -> tuple[dict[nn.Module, float], float]:
    """Return the seconds of each layer in a run, and of the whole run: medians of several runs after a first one."""
    times: dict[nn.Module, list[float]] = {layer: [] for layer in layers}
    wholes: list[float] = []
    began: dict[nn.Module, float] = {}

    def before(layer: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        began[layer] = time.perf_counter()

    def after(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        times[layer][-1] += _now(output) - began[layer]

    for _ in range(_RUNS + 1):
        for one in times.values():
            one.append(0.0)
        start = time.perf_counter()
        run_with_hooks(run, layers, before=before, after=after)
        wholes.append(time.perf_counter() - start)
    return {layer: median(one[1:]) for layer, one in times.items()}, median(wholes[1:])


def _now(output: Any) -> float:
    """Return the time at which an output is computed."""
    if isinstance(output, Tensor) and output.is_cuda:
        torch.cuda.synchronize(output.device)
    return time.perf_counter()
