"""A pruning tree as it grows, level by level, and what it tells of itself."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

from torch import Tensor

from lightning_roulette.judge.certificate import (
    Outcomes,
    Singles,
    alike,
    method_of,
    p_value,
    paired_error,
    size_of,
    too_few,
)
from lightning_roulette.judge.evaluator import Judge
from lightning_roulette.judge.race import Race, Reference, Rung, furthest, no_race, rungs
from lightning_roulette.judge.selection import best_of, keeps_floor
from lightning_roulette.large.shards import Shards
from lightning_roulette.mask.mask import History, Mask
from lightning_roulette.refit.calibration import Refitted
from lightning_roulette.refit.sensitivity import NoGradients
from lightning_roulette.report.report import Candidate, Level, Scores, SearchReport, StopReason
from lightning_roulette.search.refitting import Refitting
from lightning_roulette.search.winner import Winner
from lightning_roulette.settings import Importance, LeastSquares, Refit, Tree, Wheel
from lightning_roulette.wheel.chance import normal, stream
from lightning_roulette.wheel.importance import importance_of, weighed
from lightning_roulette.wheel.wheel import Sectors


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


def level_draws(survivors: int, pruning_rate: float, spare: int) -> int:
    """How many weights a level removes: `floor(rate * survivors + 0.5)`, at least one, at most `spare`."""
    return min(max(1, math.floor(pruning_rate * survivors + 0.5)), spare)


class Growing:
    """A tree that grows: the parent of the next level, and the numbers of all levels so far.

    Args:
        weights: See `search`.
        judge: Of all networks.
        branches: Candidates per level.
        wheel: How candidates are drawn.
        seed: All chance.
        observer: Is told of each step.
        refitting: What is done to a level after it is drawn.
        history: The levels that the network has behind it; None: it is dense.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        judge: Judge,
        branches: int,
        wheel: Wheel,
        seed: int,
        observer: Observer,
        refitting: Refitting,
        history: History | None = None,
    ) -> None:
        self.weights, self.judge, self.branches = weights, judge, branches
        self.wheel, self.seed, self.observer, self.refitting = wheel, seed, observer, refitting
        self.shards = Shards.of(weights)
        self.history = history or History.of_dense(weights)
        self.parent = self.history.mask
        self.allocation = _allocation(wheel, refitting.how, branches)
        self.importance = _importance(wheel, refitting.how)
        self.leaning = dict.fromkeys(weights, 0.0)
        self.levels: list[Level] = []
        self.halvings, self.failures = 0, 0
        self.began = time.monotonic()
        self.report: SearchReport

    def start(self, tolerance: float, confidence: float | None, race: bool, refuse_nan: bool = True) -> None:
        """Validate the network as it is, on the ranking and on the confirmation folds."""
        judge = self.judge
        dense = self.refitting.network(self.parent)
        scores, self.outcomes = judge.recorded(dense, judge.search_folds)
        if refuse_nan:
            _refuse_nan(scores.score)
        self.report = SearchReport("score", "max", scores.score, tolerance, self.branches, self.seed, self.parent.size)
        self.report = replace(
            self.report,
            folds=(len(judge.search_folds), len(judge.held_out_folds)),
            undivided_because=judge.undivided_because,
            refit=self.refitting.in_words,
            left_alone=self.refitting.left_alone,
            importance=self.importance if isinstance(self.importance, str) else "a function",
        )
        if judge.held_out_folds:
            held_out, self.held_out_outcomes = judge.recorded(dense, judge.held_out_folds)
            if refuse_nan:
                _refuse_nan(held_out.score)
            samples = None if self.held_out_outcomes is None else size_of(self.held_out_outcomes)
            self.report = replace(self.report, held_out_dense=held_out.score, samples=samples)
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
        if not self.judge.held_out_folds:
            return
        self.history, held = self.history.won_by(0), True
        for place, level in enumerate(self.levels):
            if level.accepted and held:
                self.levels[place] = held_out = self._held_out(level)
                if held := bool(held_out.held):
                    self.history = self.history.won_by(level.level)
                self.observer.on_confirmed(held_out, self.so_far(None))

    def so_far(self, reason: StopReason | None) -> Winner:
        """What the search has found up to here."""
        refits = dict(self.refitting.kept)
        mask = self.parent if self.history.level == self.history.deepest else self.history.mask
        return Winner(mask, self._report(reason), self.weights, self.history, refits)

    def _promise(self, confidence: float) -> None:
        """Refuse what cannot be certified; note what the certificate will rest on."""
        outcomes = self.held_out_outcomes if self.judge.held_out_folds else None
        if outcomes is None:
            raise ValueError(_cannot_certify(confidence, self.report.undivided_because))
        share = len(self.judge.held_out_folds) / self.judge.folds
        width = outcomes.high - outcomes.low if isinstance(outcomes, Singles) else None
        if why := too_few(size_of(outcomes), width, confidence, self.report.tolerance, share):
            raise ValueError(why)
        self.report = replace(self.report, confidence=confidence, method=method_of(outcomes))

    def _stages(self, race: bool, whole: Scores) -> tuple[list[Rung], Reference | None]:
        """The rungs of every level: a race, if its parts give the dense network a score at all."""
        ranking = self.judge.search_folds
        if race and len(ranking) > 1 and self.branches > 1:
            finalists = max(2, self.refitting.finalists)
            stages = rungs(self.branches, len(ranking), self.judge.at_once, self.judge.at_least, finalists)
            dense = self.refitting.network(self.parent)
            scores = {part: self.judge.scores(dense, part) for rung in stages for part in rung.parts}
            if not any(math.isnan(one.rank + one.score) for one in (whole, *scores.values())):
                return stages, Reference(scores, whole)
        return no_race(self.branches, ranking), None

    def _work(self) -> float:
        folds = sum(rung.entrants * len(part) for rung in self.stages for part in rung.parts)
        again = len(self.judge.search_folds) if self._rejudges() else 0
        return (folds + again * (1 if self.judge.records else 2)) / self.judge.folds

    def _rejudges(self) -> bool:
        """Whether the winner of a branch is judged again: on the union of the ranking folds, with its outcomes."""
        return self.judge.records or len(self.judge.search_folds) > 1

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
            scores = self.judge.scores(self.refitting.network(race.mask(one.index), found), self.judge.search_folds)
            known[one.index] = one = replace(one.scored(scores, len(self.judge.search_folds)), refitted=True)
            if best is None or best_of([best, one]) is one:
                best, values = one, found
            refitted += 1
            tell(self._in_race + refitted, best)
        return list(known.values()), best, values

    def _refit_accepted(self) -> None:
        """Refit accepted levels, all that will be judged once more: they are confirmed as they will be used."""
        for place, level in enumerate(self.levels):
            if not level.accepted or not (self.judge.held_out_folds or level.level == self.history.level):
                continue
            mask = self.history.mask_at(level.level)
            refitted = self.refitting.refitted(mask)
            if self.judge.held_out_folds or self._gains(level, mask, refitted):
                self.levels[place] = replace(level, undone=refitted.undone)
                self.refitting.keep(level.level, mask, refitted)
            else:
                self.report = replace(self.report, refit=f"{self.report.refit}, not kept as it gained nothing")

    def _gains(self, level: Level, mask: Mask, refitted: Refitted) -> bool:
        """Whether a level that nothing will confirm is better for a refit."""
        before = next(one for one in level.candidates if one.index == level.winner)
        after = before.scored(self.judge.scores(self.refitting.network(mask, refitted), self.judge.search_folds), 0)
        return best_of([before, after]) is after and keeps_floor(after.score, self.report.floor)

    def _judged_in_full(self, best: Candidate | None, race: Race, refitted: Refitted) -> tuple[Candidate | None, float]:
        """The winner of a branch with its scores on all ranking folds, and their paired standard error."""
        if best is None or not self._rejudges():
            return best, math.nan
        network = self.refitting.network(race.mask(best.index), refitted)
        scores, outcomes = self.judge.recorded(network, self.judge.search_folds)
        return best.scored(scores, len(self.judge.search_folds)), _error(self.outcomes, outcomes)

    def _held_out(self, level: Level) -> Level:
        """An accepted level as the confirmation folds judge it."""
        network = self.refitting.at(level.level, self.history.mask_at(level.level))
        scores, outcomes = self.judge.recorded(network, self.judge.held_out_folds)
        error, p = _error(self.held_out_outcomes, outcomes), cast("float | None", None)
        if self.report.confidence is not None:
            p, dense = 1.0, self.held_out_outcomes
            if outcomes is not None and dense is not None and alike(dense, outcomes):
                p = p_value(dense, outcomes, self.report.tolerance, self.report.confidence)
            held = p <= 1 - self.report.confidence
        else:
            held = keeps_floor(scores.score, cast(float, self.report.held_out_floor))
        return replace(level, held_out_score=scores.score, held_out_error=error, p_value=p, held=held)

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
