"""The report of a search: its numbers, and the numbers that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_roulette.report import frame, html, plain, plot, table, words
from lightning_roulette.report.former import FormerNames
from lightning_roulette.report.records import Footprint, Held, Level, Method, Skipped, StopReason, negated
from lightning_roulette.report.target import over_target


@dataclass(frozen=True)
class SearchReport(FormerNames):
    """What a search did, in numbers.

    Attributes:
        monitor: Name of the metric of all scores.
        mode: `"max"` if larger scores are better, else `"min"`.
        dense_score: Score of the network before pruning, on the search folds.
        tolerance: How much worse than the dense score a winner may be, in the metric's own units.
        branches: Number of candidates of a level. A coarse level has one.
        seed: Seed of all random draws.
        size: Number of prunable weights.
        levels: All levels in the order tried, failed ones included.
        stop_reason: Why the search stopped; None while it is running.
        validations: Work done, in validations of one network on all folds. Those of the dense network are included.
        seconds: Wall time of the search.
        rank_by: Name of the metric that ordered the branches.
        folds: Number of search folds and number of held-out folds. The second is 0 if the search used all folds.
        undivided_because: Why the validation data was not divided into folds, if division was asked for; else empty.
        held_out_dense: Score of the network before pruning on the held-out folds; None if there are none.
        confidence: Probability with which the winner's true decline is at most `tolerance`; None if not requested.
        method: How the confidence was computed; None if not requested.
        samples: Number of samples in the held-out folds, or of batches if only these are known; None if unknown.
        score: Score of the winner, measured again after it was loaded; None if it was not measured.
        trained_score: Score at the end of the training after the search; None if there was none.
        importance: Importance that the wheel used, in words.
        refit: Refit that was applied to the levels, in words; empty if there was none.
        left_alone: Reasons why a prunable weight was not refitted, by its name.
        gradual: Whether the network was trained after each cut before the level was judged.
        matrices: Number of weights in all parameters with at least two dimensions; 0 if it is unknown.
        skipped: The parameters among them that are not prunable, largest first.
        dense_measured: Metric of the dense network on all validation data, like `score`; None if it was not measured.
        notes: What else the reader of the report must know, in sentences.
        target_sparsity: Sparsity at which the search was to end; None without a target.
        tolerance_why: How the tolerance was chosen, in words; empty if it was given.
        not_refitted: The weights in `left_alone`, grouped by reason, largest group first.
        footprint: Bytes and multiply-adds of the network after the search; None if they were not measured. `search`
            does not measure them.
        unit: What leaves, such as `"neuron"`; empty for single weights.
        units: Number of units before pruning; None if single weights leave.
        multiply_adds: Multiply-adds of one sample before pruning; None if single weights leave, or if it is unknown.
        counted: What units cost: `"weights"`, or a field of `Reduction`; empty if single weights leave.
        cost: What the network costs before pruning, in what `counted` names; None if single weights leave.
        target_reduction: Share of the cost at whose removal the search was to end; None without such a target.
        held: What was left of the network before the search, if weights of it were held at zero; else None. These
            weights count as pruned in every level. The dense scores are those of the network with its zeros.
    """

    monitor: str
    mode: str
    dense_score: float
    tolerance: float
    branches: int
    seed: int
    size: int
    levels: tuple[Level, ...] = ()
    stop_reason: StopReason | None = None
    validations: float = 0
    seconds: float = 0.0
    rank_by: str = "score"
    folds: tuple[int, int] = (1, 0)
    undivided_because: str = ""
    held_out_dense: float | None = None
    confidence: float | None = None
    method: Method | None = None
    samples: int | None = None
    score: float | None = None
    trained_score: float | None = None
    importance: str = ""
    refit: str = ""
    left_alone: Mapping[str, str] = field(default_factory=dict, hash=False)
    gradual: bool = False
    matrices: int = 0
    skipped: tuple[Skipped, ...] = ()
    dense_measured: float | None = None
    notes: tuple[str, ...] = ()
    target_sparsity: float | None = None
    tolerance_why: str = ""
    not_refitted: tuple[Skipped, ...] = ()
    footprint: Footprint | None = None
    unit: str = ""
    units: int | None = None
    multiply_adds: int | None = None
    counted: str = ""
    cost: float | None = None
    target_reduction: float | None = None
    held: Held | None = None

    @property
    def floor(self) -> float:
        """Worst score that a winner may have: the dense score minus (for `"min"`, plus) the tolerance."""
        return self._below(self.dense_score)

    @property
    def held_out_floor(self) -> float | None:
        """Floor on the held-out folds; None if there are none."""
        return None if self.held_out_dense is None else self._below(self.held_out_dense)

    @property
    def accepted(self) -> tuple[Level, ...]:
        """Accepted levels, from the densest to the sparsest."""
        return tuple(level for level in self.levels if level.accepted)

    @property
    def winner(self) -> Level | None:
        """Sparsest accepted level that kept the floor on the held-out folds; None if the network stays dense.

        Before the held-out folds are used, and without held-out folds, every accepted level counts. If a search was
        interrupted, or if an error ended it, this is the level that was kept in a file, but not loaded.
        """
        begun = any(level.held is not None for level in self.accepted)
        holding = [level for level in self.accepted if level.held or not begun]
        return holding[-1] if holding else None

    @property
    def sparsity(self) -> float:
        """Sparsity of the network after the search, in [0, 1]. Weights that were held at zero before it count."""
        result = self.winner or self.held
        return result.sparsity if result else 0.0

    @property
    def survivors(self) -> int:
        """Number of prunable weights that the network keeps after the search."""
        result = self.winner or self.held
        return result.survivors if result else self.size

    @property
    def target_met(self) -> bool | None:
        """Whether the winner removes at least as much as the target asks for; None without a target."""
        if self.target_reduction is not None and self.cost is not None:
            result = self.winner or self.held
            left = result.cost if result else self.cost
            return left is not None and over_target(left, self.cost, self.target_reduction) <= 0
        if self.target_sparsity is None:
            return None
        return self.size - self.survivors >= math.floor(self.target_sparsity * self.size + 0.5)

    @property
    def search_score(self) -> float:
        """Score of the winner on the search folds. The search chose the winner by it, so it is optimistic."""
        return self.winner.score if self.winner else self.dense_score

    @property
    def decline(self) -> float:
        """How much worse than the dense network the winner is, in the metric's own units; negative if it is better.

        With held-out folds it is an estimate:

        - The winner is the last level that kept the floor there. It was chosen for this, so its own decline is too
          small. The next level was chosen because it missed the floor, so its decline is too large.
        - The estimate is halfway between two numbers: the largest decline of the levels up to the winner, at least 0,
          and the decline of the level that missed the floor. It is at most the tolerance.
        - If all levels kept the floor, it is the first of the two numbers.
        - It is NaN before the held-out folds are used.

        Without held-out folds it is the decline on the data that chose the winner.
        """
        if self.held_out_dense is None:
            return self._worse(self.dense_score, self.search_score)
        if self.winner is None:
            return 0.0 if any(level.held is not None for level in self.accepted) or not self.accepted else math.nan
        chain = [level.held_out_score for level in self.accepted if level.level <= self.winner.level]
        declines = [self._worse(self.held_out_dense, score) for score in chain if score is not None]
        if len(declines) < len(chain):
            return math.nan
        most, missed = max(0.0, *declines), self._first_missed(self.held_out_dense)
        return most if math.isnan(missed) else max(most, min(self.tolerance, (most + missed) / 2))

    def in_metric(self, monitor: str, mode: str) -> SearchReport:
        """Return a report of larger-is-better scores in the units of the metric.

        Args:
            monitor: Name of the metric.
            mode: `"max"` if larger values of the metric are better, else `"min"`.
        """
        if mode == "max":
            return replace(self, monitor=monitor)
        return replace(
            self,
            monitor=monitor,
            mode="min",
            dense_score=-self.dense_score,
            held_out_dense=negated(self.held_out_dense),
            levels=tuple(level.negated() for level in self.levels),
            score=negated(self.score),
            dense_measured=negated(self.dense_measured),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts for JSON; NaN and infinities become strings."""
        return plain.written(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SearchReport:
        """Return the report that `to_dict` of this or an earlier version wrote.

        Args:
            fields: What `to_dict` returned, also after JSON.
        """
        return cls(**plain.read(fields))

    def __str__(self) -> str:
        """Return the summary and a short table of levels as text."""
        return table.text(self)

    def _repr_html_(self) -> str:
        """Return the summary and a short table of levels in HTML. Notebooks show it."""
        return html.html(self)

    def markdown(self, *, brief: bool = False) -> str:
        """Return the summary and the table of all levels in Markdown.

        Args:
            brief: Whether the table has no pruning rate and no spread of the branch, so that it fits on narrow pages.
        """
        return table.markdown(self, brief=brief)

    def plot(self, over: str = "sparsity", axes: Any = None) -> Any:
        """Draw the scores of the search with matplotlib.

        Every candidate is a dot. A line joins the winners of the accepted levels, and another one their scores on the
        held-out half. Floors are dashed, the dense network is a diamond, and a dotted line marks the result. Candidates
        that are much worse than the winners are outside of the picture; the legend says how many.

        Args:
            over: The x-axis:

                - `"sparsity"`: to see what each step costs. It has a logarithmic scale in the share of weights left.
                - `"multiply_adds"`: to see what less work costs, in percent of the dense network's multiply-adds. A
                  report counts them if whole neurons or heads leave. The scale is logarithmic, too.
                - `"level"`: to see the order of the steps, and levels that were tried again.
            axes: Axes of matplotlib to draw on. None: those of a new figure of pyplot.

        Returns:
            The axes.

        Raises:
            ValueError: If `over` is not one of the choices, or if the report does not count multiply-adds.
            ImportError: If matplotlib is not installed, which is the extra `plot`.
        """
        return plot.plot(self, over, axes)

    def to_dataframe(self) -> Any:
        """Return a pandas DataFrame with one row for each level, failed ones included.

        The columns are the fields of `Level`, with numbers in place of `candidates` and `undone`; and the smallest,
        median and largest score of the branch. What is unknown is NaN or None.

        Raises:
            ImportError: If pandas is not installed, which is the extra `pandas`.
        """
        return frame.frame(self)

    def summary(self) -> list[str]:
        """Return the result in a few lines; the same lines begin `str(report)`."""
        return words.summary(self)

    def table(self, most: int | None = None) -> str:
        """Return the table of levels as aligned text.

        Args:
            most: About how many levels to show. The others are left out evenly, and a last line says how many. The
                first level, the winner, the first level that did not hold on held-out data, and the last level are
                always shown. None: all levels.
        """
        return table.aligned(self, most)

    def rows(self) -> list[list[str]]:
        """Return the table of all levels as lists of text, headings first."""
        return table.rows(self)

    def _below(self, dense: float) -> float:
        return dense - self.tolerance if self.mode == "max" else dense + self.tolerance

    def _worse(self, dense: float, score: float) -> float:
        return dense - score if self.mode == "max" else score - dense

    def _first_missed(self, dense: float) -> float:
        """Return the decline of the first level that missed the held-out floor; NaN if there is none."""
        missed = (one.held_out_score for one in self.accepted if one.held is False)
        return self._worse(dense, next((score for score in missed if score is not None), math.nan))
