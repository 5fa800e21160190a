"""The units of the network of a fit, found with an example of its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from lightning_roulette.report.names import shortened
from lightning_roulette.trainer.data.folded_data import FoldedData
from lightning_roulette.trainer.example import example_of, prefix_of
from lightning_roulette.trainer.fit_state import FitState
from lightning_roulette.trainer.preparing import judging_of, prunable, rehearse
from lightning_roulette.trainer.show.log import log
from lightning_roulette.trainer.shrinking import rehearse_shrinking
from lightning_roulette.unit import Unit, Weight, unit_of
from lightning_roulette.wheel.units.grouping import FINDERS, units_of
from lightning_roulette.wheel.units.units import Cost, Part, Units

T = TypeVar("T")


def units_for(fit: FitState, weights: Mapping[str, nn.Parameter], data: FoldedData | None = None) -> Units | None:
    """Return the units of the network of a fit; None if single weights leave.

    The example of the input is the module's `example_input_array` if it is set. Otherwise one validation step is taken
    on the first batch of the validation data: it is what the step passes to the network inside the module that has most
    of the prunable weights, or to the module itself. With several processes, all use what the first found. Units depend
    on the layers and not on their weights, so a run finds them once for each set of prunable weights.

    Args:
        fit: The run.
        weights: The prunable weights.
        data: The validation data, if a search has read them.

    Raises:
        ImportError: If the extra `units` is not installed.
        RuntimeError: If there is no example of the input, or if no unit may leave.
    """
    if (unit := unit_of(fit.choices.wheel.unit)) == Weight():
        return None
    if (found := fit.units.get(tuple(weights))) is None:
        found = fit.units[tuple(weights)] = _found(fit, data, weights, unit)
    return found


def _found(fit: FitState, data: FoldedData | None, weights: Mapping[str, nn.Parameter], unit: Unit) -> Units:
    try:
        if type(unit) in FINDERS:
            return _without_tracing(fit, data, weights, unit)
        return _in_all_processes(fit, _traced(fit, data, weights, unit))
    except (TypeError, ValueError) as error:
        raise RuntimeError(
            f"unit is {unit!r}, but its units were not found: {error} The example of the input is the module's "
            "example_input_array, or what validation_step passes to the network on the first validation batch. If the "
            "step calls layers one by one, give the module a forward that calls them, and set example_input_array. Or "
            "pass Wheel(unit='weight')."
        ) from error


def _traced(fit: FitState, data: FoldedData | None, weights: Mapping[str, nn.Parameter], unit: Unit) -> Units:
    """Return units that are found, or whose cost is found, with an example of the input."""
    path, example, work = example_of(fit, data, weights)
    network, prefix = fit.module.get_submodule(path), prefix_of(path)
    inner = {name.removeprefix(prefix): one for name, one in weights.items() if name.startswith(prefix)}
    try:
        with judging_of(fit).isolated():
            found = units_of(network, example, unit=unit, weights=inner, target=fit.choices.tree.target)
    except ValueError as error:
        what = f"{path!r}, which has most of the weights of what validation_step calls" if path else "the module itself"
        raise ValueError(f"{error} The network that was traced is {what}.") from error
    beside = {name: one.numel() for name, one in fit.module.named_parameters() if not name.startswith(prefix)}
    found = _renamed(found, prefix, [name for name in beside if name in weights])
    if found.cost.counted == "parameters":
        fixed = sum(size for name, size in beside.items() if name not in weights)
        found = replace(found, cost=replace(found.cost, fixed=found.cost.fixed + fixed))
    return found if work is None else _counted_in(work, found)


def _counted_in(work: Cost, units: Units) -> Units:
    """Return units with the multiply-adds of the whole module, as some of it may run beside the network."""
    cost = work if units.cost.counted == work.counted else units.cost
    return replace(units, cost=cost, multiply_adds=work)


def _without_tracing(fit: FitState, data: FoldedData | None, weights: Mapping[str, nn.Parameter], unit: Unit) -> Units:
    """Return units that all processes find alike, in the layers of the whole module. Only a target needs an example."""
    found = units_of(fit.module, unit=unit, weights=weights)
    if fit.choices.tree.target is None:
        return found
    counted = _traced(fit, data, weights, unit)
    cost, multiply_adds = _in_all_processes(fit, (counted.cost, counted.multiply_adds))
    return replace(found, cost=cost, multiply_adds=multiply_adds)


def _in_all_processes(fit: FitState, found: T) -> T:
    """Return what the first process found."""
    return fit.trainer.strategy.broadcast(found) if _several(fit) else found


def _several(fit: FitState) -> bool:
    return fit.trainer.world_size > 1


def rehearse_search(fit: FitState, batches: float) -> None:
    """Find the metric, and refuse what would fail in the search; see `rehearse`. The units are found, too.

    Args:
        fit: The run.
        batches: How many batches of each loader are validated.

    Raises:
        RuntimeError: See `rehearse`, `units_for` and `rehearse_shrinking`.
    """
    rehearse(fit, batches)
    if fit.result.history is None:
        units = units_for(fit, prunable(fit))
        if units is None or units.multiply_adds is None:  # else there was an example, in which they were counted
            rehearse_shrinking(fit)


def say_units(fit: FitState, units: Units | None) -> None:
    """Log how many units there are and which layers are kept whole, and keep the latter for the report."""
    if units is None:
        return
    reasons: dict[str, list[str]] = {}
    for name, why in units.kept_whole.items():
        reasons.setdefault(why, []).append(name)
    whole = "; ".join(f"{shortened(names)} ({why})" for why, names in reasons.items())
    said = f"Kept whole, without units: {whole}." if whole else ""
    if said:
        fit.facts.note(said)
    if fit.trainer.is_global_zero:
        log.info(f"RouletteWheelPruning: {units.count:,} units may leave (unit: {units.kind}). {said}".rstrip())


def _renamed(units: Units, prefix: str, outside: Sequence[str]) -> Units:
    """Return units of a network inside a module with the names that the module gives them.

    Args:
        units: The units.
        prefix: Of the names.
        outside: Prunable weights of the module that the network does not have.
    """

    def cost(one: Cost) -> Cost:
        others = 1.0 if one.counted in ("weights", "parameters") else 0.0
        each = {f"{prefix}{name}": value for name, value in one.each.items()}
        return replace(one, each=each | dict.fromkeys(outside, others))

    def named(one: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{prefix}{name}": value for name, value in one.items()}

    whole = named(units.kept_whole) | dict.fromkeys(outside, "the network that is traced does not have it")
    return replace(
        units,
        groups=named(units.groups),
        parts=tuple(Part(f"{prefix}{one.name}", one.labels, one.reads) for one in units.parts),
        cost=cost(units.cost),
        multiply_adds=None if units.multiply_adds is None else cost(units.multiply_adds),
        kept_whole=whole,
        steps=named(units.steps),
    )
