"""Evaluators of folds that keep a log, for tests of what a search asks of one."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from lightning_roulette import Mask, PrunedWeights, Scores, Singles


def key_of(mask: Mask) -> bytes:
    """Equal for equal masks of one network only."""
    return b"".join(kept.numpy().tobytes() for kept in mask.values())


def noise(mask: Mask, fold: int) -> float:
    """A number in [0, 1) for each mask and fold, always the same."""
    return random.Random(key_of(mask) + bytes([fold])).random()


class Logged:
    """The score on some folds is the mean of `score(mask, fold)`; every call is logged by its mask and folds."""

    def __init__(self, score: Callable[[Mask, int], float], folds: int, at_once: int | None = None) -> None:
        self.score, self.folds, self.log = score, folds, []
        if at_once is not None:
            self.at_once = at_once

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        self.log.append((candidate.mask, tuple(folds)))
        value = sum(self.score(candidate.mask, fold) for fold in folds) / len(folds)
        return Scores(rank=value, score=value)

    @property
    def validations(self) -> float:
        return sum(len(folds) for _, folds in self.log) / self.folds

    def asked(self, mask: Mask) -> list[tuple[int, ...]]:
        """What was asked about one mask."""
        return [folds for one, folds in self.log if one == mask]


class Telling(Logged):
    """Tells no outcomes, but can be asked for them."""

    def recorded(self, candidate: PrunedWeights, folds: Sequence[int]) -> tuple[Scores, None]:
        return self(candidate, folds), None


class Sampled(Logged):
    """Tells the score of each of `size` samples a fold: 0 for the first `wrong(mask, fold)` of them, else 1."""

    def __init__(self, wrong: Callable[[Mask, int], int], folds: int, size: int) -> None:
        super().__init__(lambda mask, fold: 1 - wrong(mask, fold) / size, folds)
        self.wrong, self.size = wrong, size

    def outcomes(self, mask: Mask, folds: Sequence[int]) -> Singles:
        right = [(torch.arange(self.size) >= self.wrong(mask, fold)).double() for fold in folds]
        return Singles(torch.cat(right), 0.0, 1.0)

    def recorded(self, candidate: PrunedWeights, folds: Sequence[int]) -> tuple[Scores, Singles]:
        return self(candidate, folds), self.outcomes(candidate.mask, folds)
