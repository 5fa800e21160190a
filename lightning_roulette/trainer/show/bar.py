"""One line about the search in the Trainer's own progress bar, whichever it is."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class Line:
    """The line of a search; this one, for a Trainer without a bar of a known kind, shows nothing."""

    def show(self, text: str, done: int, total: int) -> None:
        """Say `text`, with `done` of `total` candidates validated."""

    def close(self) -> None:
        """Take the line away."""


class TQDMLine(Line):
    """A line of the TQDM bar, where that shows validations."""

    def __init__(self, bar: TQDMProgressBar) -> None:
        self._line = Tqdm(
            desc="Pruning",
            position=2 * bar.process_position + 1,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=bar.BAR_FORMAT,
        )

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
        self._progress.update(self._task, visible=False)  # the bar finds its own tasks by their place in the list


def line_of(trainer: Trainer) -> Line:
    """A line in the bar that the Trainer shows; a silent one if it shows none."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        return TQDMLine(bar)
    if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        return RichLine(bar.progress)
    return Line()
