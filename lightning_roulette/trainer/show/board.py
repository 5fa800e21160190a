"""Entries of TensorBoard, each with a description that TensorBoard shows beside its name."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.data_compat import migrate_value
from torch.utils.tensorboard import summary

from lightning_roulette.trainer.show.layout import layout
from lightning_roulette.trainer.show.points import described


class Board:
    """Writes into the folder of a TensorBoardLogger.

    Tags have no prefix of the logger, because charts and descriptions name them.

    Args:
        logger: The logger.
    """

    def __init__(self, logger: TensorBoardLogger) -> None:
        self._logger = logger

    def scalars(self, points: Mapping[str, float], step: int, monitor: str) -> None:
        """Write a point of each curve.

        Args:
            points: Value by tag. The tags are those of `points.py`.
            step: The level.
            monitor: Name of the metric.
        """
        for tag, value in points.items():
            self._write(summary.scalar(tag, value), step, described(tag, monitor))

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Write a text in Markdown."""
        self._logger.experiment.add_text(tag, markdown, step)

    def lay_out(self) -> None:
        """Write the charts that draw several curves together."""
        self._add(layout())

    def save(self) -> None:
        """Write what waits to the disk."""
        self._logger.save()

    def _write(self, entry: Summary, step: int, description: str) -> None:
        """Write an entry in the present form of TensorBoard. It ignores descriptions of entries in the former one."""
        (value,) = entry.value
        value.metadata.summary_description = description
        self._add(Summary(value=[migrate_value(value)]), step)

    def _add(self, entry: Summary, step: int | None = None) -> None:
        # as Lightning's logger does: the public methods of the writer take no description
        self._logger.experiment._get_file_writer().add_summary(entry, step)
