"""RouletteWheelPruning: when a Trainer searches, and what becomes of the winner."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_roulette.checks import check_choice, check_epochs, check_words
from lightning_roulette.judge.evaluator import Evaluator
from lightning_roulette.judge.journal import Noted
from lightning_roulette.mask.history import History
from lightning_roulette.mask.mask import Mask, breaks, fits
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.network.lending import copy_into, named_tensors
from lightning_roulette.refit.inputs import Calibration
from lightning_roulette.report.records import StopReason
from lightning_roulette.report.report import SearchReport
from lightning_roulette.search.arguments import check_search
from lightning_roulette.search.gradual import Cuts
from lightning_roulette.search.search import search
from lightning_roulette.search.winner import Winner, load
from lightning_roulette.settings import CALIBRATED, LeastSquares, Refit, Tree, Validation, Wheel, refit_of
from lightning_roulette.trainer.between_epochs import BetweenEpochs
from lightning_roulette.trainer.data.folded_data import FoldedData
from lightning_roulette.trainer.data.training_inputs import (
    TrainerCalibration,
    calibration_batches,
    refuse_blind_to_training,
)
from lightning_roulette.trainer.files import (
    RunFiles,
    checkpoint_with_these_weights,
    let_epoch_begin,
    refuse_dirpath,
    save_accepted_levels,
)
from lightning_roulette.trainer.hold_zeros import ZeroHolder, average_becomes, hold_zeros, place_before_checkpoints
from lightning_roulette.trainer.preflight import (
    find_prunable,
    refuse_foreign_trainer,
    refuse_sharding,
    refuse_trainer,
    refuse_without_validation,
)
from lightning_roulette.trainer.resuming import as_training_ended, journal_of, warn_of_no_search
from lightning_roulette.trainer.scores.monitored_metric import MonitoredMetric
from lightning_roulette.trainer.scores.refusals import refuse_too_few_samples
from lightning_roulette.trainer.scores.setup import CandidateValidation, ValidationSetup
from lightning_roulette.trainer.show.watcher import EpochWatcher, Watcher, log, speak_up
from lightning_roulette.trainer.spawned import FromWorker, Handover
from lightning_roulette.trainer.validation.isolation import IsolatedValidation


class RouletteWheelPruning(ZeroHolder):
    """Prunes the weights of a trained network as far as its validation score allows, within `Trainer.fit`.

    A roulette wheel draws a branch of pruned candidates: small weights are likely to go but may stay, large ones the
    other way round. Each candidate is validated by the module's own validation hooks, unseen by loggers and other
    callbacks; the best becomes the parent of the next level, until the score would fall below the floor. The slimmest
    accepted network is loaded in place. (Chan, Yiu, Guo and Jiang 2024, doi:10.1007/s00521-024-09719-6.)

    After `fit`, `report` tells what was done, `mask` which weights are kept, and `best_model_path` names a checkpoint
    that loads into the unpruned class. ModelCheckpoint's own files keep their meaning: those written before the search,
    `last.ckpt` as a rule among them, hold unpruned weights. A file written after it holds the pruned weights, and
    resuming from it holds their zeros.

    While it goes on, a search notes its validations in a file beside those checkpoints. If it does not end, a fit that
    resumes the training, `ckpt_path=`, repeats none of them: it ends as if nothing had been, provided that training
    does. A training that had ended without its search is searched when it is resumed.

    Weights may be sharded by FSDP2: under `ModelParallelStrategy`, with `fully_shard` and no tensor parallelism. Each
    process then draws among its own weights, and all find the mask that one device finds. Magnitude is the only
    importance there, without a refit: pass `refit=None`. Each process keeps the masks of the whole network, of a large
    tensor at a bit a weight.

    Args:
        branches: Candidates per level. None: 20; 1 if levels are cut between epochs, where training does more for a
            network than choosing does.
        tolerance: How far below the dense score a winner may be, in the metric's own units: the floor.
        monitor: The metric that judges. None: the one logged torchmetrics object with `higher_is_better=True`; else
            the one name like an accuracy; else what a ModelCheckpoint, EarlyStopping or plateau scheduler watches;
            else the only metric.
        mode: `"max"` or `"min"`. None: that of the callback or scheduler that watches the metric; else the metric's
            `higher_is_better`; else by its name.
        target_sparsity: A further end of the search, in (0, 1).
        confidence: In (0, 1), 0.95 say. The winner's decline on the population that the validation data are an i.i.d.
            sample of is then, with this confidence, at most `tolerance`. None: the winner is only seen to hold on the
            confirmation data. A certificate takes thousands of samples: the fewest possible are told before the search.
            Single samples are then dealt to folds; where batches cannot be split, their order must be random.
        at_epoch: None: search when training ends. N: search when N epochs are trained, before the next begins;
            training then goes on with pruned weights held at zero. A run that stops earlier searches at its end.
            Several, `range(10, 30)` say: prune and train in turn. Before each of these epochs the network as trained is
            judged; if it keeps the floor, one level more is cut, and training goes on with it. A level that misses the
            floor is trained on without a further cut, and judged again. At the end the slimmest that held is loaded, as
            it was then. The floor is the score before the first cut less `tolerance`. Each cut takes the tree's pruning
            rate, or what the cubic schedule to `target_sparsity` asks for. A run that stops before the first of them
            searches at its end, with the same branches and refit. With a callback that averages weights, the module's
            own are judged between epochs, the averaged ones at the end.
        refit: What is done for the accuracy of a level after it was drawn, on inputs of the training data, without
            gradients or labels. `"least_squares"`, or a `LeastSquares`: the survivors of each layer, and its bias, are
            refitted so that its outputs are as close as may be to the dense network's, and running statistics of batch
            normalisations are computed anew; `"batch_norm"`: the latter alone; None: survivors stay as they are;
            `"auto"`: least squares in a search, none between epochs. The module takes its `validation_step` on batches
            of the training data for it, or `calibration_step(batch)` where it has one: a method that runs the network.
        include: Glob patterns over parameter names that replace the default choice (see `prunable_parameters`).
        exclude: Glob patterns over parameter names to leave out.
        wheel: How candidates are drawn.
        tree: How levels follow.
        validation: How candidates are judged: on which metric, on which share of the data.
        seed: All chance of the search.
        dirpath: Where the winner is written. None: beside the Trainer's checkpoints; nothing is written where those
            are disabled. No file of another run is overwritten.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.

    Example:
        pruning = RouletteWheelPruning(branches=20)
        Trainer(callbacks=[pruning]).fit(model, datamodule=data)
        print(pruning.report)
    """

    report = FromWorker[SearchReport | None]()
    best_model_path = FromWorker[str]()
    _history = FromWorker[History | None]()

    def __init__(
        self,
        branches: int | None = None,
        *,
        tolerance: float = 0.0,
        monitor: str | None = None,
        mode: str | None = None,
        target_sparsity: float | None = None,
        confidence: float | None = None,
        at_epoch: int | Sequence[int] | None = None,
        refit: str | LeastSquares | None = "auto",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        wheel: Wheel = Wheel(),
        tree: Tree = Tree(),
        validation: Validation = Validation(),
        seed: int = 0,
        dirpath: str | os.PathLike[str] | None = None,
    ) -> None:
        check_epochs(at_epoch, confidence)
        several = at_epoch is not None and not isinstance(at_epoch, Integral)
        branches = (1 if several else 20) if branches is None else branches
        refit = (None if several else "least_squares") if refit == "auto" else refit
        check_search(branches, tolerance, target_sparsity, confidence, wheel, tree, validation, seed)
        if mode is not None:
            check_choice("mode", mode, ("max", "min"))
        if monitor is not None and not isinstance(monitor, str):
            raise TypeError(f"monitor is {monitor!r}, but must be the name of a logged metric.")
        for name, patterns in (("include", include), ("exclude", exclude)):
            if patterns is not None:
                check_words(name, patterns, "patterns over parameter names")
        refit_of(refit)
        refuse_dirpath(dirpath)
        # plain numbers, as checkpoints hold no others
        self.branches, self.tolerance = int(branches), float(tolerance)
        self.target_sparsity = None if target_sparsity is None else float(target_sparsity)
        self.confidence = None if confidence is None else float(confidence)
        self.monitor, self.mode, self.refit = monitor, mode, refit
        self.at_epoch = int(at_epoch) if isinstance(at_epoch, Integral) else at_epoch
        self.include, self.exclude = include, exclude
        self.wheel, self.tree, self.validation = wheel, tree, validation
        self.seed, self.dirpath = int(seed), dirpath
        self._saving = False
        self._restored = self._idle = self._epoch_begins = self._fitting = self._trains = False
        self._handover = Handover()
        self._forget()

    def _forget(self) -> None:
        self.report, self.best_model_path, self._history = None, "", None
        self._levels: Winner | None = None
        self._metric: MonitoredMetric | None = None
        self._module: weakref.ref[LightningModule] | None = None
        self._files: RunFiles | None = None
        self._measured_at_step = 0
        self._gradual = self._between_epochs()

    @property
    def mask(self) -> Mask | None:
        """Which weights the winner keeps, True = kept; None before a search has ended."""
        return None if self._history is None else self._history.mask

    def mask_at(self, level: int) -> Mask:
        """The mask of any accepted level; 0 is the dense network.

        Raises:
            ValueError: If there was no such level.
            RuntimeError: If no search has ended.
        """
        if self._history is None:
            raise RuntimeError("no search has ended, so there are no levels yet. Call fit first.")
        return self._history.mask_at(level)

    def weights_at(self, level: int) -> dict[str, Tensor]:
        """The prunable weights of any accepted level, and whatever else refits changed, on the CPU; 0 is dense.

        `module.load_state_dict(pruning.weights_at(level), strict=False)` makes the network that level. Weights that are
        sharded are DTensors here, on their own device.

        Raises:
            ValueError: If there was no such level.
            RuntimeError: If no search has ended in this process: checkpoints hold the weights of the winner alone.
        """
        self.mask_at(level)
        if self._gradual is not None and self._history is not None and self.report is not None and self.report.gradual:
            return self._gradual.weights_at(level)
        if self._levels is None:
            raise RuntimeError(
                "the search ran before this callback was loaded from a checkpoint, or in another process, and what "
                "comes from there are the weights of the winner alone. The masks of all levels are there: "
                "mask_at(level)."
            )
        return self._levels.weights_at(level)

    def held(self) -> Mask | None:
        """The winner's mask; while levels are cut between epochs, that of the deepest."""
        return self.mask if self._prunes_on is None else self._prunes_on.mask

    # ---- when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; take the place between those who change weights and those who save them."""
        refuse_foreign_trainer(trainer)
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        self._restored = self._epoch_begins = self._trains = False
        self._epoch: int | None = None
        self._idle = _nothing_to_do(trainer)
        self._metric = self._files = None  # another Trainer may log other metrics; another fit writes other files
        refuse_sharding(trainer, self.refit, self.wheel.importance, self.at_epoch)
        refuse_trainer(trainer, self, self.validation.keep_callbacks, self.at_epoch)
        if self.confidence is not None and trainer.world_size > 1:
            raise RuntimeError(
                f"confidence is {self.confidence} and there are {trainer.world_size} processes, but a process sees its "
                "own samples alone, which certify nothing for all. Train on one device, or leave confidence out."
            )
        place_before_checkpoints(trainer, self)
        speak_up()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module or data that cannot be searched."""
        if not self._idle:
            find_prunable(pl_module, self.include, self.exclude)
            refuse_without_validation(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold the zeros of an earlier search; else see that the metric will be there when it is needed."""
        self._trains = True
        if self._prunes_on is not None and self.report is not None:
            self.report = replace(self.report, stop_reason=None)
        if not self._restored:
            if not self._still_holds(pl_module):
                self._forget()
            self._measured_at_step = trainer.global_step  # of another fit it was
        if self._history is not None:
            self._hold_zeros(trainer, pl_module, afresh=not self._restored)
            ended = self._prunes_on is None and self._history.mask.sparsity > 0
            if ended and not self._restored and trainer.is_global_zero:
                log.info(
                    f"RouletteWheelPruning: this network was pruned before ({self._history.mask.sparsity:.2%}). Its "
                    "zeros are held, and no more are made. To prune it further, pass a new RouletteWheelPruning."
                )
        if not self._idle and (trainer.num_sanity_val_steps > 0 or not self._validates_first(trainer)):
            self._rehearse(trainer, pl_module, max(1, trainer.num_sanity_val_steps))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where the user skips the sanity check, see at the first validation that the metric is there."""
        training = trainer.state.fn == "fit" and not trainer.sanity_checking
        if training and not self._idle and self._metric is None:
            self._rehearse(trainer, pl_module, 1)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search, if `at_epoch` epochs are trained: the checkpoints of the epoch before are written by now."""
        self._epoch = trainer.current_epoch
        if self._idle:
            return
        if self._gradual is not None:
            if (place := self._gradual.place(trainer.current_epoch)) is not None:
                self._epoch_begins = True
                self._prune_on(trainer, pl_module, self._gradual, place)
            return
        due = isinstance(self.at_epoch, int) and trainer.current_epoch >= self.at_epoch
        if due and self._history is None:
            self._epoch_begins = True
            self._search(trainer, pl_module)
            self._hold_zeros(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search, if that is still to be done; else measure and save what training made of the winner."""
        super().on_train_end(trainer, pl_module)
        if self._idle:
            return
        if self._history is None or self._prunes_on or trainer.global_step > self._measured_at_step:
            self._conclude(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The epoch before which the search ran has begun."""
        # resumed from a file that the last batch of an epoch wrote, Lightning does not say that the next epoch starts
        if batch_idx == 0 and self._epoch != trainer.current_epoch:
            self.on_train_epoch_start(trainer, pl_module)
        self._epoch_begins = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if unpruned weights were loaded to be validated."""
        self._warn_of_unpruned(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if unpruned weights were loaded to be tested."""
        self._warn_of_unpruned(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if unpruned weights were loaded to predict."""
        self._warn_of_unpruned(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where Lightning found nothing left to train, do now what the end of that training was to do, or warn."""
        if self._idle or self._trains:
            return
        if not self._restored and not self._still_holds(pl_module):
            self._forget()
        measured = self._history is not None and trainer.global_step <= self._measured_at_step
        if (measured and not self._prunes_on) or warn_of_no_search(trainer):
            return
        log.info(
            "RouletteWheelPruning: the training had ended before this fit. What was to follow it, and did not, or was "
            "cut short, is done now."
        )
        with as_training_ended(trainer, pl_module):
            self._conclude(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say in the report that a training with cuts did not end."""
        self.receive()
        if self._prunes_on is not None and self.report is not None:
            self.report = replace(self.report, stop_reason=StopReason.BROKEN_OFF)
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hold nothing any more; from a worker process, hand over what was found."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._hand_over(trainer)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Mask, report and path of the winner, in plain tensors and Python values; empty before a search has ended."""
        if self._history is None or self.report is None:
            return {}
        report = self.report.to_dict()
        ours = {"best_model_path": self.best_model_path, "measured_at_step": self._measured_at_step}
        state = {**self._history.state(), "report": report, **ours}
        return state if self._gradual is None else {**state, "gradual": self._gradual.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the search that a checkpoint was saved after; to validate another does not replace this one's."""
        if not self._fitting and self._history is not None:
            return
        if self._fitting and self._gradual is None and not state_dict.get("gradual", {}).get("over", True):
            raise ValueError(
                "the checkpoint is of a training that is pruned between epochs and had not ended, but at_epoch is "
                f"{self.at_epoch}. Pass the at_epoch that it was begun with."
            )
        self._take_up(state_dict)
        self._restored = True
        begun = self.report if self._fitting and self._prunes_on else None
        if begun is not None and begun.tolerance != self.tolerance:
            rank_zero_warn(
                f"RouletteWheelPruning: tolerance is {self.tolerance}, but the training that is resumed was begun with "
                f"{begun.tolerance}, and keeps its floor. To use another, begin a new training.",
                stacklevel=2,
            )

    def _take_up(self, found: dict[str, Any]) -> None:
        self._forget()
        self._history = History.from_state(found) if "pruned_at" in found else None
        self.report = SearchReport.from_dict(found["report"]) if found["report"] else None
        self.best_model_path = found.get("best_model_path", "")
        self._measured_at_step = found.get("measured_at_step", 0)
        if self._gradual is not None:
            self._gradual.restore(found.get("gradual", {}))

    def _hand_over(self, trainer: Trainer) -> None:
        if self._handover.is_due(trainer):
            report = None if self.report is None else self.report.to_dict()
            self._handover.send({**self.state_dict(), "report": report})

    def receive(self) -> None:
        """Take over what a worker process has found; called whenever it is asked for."""
        if (found := self._handover.received()) is not None:
            self._take_up(found)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save zeros, as weight averaging has put its own weights in; into our own file what was measured."""
        if self._saving and "current_model_state" in checkpoint:  # where weight averaging has put the module's own
            checkpoint["state_dict"] = dict(checkpoint["current_model_state"])
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._epoch_begins:
            let_epoch_begin(checkpoint)

    def __getstate__(self) -> dict[str, Any]:
        self.receive()
        return {**super().__getstate__(), "_module": None}  # which is of one process

    # ---- what

    def _conclude(self, trainer: Trainer, module: LightningModule) -> None:
        """What comes after training: a search, or the end of one that training was part of or has followed."""
        if (gradual := self._prunes_on) is not None:
            self._end_gradual(trainer, module, gradual)
        elif self._history is None or self.report is None:
            self._search(trainer, module)
        else:
            self._finish(trainer, module, self.report)

    def _still_holds(self, module: LightningModule) -> bool:
        """Whether `module` is the one pruned before, and still is; a copy of this callback knows it by its zeros."""
        if (mask := self.held()) is None or not fits(mask, module) or breaks(mask, module):
            return False
        return mask.survivors < mask.size if self._module is None else self._module() is module

    def _warn_of_unpruned(self, trainer: Trainer, module: LightningModule) -> None:
        loaded = trainer.state.fn != "fit" and trainer.ckpt_path is not None
        if not loaded or (mask := self.mask) is None or not fits(mask, module):
            return
        if breaks(mask, module) and trainer.is_global_zero:
            warnings.warn(
                "RouletteWheelPruning: the checkpoint that was loaded holds unpruned weights. "
                f"The pruned ones are in {self.best_model_path or 'no file, as none was to be written'}.",
                stacklevel=2,
            )

    def _hold_zeros(self, trainer: Trainer, module: LightningModule, afresh: bool = True) -> None:
        if self._hold is not None:
            self._hold.release()
        if (mask := self.held()) is not None:
            self._hold = hold_zeros(trainer, module, mask, afresh)
            self._module = weakref.ref(module)

    def _validates_first(self, trainer: Trainer) -> bool:
        """Whether the Trainer validates before the search comes."""
        every, last = trainer.check_val_every_n_epoch, trainer.max_epochs
        if self.at_epoch is not None:
            last = self.at_epoch if isinstance(self.at_epoch, int) else self.at_epoch[0]
        return every is None or last is None or last == -1 or every <= last

    def _rehearse(self, trainer: Trainer, module: LightningModule, batches: float) -> None:
        """Find the metric by a short validation, and refuse what cannot work with it."""
        judging = self._judging(trainer, module)
        with judging.isolated() as validation:
            logged, samples = validation.run(batches), validation.samples()
            if self._looks_at_inputs and self._history is None:
                remedy = "refit=None" if self.refit is not None else "wheel=Wheel(importance='magnitude')"
                refuse_blind_to_training(trainer, validation, self.seed, remedy)
        metric = self._know(trainer, judging.metric(logged))
        if self.confidence is not None and self._history is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            judged_by = logged.metrics.get(metric.monitor)
            refuse_too_few_samples(samples, judged_by, self.confidence, self.tolerance, self.validation.confirm)

    def _judging(self, trainer: Trainer, module: LightningModule) -> ValidationSetup:
        # what an earlier search was judged by is what its winner is measured by
        monitor, mode = (
            (self.report.monitor, self.report.mode) if self._history and self.report else (self.monitor, self.mode)
        )
        return ValidationSetup(trainer, module, self.validation, monitor, mode, self.tolerance, self.seed, self)

    def _know(self, trainer: Trainer, metric: MonitoredMetric) -> MonitoredMetric:
        if metric != self._metric and trainer.is_global_zero:
            log.info(
                f"RouletteWheelPruning: judged by {metric.monitor} ({metric.mode}, {metric.why}), ranked by "
                f"{metric.rank_by}."
            )
        self._metric = metric
        return metric

    def _ready(self, trainer: Trainer, module: LightningModule) -> CandidateValidation:
        """What judges the candidates of a search."""
        by_rows, first = self.confidence is not None, self._history is None
        ready = self._judging(trainer, module).dealt(lambda: self._weights(module), by_rows, first)
        self._know(trainer, ready.metric)
        return ready

    def _ready_between_epochs(self, trainer: Trainer, module: LightningModule) -> CandidateValidation:
        """What judges a network as trained, and the candidates of a cut; where there is one, data is not divided."""
        if self.branches > 1:
            return self._ready(trainer, module)
        judging = self._judging(trainer, module)
        if (metric := self._metric) is None:
            with judging.isolated() as validation:
                logged = validation.run(1)
            metric = self._know(trainer, judging.metric(logged))
        return judging.undivided(metric, self._weights(module), self._history is None)

    def _weights(self, module: LightningModule) -> dict[str, nn.Parameter]:
        """The prunable parameters; once levels are cut those of the first, whatever is frozen or thawed since."""
        if self._gradual is None or (mask := self._gradual.mask) is None:
            return find_prunable(module, self.include, self.exclude)
        found = dict(module.named_parameters(remove_duplicate=False))
        return {name: found[name] for name in mask}

    def _search(self, trainer: Trainer, module: LightningModule) -> None:
        ready = self._ready(trainer, module)
        self._files = RunFiles.next_to(trainer, self.dirpath)
        with Watcher(trainer, ready.metric) as watcher, self._handing_over(trainer):
            try:
                with self._noting(trainer, module, ready) as evaluate:
                    with ready.validation:
                        calibration = self._calibration(trainer, module, ready.validation)
                        winner = search(
                            ready.weights,
                            evaluate,
                            calibration=calibration,
                            observer=watcher,
                            **self._settings(trainer),
                        )
                    report = self._load(trainer, module, winner, ready.metric, ready.data)
                if self._gradual is not None:
                    self._gradual.over = True
            except BaseException as error:
                if self._history is None:  # the network is the dense one
                    reason = StopReason.INTERRUPTED if isinstance(error, KeyboardInterrupt) else StopReason.FAILED
                    self._keep_accepted(trainer, watcher.so_far, ready.metric, reason)
                raise
        watcher.on_end(report)

    @contextlib.contextmanager
    def _noting(self, trainer: Trainer, module: LightningModule, ready: CandidateValidation) -> Iterator[Evaluator]:
        """Inside the block the evaluator's answers are noted in a file, which goes when the block ends well."""
        metric = replace(ready.metric, why="")  # a resumed fit may have found it in another way
        facts = [self._settings(trainer), *ready.weights, metric, ready.data.folds, ready.size]
        journal = journal_of(trainer, module, self._files, facts)
        yield ready.evaluate if journal is None else Noted(ready.evaluate, journal)
        if journal is not None:
            journal.remove()

    @contextlib.contextmanager
    def _handing_over(self, trainer: Trainer) -> Iterator[None]:
        """Of a block that fails in a worker process hand over what was found: no other hook is called there."""
        try:
            yield
        except BaseException:
            self._hand_over(trainer)
            raise

    # ---- between epochs

    def _between_epochs(self) -> BetweenEpochs | None:
        """Pruning in turn with training, if that is asked for."""
        if self.at_epoch is None or isinstance(self.at_epoch, int):
            return None
        cuts = Cuts(
            self.branches,
            self.tolerance,
            self.target_sparsity,
            len(self.at_epoch),
            refit_of(self.refit),
            self.wheel,
            self.tree,
            self.validation,
            self.seed,
        )
        return BetweenEpochs(cuts, self.at_epoch)

    @property
    def _prunes_on(self) -> BetweenEpochs | None:
        """What further levels may be cut by."""
        gradual = self._gradual
        return None if gradual is None or gradual.over or gradual.mask is None else gradual

    def _prune_on(self, trainer: Trainer, module: LightningModule, gradual: BetweenEpochs, place: int) -> None:
        """Judge the network as it is trained, and if it keeps the floor cut one level more."""
        ready, epoch = self._ready_between_epochs(trainer, module), trainer.current_epoch
        self._files = self._files or RunFiles.next_to(trainer, self.dirpath)
        with (
            EpochWatcher(trainer, ready.metric, epoch) as watcher,
            self._handing_over(trainer),
            self._noting(trainer, module, ready) as evaluate,
        ):
            with ready.validation:
                calibration = self._calibration(trainer, module, ready.validation)
                held = gradual.judge(ready.weights, evaluate, calibration, watcher)
            self._note(trainer, module, gradual, held, watcher)
            if held:
                with ready.validation:
                    network = gradual.cut(place, epoch)
                if network is not None:
                    self._train_on(trainer, module, gradual, network, watcher)

    def _train_on(
        self,
        trainer: Trainer,
        module: LightningModule,
        gradual: BetweenEpochs,
        network: PrunedWeights,
        watcher: EpochWatcher,
    ) -> None:
        """Let the network that was cut be what trains from now on."""
        copy_into(named_tensors(module), network.weights)
        if network.refitted:
            average_becomes(trainer, module)
        report, self._history = gradual.found
        self.report = watcher.on_cut(report, network.mask)
        self._hold_zeros(trainer, module)

    def _note(
        self, trainer: Trainer, module: LightningModule, gradual: BetweenEpochs, held: bool, watcher: EpochWatcher
    ) -> None:
        """Take note of a judgement; keep and save a network that held, the dense one at first."""
        report, self._history = gradual.found
        self.report = watcher.on_judged(report, self._history.mask)
        if not held:
            return
        gradual.keep(module)
        if self.report.levels:
            self._save(trainer)
        elif self._files is not None:
            trainer.save_checkpoint(self._files.dense, weights_only=False)

    def _end_gradual(self, trainer: Trainer, module: LightningModule, gradual: BetweenEpochs) -> None:
        """Judge the last level, load the slimmest that held, and save it."""
        ready = self._ready_between_epochs(trainer, module)
        self._files = self._files or RunFiles.next_to(trainer, self.dirpath)
        with EpochWatcher(trainer, ready.metric, trainer.current_epoch) as watcher, self._handing_over(trainer):
            with ready.validation:
                held = gradual.judge(ready.weights, ready.evaluate)
            self._note(trainer, module, gradual, held, watcher)
            gradual.load_kept(module)
            average_becomes(trainer, module)
            gradual.over = True
            report = ready.metric.units_of(gradual.ended())
            self._hold_zeros(trainer, module)
            score = self._measure(trainer, module, report.monitor, ready.data)
            self.report, self._measured_at_step = replace(report, score=score), trainer.global_step
            if self.report.winner is not None:
                self._save(trainer)
        watcher.on_end(self.report)

    # ---- parts

    @property
    def _looks_at_inputs(self) -> bool:
        implied = self._gradual is not None and self.wheel.importance is None
        return self.refit is not None or implied or self.wheel.importance in CALIBRATED

    def _calibration(
        self, trainer: Trainer, module: LightningModule, validation: IsolatedValidation
    ) -> Calibration | None:
        if not self._looks_at_inputs:
            return None
        how = refit_of(self.refit) or Refit()
        most = 1 if trainer.fast_dev_run else how.batches  # type: ignore[attr-defined]
        batches = calibration_batches(trainer, validation, most, self.seed)
        by_layer = self.refit is not None or self.wheel.importance in ("activation", "obs")
        return TrainerCalibration(trainer, module, validation, batches, self.seed, by_layer)

    def _settings(self, trainer: Trainer) -> dict[str, Any]:
        """What the search is asked for."""
        limits: dict[str, Any] = {
            "branches": self.branches,
            "tolerance": self.tolerance,
            "confidence": self.confidence,
            "tree": self.tree,
        }
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # see every part work once
            tree = replace(self.tree, max_levels=1)
            limits = {"branches": 2, "tolerance": math.inf, "confidence": None, "tree": tree}
        same = ("target_sparsity", "refit", "wheel", "validation", "seed")
        return limits | {name: getattr(self, name) for name in same}

    def _keep_accepted(
        self, trainer: Trainer, so_far: Winner | None, metric: MonitoredMetric, reason: StopReason
    ) -> None:
        """Of a search that did not end keep the report, and the masks in a file."""
        if so_far is None:
            return
        self.report = replace(metric.units_of(so_far.report), stop_reason=reason)
        if self._files is not None and self.report.accepted and trainer.is_global_zero:
            weights = so_far.weights if so_far.refits else {}
            save_accepted_levels(self._files.interrupted, so_far.history, self.report.to_dict(), weights)
            warnings.warn(
                f"RouletteWheelPruning: the search did not end. The {len(self.report.accepted)} levels accepted so far "
                f"are in {self._files.interrupted!r}; apply_mask(module, path) applies level {so_far.history.level}.",
                stacklevel=2,
            )

    def _load(
        self, trainer: Trainer, module: LightningModule, winner: Winner, metric: MonitoredMetric, data: FoldedData
    ) -> SearchReport:
        """Load the winner in place, measure it once more, and save it; the dense network first."""
        pruned = winner.report.winner is not None
        # while training goes on, a ModelCheckpoint may remove its file
        if pruned and self._files and (self._epoch_begins or not checkpoint_with_these_weights(trainer, module)):
            trainer.save_checkpoint(self._files.dense, weights_only=False)
        self._levels = winner.cpu()
        load(module, winner)
        if pruned:
            average_becomes(trainer, module)
        self.report = report = metric.units_of(winner.report)
        self._history, self._module = self._levels.history, weakref.ref(module)
        try:
            self.report = report = replace(report, score=self._measure(trainer, module, metric.monitor, data))
            self._measured_at_step = trainer.global_step
        except BaseException:
            if pruned and trainer.world_size == 1:  # one of several processes would wait for the others
                self._save(trainer)
            raise
        if pruned:
            self._save(trainer)
        return report

    def _finish(self, trainer: Trainer, module: LightningModule, report: SearchReport) -> None:
        """Measure and save the winner as further training has made it."""
        trained_score = self._measure(trainer, module, report.monitor)
        self.report, self._measured_at_step = replace(report, trained_score=trained_score), trainer.global_step
        self._files = self._files or RunFiles.next_to(trainer, self.dirpath)
        if self.report.winner is not None:
            self._save(trainer)

    def _measure(
        self, trainer: Trainer, module: LightningModule, monitor: str, data: FoldedData | None = None
    ) -> float:
        return self._judging(trainer, module).measured(monitor, data)

    def _save(self, trainer: Trainer) -> None:
        if self._files is None:
            return
        before, self.best_model_path = self.best_model_path, self._files.pruned  # which the file itself names
        self._saving = True
        try:
            trainer.save_checkpoint(self._files.pruned, weights_only=False)
        except BaseException:
            self.best_model_path = before
            raise
        finally:
            self._saving = False


def _nothing_to_do(trainer: Trainer) -> bool:
    """Whether this fit cannot search at all; then one warning says so."""
    why = None
    if trainer.barebones:
        why = "barebones=True logs no metrics"
    elif trainer.max_epochs == 0 or trainer.max_steps == 0:
        why = "the Trainer trains for no epoch, and so calls no hook at the end of training"
    if why is not None:
        warnings.warn(f"RouletteWheelPruning does nothing in this fit: {why}.", stacklevel=2)
    return why is not None
