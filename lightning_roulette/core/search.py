"""The search, level by level.

K. Y. Chan, K. F. C. Yiu, S. Guo and H. Jiang, "A roulette wheel-based pruning method to simplify cumbersome deep neural
networks", Neural Computing and Applications 36:13915-13933 (2024), doi:10.1007/s00521-024-09719-6.

From a trained network the roulette wheel draws a branch of pruned networks; each is evaluated; the best becomes the
parent of the next level, until accuracy would decline. The paper takes "the slimmest with the best accuracy": all
candidates of one level are equally slim here, so the best score decides within a level, and slimness between levels:
the winner of the tree is the last, and so the slimmest, accepted level.

Only the paper's abstract and public summaries were at hand. What they leave open is settled thus: odds fall with a
power of importance (`Wheel.sharpness`); a level must keep the dense score less a tolerance; a level that does not is
tried again at half the rate, `Tree.patience` times in a row, down to `Tree.smallest_rate`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Protocol, cast

from torch import Tensor

from lightning_roulette.core.importance import importance_of
from lightning_roulette.core.masks import History, Mask
from lightning_roulette.core.report import Candidate, Level, SearchReport, StopReason
from lightning_roulette.core.selection import best_of, keeps_floor
from lightning_roulette.core.settings import Tree, Wheel, check_count, check_group, check_number, check_seed
from lightning_roulette.core.wheel import Sectors


@dataclass(frozen=True)
class Scores:
    """What an evaluation found; larger is better throughout, NaN never wins.

    Attributes:
        rank: Orders the branch.
        floor: Is held against the floor.
        tiebreak: Orders equal ranks.
    """

    rank: float
    floor: float
    tiebreak: float = 0.0


@dataclass(frozen=True, eq=False)
class PrunedWeights:
    """A network that an evaluator is asked about: a mask over the dense weights.

    Attributes:
        mask: Which weights are kept.
        dense: The weights of the dense network, not copied.
    """

    mask: Mask
    dense: Mapping[str, Tensor]

    @property
    def weights(self) -> dict[str, Tensor]:
        """New tensors: the dense weights, zero where pruned."""
        kept = {name: self.mask[name].to(weight.device) for name, weight in self.dense.items()}
        return {name: weight.detach().masked_fill(~kept[name], 0) for name, weight in self.dense.items()}


class Evaluator(Protocol):
    """Judges pruned networks on folds of validation data. It puts them into the network; the search does not."""

    @property
    def folds(self) -> int:
        """How many folds there are."""
        ...

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        """The candidate's scores on these of the folds 0 to `folds - 1`; everything else is left as it was."""
        ...


class Observer:
    """Is told of every step of a search; this one does nothing. A level's scores are the evaluator's, larger better."""

    def on_dense(self, so_far: Winner) -> None:
        """The dense network was validated."""

    def on_candidate(self, level: int, number: int, best: Candidate | None, sparsity: float) -> None:
        """`number` candidates of a level have scores, `best` of them so far; all are this slim."""

    def on_level(self, level: Level, so_far: Winner) -> None:
        """A level was judged; `so_far` is what the search would return if it ended here."""


@dataclass(frozen=True, eq=False)
class Winner:
    """What a search found: the slimmest accepted network.

    Attributes:
        mask: Which weights are kept; all, if no level was accepted.
        report: What was done.
        dense: The weights that the search was given, not copied.
        history: The masks of all accepted levels.
    """

    mask: Mask
    report: SearchReport
    dense: Mapping[str, Tensor]
    history: History

    @property
    def weights(self) -> dict[str, Tensor]:
        """New tensors: the dense weights, zero where the winner is pruned."""
        return PrunedWeights(self.mask, self.dense).weights

    def mask_at(self, level: int) -> Mask:
        """The mask of an accepted level; 0 is the dense network.

        Raises:
            ValueError: If there was no such level.
        """
        return self.history.mask_at(level)


def search(
    weights: Mapping[str, Tensor],
    evaluate: Evaluator | Callable[[Mask], float],
    *,
    branches: int = 20,
    tolerance: float = 0.0,
    target_sparsity: float | None = None,
    wheel: Wheel = Wheel(),
    tree: Tree = Tree(),
    seed: int = 0,
    observer: Observer | None = None,
) -> Winner:
    """The slimmest network of a pruning tree whose score keeps the floor.

    Args:
        weights: Parameter name to tensor, the prunable weights of the dense network. Never changed.
        evaluate: An `Evaluator`, or a function from a `Mask` to a score, larger is better.
        branches: Candidates per level.
        tolerance: How far below the dense score a winner may be; infinity leaves the score out of it.
        target_sparsity: A further end of the search, in (0, 1); the last level is cut to reach it exactly.
        wheel: How candidates are drawn.
        tree: How levels follow.
        seed: All chance of the search, a signed 64-bit number. Equal seed and scores, equal masks.
        observer: Is told of each step.

    Returns:
        The winner: the last accepted level, or the dense network if none was.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, `weights` is empty, an importance is not a finite non-negative
            number, or the dense score is NaN.

    Example:
        >>> weights = {"layer": Tensor([0.1, -2.0, 0.01, 3.0])}
        >>> winner = search(weights, lambda mask: float(mask["layer"][[1, 3]].all()), wheel=Wheel(math.inf))
        >>> winner.mask["layer"]
        tensor([False,  True, False,  True])
    """
    check_search(branches, tolerance, target_sparsity, wheel, tree, seed)
    if not weights or not any(weight.numel() for weight in weights.values()):
        raise ValueError("weights is empty, but must name at least one tensor with entries.")
    growing = _Growing(weights, _lifted(evaluate), int(branches), wheel, int(seed), observer or Observer())
    growing.start(float(tolerance))
    while (reason := growing.end(target_sparsity, tree)) is None:
        growing.level(tree, target_sparsity)
    return growing.so_far(reason)


def check_search(
    branches: int, tolerance: float, target_sparsity: float | None, wheel: Wheel, tree: Tree, seed: int
) -> None:
    """Raise if an argument of a search is of the wrong kind or out of range.

    Raises:
        TypeError: If one is of the wrong kind.
        ValueError: If one is out of range.
    """
    check_count("branches", branches)
    check_number("tolerance", tolerance, at_least=0, remedy="It is in the metric's own units: 0.005 is half a point.")
    if target_sparsity is not None:
        check_number("target_sparsity", target_sparsity, above=0, below=1)
    check_group("wheel", wheel, Wheel)
    check_group("tree", tree, Tree)
    check_seed(seed)


def level_draws(survivors: int, pruning_rate: float, spare: int) -> int:
    """How many weights a level removes: `floor(rate * survivors + 0.5)`, at least one, at most `spare`."""
    return min(max(1, math.floor(pruning_rate * survivors + 0.5)), spare)


class _Growing:
    """A tree that grows: the parent of the next level, and the numbers of all levels so far."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        evaluate: Evaluator,
        branches: int,
        wheel: Wheel,
        seed: int,
        observer: Observer,
    ) -> None:
        self.weights, self.evaluate, self.branches = weights, evaluate, branches
        self.wheel, self.seed, self.observer = wheel, seed, observer
        self.parent, self.history = Mask.full(weights), History.of_dense(weights)
        self.levels: list[Level] = []
        self.validations, self.halvings, self.failures = 0, 0, 0
        self.began = time.monotonic()
        self.report: SearchReport

    def start(self, tolerance: float) -> None:
        """Validate the dense network."""
        score = self._scores(self.parent).floor
        if math.isnan(score):
            raise ValueError(
                "the dense network scores NaN or infinity, so there is no floor to keep. Nothing was pruned; does the "
                "network give finite outputs on the validation data?"
            )
        self.report = SearchReport("score", "max", score, tolerance, self.branches, self.seed, self.parent.size)
        self.observer.on_dense(self.so_far(None))

    def end(self, target_sparsity: float | None, tree: Tree) -> StopReason | None:
        """Why no further level is tried, None if one is."""
        if self.failures >= tree.patience:
            return StopReason.DECLINED
        if self.halvings > 0 and self._rate(tree) < tree.smallest_rate:
            return StopReason.RATE_TOO_SMALL
        if target_sparsity is not None and self._missing(target_sparsity) <= 0:
            return StopReason.TARGET_REACHED
        if self.history.level >= min(tree.max_levels or History.most_levels, History.most_levels):
            return StopReason.MAX_LEVELS
        return StopReason.EXHAUSTED if self._spare(None) <= 0 else None

    def level(self, tree: Tree, target_sparsity: float | None) -> None:
        """Spin, validate and judge one branch."""
        rate = self._rate(tree)
        draws = level_draws(self.parent.survivors, rate, self._spare(target_sparsity))
        survivors = self.parent.survivors - draws
        sparsity = 1 - survivors / self.parent.size
        branch = tuple(self._branch(draws, sparsity))
        best = best_of(branch)
        accepted = best is not None and keeps_floor(best.score, self.report.floor)
        number, winner = self.history.level + 1, best.index if best else None
        self.levels.append(Level(number, rate, sparsity, survivors, branch, winner, accepted))
        if accepted:
            self.parent = self._sectors.spin(draws, seed=self.seed, level=number, candidate=cast(int, winner))
            self.history = self.history.pruned(self.parent)
            self.failures = 0
        else:
            self.halvings, self.failures = self.halvings + 1, self.failures + 1
        self.observer.on_level(self.levels[-1], self.so_far(None))

    def so_far(self, reason: StopReason | None) -> Winner:
        """What the search has found up to here."""
        return Winner(self.parent, self._report(reason), self.weights, self.history)

    def _branch(self, draws: int, sparsity: float) -> Iterator[Candidate]:
        """The candidates of one level, scored; those equal to an earlier one share its scores."""
        if not self.failures:
            parent = PrunedWeights(self.parent, self.weights).weights
            importance = importance_of(parent, self.wheel.importance)
            self._sectors = Sectors(importance, self.parent, sharpness=self.wheel.sharpness, scope=self.wheel.scope)
        number, best = self.history.level + 1, None
        seen: dict[bytes, Candidate] = {}
        for turn in range(self.branches):
            index = self.failures * self.branches + turn
            mask = self._sectors.spin(draws, seed=self.seed, level=number, candidate=index)
            twin = seen.get(key := _fingerprint(mask))
            if twin is None:
                scores = self._scores(mask)
                one = Candidate(index, sparsity, scores.floor, scores.rank, scores.tiebreak)
                seen[key] = one
            else:
                one = replace(twin, index=index, same_as=twin.index)
            best = best_of([one] if best is None else [best, one])
            self.observer.on_candidate(number, turn + 1, best, sparsity)
            yield one

    def _scores(self, mask: Mask) -> Scores:
        self.validations += 1
        scores = self.evaluate(PrunedWeights(mask, self.weights), range(self.evaluate.folds))
        values = [float(value) for value in (scores.rank, scores.floor, scores.tiebreak)]
        return Scores(*(value if math.isfinite(value) else math.nan for value in values))

    def _spare(self, target_sparsity: float | None) -> int:
        """How many more weights may go: to the target, else to one weight (one a layer where each has a wheel)."""
        if target_sparsity is not None:
            return min(self._spare(None), self._missing(target_sparsity))
        if self.wheel.scope == "layer":
            return sum(max(0, int(kept.sum()) - 1) for kept in self.parent.values())
        return self.parent.survivors - 1

    def _rate(self, tree: Tree) -> float:
        return float(tree.pruning_rate) / 2.0**self.halvings

    def _missing(self, target_sparsity: float) -> int:
        """How many weights must go until the target is reached."""
        goal = math.floor(target_sparsity * self.parent.size + 0.5)
        return goal - (self.parent.size - self.parent.survivors)

    def _report(self, reason: StopReason | None) -> SearchReport:
        return replace(
            self.report,
            levels=tuple(self.levels),
            stop_reason=reason,
            validations=self.validations,
            seconds=time.monotonic() - self.began,
        )


@dataclass(frozen=True)
class _OneFold:
    """A plain function of a mask as an evaluator of one fold."""

    score: Callable[[Mask], float]
    folds: int = 1

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        value = float(self.score(candidate.mask))
        return Scores(rank=value, floor=value)


def _lifted(evaluate: Evaluator | Callable[[Mask], float]) -> Evaluator:
    if hasattr(evaluate, "folds"):
        return cast(Evaluator, evaluate)
    return _OneFold(evaluate)


def _fingerprint(mask: Mask) -> bytes:
    """Equal for equal masks of one network; for different ones with a chance of 2**-128."""
    digest = blake2b(digest_size=16)
    for kept in mask.values():
        digest.update(kept.cpu().contiguous().numpy().data)
    return digest.digest()
