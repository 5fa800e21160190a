"""The state of one run of a Trainer, from `setup` to `teardown`, and what each hook does in each phase.

A run is in one `Phase`. The `Progress` of its `Result` tells how far the pruning is, and outlives the run.

| hook | phase | what it does |
|---|---|---|
| `setup` | | Begins FRESH in `fit`; begins EVALUATING in validate, test and predict. |
| `load_state_dict` | FRESH | Takes over the state of the checkpoint; becomes RESUMED. |
| | EVALUATING | Takes over the state if nothing was found yet. |
| `on_fit_start` | FRESH, RESUMED | Refuses a module or data that cannot be searched. In `prune`: loads the weights. |
| `on_train_start` | FRESH | Forgets the result of another network; becomes TRAINING. |
| | RESUMED | Becomes TRAINING. |
| | both | Holds the zeros of what was found. Finds the metric by a short validation. |
| `on_train_epoch_start` | TRAINING | If a search or a cut is due: becomes EPOCH_BEGINS, makes it, holds zeros. |
| `on_train_batch_start` | EPOCH_BEGINS | Becomes TRAINING. |
| `on_save_checkpoint` | EPOCH_BEGINS | Also resets the counters of batches, so that a resume trains this epoch. |
| `on_validation_end` | TRAINING | Finds the metric, if it is not known yet. |
| `on_train_end` | TRAINING | DENSE: searches. CUTTING: loads the slimmest that held. PRUNED: measures and saves. |
| `on_fit_end` | FRESH, RESUMED | Nothing was trained: does now what `on_train_end` would have done, or warns. |
| `on_exception` | any | CUTTING: says in the report that training did not end. |
| `teardown` | any | Hands over the result of a worker process; the run is dropped. |

If `searches` is False, no hook refuses, searches or cuts, but zeros are held. In `prune`, a `SearchLoop` calls
`on_train_start` and `on_train_end`, and no hooks of training between them.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from enum import Enum

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_roulette.report.report import SearchReport
from lightning_roulette.trainer.choices import Choices
from lightning_roulette.trainer.facts import Facts
from lightning_roulette.trainer.files import RunFiles
from lightning_roulette.trainer.hold_zeros import Zeros
from lightning_roulette.trainer.persistence import Progress, Result
from lightning_roulette.trainer.scores.monitored_metric import MonitoredMetric
from lightning_roulette.wheel.units.units import Units


class Phase(Enum):
    """Where a run is; the value is a sentence."""

    EVALUATING = "The Trainer validates, tests or predicts, and nothing is searched."
    FRESH = "A fit is set up, and nothing is trained yet."
    RESUMED = "A fit is set up, and a checkpoint has brought the result of an earlier search."
    TRAINING = "Batches are trained."
    EPOCH_BEGINS = "A search or a cut was made as this epoch begins, and no batch of it is trained yet."


def batches_trained(trainer: Trainer) -> int:
    """Return how many batches a Trainer has trained, those of the fit that it resumed included.

    Its global step does not count the steps of an optimizer that a module gets with `use_pl_optimizer=False`.
    """
    processed: int = trainer.fit_loop.epoch_loop.batch_progress.total.state_dict()["processed"]
    return processed


@dataclass(eq=False)
class FitState:
    """One run of a Trainer.

    Attributes:
        trainer: The Trainer.
        module: The module that it trains.
        callback: The callback that prunes.
        choices: The arguments of the callback.
        result: The result of this run or of an earlier one.
        zeros: Holds the zeros of the pruned network.
        phase: Where the run is.
        searches: Whether this run may search at all.
        epoch: The last epoch that has begun.
        metric: The metric that judges; None before it was found.
        files: Where this run writes; None before a search, and where nothing is written.
        restless: Parameters that are not prunable and that validation changes.
        measured_weights: Digests of the parameters when the network was last measured; empty before.
        facts: What the report says beyond the search.
        writes_winner: Whether the checkpoint of the winner is being written now.
        units: The units of the network that were found, by the names of the prunable weights.
    """

    trainer: Trainer
    module: LightningModule
    callback: Callback
    choices: Choices
    result: Result
    zeros: Zeros
    phase: Phase
    searches: bool
    epoch: int | None = None
    metric: MonitoredMetric | None = None
    files: RunFiles | None = None
    restless: list[nn.Parameter] = field(default_factory=list)
    measured_weights: dict[str, int] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)
    writes_winner: bool = False
    units: dict[tuple[str, ...], Units] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        """Whether training has begun."""
        return self.phase in (Phase.TRAINING, Phase.EPOCH_BEGINS)

    @property
    def only_tries(self) -> bool:
        """Whether the Trainer has `fast_dev_run`."""
        return bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]

    @property
    def is_concluded(self) -> bool:
        """Whether nothing is left to do: the network was pruned, and was not trained since it was measured."""
        measured = batches_trained(self.trainer) <= self.result.measured_at_batch
        return self.result.progress is Progress.PRUNED and measured

    def search_is_due(self, epoch: int) -> bool:
        """Whether the single search is due before this epoch."""
        at_epoch = self.choices.at_epoch
        due = isinstance(at_epoch, int) and epoch >= at_epoch
        return self.searches and due and self.result.history is None

    def begin_training(self) -> None:
        """Become TRAINING. Forget a result of another network, unless a checkpoint has just brought it."""
        resumed, result = self.phase is Phase.RESUMED, self.result
        self.phase = Phase.TRAINING
        if result.progress is Progress.CUTTING and result.report is not None:
            result.report = replace(result.report, stop_reason=None)
        if not resumed:
            self.forget_another_network()
            result.measured_at_batch = batches_trained(self.trainer)  # it was a batch of another fit

    def forget_another_network(self) -> None:
        """Forget a result that was not found on this module."""
        if not self.result.is_of(self.module):
            self.result.forget(self.choices.between_epochs())

    def hold_zeros(self, *, afresh: bool = True) -> None:
        """Prune the module by the mask of the result, and hold its zeros from now on.

        Args:
            afresh: Whether the optimizers may remember the network before it was pruned.
        """
        if (mask := self.result.held) is None:
            self.zeros.release()
            return
        self.zeros.hold(self.trainer, self.module, mask, afresh)
        self.result.module = weakref.ref(self.module)

    def report_of(self, found: SearchReport, metric: MonitoredMetric) -> SearchReport:
        """Return the report of a search in the units of the metric, with all that this run knows."""
        if self.result.history is not None and self.result.report is not None:
            self.facts.go_on_from(self.result.report)
        return self.facts.added_to(metric.units_of(found))

    def know_files(self) -> None:
        """Choose the files of this run, if they are not chosen yet."""
        self.files = self.files or RunFiles.next_to(self.trainer, self.choices.dirpath)
