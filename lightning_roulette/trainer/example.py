"""An example of the input of the network of a fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from torch import nn

from lightning_roulette.network.calling import has_own_forward
from lightning_roulette.network.hooks import run_with_hooks
from lightning_roulette.network.samples import rows_of
from lightning_roulette.trainer.data.folded_data import FoldedData
from lightning_roulette.trainer.fit_state import FitState
from lightning_roulette.trainer.footprint import first_batch
from lightning_roulette.trainer.preparing import judging_of
from lightning_roulette.trainer.validation.loop import transferred
from lightning_roulette.wheel.units.costs import cost_in_multiply_adds
from lightning_roulette.wheel.units.units import Cost


def example_of(
    fit: FitState, data: FoldedData | None, weights: Mapping[str, nn.Parameter]
) -> tuple[str, Any, Cost | None]:
    """Return the path of a network inside the module, what it is called with, and the work of a validation step.

    The example is the module's `example_input_array` if it is set. Otherwise one validation step is taken on the first
    batch: the network is the outermost that is called of those with most of the weights. The work are the multiply-adds
    of one sample; None if the network is the module, or if samples cannot be counted.

    Args:
        fit: The run.
        data: The validation data, if a search has read them.
        weights: The prunable weights.

    Raises:
        ValueError: If no example is found.
    """
    if (given := fit.module.example_input_array) is not None:
        return "", transferred(fit.trainer, given, 0), None
    with judging_of(fit).isolated() as validation:
        if (batch := first_batch(validation, data)) is None:
            raise ValueError("validation_step takes no batches, but an iterator.")
        step = partial(validation.validation_step, batch)
        found: list[tuple[str, Any]] = []
        with validation.seeing():
            if not (samples := rows_of(batch)):
                return *_passed(fit.module, step, weights), None
            work = cost_in_multiply_adds(
                fit.module, weights, lambda: found.append(_passed(fit.module, step, weights)), samples
            )
        return *found[0], work


def prefix_of(path: str) -> str:
    """Return what the names of a network inside the module begin with."""
    return f"{path}." if path else ""


def _passed(module: nn.Module, run: Callable[[], object], weights: Collection[str]) -> tuple[str, Any]:
    """Return the path of the outermost called module with most of the weights, and what it is called with first."""
    paths = {id(part): path for path, part in module.named_modules()}  # the hash of a metric may change
    calls: dict[str, tuple[tuple[Any, ...], Mapping[str, Any]]] = {}

    def note(part: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if has_own_forward(part):  # with DDP the module is called in place of its step, with what the step takes
            calls.setdefault(paths[id(part)], (arguments, named))

    run_with_hooks(run, module.modules(), before=note)
    counts = {path: sum(name.startswith(prefix_of(path)) for name in weights) for path in calls}
    if not any(counts.values()):
        raise ValueError("validation_step calls no module with prunable weights.")
    path = max(counts, key=lambda one: counts[one])  # of several, the one that is called first
    arguments, named = calls[path]
    if named:
        forward = inspect.signature(module.get_submodule(path).forward)
        return path, dict(forward.bind(*arguments, **named).arguments)
    return path, arguments
