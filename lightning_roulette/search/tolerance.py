"""The tolerance of a search to which none was given: half a standard error of the dense score.

It is stricter than the one-standard-error rule of L. Breiman, J. H. Friedman, R. A. Olshen and C. J. Stone,
"Classification and Regression Trees" (1984), section 3.4.3: choose the simplest model whose error is within one
standard error of the best. With half of it, the decline on unseen data stays within one standard error, see
docs/measurements.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_roulette.judge.certificate import standard_error
from lightning_roulette.judge.evaluator import Judge
from lightning_roulette.judge.outcomes import Batches, Outcomes, size_of
from lightning_roulette.mask.pruned import PrunedWeights

_SHARE = 0.5  # of the standard error
_MOST = 0.1  # of what the prunable weights add to the score


@dataclass(frozen=True)
class Tolerance:
    """How far below the dense score a winner may be.

    Attributes:
        value: In units of the score.
        why: How it was chosen, in words. Empty if it was given.
    """

    value: float
    why: str = ""


def default_tolerance(judge: Judge, network: PrunedWeights, outcomes: Outcomes | None) -> Tolerance:
    """Return half a standard error of the dense score on the held-out half, or on all data if nothing is held out.

    It is at most a tenth of `Evaluator.gain`. It is 0 if the standard error is unknown or 0.

    Args:
        judge: Scores networks. If there are no outcomes, it scores the dense network on single folds.
        network: The dense network.
        outcomes: Outcomes behind the dense score on these data. None if they are unknown.
    """
    folds = judge.held_out_folds or judge.search_folds
    if outcomes is None or math.isnan(error := standard_error(outcomes)):
        outcomes = _by_fold(judge, network, folds)
        error = standard_error(outcomes)
    data = "held-out half" if judge.held_out_folds else "validation data"
    if not error > 0:
        known = "is unknown" if math.isnan(error) else "is zero"
        return Tolerance(0.0, f"the standard error of the dense score on the {data} {known}")
    number = f"{size_of(outcomes):,} {'parts of it' if isinstance(outcomes, Batches) else 'samples'}"
    value, why = _SHARE * error, f"half a standard error of the dense score on the {data}, from {number}"
    most = math.inf if judge.gain is None else max(0.0, _MOST * judge.gain)
    if most < value:
        return Tolerance(most, f"a tenth of what the prunable weights add to the score, because {why}, is {value:.3g}")
    return Tolerance(value, why)


def _by_fold(judge: Judge, network: PrunedWeights, folds: Sequence[int]) -> Batches:
    """Return the scores on single folds as outcomes; none for a single fold."""
    values = [judge.scores(network, [fold]).score for fold in folds] if len(folds) > 1 else []
    return Batches(torch.tensor(values, dtype=torch.float64), torch.ones(len(values), dtype=torch.float64))
