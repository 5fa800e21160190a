"""How a logged value grows with the data it is computed on: not at all, as a mean, or in proportion, as a sum."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.large.limits import are_few
from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.lending import applied
from lightning_roulette.network.samples import rows_of
from lightning_roulette.trainer.data.folded_data import FoldedData
from lightning_roulette.trainer.processes import in_any_process, mean_over_processes
from lightning_roulette.trainer.scores.bounds import bounds_of
from lightning_roulette.trainer.scores.monitored_metric import MonitoredMetric
from lightning_roulette.trainer.validation.isolation import IsolatedValidation
from lightning_roulette.trainer.validation.logged import Logged

_Weights = Mapping[str, nn.Parameter]
_EXACT = 1e-3  # relative error of a sum on the same data twice, compared with twice the sum
_ALIKE = 0.1  # the same for a mean: a random step draws other numbers on the second half


@dataclass(frozen=True, eq=False)
class Growth:
    """Finds how the values of a metric grow with the data.

    For values that are logged batch by batch, Lightning knows the reduction. For other values, a part of the data is
    validated twice: as it is, and with each of its batches given twice. A mean stays the same. A sum doubles.

    Attributes:
        validation: Entered.
        data: The validation data, in folds.
        weights: The prunable weights.
        logged: What the module logs. It tells the reductions of the values.
    """

    validation: IsolatedValidation
    data: FoldedData
    weights: _Weights
    logged: Logged

    def of(self, metric: MonitoredMetric) -> MonitoredMetric:
        """Return the metric with the names of its sums, and of values that are neither means nor sums.

        All data in one fold need no test: nothing is judged on a part of it.
        """
        if self.data.folds == 1:
            return metric
        names = dict.fromkeys(one for one in (metric.monitor, metric.rank_by, metric.tiebreak) if one)
        kinds = {name: self._known(name) for name in names}
        if unknown := [name for name, kind in kinds.items() if not kind]:
            kinds |= {name: _kind(ratio) for name, ratio in self._ratios(unknown).items()}
        sums, others = (tuple(name for name in names if kinds[name] == kind) for kind in ("sum", "other"))
        return replace(metric, sums=sums, others=others)

    def _known(self, name: str) -> str:
        """Return the kind of a value that needs no test: of a reduction over batches, or with bounds on both sides."""
        if reduction := self.logged.reductions.get(name):
            return "other" if reduction in ("max", "min") else reduction
        judged_by = self.logged.metrics.get(name)
        bounded = judged_by is not None and all(math.isfinite(bound) for bound in bounds_of(judged_by))
        return "mean" if bounded else ""

    def _ratios(self, names: Sequence[str]) -> dict[str, float | None]:
        """Return each value on a fold given twice, relative to its value on the fold. None: it cannot be known."""
        found = self._ratios_of(names)
        zeros = [name for name in names if found[name] is None]
        if zeros and are_few(self.weights.values()):
            # a perfect network makes no errors, but one without weights does
            with applied(Mask.nothing(self.weights), self.weights):
                found |= self._ratios_of(zeros)
        return found

    def _ratios_of(self, names: Sequence[str]) -> dict[str, float | None]:
        once, twice = self._validated(names, 1), self._validated(names, 2)
        return {name: _ratio(once.get(name, math.nan), twice.get(name, math.nan)) for name in names}

    def _validated(self, names: Sequence[str], times: int) -> dict[str, float]:
        """Return the values on one fold whose batches are given some times; none if validation fails."""
        counts = [times * count for count in self.data.counts([0])]
        found: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = dict(self.validation.run_on(self._repeated(len(counts), times), counts=counts).values)
            except Exception:  # for example a module that expects to see a batch once
                found = {}
        trainer = self.validation.trainer
        if in_any_process(trainer, any(name not in found for name in names)):
            return {}
        return {name: mean_over_processes(trainer, found[name]) for name in names}

    def _repeated(self, loaders: int, times: int) -> Iterator[tuple[Any, int]]:
        """Yield the batches of one fold, all of a loader several times before those of the next loader."""
        for loader in range(loaders):
            for _ in range(times):
                yield from (one for one in self.data.of([0]) if one[1] == loader)


def shares_of(validation: IsolatedValidation, data: FoldedData) -> list[float]:
    """Return the share of the data in each fold: of its samples if they can be counted, else of its batches."""
    every = range(data.folds)
    sizes = [_samples(data, fold) if data.at_once == data.folds else None for fold in every]
    if in_any_process(validation.trainer, None in sizes):
        sizes = [sum(data.counts([fold])) for fold in every]
    agreed = [mean_over_processes(validation.trainer, _number(size)) for size in sizes]
    return [size / sum(agreed) for size in agreed]


def _samples(data: FoldedData, fold: int) -> int | None:
    found = [rows_of(batch) for batch, _ in data.of([fold])]
    return None if None in found else sum(rows or 0 for rows in found)


def _number(size: int | None) -> Tensor:
    return torch.tensor(float(size or 0), dtype=torch.float64)


def _kind(ratio: float | None) -> str:
    if ratio is not None and abs(ratio - 2) <= _EXACT:
        return "sum"
    return "mean" if ratio is None or abs(ratio - 1) <= _ALIKE else "other"


def _ratio(once: float, twice: float) -> float | None:
    known = math.isfinite(once) and math.isfinite(twice) and once != 0
    return twice / once if known else None
