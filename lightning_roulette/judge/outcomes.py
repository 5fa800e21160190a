"""Outcomes: the scores of single samples or batches behind one score of a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_roulette.wheel.chance import random_bits, stream


@dataclass(frozen=True, eq=False)
class Singles:
    """Scores of one network for single samples. The metric is their mean.

    Attributes:
        values: Shape `(samples,)`, in the order of the data.
        low: Smallest score that any sample could get, known without looking at the data.
        high: Largest score that any sample could get.

    Raises:
        ValueError: If `values` does not have one dimension, if a finite value is outside the bounds, or if the bounds
            are not finite and in order. The p-value is exact only if all scores lie within the bounds.
    """

    values: Tensor
    low: float
    high: float

    def __post_init__(self) -> None:
        _check_line("values", self.values)
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"low and high are {self.low} and {self.high}, but must be finite, the smaller one first. Pass the "
                "range of a sample's score, or record the metric as Resamples if it has no range."
            )
        outside = torch.isfinite(self.values) & ((self.values < self.low) | (self.values > self.high))
        if bool(outside.any()):
            raise ValueError(
                f"values hold {float(self.values[outside][0])}, but must lie in [{self.low}, {self.high}]. Widen low "
                "and high to include every score that a sample could get."
            )


@dataclass(frozen=True, eq=False)
class Resamples:
    """A metric of one network that is not a mean over samples, such as F1, AUROC or a correlation.

    Attributes:
        score: Returns the metric on the recorded samples with these indices: int64, shape `(n,)`, may repeat.
        size: Number of recorded samples.
    """

    score: Callable[[Tensor], float]
    size: int
    _scores: list[float] = field(default_factory=list, init=False, repr=False)

    def resampled(self, count: int) -> list[float]:
        """Return the scores on `count` resamples. They are the same for all networks, and each is scored once.

        Args:
            count: Number of resamples.
        """
        counter = torch.arange(self.size)
        for i in range(len(self._scores), count):
            self._scores.append(float(self.score(random_bits(stream(0, 0, i, "resample"), counter) % self.size)))
        return self._scores[:count]


@dataclass(frozen=True, eq=False)
class Batches:
    """Scores of one network for single batches. The metric is their weighted mean.

    Attributes:
        values: Shape `(batches,)`.
        weights: Shape `(batches,)`, positive: the number of samples of each batch.

    Raises:
        ValueError: If the two do not have one dimension and equal size, or a weight is not positive and finite.
    """

    values: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        _check_line("values", self.values)
        if self.weights.shape != self.values.shape:
            raise ValueError(
                f"weights have shape {tuple(self.weights.shape)}, but must have the shape of values, "
                f"{tuple(self.values.shape)}. Pass the size of every batch."
            )
        unfit = ~(torch.isfinite(self.weights) & (self.weights > 0))
        if bool(unfit.any()):
            raise ValueError(
                f"weights hold {float(self.weights[unfit][0])}, but must be positive and finite. Leave out batches "
                "without samples."
            )


Outcomes = Singles | Resamples | Batches


def size_of(outcomes: Outcomes) -> int:
    """Return the number of samples, or of batches."""
    return outcomes.size if isinstance(outcomes, Resamples) else len(outcomes.values)


def alike(dense: Outcomes, pruned: Outcomes) -> bool:
    """Return whether outcomes can be compared: they are of one kind, with equal size and bounds or weights."""
    return _kind(dense) == _kind(pruned)


def unlike(dense: Outcomes, pruned: Outcomes) -> ValueError:
    """Return the error for outcomes that cannot be compared."""
    return ValueError(
        f"pruned is {_words(pruned)} and dense is {_words(dense)}, but both must be of one kind on the same samples, "
        "with equal bounds or weights. Validate both networks in the same way."
    )


def differences(dense: Singles | Batches, pruned: Singles | Batches) -> Tensor:
    """Return the dense minus the pruned scores. Float64 on the CPU, shape `(samples,)` or `(batches,)`."""
    return float64(dense.values) - float64(pruned.values)


def float64(values: Tensor) -> Tensor:
    """Return the values in float64 on the CPU."""
    return values.detach().cpu().to(torch.float64)


def _kind(outcomes: Outcomes) -> tuple[object, ...]:
    """Return the properties that the outcomes of two networks must share."""
    match outcomes:
        case Singles(values, low, high):
            return (Singles, len(values), low, high)
        case Resamples(_, size):
            return (Resamples, size)
        case Batches(_, weights):
            return (Batches, *weights.tolist())


def _words(outcomes: Outcomes) -> str:
    return f"{type(outcomes).__name__} of {size_of(outcomes)}"


def _check_line(name: str, values: Tensor) -> None:
    if values.ndim != 1:
        raise ValueError(
            f"{name} have shape {tuple(values.shape)}, but must have one dimension. Pass a number per sample or batch."
        )
