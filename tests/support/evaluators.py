"""Evaluators of folds that keep a log, for tests of what a search asks of one."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from lightning_roulette import Level, Mask, Observer, PrunedWeights, Scores, Singles, Winner


def network(size: int = 100) -> dict[str, torch.Tensor]:
    """One tensor of weights."""
    return {"a": torch.from_numpy(np.random.default_rng(2).standard_normal(size))}


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
    """Can be asked for outcomes, and returns none."""

    def recorded(self, candidate: PrunedWeights, folds: Sequence[int]) -> tuple[Scores, None]:
        return self(candidate, folds), None


class Blind(Telling):
    """One field of its scores is NaN where `blind(mask, folds)` is true."""

    def __init__(self, blind: Callable[[Mask, Sequence[int]], bool], field: str = "rank") -> None:
        super().__init__(noise, 16)
        self.blind, self.field = blind, field

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        scores = super().__call__(candidate, folds)
        return replace(scores, **{self.field: float("nan")}) if self.blind(candidate.mask, folds) else scores


class Sampled(Logged):
    """Records the score of each of `size` samples a fold: 0 for the first `wrong(mask, fold)` of them, else 1."""

    def __init__(self, wrong: Callable[[Mask, int], int], folds: int, size: int) -> None:
        super().__init__(lambda mask, fold: 1 - wrong(mask, fold) / size, folds)
        self.wrong, self.size = wrong, size

    def outcomes(self, mask: Mask, folds: Sequence[int]) -> Singles:
        right = [(torch.arange(self.size) >= self.wrong(mask, fold)).double() for fold in folds]
        return Singles(torch.cat(right), 0.0, 1.0)

    def recorded(self, candidate: PrunedWeights, folds: Sequence[int]) -> tuple[Scores, Singles]:
        return self(candidate, folds), self.outcomes(candidate.mask, folds)


class Steps(Observer):
    """Keeps what it is told. `dense` and `grown` are the lengths of the log after the dense network and the levels."""

    def __init__(self, evaluate: Logged) -> None:
        self.evaluate, self.dense, self.grown, self.work = evaluate, 0, 0, 0.0
        self.candidates, self.levels, self.confirmed = [], [], []

    def on_dense(self, so_far: Winner, work: float) -> None:
        self.dense = self.grown = len(self.evaluate.log)
        self.work = work

    def on_candidate(self, level, done, planned, best, sparsity) -> None:
        self.candidates.append((level, done, planned, best and best.index))

    def on_level(self, level: Level, so_far: Winner) -> None:
        self.grown = len(self.evaluate.log)
        self.levels.append((level, self.grown, so_far.report.validations))

    def on_confirmed(self, level: Level, so_far: Winner) -> None:
        self.confirmed.append((level, so_far))
