"""RouletteWheelPruning: when a Trainer searches, and where the result goes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_roulette.network.lending import leave_inference_mode
from lightning_roulette.refit_settings import LeastSquares, Refit
from lightning_roulette.report.records import StopReason
from lightning_roulette.settings import Tree, Validation, Wheel
from lightning_roulette.trainer.choices import Choices
from lightning_roulette.trainer.cutting import end_cuts, judge_and_cut
from lightning_roulette.trainer.files import let_epoch_begin
from lightning_roulette.trainer.fit_state import FitState, Phase
from lightning_roulette.trainer.hold_zeros import place_before_checkpoints
from lightning_roulette.trainer.lightning_names import refuse_foreign_trainer
from lightning_roulette.trainer.loading import load_checkpoint
from lightning_roulette.trainer.persistence import Progress
from lightning_roulette.trainer.preflight import (
    find_prunable,
    nothing_to_do,
    refuse_several_processes,
    refuse_sharding,
    refuse_shrink,
    refuse_trainer,
    refuse_without_validation,
    validates_before,
    warn_of_early_stopping,
    warn_of_little,
)
from lightning_roulette.trainer.resuming import (
    as_training_ended,
    refuse_other_schedule,
    say_how_to_prune_weights,
    say_what_is_evaluated,
    say_what_is_held,
    warn_of_no_search,
    warn_of_other_tolerance,
)
from lightning_roulette.trainer.saved import read_back_late, warn_of_other_weights
from lightning_roulette.trainer.search_loop import as_data_allows, search_loop_of
from lightning_roulette.trainer.searching import measure_and_save, search_network
from lightning_roulette.trainer.show.log import log, speak_up
from lightning_roulette.trainer.show.show import begin_rows
from lightning_roulette.trainer.units import rehearse_search
from lightning_roulette.trainer.with_result import WithResult


class RouletteWheelPruning(WithResult):
    """Prunes the weights of a network in `Trainer.fit`, as far as its validation score allows.

    When training ends, the network is searched:

    1. The validation score of the trained network less `tolerance` is the floor.
    2. A roulette wheel draws a branch of pruned candidates. Small weights are likely to be pruned but may be kept;
       large weights are likely to be kept but may be pruned.
    3. Every candidate is validated by the module's own validation hooks, on half of the validation data (the search
       half). Loggers, callbacks and random state are left untouched.
    4. The best candidate that keeps the floor becomes the parent of the next level. This repeats until the score falls
       below the floor.
    5. The accepted levels are judged once on the held-out half, the densest first, until one misses the floor. The
       last that kept it is loaded in place.

    Before the search, a log line says which share of the weights is prunable, and what is skipped and why. Weights are
    skipped if neither the monitored nor the ranking metric depends on them, such as a head that only training uses.
    Layers of your own become prunable by `register_layer`.

    The method: Chan, Yiu, Guo and Jiang 2024, doi:10.1007/s00521-024-09719-6.

    After `fit`:

    - `report` is a `SearchReport` of all levels. `print(pruning.report)` shows it as a table.
    - `mask` is the winner's `Mask`. `mask_at` and `weights_at` return the masks and weights of other levels.
    - `best_model_path` is a checkpoint of the pruned network, `pruned.ckpt`. It loads into the unpruned class.

    Files of ModelCheckpoint that were written before the search hold unpruned weights; `last.ckpt` usually does. Files
    that were written after it hold pruned weights, and a fit that resumes from one of them holds their zeros.

    Zeros that a `HoldZeros` of the same Trainer holds stay zero in all levels, also in a refit, and count as pruned.
    The dense network is then the network with these zeros: its score sets the floor, and `report.held` says what is
    left of it. Without `HoldZeros`, weights that are zero before the search count as kept, and a refit may change them.

    A search that is killed can be resumed. It records its validations in a file beside the checkpoints. A fit that
    resumes the training with `ckpt_path` repeats none of them, and finds the same network if training is deterministic.
    If training had ended without its search, resuming it runs the search.

    Weights may be sharded by FSDP2: use `ModelParallelStrategy` and `fully_shard`, without tensor parallelism. The
    importance is the magnitude. A refit gathers one layer at a time. All processes find the mask that one device would
    find with this importance, up to rounding in a refit. Each process keeps the masks of the whole network; the mask of
    a large tensor takes one bit per weight. It also keeps the refitted survivors of all accepted levels on its CPU.

    Args:
        branches: Number of candidates per level. None: 20, or 1 if levels are cut between epochs, where further
            training helps more than the choice of a candidate.
        tolerance: How far the score of the winner may be below the dense score (above it, for a metric to minimise).

            - A number: in units of the metric. 0.005 is half a point of accuracy. Infinity disables the floor.
            - None: half a standard error of the dense score on the held-out half, or on all validation data if nothing
              is held out. The standard error is the noise of the score itself: it is larger with fewer validation
              samples. The tolerance is at most a tenth of what the prunable weights add to the score. It is 0 if the
              standard error is unknown or 0. A log line before the first level says the number. `report.tolerance` has
              it, too. The rule is stricter than the one-standard-error rule of Breiman et al., "Classification and
              Regression Trees" (1984), section 3.4.3.
        monitor: Name of the logged metric that is compared with the floor. None: the first of these that is unique:

            - the logged torchmetrics object with `higher_is_better=True`;
            - the metric with a name like an accuracy;
            - the metric that a ModelCheckpoint, an EarlyStopping or a plateau scheduler watches;
            - the only metric.
        mode: `"max"` if larger values are better, `"min"` if smaller values are better. None: the first of these:

            - `higher_is_better` of the metric, which `mode` must not contradict;
            - the mode of the callback or scheduler that watches the metric;
            - the direction that its name suggests.
        target_sparsity: Sparsity, in (0, 1), at which the search ends even if the score keeps the floor. None: no such
            end.
        confidence: Probability in (0, 1), such as 0.95, for a certificate. The winner's true decline is then at most
            `tolerance` with this confidence. It is the decline on the population from which the validation data is an
            i.i.d. sample. A certificate needs a positive number as `tolerance`, one device and thousands of samples.
            Too few samples are an error before the search. Samples are dealt to the halves one by one; if batches
            cannot be split, their order must be random. None: the winner is only compared with the floor on the
            held-out half.
        at_epoch: When to prune.

            - None: search after training.
            - A number: search after this many epochs. Training goes on with the pruned weights held at zero. A run that
              stops earlier is searched at its end.
            - Several numbers, such as `range(10, 30)`: alternate pruning and training. Before each of these epochs the
              network is judged. If it keeps the floor, one more level is cut, and training goes on with it. Otherwise
              training goes on without a further cut, and the level is judged again before the next of these epochs.
              When training ends, the slimmest network that held is loaded, with the weights it had then.

              The floor is the score before the first cut less `tolerance`. All levels must be judged on the same
              validation data; a warning and the report say so if data that fit into memory have changed. Each cut takes
              the tree's `pruning_rate`, or follows the cubic schedule to `target_sparsity` if that is given. A run that
              stops before the first cut is searched at its end, with the same branches and refit. With a callback that
              averages weights, the module's own weights are judged between epochs, and the averaged weights at the end.
        refit: How the surviving weights of a level are adapted, without gradients or labels, before it is judged.

            - `"auto"`: `"least_squares"` in a search, None between epochs.
            - `"least_squares"`, or a `LeastSquares` or a dict of its fields: the survivors and the bias of each
              layer are solved so that its outputs on training inputs are as close as possible to those of the dense
              network. The running statistics of batch normalisation layers are computed again.
            - `"batch_norm"`, or a `Refit`: only these running statistics are computed again.
            - None: survivors stay as they are.

            A refit needs training data from a DataLoader. It runs the module's `calibration_step(batch)` if there is
            one, else its `validation_step`, on training batches.
        include: Glob patterns over parameter names. Only matching parameters are prunable. None: the default choice,
            see `prunable_parameters`, without weights that validation does not use.
        exclude: Glob patterns over parameter names that are not prunable.
        wheel: How candidates are drawn: which weights are likely to go. A `Wheel`, or a dict of its fields.
        tree: How levels follow one another: the pruning rate, and when the search ends. A `Tree`, or a dict of its
            fields.
        validation: How candidates are judged: on which metric and on which share of the data. A `Validation`, or a dict
            of its fields.
        seed: Seed of all random choices of the search.
        dirpath: Folder for the files of the search. None: the folder of the Trainer's checkpoints; if the Trainer
            writes no checkpoints, nothing is written. Files of other runs are never overwritten.
        shrink: Whether to write `shrunk.ckpt` beside `pruned.ckpt` as well: the winner without the neurons, channels
            and heads that are left without effect, see `remove_dead`. The module keeps its shapes. `load_shrunk` reads
            the file, and `shrunk()` returns the same network. It needs the extra `units` and whole weights. If
            the network cannot be shrunk, a warning says why, and `pruned.ckpt` holds the winner.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; in `fit`, also if it does not suit the module or the data.
        RuntimeError: In `fit`, before it trains or searches: if the Trainer, its strategy, the module or the data does
            not allow a search, if the metric is not logged, if two validations of one network give different results,
            or if the tolerance is so large that every network keeps the floor.

    Examples:
        Prune when training ends:

            pruning = RouletteWheelPruning(tolerance=0.01)
            Trainer(callbacks=[pruning]).fit(model, datamodule=data)
            print(pruning.report)
    """

    def __init__(
        self,
        branches: int | None = None,
        *,
        tolerance: float | None = None,
        monitor: str | None = None,
        mode: str | None = None,
        target_sparsity: float | None = None,
        confidence: float | None = None,
        at_epoch: int | Sequence[int] | None = None,
        refit: str | LeastSquares | Refit | Mapping[str, Any] | None = "auto",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        wheel: Wheel | Mapping[str, Any] = Wheel(),
        tree: Tree | Mapping[str, Any] = Tree(),
        validation: Validation | Mapping[str, Any] = Validation(),
        seed: int = 0,
        dirpath: str | os.PathLike[str] | None = None,
        shrink: bool = False,
    ) -> None:
        choices = Choices.checked(
            branches=branches,
            tolerance=tolerance,
            monitor=monitor,
            mode=mode,
            target_sparsity=target_sparsity,
            confidence=confidence,
            at_epoch=at_epoch,
            refit=refit,
            include=include,
            exclude=exclude,
            wheel=wheel,
            tree=tree,
            validation=validation,
            seed=seed,
            dirpath=dirpath,
            shrink=shrink,
        )
        self.branches, self.tolerance, self.seed = choices.branches, choices.tolerance, choices.seed
        self.monitor, self.mode, self.validation = choices.monitor, choices.mode, choices.validation
        self.target_sparsity, self.confidence = choices.target_sparsity, choices.confidence
        self.at_epoch, self.refit = choices.at_epoch, choices.refit
        self.include, self.exclude = choices.include, choices.exclude
        self.wheel, self.tree, self.dirpath, self.shrink = choices.wheel, choices.tree, choices.dirpath, choices.shrink
        super().__init__(choices)
        self._fit: FitState | None = None

    @property
    def state_key(self) -> str:
        """The key of the state in checkpoints: the name of the class.

        Before the first run, when there is no state, each callback has a key of its own. A Trainer with two of them can
        then be made, and `setup` says what is wrong with it.
        """
        begun = self._fit is not None or self._result.history is not None
        return super().state_key if begun else f"{super().state_key} {id(self)}"

    # ---- hooks: see the table in fit_state.py

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a run. Refuse a Trainer that cannot search, and take the place before the checkpoints."""
        refuse_foreign_trainer(trainer)
        phase = Phase.FRESH if stage == "fit" else Phase.EVALUATING
        loop = search_loop_of(trainer)
        searches = stage == "fit" and (loop is not None or not nothing_to_do(trainer))
        choices = Choices.of(self) if loop is None else as_data_allows(Choices.of(self), loop)
        self._fit = FitState(trainer, pl_module, self, choices, self._result, self._zeros, phase, searches)
        if stage == "fit":
            leave_inference_mode(pl_module)
            refuse_sharding(trainer, choices)
            refuse_shrink(trainer, self.shrink)
            refuse_trainer(trainer, self, self.validation.keep_callbacks, self.at_epoch)
            refuse_several_processes(trainer, self.confidence)
            place_before_checkpoints(trainer, self)
            if loop is None:
                warn_of_early_stopping(trainer, self.at_epoch)
            speak_up()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module or data that cannot be searched. Without training, load the weights that are pruned."""
        if (loop := search_loop_of(trainer)) is not None and loop.ckpt_path is not None:
            load_checkpoint(trainer, pl_module, loop.ckpt_path, loop.weights_only)
        if self._run.searches:
            find_prunable(pl_module, self.include, self.exclude)
            if self._run.phase is Phase.FRESH:
                warn_of_little(pl_module, self.include, self.exclude)
            refuse_without_validation(trainer, pl_module)
            begin_rows(trainer, pl_module, self._run.choices)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold the zeros of an earlier search, and find the metric by a short validation."""
        fit, resumed = self._run, self._run.phase is Phase.RESUMED
        fit.begin_training()
        if fit.result.history is not None:
            fit.hold_zeros(afresh=not resumed)
            if not resumed:
                say_what_is_held(fit)
        trains = search_loop_of(trainer) is None
        validates = trainer.num_sanity_val_steps == 0 and validates_before(trainer, fit.choices.first_epoch)
        if fit.searches and not (trains and validates):
            rehearse_search(fit, max(1, trainer.num_sanity_val_steps))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the metric after the first validation of a fit without a sanity check."""
        if self._run.searches and not trainer.sanity_checking and self._run.metric is None:
            rehearse_search(self._run, 1)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search or cut, if it is due before this epoch. The checkpoints of the last epoch are written by now."""
        fit, epoch, cuts = self._run, trainer.current_epoch, self._result.between_epochs
        fit.epoch = epoch
        self._zeros.fill()
        with self._handing_over(trainer):
            if fit.searches and cuts is not None and (number := cuts.number_of_cut(epoch)) is not None:
                fit.phase = Phase.EPOCH_BEGINS
                judge_and_cut(fit, cuts, number)
            elif fit.search_is_due(epoch):
                fit.phase = Phase.EPOCH_BEGINS
                search_network(fit)
                fit.hold_zeros()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that the epoch has begun."""
        # after a resume from a file that was written at an epoch's last batch, Lightning skips on_train_epoch_start
        if batch_idx == 0 and self._run.epoch != trainer.current_epoch:
            self.on_train_epoch_start(trainer, pl_module)
        self._run.phase = Phase.TRAINING
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search, end the cuts or measure, unless this was done and the network was not trained since."""
        super().on_train_end(trainer, pl_module)
        if self._run.searches and not self._run.is_concluded:
            self._conclude(self._run)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """If there was nothing left to train, search, end the cuts or measure now, or warn."""
        fit = self._run
        if not fit.searches or fit.trained:
            return
        if fit.phase is Phase.FRESH:
            fit.forget_another_network()
        if fit.is_concluded or warn_of_no_search(trainer):
            return
        log.info("RouletteWheelPruning: training had ended before this fit. The search that follows it is made now.")
        with as_training_ended(trainer, pl_module):
            self._conclude(fit)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if unpruned weights were loaded to be validated, and say if nothing was searched yet."""
        say_what_is_evaluated(self._run)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if unpruned weights were loaded to be tested, and say if nothing was searched yet."""
        say_what_is_evaluated(self._run)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if unpruned weights were loaded to predict, and say if nothing was searched yet."""
        say_what_is_evaluated(self._run)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say in the report that training with cuts did not end. The run is kept for a checkpoint of the error."""
        result = self._result
        if result.progress is Progress.CUTTING and result.report is not None:
            result.report = replace(result.report, stop_reason=StopReason.BROKEN_OFF)
        say_how_to_prune_weights(self._fit, exception)
        super().on_exception(trainer, pl_module, exception)
        self._hand_over(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the run. A worker process hands over what was found."""
        if stage == "fit" and self._fit is not None:  # a copy has no run
            warn_of_other_weights(self._fit)
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            if self._fit is not None:
                read_back_late(self._fit)
            self._hand_over(trainer)
        self._fit = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, see `SavedState`; empty before a search has ended."""
        return dict(self._result.state())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the search of a checkpoint. In validate, test and predict a search made here is not replaced."""
        fit, result = self._fit, self._result
        if fit is not None and fit.phase is Phase.EVALUATING and result.history is not None:
            return
        cuts = Choices.of(self).between_epochs()
        if fit is None or fit.phase is Phase.EVALUATING:
            result.take_over(state_dict, cuts)
            return
        refuse_other_schedule(state_dict, self.at_epoch)
        result.take_over(state_dict, cuts)
        fit.phase = Phase.RESUMED
        warn_of_other_tolerance(fit)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save zeros. The file of the winner gets the weights that were measured, also with weight averaging."""
        fit = self._fit
        if fit is not None and fit.writes_winner and "current_model_state" in checkpoint:
            checkpoint["state_dict"] = dict(checkpoint["current_model_state"])
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if fit is not None and fit.phase is Phase.EPOCH_BEGINS:
            let_epoch_begin(checkpoint)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_fit": None}  # a run belongs to one process

    # ---- parts

    @property
    def _run(self) -> FitState:
        assert self._fit is not None
        return self._fit

    def _conclude(self, fit: FitState) -> None:
        """Search, end the cuts, or measure the winner after further training, depending on the progress."""
        cuts, progress = fit.result.between_epochs, fit.result.progress
        with self._handing_over(fit.trainer):
            if cuts is not None and progress is Progress.CUTTING:
                end_cuts(fit, cuts)
            elif progress is Progress.DENSE:
                search_network(fit)
            else:
                measure_and_save(fit)
