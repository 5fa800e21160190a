"""What a search that was killed, or that never began, has left; and how a resumed fit goes on from there."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from lightning_roulette.judge.journal import Journal, fingerprint, lines_in
from lightning_roulette.trainer.files import RunFiles
from lightning_roulette.trainer.show.watcher import log
from lightning_roulette.trainer.validation.muting import callbacks_of


def journal_of(
    trainer: Trainer, module: LightningModule, files: RunFiles | None, facts: Sequence[object]
) -> Journal | None:
    """The journal of a search: one that was left beside the checkpoint that was resumed from, or a new one.

    It lies beside the files of the search, under a name that its fingerprint is part of, so that another search in the
    same folder neither reads nor overwrites it. What rank 0 finds counts for all processes, and rank 0 writes.

    Args:
        trainer: In a fit.
        module: With its dense weights.
        files: Of the search.
        facts: What the answers of its evaluator depend on, beside the network.

    Returns:
        None where no file is to be written, or only remote ones, to which nothing can be added.
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
    """Where the journal is, or is to be, and what it holds."""
    name = f"search-{search}.jsonl"
    own, beside = files.folder, os.path.dirname(os.fspath(trainer.ckpt_path or ""))
    for folder in dict.fromkeys((own, beside) if "://" not in beside else (own,)):
        path = os.path.join(folder, name)
        if lines := lines_in(path, search):
            log.info(
                f"RouletteWheelPruning: a search that did not end has left {path!r}. What was validated then is not "
                "validated again, as far as the search takes the same way."
            )
            return path, lines
    return os.path.join(own, name), []


def ended_before(trainer: Trainer) -> bool:
    """Whether this fit resumed a training that had ended, so that Lightning found nothing left to train."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    trained = trainer.ckpt_path is not None and trainer.global_step > 0 and trainer.limit_train_batches != 0
    ended = epochs not in (None, -1) and trainer.current_epoch >= epochs
    return trained and (ended or (steps != -1 and trainer.global_step >= steps))


@contextmanager
def as_training_ended(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Inside the block the module is as the hooks at the end of a training find it, which were not called.

    It is on its device, from which Lightning has taken it, and has the averaged weights of a `WeightAveraging`.
    """
    for one in callbacks_of(trainer):
        if isinstance(one, WeightAveraging):
            one.on_train_end(trainer, module)
    trainer.strategy.model_to_device()
    try:
        yield
    finally:
        module.cpu()  # as the teardown of a strategy leaves it


def warn_of_no_search(trainer: Trainer) -> bool:
    """Warn if nothing was trained that could be searched now, or if its weights are not to be had.

    Returns:
        Whether that is so.
    """
    if not ended_before(trainer):
        why = (
            "there was nothing left to train, as max_epochs or max_steps was reached before, or limit_train_batches is "
            "0. Allow some training for the search, or resume from a checkpoint of the training that has ended."
        )
    elif any(isinstance(one, StochasticWeightAveraging) for one in callbacks_of(trainer)):
        why = (
            "its search comes after StochasticWeightAveraging, which does nothing when a training that has ended is "
            "resumed. Allow one more epoch."
        )
    else:
        return False
    warnings.warn(f"RouletteWheelPruning does nothing in this fit: {why}", stacklevel=3)
    return True
