"""Isolated validations and searches within a fit, apart from the callback.

The names of the package that these need are imported here and nowhere else in the tests.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from lightning_roulette import Mask, Tree, Validation, prunable_parameters, search
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.trainer.data.reading import folded
from lightning_roulette.trainer.scores.monitored_metric import MonitoredMetric
from lightning_roulette.trainer.scores.trainer_evaluator import RecordingEvaluator
from lightning_roulette.trainer.validation.isolation import IsolatedValidation

BY_DEFAULT = Validation()
ON_ALL = Validation(confirm=0, race=False)  # every candidate is judged on all data


def judged_by(monitor, mode="max", loss=None, rank_by=None, rank_mode=None):
    """A metric that a search is judged by."""
    return MonitoredMetric(monitor, mode, "", loss, rank_by or monitor, rank_mode or mode)


def evaluator_of(trainer, module, validation, metric, weights=None, cache_bytes=2**31):
    """An evaluator of candidates within a validation."""
    data, _ = folded(validation, 0, cache_bytes)
    weights = prunable_parameters(module) if weights is None else weights
    return RecordingEvaluator(trainer, module, validation, data, weights, metric)


def one_level(trainer, module, branches=2, monitor="val_acc", how=BY_DEFAULT):
    """A search of one level. Its winner is not applied."""
    weights, tree = prunable_parameters(module), Tree(pruning_rate=0.9, max_levels=1)
    with IsolatedValidation(trainer, module, how.keep_callbacks) as validation:
        evaluate = evaluator_of(trainer, module, validation, judged_by(monitor), cache_bytes=how.cache_bytes)
        return search(weights, evaluate, branches=branches, tolerance=math.inf, tree=tree, validation=how)


def values_of(trainer, module, mask, monitor, times=1, cache_bytes=2**31):
    """Values of one metric in several validations of one candidate within one session."""
    weights = prunable_parameters(module)
    with IsolatedValidation(trainer, module) as validation:
        evaluate = evaluator_of(trainer, module, validation, judged_by(monitor), cache_bytes=cache_bytes)
        return [evaluate(PrunedWeights(mask, weights), range(evaluate.folds)).rank for _ in range(times)]


def a_mask(module, share):
    """A mask that keeps about `share` of the weights."""
    chance = torch.Generator().manual_seed(5)
    weights = prunable_parameters(module)
    return Mask({name: torch.rand(weight.shape, generator=chance) < share for name, weight in weights.items()})


WAYS = {
    "Trainer's loop": lambda validation: validation.run,
    "own loop": lambda validation: partial(validation.run_on, list(validation.read())),
    "own loop, read each time": lambda validation: lambda: validation.run_on(validation.read()),
}


def each_way(action, keep=()):
    """A hook action that returns, for each way to validate, `action(validate, trainer, module)` in its own session."""

    def act(trainer, module):
        found = {}
        for name, way in WAYS.items():
            with IsolatedValidation(trainer, module, keep) as validation:
                found[name] = action(way(validation), trainer, module)
        return found

    return act
