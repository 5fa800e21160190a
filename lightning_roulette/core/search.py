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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from torch import Tensor, nn

from lightning_roulette.core.calibration import Calibration, Refitted, Survivors
from lightning_roulette.core.certificate import (
    Outcomes,
    Singles,
    alike,
    method_of,
    p_value,
    paired_error,
    size_of,
    too_few,
)
from lightning_roulette.core.chance import normal, stream
from lightning_roulette.core.evaluator import Evaluator, Judge, PrunedWeights
from lightning_roulette.core.importance import importance_of, weighed
from lightning_roulette.core.masks import History, Mask, apply_mask
from lightning_roulette.core.on_disk import copies_of
from lightning_roulette.core.race import Race, Reference, Rung, furthest, no_race, rungs
from lightning_roulette.core.report import Candidate, Level, Scores, SearchReport, StopReason
from lightning_roulette.core.selection import best_of, keeps_floor
from lightning_roulette.core.sensitivity import NoGradients
from lightning_roulette.core.settings import (
    CALIBRATED,
    Importance,
    LeastSquares,
    Refit,
    Tree,
    Validation,
    Wheel,
    check_count,
    check_group,
    check_number,
    check_seed,
    refit_of,
)
from lightning_roulette.core.shards import Shards
from lightning_roulette.core.steps import copy_into, named_tensors
from lightning_roulette.core.wheel import Sectors


class Observer:
    """Is told of every step of a search; this one does nothing. A level's scores are the evaluator's, larger better."""

    def on_dense(self, so_far: Winner, work: float) -> None:
        """The dense network was validated; a level will take so many validations of one network on all folds."""

    def on_candidate(self, level: int, done: int, planned: int, best: Candidate | None, sparsity: float) -> None:
        """A candidate of a level was judged, `done` of about `planned` times; `best` so far; all are this slim."""

    def on_level(self, level: Level, so_far: Winner) -> None:
        """A level was judged on the ranking folds; `so_far` is what the search would return if it ended here."""

    def on_confirmed(self, level: Level, so_far: Winner) -> None:
        """An accepted level was judged on the confirmation folds."""


@dataclass(frozen=True, eq=False)
class Winner:
    """What a search found: the slimmest accepted network that held on the confirmation folds.

    Attributes:
        mask: Which weights are kept; all, if no level was accepted.
        report: What was done.
        dense: The weights that the search was given, not copied.
        history: The masks of all accepted levels.
        refits: What refits changed, by the number of the level: the survivors of each weight, and all else; under 0,
            all else as it was. On the CPU; all levels together have at most `1 / pruning_rate` numbers a weight.
    """

    mask: Mask
    report: SearchReport
    dense: Mapping[str, Tensor]
    history: History
    refits: Mapping[int, Survivors] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Tensor]:
        """New tensors: the winner's weights, zero where it is pruned; and all else that a refit changed."""
        return self.weights_at(self.history.level)

    def mask_at(self, level: int) -> Mask:
        """The mask of an accepted level; 0 is the dense network.

        Raises:
            ValueError: If there was no such level.
        """
        return self.history.mask_at(level)

    def weights_at(self, level: int) -> dict[str, Tensor]:
        """New tensors, on the devices of the dense weights: those of an accepted level; 0 is the dense network.

        Biases and running statistics are among them if a refit changed them.

        Raises:
            ValueError: If there was no such level.
        """
        return _network_at(level, self.mask_at(level), self.dense, self.refits).weights

    def cpu(self) -> Winner:
        """The same on the CPU, with copies of the dense weights: of more than a gibibyte, in a temporary file."""
        return replace(self, mask=self.mask.cpu(), dense=copies_of(self.dense), history=self.history.cpu())


def _network_at(level: int, mask: Mask, dense: Mapping[str, Tensor], refits: Mapping[int, Survivors]) -> PrunedWeights:
    """The network of an accepted level: what a refit made of it, or else the dense values, biases included."""
    known = refits.get(level, refits.get(0))
    return PrunedWeights(mask, dense, {} if known is None else known.spread(mask, dense))


def load(module: nn.Module, winner: Winner) -> None:
    """Make a network the winner, in place: its mask, and what a refit changed. All else stays bit for bit.

    Args:
        module: Dense, with the names of the winner's weights.
        winner: Of a search over this network.
    """
    level = winner.history.level
    if level in winner.refits:
        copy_into(named_tensors(module), winner.refits[level].spread(winner.mask, winner.dense))
    apply_mask(module, winner.mask)


def search(
    weights: Mapping[str, Tensor],
    evaluate: Evaluator | Callable[[Mask], float],
    *,
    branches: int = 20,
    tolerance: float = 0.0,
    target_sparsity: float | None = None,
    confidence: float | None = None,
    refit: str | LeastSquares | None = None,
    calibration: Calibration | None = None,
    wheel: Wheel = Wheel(),
    tree: Tree = Tree(),
    validation: Validation = Validation(),
    seed: int = 0,
    observer: Observer | None = None,
) -> Winner:
    """The slimmest network of a pruning tree whose score keeps the floor.

    The tree grows on the ranking folds of `evaluate` alone. Then its accepted levels are judged on the others, the
    densest first, and the last before one that misses the floor there is the winner.

    Args:
        weights: Parameter name to tensor, the prunable weights of the dense network. Never changed. Of DTensors, whose
            rows lie in several processes, all of them search alike, by magnitude alone and without a refit.
        evaluate: An `Evaluator`, or a function from a `Mask` to a score, larger is better: an evaluator of one fold,
            which cannot be confirmed.
        branches: Candidates per level.
        tolerance: How far below the dense score a winner may be; infinity leaves the score out of it.
        target_sparsity: A further end of the search, in (0, 1); the last level is cut to reach it exactly.
        confidence: In (0, 1). A level then holds only if, with this confidence, its decline on the population that the
            data are an i.i.d. sample of is at most `tolerance`. The levels were fixed without the confirmation folds
            and are tested in order up to the first failure, so that no correction is needed (fixed-sequence testing;
            Learn then Test, Angelopoulos et al. 2021, arXiv:2110.01052).
        refit: What is done for accuracy after a level is drawn: None; `"batch_norm"`, running statistics are computed
            anew; `"least_squares"`, or a `LeastSquares`, the survivors are refitted besides. It is part of the level:
            the floor is held against the refitted network.
        calibration: The network whose weights these are, with inputs: for a refit, and for an importance that looks at
            inputs. Neither validation data nor labels belong there.
        wheel: How candidates are drawn.
        tree: How levels follow.
        validation: How candidates are judged: `confirm` and `race` are read here.
        seed: All chance of the search, a signed 64-bit number. Equal seed and scores, equal masks.
        observer: Is told of each step.

    Returns:
        The winner: the last accepted level that held, or the dense network if none did.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, `weights` is empty, an importance is not a finite non-negative
            number, the dense score is NaN, or the confirmation folds cannot certify anything.

    Example:
        >>> weights = {"layer": Tensor([0.1, -2.0, 0.01, 3.0])}
        >>> winner = search(weights, lambda mask: float(mask["layer"][[1, 3]].all()), wheel=Wheel(math.inf))
        >>> winner.mask["layer"]
        tensor([False,  True, False,  True])
    """
    check_search(branches, tolerance, target_sparsity, confidence, wheel, tree, validation, seed)
    if not weights or not any(weight.numel() for weight in weights.values()):
        raise ValueError("weights is empty, but must name at least one tensor with entries.")
    how = refit_of(refit)
    if (shards := Shards.of(weights)) is not None and (why := beyond_shards(wheel.importance, how)):
        raise ValueError(f"the weights lie in {shards.ranks} processes, but {why}")
    if calibration is None and (how is not None or wheel.importance in CALIBRATED):
        asked = f"refit is {refit!r}" if how is not None else f"importance is {wheel.importance!r}"
        raise ValueError(f"{asked}, but there are no inputs for it. Pass calibration=Calibration(network, batches).")
    judge = Judge(evaluate, validation.confirm)
    refitting = _Refitting(weights, how, calibration)
    growing = _Growing(weights, judge, int(branches), wheel, int(seed), observer or Observer(), refitting)
    growing.start(float(tolerance), confidence, validation.race)
    while (reason := growing.end(target_sparsity, tree)) is None:
        growing.level(tree, target_sparsity)
    growing.confirm()
    return growing.so_far(reason)


def check_search(
    branches: int,
    tolerance: float,
    target_sparsity: float | None,
    confidence: float | None,
    wheel: Wheel,
    tree: Tree,
    validation: Validation,
    seed: int,
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
    check_group("validation", validation, Validation)
    check_seed(seed)
    if confidence is not None:
        _check_confidence(confidence, tolerance, validation)


def beyond_shards(importance: Importance | str | None, how: Refit | None) -> str:
    """Why weights that lie in several processes cannot be pruned so, and what to do; empty if they can."""
    if how is not None:
        return "a refit needs whole layers, which no process has. Pass refit=None."
    if importance not in (None, "magnitude"):
        what = f"importance {importance!r}" if isinstance(importance, str) else "importance by a function"
        return f"{what} needs whole layers, which no process has. Pass wheel=Wheel(importance='magnitude')."
    return ""


def _check_confidence(confidence: float, tolerance: float, validation: Validation) -> None:
    check_number("confidence", confidence, above=0, below=1, remedy="0.95 is usual.")
    if math.isinf(tolerance):
        raise ValueError(
            f"tolerance is {tolerance} and confidence {confidence}, but that anything at all may be lost needs no "
            "certificate. Pass a tolerance, such as 0.005 for half a point, or leave confidence out."
        )
    if tolerance == 0:
        raise ValueError(
            f"tolerance is {tolerance} and confidence {confidence}, but no finite sample can certify that nothing is "
            "lost. Allow some tolerance, such as 0.005 for half a point, or leave confidence out."
        )
    if validation.confirm == 0:
        raise ValueError(
            f"confirm is 0 and confidence {confidence}, but data that ranked candidates can certify none of them. "
            "Keep some for confirmation, as Validation(confirm=0.5) does, or leave confidence out."
        )


def level_draws(survivors: int, pruning_rate: float, spare: int) -> int:
    """How many weights a level removes: `floor(rate * survivors + 0.5)`, at least one, at most `spare`."""
    return min(max(1, math.floor(pruning_rate * survivors + 0.5)), spare)


class _Refitting:
    """What is done to a network after its mask was drawn: nothing, or a refit.

    Attributes:
        how: None: nothing.
        kept: What was done to accepted levels.
    """

    def __init__(self, weights: Mapping[str, Tensor], how: Refit | None, calibration: Calibration | None) -> None:
        self._weights, self.how, self._calibration = weights, how, calibration
        self.kept: dict[int, Survivors] = {}
        self.now = Refitted()
        if how is not None and calibration is not None:
            dense = Mask.full(weights)
            self.kept[0] = Survivors.of(dense, calibration.others(dense, how))

    @property
    def each_level(self) -> bool:
        """Whether levels are refitted before they are judged."""
        return self.how is not None and self.how.each_level

    @property
    def finalists(self) -> int:
        """How many candidates of a level are refitted."""
        return self.how.finalists if self.how is not None and self.how.each_level else 0

    @property
    def left_alone(self) -> dict[str, str]:
        """The weights that no refit changes, and why."""
        if self.how is None or self._calibration is None:
            return {}
        return self._calibration.left_alone(Mask.full(self._weights), self.how)

    def refitted(self, mask: Mask) -> Refitted:
        """The network of a mask, refitted."""
        assert self._calibration is not None
        assert self.how is not None
        return self._calibration.refit(mask, self.how)

    def network(self, mask: Mask, refitted: Refitted | None = None) -> PrunedWeights:
        """The network of a mask over refitted values: over those of the parent if they are not given."""
        return PrunedWeights(mask, self._weights, (refitted or self.now).values)

    def keep(self, level: int, mask: Mask, refitted: Refitted) -> None:
        """Keep what makes a level's weights."""
        if refitted.values:
            self.kept[level] = Survivors.of(mask, refitted.values)

    def at(self, level: int, mask: Mask) -> PrunedWeights:
        """The network of an accepted level."""
        return _network_at(level, mask, self._weights, self.kept)

    def scales(self, kind: str, mask: Mask) -> Mapping[str, Tensor]:
        """See `Calibration.scales`."""
        assert self._calibration is not None
        return self._calibration.scales(kind, mask, self.now.values)


class _Growing:
    """A tree that grows: the parent of the next level, and the numbers of all levels so far."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        judge: Judge,
        branches: int,
        wheel: Wheel,
        seed: int,
        observer: Observer,
        refitting: _Refitting,
        history: History | None = None,
    ) -> None:
        self.weights, self.judge, self.branches = weights, judge, branches
        self.wheel, self.seed, self.observer, self.refitting = wheel, seed, observer, refitting
        self.shards = Shards.of(weights)
        self.history = history or History.of_dense(weights)
        self.parent = self.history.mask
        self.allocation, self.importance = (
            _allocation(wheel, refitting.how, branches),
            _importance(wheel, refitting.how),
        )
        self.leaning = dict.fromkeys(weights, 0.0)
        self.levels: list[Level] = []
        self.halvings, self.failures = 0, 0
        self.began = time.monotonic()
        self.report: SearchReport

    def start(self, tolerance: float, confidence: float | None, race: bool, refuse_nan: bool = True) -> None:
        """Validate the network as it is, on the ranking and on the confirmation folds."""
        judge = self.judge
        dense = self.refitting.network(self.parent)
        scores, self.outcomes = judge.recorded(dense, judge.ranking)
        if refuse_nan:
            _refuse_nan(scores.floor)
        self.report = SearchReport("score", "max", scores.floor, tolerance, self.branches, self.seed, self.parent.size)
        self.report = replace(
            self.report,
            folds=(len(judge.ranking), len(judge.confirming)),
            shared=judge.whole,
            refit=_in_words(self.refitting.how),
            left_alone=self.refitting.left_alone,
            importance=self.importance if isinstance(self.importance, str) else "a function",
        )
        if judge.confirming:
            gated, self.gated_outcomes = judge.recorded(dense, judge.confirming)
            if refuse_nan:
                _refuse_nan(gated.floor)
            samples = None if self.gated_outcomes is None else size_of(self.gated_outcomes)
            self.report = replace(self.report, gated_dense=gated.floor, samples=samples)
        if confidence is not None:
            self._promise(float(confidence))
        self.stages, self.reference = self._stages(race, scores)
        self.observer.on_dense(self.so_far(None), self._work())

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
        race = self._race(draws, sparsity)
        branch = race.run(self.stages)
        best, refitted = best_of(furthest(branch)), self.refitting.now
        if self.refitting.each_level:
            branch, best, refitted = self._refitted(branch, race)
        best, error = self._judged_in_full(best, race, refitted)
        accepted = best is not None and not math.isnan(best.rank) and keeps_floor(best.score, self.report.floor)
        number, winner = self.history.level + 1, best.index if best else None
        if best is not None:
            twins = [one.index for one in branch if one.same_as == best.index]
            shared = {best.index: best} | {index: best.twin(index) for index in twins}
            branch = [shared.get(one.index, one) for one in branch]
        level = Level(number, rate, sparsity, survivors, tuple(branch), winner, accepted, error)
        self.levels.append(replace(level, undone=refitted.undone))
        if accepted:
            self.parent = race.mask(cast(int, winner))
            self.leaning = self._leaning(number, cast(int, winner))
            self.refitting.now = refitted
            self.refitting.keep(number, self.parent, refitted)
            self.history = self.history.pruned(self.parent)
            self.failures = 0
        else:
            self.halvings, self.failures = self.halvings + 1, self.failures + 1
        self.observer.on_level(self.levels[-1], self.so_far(None))

    def confirm(self) -> None:
        """Judge the accepted levels on the confirmation folds, densest first, up to the first that does not hold."""
        if self.refitting.how is not None and not self.refitting.each_level:
            self._refit_accepted()
        if not self.judge.confirming:
            return
        self.history, held = self.history.won_by(0), True
        for place, level in enumerate(self.levels):
            if level.accepted and held:
                self.levels[place] = gated = self._gated(level)
                if held := bool(gated.held):
                    self.history = self.history.won_by(level.level)
                self.observer.on_confirmed(gated, self.so_far(None))

    def so_far(self, reason: StopReason | None) -> Winner:
        """What the search has found up to here."""
        refits = dict(self.refitting.kept)
        mask = self.parent if self.history.level == self.history.deepest else self.history.mask
        return Winner(mask, self._report(reason), self.weights, self.history, refits)

    def _promise(self, confidence: float) -> None:
        """Refuse what cannot be certified; note what the certificate will rest on."""
        outcomes = self.gated_outcomes if self.judge.confirming else None
        if outcomes is None:
            raise ValueError(_cannot_certify(confidence, self.report.shared))
        share = len(self.judge.confirming) / self.judge.folds
        width = outcomes.high - outcomes.low if isinstance(outcomes, Singles) else None
        if why := too_few(size_of(outcomes), width, confidence, self.report.tolerance, share):
            raise ValueError(why)
        self.report = replace(self.report, confidence=confidence, method=method_of(outcomes))

    def _stages(self, race: bool, whole: Scores) -> tuple[list[Rung], Reference | None]:
        """The rungs of every level: a race, if its parts give the dense network a score at all."""
        ranking = self.judge.ranking
        if race and len(ranking) > 1 and self.branches > 1:
            finalists = max(2, self.refitting.finalists)
            stages = rungs(self.branches, len(ranking), self.judge.at_once, self.judge.at_least, finalists)
            dense = self.refitting.network(self.parent)
            scores = {part: self.judge.scores(dense, part) for rung in stages for part in rung.parts}
            if not any(math.isnan(one.rank + one.floor) for one in (whole, *scores.values())):
                return stages, Reference(scores, whole)
        return no_race(self.branches, ranking), None

    def _work(self) -> float:
        folds = sum(rung.entrants * len(part) for rung in self.stages for part in rung.parts)
        again = len(self.judge.ranking) if self._rejudges() else 0
        return (folds + again * (1 if self.judge.records else 2)) / self.judge.folds

    def _rejudges(self) -> bool:
        """Whether the winner of a branch is judged again: on the union of the ranking folds, with its outcomes."""
        return self.judge.records or len(self.judge.ranking) > 1

    def _race(self, draws: int, sparsity: float) -> Race:
        """The candidates of one level, ready to run."""
        if not self.failures:
            self._set_up_wheel()
        number = self.history.level + 1
        first = self.failures * self.branches
        candidates = [
            Candidate(index, sparsity, math.nan, math.nan, folds=0) for index in range(first, first + self.branches)
        ]

        def spin(index: int) -> Mask:
            sectors = self._sectors
            if self.allocation:
                leaning = self._leaning(number, index)
                factors = {name: math.exp(leaning[name]) for name in leaning}
                sectors = Sectors(
                    weighed(self._importance, factors), self.parent, sharpness=self.wheel.sharpness, shards=self.shards
                )
            return sectors.spin(draws, seed=self.seed, level=number, candidate=index)

        return Race(candidates, spin, self.refitting.network, self.judge, self.reference, self._teller(sparsity))

    @property
    def _in_race(self) -> int:
        """How often candidates of a level are judged before any is refitted."""
        return sum(rung.entrants * len(rung.parts) for rung in self.stages)

    def _teller(self, sparsity: float) -> Callable[[int, Candidate | None], None]:
        """What tells the observer how far a level is."""
        number, planned = self.history.level + 1, self._in_race + self.refitting.finalists

        def tell(done: int, best: Candidate | None) -> None:
            self.observer.on_candidate(number, done, planned, best, sparsity)

        return tell

    def _set_up_wheel(self) -> None:
        """What the candidates of a level share."""
        of = self._weights_of_parent()
        try:
            self._importance = importance_of(of, self.importance, lambda kind: self.refitting.scales(kind, self.parent))
        except NoGradients as error:
            if self.wheel.importance is not None:
                raise ValueError(f"importance is {self.importance!r}, but {error}. Choose another.") from error
            self.importance = "magnitude"
            self.report = replace(self.report, importance=f"magnitude, as {error}")
            self._importance = importance_of(of, self.importance)
        self._sectors = Sectors(
            self._importance,
            self.parent,
            sharpness=self.wheel.sharpness,
            scope=self.wheel.scope,
            shards=self.shards,
        )

    def _weights_of_parent(self) -> dict[str, Tensor]:
        """The weights that importance is taken of: copies, zero where pruned, unless only the dense survivors count."""
        if self.shards is not None:
            return self.shards.own(self.weights)
        if self.importance == "magnitude" and not self.refitting.now.values:
            return {name: weight.detach() for name, weight in self.weights.items()}
        parent = self.refitting.network(self.parent).weights
        return {name: parent[name] for name in self.weights}

    def _leaning(self, level: int, candidate: int) -> dict[str, float]:
        """The logarithm of what a candidate multiplies the importance of each layer by."""
        if not self.allocation:
            return self.leaning
        return {
            name: before + self.allocation * normal(stream(self.seed, level, candidate, name))
            for name, before in self.leaning.items()
        }

    def _refitted(self, branch: list[Candidate], race: Race) -> tuple[list[Candidate], Candidate | None, Refitted]:
        """The branch with its best few refitted and judged again, the best of these, and its values."""
        best, values, known = cast("Candidate | None", None), Refitted(), {one.index: one for one in branch}
        runners = [one for one in furthest(branch) if one.same_as is None and not math.isnan(one.rank)]
        refitted, tell = 0, self._teller(branch[0].sparsity)
        while runners and refitted < self.refitting.finalists:
            if (one := best_of(runners)) is None:
                break
            runners.remove(one)
            found = self.refitting.refitted(race.mask(one.index))
            scores = self.judge.scores(self.refitting.network(race.mask(one.index), found), self.judge.ranking)
            known[one.index] = one = replace(one.scored(scores, len(self.judge.ranking)), refitted=True)
            if best is None or best_of([best, one]) is one:
                best, values = one, found
            refitted += 1
            tell(self._in_race + refitted, best)
        return list(known.values()), best, values

    def _refit_accepted(self) -> None:
        """Refit accepted levels, all that will be judged once more: they are confirmed as they will be used."""
        for place, level in enumerate(self.levels):
            if not level.accepted or not (self.judge.confirming or level.level == self.history.level):
                continue
            mask = self.history.mask_at(level.level)
            refitted = self.refitting.refitted(mask)
            if self.judge.confirming or self._gains(level, mask, refitted):
                self.levels[place] = replace(level, undone=refitted.undone)
                self.refitting.keep(level.level, mask, refitted)
            else:
                self.report = replace(self.report, refit=f"{self.report.refit}, not kept as it gained nothing")

    def _gains(self, level: Level, mask: Mask, refitted: Refitted) -> bool:
        """Whether a level that nothing will confirm is better for a refit."""
        before = next(one for one in level.candidates if one.index == level.winner)
        after = before.scored(self.judge.scores(self.refitting.network(mask, refitted), self.judge.ranking), 0)
        return best_of([before, after]) is after and keeps_floor(after.score, self.report.floor)

    def _judged_in_full(self, best: Candidate | None, race: Race, refitted: Refitted) -> tuple[Candidate | None, float]:
        """The winner of a branch with its scores on all ranking folds, and their paired standard error."""
        if best is None or not self._rejudges():
            return best, math.nan
        network = self.refitting.network(race.mask(best.index), refitted)
        scores, outcomes = self.judge.recorded(network, self.judge.ranking)
        return best.scored(scores, len(self.judge.ranking)), _error(self.outcomes, outcomes)

    def _gated(self, level: Level) -> Level:
        """An accepted level as the confirmation folds judge it."""
        network = self.refitting.at(level.level, self.history.mask_at(level.level))
        scores, outcomes = self.judge.recorded(network, self.judge.confirming)
        error, p = _error(self.gated_outcomes, outcomes), cast("float | None", None)
        if self.report.confidence is not None:
            p, dense = 1.0, self.gated_outcomes
            if outcomes is not None and dense is not None and alike(dense, outcomes):
                p = p_value(dense, outcomes, self.report.tolerance, self.report.confidence)
            held = p <= 1 - self.report.confidence
        else:
            held = keeps_floor(scores.floor, cast(float, self.report.gated_floor))
        return replace(level, gated=scores.floor, gated_error=error, p_value=p, held=held)

    def _spare(self, target_sparsity: float | None) -> int:
        """How many more weights may go: to the target, else to one weight (one a layer where each has a wheel)."""
        if target_sparsity is not None:
            return min(self._spare(None), self._missing(target_sparsity))
        if self.wheel.scope == "layer":
            return sum(max(0, count - 1) for count in self.parent.counts.values())
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
            validations=self.judge.validations,
            seconds=time.monotonic() - self.began,
        )


def _importance(wheel: Wheel, how: Refit | None) -> str | Importance:
    """What candidates are drawn by."""
    if wheel.importance is None:
        return "sensitivity" if isinstance(how, LeastSquares) and how.each_level else "magnitude"
    return wheel.importance


def _allocation(wheel: Wheel, how: Refit | None, branches: int) -> float:
    """How much candidates differ in their leaning to layers."""
    if wheel.scope == "layer":
        return 0.0
    if wheel.allocation is None:
        return 0.3 if isinstance(how, LeastSquares) and how.each_level and branches > 1 else 0.0
    return wheel.allocation


def _in_words(how: Refit | None) -> str:
    if how is None:
        return ""
    what = (
        "survivors by least squares, and running statistics" if isinstance(how, LeastSquares) else "running statistics"
    )
    best = "of the best candidate" if how.finalists == 1 else f"of the best {how.finalists} candidates"
    return f"{what}, {f'{best} of a level' if how.each_level else 'at the end'}"


def _refuse_nan(dense_score: float) -> None:
    if math.isnan(dense_score):
        raise ValueError(
            "the dense network scores NaN or infinity, so there is no floor to keep. Nothing was pruned; does the "
            "network give finite outputs on the validation data?"
        )


def _error(dense: Outcomes | None, pruned: Outcomes | None) -> float:
    return math.nan if dense is None or pruned is None or not alike(dense, pruned) else paired_error(dense, pruned)


def _cannot_certify(confidence: float, shared: str) -> str:
    why = f" ({shared})" if shared else ""
    return (
        f"confidence is {confidence}, but nothing is known of single samples or batches of data that ranks no candidate"
        f"{why}. Let the validation tell more, or leave confidence out."
    )
