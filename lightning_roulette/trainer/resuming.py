"""How a fit goes on from a checkpoint that was written before, during or after a search."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape as glob_escape
from glob import glob
from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from lightning_roulette.judge.journal import Journal, fingerprint, lines_in
from lightning_roulette.mask.mask import breaks, fits
from lightning_roulette.trainer.files import RunFiles
from lightning_roulette.trainer.fit_state import FitState, Phase, batches_trained
from lightning_roulette.trainer.lightning_names import in_both
from lightning_roulette.trainer.persistence import Progress
from lightning_roulette.trainer.show.log import log, speak_up
from lightning_roulette.trainer.validation.muting import callbacks_of


def journal_of(
    trainer: Trainer, module: LightningModule, files: RunFiles | None, facts: Sequence[object]
) -> Journal | None:
    """Return the journal of a search: the one that a killed search has left, or a new one.

    The journal is beside the files of the search, or beside the checkpoint that was resumed from. Its name contains the
    fingerprint of the search, so that another search in the same folder neither reads nor overwrites it. Rank 0 reads
    and writes it for all processes.

    Args:
        trainer: A Trainer in `fit`.
        module: The module with its dense weights.
        files: The files of the search.
        facts: What the scores depend on, other than the network.

    Returns:
        None if no files are written, or if they are remote: nothing can be appended to remote files.
    """
    if files is None or "://" in files.folder:
        return None
    tensors = {name: one for name, one in module.state_dict().items() if isinstance(one, Tensor)}
    search = fingerprint(tensors, *facts, trainer.world_size) if trainer.is_global_zero else ""
    path, lines = _found(trainer, files, search) if trainer.is_global_zero else (None, [])
    if trainer.world_size == 1:
        return Journal(path, search, lines)
    lines = trainer.strategy.broadcast(lines)
    return Journal(path, search, lines, trainer.strategy.reduce_boolean_decision)


def _found(trainer: Trainer, files: RunFiles, search: str) -> tuple[str, list[str]]:
    """Return the path of the journal, and its lines."""
    name = f"search-{search}.jsonl"
    own, beside = files.folder, os.path.dirname(os.fspath(trainer.ckpt_path or ""))
    folders = (own, *([beside] if "://" not in beside else []), *_of_other_versions(own))
    for folder in dict.fromkeys(folders):
        path = os.path.join(folder, name)
        if lines := lines_in(path, search):
            log.info(
                f"RouletteWheelPruning: continues the search whose journal is {path!r}. Networks that were validated "
                "then are not validated again."
            )
            return path, lines
    return os.path.join(own, name), []


def _of_other_versions(folder: str) -> list[str]:
    """Return the folders of other runs that the same logger has numbered, such as `version_0/checkpoints`."""
    run, name = os.path.split(folder)
    return sorted(glob(os.path.join(glob_escape(os.path.dirname(run)), "version_*", glob_escape(name))))


def ended_before(trainer: Trainer) -> bool:
    """Return whether this fit has resumed a training that had ended, so that nothing was left to train."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    trained = trainer.ckpt_path is not None and batches_trained(trainer) > 0 and trainer.limit_train_batches != 0
    ended = epochs not in (None, -1) and trainer.current_epoch >= epochs
    return trained and (ended or (steps != -1 and trainer.global_step >= steps))


@contextmanager
def as_training_ended(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Inside the block the module is as it is in `on_train_end`, a hook that was not called in this fit.

    The module is on its device again, and has the averaged weights if there is a `WeightAveraging`.
    """
    for one in callbacks_of(trainer):
        if isinstance(one, in_both(WeightAveraging)):
            one.on_train_end(trainer, module)
    trainer.strategy.model_to_device()
    try:
        yield
    finally:
        module.cpu()  # as a strategy leaves it at its teardown


def warn_of_no_search(trainer: Trainer) -> bool:
    """Return whether there is no trained network to search, and warn if so."""
    if not ended_before(trainer):
        why = (
            "there was nothing left to train, because max_epochs or max_steps had been reached, or limit_train_batches "
            "is 0. Allow some training before the search, or resume from a checkpoint of the training that has ended."
        )
    elif any(isinstance(one, in_both(StochasticWeightAveraging)) for one in callbacks_of(trainer)):
        why = (
            "the search needs the weights of StochasticWeightAveraging, which does nothing when a training that has "
            "ended is resumed. Train for one more epoch."
        )
    else:
        return False
    warnings.warn(f"RouletteWheelPruning does nothing in this fit: {why}", stacklevel=3)
    return True


def say_what_is_held(fit: FitState) -> None:
    """Log that this fit trains a network that was pruned before."""
    mask = fit.result.mask
    if mask is None or not mask.sparsity or fit.result.progress is Progress.CUTTING or not fit.trainer.is_global_zero:
        return
    log.info(
        f"RouletteWheelPruning: this network was pruned before, to a sparsity of {mask.sparsity:.2%}. Its zeros are "
        "held, and it is not pruned further. To prune it further, pass a new RouletteWheelPruning."
    )


def say_what_is_evaluated(fit: FitState) -> None:
    """Warn of unpruned weights, or say how to prune, when a Trainer validates, tests or predicts."""
    if fit.phase is Phase.EVALUATING:
        _warn_of_unpruned(fit)
        _say_how_to_search(fit)


def _warn_of_unpruned(fit: FitState) -> None:
    """Warn if the checkpoint that was loaded to validate, test or predict holds unpruned weights."""
    if fit.trainer.ckpt_path is None or (mask := fit.result.mask) is None or not fits(mask, fit.module):
        return
    if breaks(mask, fit.module) and fit.trainer.is_global_zero:
        path = fit.result.best_model_path
        where = f"The pruned weights are in {path}." if path else "The pruned weights were not written to a file."
        warnings.warn(
            f"RouletteWheelPruning: the checkpoint that was loaded holds unpruned weights. {where}", stacklevel=4
        )


def _say_how_to_search(fit: FitState) -> None:
    """Say how to prune without training, if nothing was searched before."""
    if fit.result.history is None and fit.trainer.is_global_zero:
        speak_up()
        log.info(
            "RouletteWheelPruning: nothing is pruned here, because the search is a part of Trainer.fit. To prune a "
            "network without training, call lightning_roulette.prune(trainer, model, ..., ckpt_path=...)."
        )


def say_how_to_prune_weights(fit: FitState | None, error: BaseException) -> None:
    """Say how to prune a checkpoint from which training cannot resume, such as one with weights alone."""
    if fit is None or fit.trained or not fit.searches or fit.trainer.ckpt_path is None:
        return
    if isinstance(error, KeyError) and fit.trainer.is_global_zero:
        log.info(
            f"RouletteWheelPruning: training cannot resume from {os.fspath(fit.trainer.ckpt_path)!r}. To prune its "
            "weights without training, call lightning_roulette.prune(trainer, model, ..., ckpt_path=...)."
        )


def refuse_other_schedule(state: Mapping[str, Any], at_epoch: int | Sequence[int] | None) -> None:
    """Raise if `at_epoch` does not continue the cuts of a checkpoint.

    Raises:
        ValueError: If the checkpoint was written between cuts, and `at_epoch` does not name several epochs.
    """
    if not isinstance(at_epoch, Sequence) and not state.get("gradual", {}).get("over", True):
        raise ValueError(
            f"at_epoch is {at_epoch}, but the checkpoint is of a training that prunes between epochs and had not "
            "ended. Pass the same at_epoch as in that training."
        )


def warn_of_other_tolerance(fit: FitState) -> None:
    """Warn if a resumed training with cuts keeps the floor of another tolerance."""
    report, tolerance = fit.result.report, fit.choices.tolerance
    if report is None or (tolerance is None and report.tolerance_why):
        return
    if fit.result.progress is Progress.CUTTING and report.tolerance != tolerance:
        rank_zero_warn(
            f"RouletteWheelPruning: tolerance is {tolerance}, but the resumed training keeps the floor of its own "
            f"tolerance {report.tolerance}. To use another tolerance, start a new training.",
            stacklevel=3,
        )
