"""What is refused once the module can be validated: a validation that is blind to the weights, and too few samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_roulette.judge.certificate import too_few
from lightning_roulette.judge.evaluator import divided
from lightning_roulette.large.limits import limits
from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.lending import applied
from lightning_roulette.trainer.data.dealing import FOLDS
from lightning_roulette.trainer.data.folded_data import FoldedData
from lightning_roulette.trainer.scores.metric_calls import is_mean
from lightning_roulette.trainer.validation.isolation import IsolatedValidation

_Weights = Mapping[str, nn.Parameter]


def refuse_if_blind(validation: IsolatedValidation, data: FoldedData, weights: _Weights) -> None:
    """Raise if validation does not depend on the prunable weights.

    Every candidate would get the same score, and the search would prune everything. A module may, for example, validate
    averaged weights of its own. The logged values are compared with those at zero weights: first on one fold, and on
    all folds if they are equal there.

    Args:
        validation: Entered.
        data: The validation data.
        weights: The prunable parameters after training. Before training, a network may be no better than zeros.

    Raises:
        RuntimeError: If all values are equal on all folds.
    """
    if all(_logs_the_same_at_zero(weights, validation, data, folds) for folds in (range(1), range(data.folds))):
        raise RuntimeError(
            "RouletteWheelPruning: validation logs the same with all prunable weights at zero, so it cannot judge "
            "pruned candidates. Does the module validate other weights than these, for example averaged ones? Leave "
            "averaging to a callback such as lightning's WeightAveraging, or name the weights with include."
        )


def refuse_too_few_samples(
    samples: int | None, judged_by: Metric | None, confidence: float, tolerance: float, confirm: float
) -> None:
    """Raise before training begins if the validation data is too small to certify anything after it.

    Args:
        samples: The number of samples of all the validation data; None if unknown.
        judged_by: The torchmetrics object that is monitored; None if a plain number is monitored.
        confidence: The confidence asked for.
        tolerance: The tolerance asked for.
        confirm: Share of the samples that is held out.

    Raises:
        RuntimeError: If there are too few samples.
    """
    if samples is None or judged_by is None or not is_mean(judged_by):  # a bootstrap has no such bound
        return
    share = len(divided(FOLDS, confirm)[1]) / FOLDS
    if why := too_few(math.ceil(samples * share), 1.0, confidence, tolerance, share):
        raise RuntimeError(f"RouletteWheelPruning: {why}")


def _logs_the_same_at_zero(weights: _Weights, validation: IsolatedValidation, data: FoldedData, folds: range) -> bool:
    seen = data.validate(validation, folds).values
    some: list[_Weights] = []
    if sum(weight.numel() for weight in weights.values()) > limits().held_weights:
        # one by one first, as otherwise copies of all weights would be held at once
        some = [{name: weight} for name, weight in weights.items()]
    return all(_logs_at_zero(seen, ours, validation, data, folds) for ours in (*some, weights))


def _logs_at_zero(
    seen: Mapping[str, Tensor], weights: _Weights, validation: IsolatedValidation, data: FoldedData, folds: range
) -> bool:
    """Whether the same is logged with some weights at zero."""
    try:
        with warnings.catch_warnings(), applied(Mask.nothing(weights), weights):
            warnings.simplefilter("ignore")
            unseen = data.validate(validation, folds).values
    except Exception:  # a validation that fails on zeros depends on the weights
        return False
    # the search reports values that are not finite
    return all(bool(value.isfinite().all()) for value in seen.values()) and _equal(seen, unseen)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
