"""Reads the validation data of a Trainer into folds. The module must log the same on them as on its own batches."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from functools import partial

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_roulette.trainer.data.folded_data import FoldedData, TrainerLoopData
from lightning_roulette.trainer.data.streamed_data import dealt
from lightning_roulette.trainer.processes import in_any_process, least_and_most
from lightning_roulette.trainer.validation.isolation import IsolatedValidation
from lightning_roulette.trainer.validation.logged import Logged


def folded(
    validation: IsolatedValidation, seed: int, cache_bytes: int, by_rows: bool = False
) -> tuple[FoldedData, Logged]:
    """Read the validation data into folds, and validate on it once.

    Args:
        validation: Entered. All processes of its Trainer deal in the same way.
        seed: See `dealt`.
        cache_bytes: See `dealt`.
        by_rows: See `dealt`.

    Returns:
        The data, and what the module logs on it.

    Raises:
        RuntimeError: If there is no data.
    """
    lengths = validation.lengths()
    _warn_of_lost_positions(validation)
    if validation.hands_over_iterator:
        return TrainerLoopData(), validation.run()
    deal = partial(dealt, validation.read, lengths, seed, cache_bytes, by_rows=by_rows)
    data, logged = _accepted(validation, deal())
    if in_any_process(validation.trainer, data.altered()):  # the module writes into its batches
        data = deal(copies=True, undivided_because=data.undivided_because)
        logged = data.validate(validation, data.first_tried)
    return _equal_in_all_processes(validation.trainer, data), logged


def undivided(validation: IsolatedValidation, seed: int, cache_bytes: int, why: str) -> FoldedData:
    """Read the validation data into one fold. Nothing is validated yet.

    Args:
        validation: Entered.
        seed: See `dealt`.
        cache_bytes: See `dealt`.
        why: Why the data is not divided.

    Raises:
        RuntimeError: If there is no data.
    """
    lengths = validation.lengths()
    if validation.hands_over_iterator:
        return TrainerLoopData()
    # copies, as it is not known yet whether the module writes into its batches
    return dealt(validation.read, lengths, seed, cache_bytes, copies=True, undivided_because=why)


def whole_if_regrouping_matters(
    validation: IsolatedValidation, data: FoldedData, logged: Logged, names: Collection[str]
) -> FoldedData:
    """Return the data in one fold if regrouping its samples changes what the module logs, else as it is.

    Regrouping matters if the first dimension does not count samples, or if a value is not a mean over samples.

    Args:
        validation: Entered. All processes of its Trainer make the same decision.
        data: As `folded` dealt it.
        logged: What the module logs on all of it.
        names: The logged values that are compared.
    """
    if not data.regrouped:
        return data
    whole = data.undivided("the module logs other values on regrouped samples")
    rtol = rounding(validation.trainer)
    before = whole.validate(validation, range(1))
    differs = any(not _close(logged.value(name), before.value(name), rtol) for name in names)
    data.stay_regrouped()
    return whole if in_any_process(validation.trainer, differs) else data


def rounding(trainer: Trainer) -> float:
    """Return the relative error to expect in a network's outputs when sums are taken in another order."""
    numbers = {one.dtype for one in trainer.lightning_module.parameters() if one.is_floating_point()}
    if "bf16" in str(trainer.precision):
        numbers.add(torch.bfloat16)
    return max([1e-3, *(2 * torch.finfo(one).eps for one in numbers)])


def _warn_of_lost_positions(validation: IsolatedValidation) -> None:
    if (lost := validation.lost_positions()) and validation.trainer.is_global_zero:
        warnings.warn(
            f"RouletteWheelPruning: the validation data is a stream that goes on where it stopped, and {lost[0]} "
            "cannot be put back. The search reads from it, so your next validation starts at a later sample. Let the "
            "stream start from the beginning at each __iter__, or give it state_dict and load_state_dict.",
            stacklevel=2,
        )


def _accepted(validation: IsolatedValidation, data: FoldedData) -> tuple[FoldedData, Logged]:
    """Return the data, and what the module logs on it; in one fold if the module fails on regrouped samples."""
    if not data.regrouped or validation.trainer.world_size > 1:
        return data, data.validate(validation, data.first_tried)
    try:
        data.validate(validation, [0])  # the smallest batches that there will be
        return data, data.validate(validation, data.first_tried)
    except Exception as error:
        whole = data.undivided(f"validation fails on regrouped samples ({type(error).__name__}: {error})")
    return whole, whole.validate(validation, whole.first_tried)


def _equal_in_all_processes(trainer: Trainer, data: FoldedData) -> FoldedData:
    """Return the data, dealt so that all processes validate equally often. Each process has batches of its own."""
    if trainer.world_size == 1:
        return data
    data.check_only_when_told()
    least, most = least_and_most(trainer, [data.folds, int(data.regrouped), data.at_once, data.at_least])
    if least[:2] != most[:2]:
        data = data.undivided("the processes cannot deal their batches to folds in the same way")
        least = [1] * 4
    data.at_once, data.at_least = least[2:]
    return data


def _close(one: Tensor, other: Tensor, rtol: float) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=rtol, atol=1e-6, equal_nan=True)
