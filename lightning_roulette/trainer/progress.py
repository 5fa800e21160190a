"""One line about the search in the Trainer's own progress bar, whichever it is."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar


class Line:
    """The line of a search; this one, for a Trainer without a bar of a known kind, shows nothing."""

    def show(self, text: str, done: int, total: int) -> None:
        """Say `text`, with `done` of `total` candidates validated."""

    def close(self) -> None:
        """Take the line away."""


class TQDMLine(Line):
    """A line of the TQDM bar, where that would show a validation."""

    def __init__(self, bar: TQDMProgressBar) -> None:
        self._line = bar.init_validation_tqdm()
        self._line.leave = False

    def show(self, text: str, done: int, total: int) -> None:
        """Say `text`, with `done` of `total` candidates validated."""
        self._line.total, self._line.n = total, done
        self._line.set_description(text)

    def close(self) -> None:
        """Take the line away."""
        self._line.close()


class RichLine(Line):
    """A task of the Rich bar."""

    def __init__(self, progress: Any) -> None:
        self._progress, self._task = progress, progress.add_task("Pruning", total=1)

    def show(self, text: str, done: int, total: int) -> None:
        """Say `text`, with `done` of `total` candidates validated."""
        self._progress.update(self._task, description=text, completed=done, total=total)

    def close(self) -> None:
        """Take the line away."""
        self._progress.remove_task(self._task)


def line_of(trainer: Trainer) -> Line:
    """A line in the bar that the Trainer shows; a silent one if it shows none."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        return TQDMLine(bar)
    if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        return RichLine(bar.progress)
    return Line()
