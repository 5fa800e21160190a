"""Entries of TensorBoard, each with a description that TensorBoard shows beside its name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import count
from typing import Any
from weakref import WeakSet

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.data_compat import migrate_value
from torch import Tensor
from torch.utils.tensorboard import summary

from lightning_roulette.trainer.lightning_names import in_both
from lightning_roulette.trainer.show.layout import layout
from lightning_roulette.trainer.show.row import MEANINGS, RESULT, Setting, described

BINS = 64  # of a histogram

_BEGUN: WeakSet[TensorBoardLogger] = WeakSet()  # loggers in whose runs a row waits for its final numbers


class Board:
    """Writes into the folder of a TensorBoardLogger.

    Tags have no prefix of the logger, because charts and descriptions name them.

    Args:
        logger: The logger.
    """

    def __init__(self, logger: TensorBoardLogger) -> None:
        self._logger = logger

    def scalar(self, tag: str, value: float, step: int, description: str) -> None:
        """Write a point of a curve."""
        self._write(summary.scalar(tag, value), step, description)

    def image(self, tag: str, pixels: Tensor, step: int, description: str) -> None:
        """Write a picture: uint8 of shape `(channels, height, width)`."""
        self._write(summary.image(tag, pixels, dataformats="CHW"), step, description)

    def histogram(self, tag: str, values: Tensor, step: int, description: str) -> None:
        """Write a histogram of finite numbers, if there are any."""
        if values.numel():
            self._write(summary.histogram(tag, values.to(torch.float32).numpy(), BINS), step, description)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Write a text in Markdown."""
        self._logger.experiment.add_text(tag, markdown, step)

    def lay_out(self) -> None:
        """Write the charts that draw several curves together."""
        self._add(layout())

    def begin_row(self, settings: Mapping[str, Setting], others: Mapping[str, Any]) -> None:
        """Write the settings into the row of this run, in the table of the tab HParams.

        A run has one row and one list of columns. TensorBoard keeps the first that is written. So this comes before the
        module's hyperparameters are logged, and has them too. If the run has a row already, nothing is written.

        Args:
            settings: The settings of the search.
            others: Hyperparameters that Lightning will log.
        """
        hparams: Any = self._logger.hparams
        if hparams:
            return
        columns = [*(["hp_metric"] if others else []), *(f"{RESULT}{name}" for name in MEANINGS)]
        for entry in summary.hparams({**_flat(others), **settings}, dict.fromkeys(columns, 0.0)):
            self._add(entry)
        hparams.update(settings)
        _BEGUN.add(self._logger)

    def end_row(self, settings: Mapping[str, Setting], result: Mapping[str, float], step: int) -> None:
        """Write the final numbers, and a row for them if none was begun.

        That row is the one of a run of its own, in a folder below. It has the hyperparameters of this run too.
        """
        if self._logger in _BEGUN:
            _BEGUN.discard(self._logger)
        else:
            hparams: Any = self._logger.hparams
            row = {**_flat(hparams), **settings}
            self._logger.experiment.add_hparams(row, dict(result), None, self._free_run(), step)
        for tag, value in result.items():
            self.scalar(tag, value, step, described(tag))

    def save(self) -> None:
        """Write what waits to the disk."""
        self._logger.save()

    def _free_run(self) -> str:
        """Return the name of a folder that does not exist yet."""
        files = get_filesystem(self._logger.log_dir)
        names = (f"roulette_{number}" for number in count(1))
        return next(name for name in names if not files.exists(os.path.join(self._logger.log_dir, name)))

    def _write(self, entry: Summary, step: int, description: str) -> None:
        """Write an entry in the present form of TensorBoard. It ignores descriptions of entries in the former one."""
        (value,) = entry.value
        value.metadata.summary_description = description
        self._add(Summary(value=[migrate_value(value)]), step)

    def _add(self, entry: Summary, step: int | None = None) -> None:
        # as Lightning's logger does: the public methods of the writer take no description
        self._logger.experiment._get_file_writer().add_summary(entry, step)


def is_tensorboard(logger: Logger) -> bool:
    """Whether entries of a `Board` can be written into the folder of this logger."""
    return isinstance(logger, in_both(TensorBoardLogger))


def boards_of(trainer: Trainer) -> list[Board]:
    """Return a board for each TensorBoardLogger of a Trainer, in the first process; none in others."""
    ours: list[Any] = [one for one in trainer.loggers if is_tensorboard(one)]
    return [Board(one) for one in ours] if trainer.is_global_zero else []


def _flat(hparams: Mapping[str, Any], within: str = "") -> dict[str, Setting]:
    """Return hyperparameters as TensorBoard can show them: nested names joined by "/", and other objects as text."""
    found: dict[str, Setting] = {}
    for name, value in hparams.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{within}{name}/")
        else:
            found[f"{within}{name}"] = value if isinstance(value, Setting) else str(value)
    return found
