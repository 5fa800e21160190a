"""Checks of the arguments of a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_roulette.checks import as_group, check_count, check_number, check_seed
from lightning_roulette.judge.evaluator import Evaluator, as_evaluator
from lightning_roulette.large.masking import pruned_parts
from lightning_roulette.large.shards import Shards, anywhere
from lightning_roulette.mask.mask import Mask
from lightning_roulette.refit.inputs import Calibration
from lightning_roulette.refit_settings import LeastSquares, Refit, refit_of
from lightning_roulette.settings import CALIBRATED, Tree, Validation, Wheel
from lightning_roulette.unit import Weight
from lightning_roulette.wheel.units.units import Units


def check_search(
    branches: int,
    tolerance: float | None,
    target_sparsity: float | None,
    confidence: float | None,
    wheel: Wheel,
    tree: Tree,
    validation: Validation,
    seed: int,
) -> None:
    """Check arguments of `search` that do not depend on the network.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.
    """
    check_count("branches", branches)
    if tolerance is not None:
        remedy = "It is in the metric's own units: 0.005 is half a point."
        check_number("tolerance", tolerance, at_least=0, remedy=remedy)
    if target_sparsity is not None:
        check_number("target_sparsity", target_sparsity, above=0, below=1)
    for name, value, group in (("wheel", wheel, Wheel), ("tree", tree, Tree), ("validation", validation, Validation)):
        as_group(name, value, group)
    _check_targets(target_sparsity, wheel, tree)
    check_seed(seed)
    if confidence is not None:
        _check_confidence(confidence, tolerance, validation)


def check_network(
    weights: Mapping[str, Tensor],
    evaluate: Evaluator | Callable[[Mask], float],
    refit: str | LeastSquares | Mapping[str, Any] | None,
    calibration: Calibration | None,
    wheel: Wheel,
) -> None:
    """Check arguments of `search` that depend on the network and its evaluator.

    Raises:
        TypeError: If `refit` has the wrong type.
        ValueError: If there are no weights, or if the weights, the evaluator or missing calibration inputs do not allow
            an argument.
    """
    if not weights or not any(weight.numel() for weight in weights.values()):
        raise ValueError("weights is empty, but must name at least one tensor with entries.")
    how = refit_of(refit)
    if (shards := Shards.of(weights)) is not None and (why := beyond_shards(wheel, how)):
        raise ValueError(f"the weights are sharded over {shards.ranks} processes, but {why}")
    if calibration is None and (how is not None or wheel.importance in CALIBRATED):
        asked = f"refit is {refit!r}" if how is not None else f"importance is {wheel.importance!r}"
        raise ValueError(f"{asked}, but calibration is None. Pass calibration=Calibration(network, batches).")
    if how is not None and not as_evaluator(evaluate).sees_weights:
        raise ValueError(
            f"refit is {refit!r}, but evaluate is a function of a mask, which does not see refitted values. Pass an "
            "Evaluator, which is given the weights too, or refit=None."
        )


def check_units(units: Units | None, wheel: Wheel, tree: Tree, weights: Mapping[str, Tensor]) -> None:
    """Check that the units of a network are those that the settings ask for.

    Raises:
        ValueError: If there are none although they are asked for, if they are not those of the network, or if they cost
            something else than the target counts.
    """
    if (units is None) != (wheel.unit == Weight()):
        came = "None" if units is None else f"units of the kind {units.kind!r}"
        raise ValueError(f"the wheel's unit is {wheel.unit!r}, but units is {came}. Pass units=units_of(...) for it.")
    if units is None:
        return
    if unknown := [part.name for part in units.parts if part.name not in weights]:
        raise ValueError(f"units are parts of {unknown[0]!r}, but weights does not name it. Make them of the weights.")
    counted = "weights" if tree.target is None else tree.target.counted
    if units.cost.counted != counted:
        raise ValueError(
            f"the target counts {counted}, but units cost {units.cost.counted}. Pass the same target to units_of."
        )


def held_of(held: Mapping[str, Tensor] | None, weights: Mapping[str, Tensor]) -> Mask | None:
    """Return the mask of what is held at zero.

    Raises:
        TypeError: If a tensor of it is not bool.
        ValueError: If it has another shape than a weight, or if a weight that it holds is not zero.
    """
    if held is None:
        return None
    mask = Mask(held)
    ours = {name: weights[name].detach() for name in mask if name in weights}
    for name, weight in ours.items():
        if (shape := mask.flags[name].shape) != weight.shape:
            raise ValueError(
                f"held has the shape {tuple(shape)} for {name!r}, but the weight has {tuple(weight.shape)}. Pass the "
                "mask of this network."
            )
        here = any(bool(part[gone].any()) for part, gone in pruned_parts(weight, mask.flags[name]))
        if anywhere(here, {name: weight}):
            raise ValueError(
                f"held prunes weights of {name!r} that are not zero. Set them to zero before the search, as "
                "apply_mask(network, held) does."
            )
    return mask


def _check_targets(target_sparsity: float | None, wheel: Wheel, tree: Tree) -> None:
    """Check that a target can be counted."""
    if tree.target is not None and wheel.unit == Weight():
        raise ValueError(
            f"target is {tree.target!r}, but single weights leave, whose zeros cost as much as other numbers. Pass "
            "Wheel(unit='neuron'), or target_sparsity instead of a target."
        )
    if tree.target is not None and target_sparsity is not None:
        raise ValueError(
            f"target_sparsity is {target_sparsity} and target {tree.target!r}, but a search has one target. Leave out "
            "one of them."
        )


def beyond_shards(wheel: Wheel, refit: Refit | None) -> str:
    """Why sharded weights cannot be pruned with these choices, and what to do. Empty if they can.

    Args:
        wheel: How candidates are drawn.
        refit: What is done to their survivors.
    """
    if isinstance(refit, LeastSquares) and refit.distill:
        return f"distill {refit.distill} needs whole weights for its gradient steps. Pass LeastSquares(distill=0)."
    importance = wheel.importance
    if wheel.unit != Weight():
        return f"unit {wheel.unit!r} needs whole layers, and no process has them. Pass wheel=Wheel(unit='weight')."
    if importance not in (None, "magnitude"):
        what = f"importance {importance!r}" if isinstance(importance, str) else "importance by a function"
        return f"{what} needs whole layers, and no process has them. Pass wheel=Wheel(importance='magnitude')."
    return ""


def _check_confidence(confidence: float, tolerance: float | None, validation: Validation) -> None:
    check_number("confidence", confidence, above=0, below=1, remedy="0.95 is usual.")
    if tolerance is None:
        raise ValueError(
            f"tolerance is None and confidence {confidence}, but a certificate is about a tolerance that does not "
            "depend on the data. Pass a tolerance, such as 0.005 for half a point, or leave confidence out."
        )
    if math.isinf(tolerance):
        raise ValueError(
            f"tolerance is {tolerance} and confidence {confidence}, but without a floor there is nothing to certify. "
            "Pass a tolerance, such as 0.005 for half a point, or leave confidence out."
        )
    if tolerance == 0:
        raise ValueError(
            f"tolerance is {tolerance} and confidence {confidence}, but no finite sample can certify that nothing is "
            "lost. Allow some tolerance, such as 0.005 for half a point, or leave confidence out."
        )
    if validation.confirm == 0:
        raise ValueError(
            f"confirm is 0 and confidence {confidence}, but data that chose the candidates cannot certify them. Hold "
            "some out, as Validation(confirm=0.5) does, or leave confidence out."
        )
