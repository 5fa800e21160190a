"""Entries of TensorBoard, each with a description that TensorBoard shows beside its name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import count
from typing import Any

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
from lightning_roulette.trainer.show.row import Setting

BINS = 64  # of a histogram


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

    def row(self, settings: Mapping[str, Setting], result: Mapping[str, float], step: int) -> None:
        """Write a row into the table of the tab HParams.

        The table has one row for each run. If this run has a row already, such as the hyperparameters of the module,
        the row is that of a run of its own, in a folder below. It then has these hyperparameters too.
        """
        hparams: Any = self._logger.hparams
        if hparams:
            plain = {str(name): one for name, one in hparams.items() if isinstance(one, bool | int | float | str)}
            self._logger.experiment.add_hparams({**plain, **settings}, dict(result), None, self._free_run(), step)
            return
        for entry in summary.hparams(dict(settings), dict(result)):
            self._add(entry, step)
        hparams.update(settings)  # this run has a row now

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
