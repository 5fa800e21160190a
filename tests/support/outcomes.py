"""Outcomes of validations for tests of the certificate."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_roulette.judge.outcomes import Batches, Resamples, Singles


def chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flips(shape: tuple[int, ...], worse: float, better: float, seed: int) -> Tensor:
    """Declines of accuracy: 1 where a sample becomes wrong, -1 where it becomes right."""
    uniform = torch.rand(shape, generator=chance(seed), dtype=torch.float64)
    return (uniform < worse).double() - (uniform >= 1 - better).double()


def singles(declines: Tensor, low: float = 0.0, high: float = 1.0) -> tuple[Singles, Singles]:
    """A dense and a pruned network with these declines, in units of the width."""
    dense = low + (high - low) * (declines > 0).double()
    return Singles(dense, low, high), Singles(dense - (high - low) * declines, low, high)


def mean_of(values: Tensor) -> Resamples:
    return Resamples(lambda index: float(values[index].mean()), len(values))


def batches(values: list[float], weights: list[float] | None = None) -> Batches:
    return Batches(torch.tensor(values), torch.tensor(weights or [1.0] * len(values)))


# each kind of outcomes, of given scores
KINDS = {
    "singles": lambda values: Singles(values, 0, 1),
    "resamples": mean_of,
    "batches": lambda values: Batches(values, torch.ones(len(values))),
}
