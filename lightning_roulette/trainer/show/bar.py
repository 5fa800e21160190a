"""A line about the search in the progress bar of the Trainer."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_roulette.mask.mask import Mask
from lightning_roulette.report.records import Level
from lightning_roulette.report.report import SearchReport
from lightning_roulette.trainer.lightning_names import in_both
from lightning_roulette.trainer.show.display import Display


class Line:
    """A line in a progress bar. This base class shows nothing; it is used if the Trainer has no known bar."""

    def show(self, text: str, done: int, total: int) -> None:
        """Show `text`, and `done` of `total` steps."""

    def restart(self) -> None:
        """Measure the speed and the remaining time from now on."""

    def close(self) -> None:
        """Remove the line."""


class TQDMLine(Line):
    """A line of the TQDM bar, at the place where that bar shows validations. It is drawn at most ten times a second."""

    def __init__(self, bar: TQDMProgressBar) -> None:
        self._line = Tqdm(
            desc="Pruning",
            position=2 * bar.process_position + 1,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=bar.BAR_FORMAT,
            miniters=1,  # only the time decides when it is drawn
            smoothing=0,  # the mean speed since the last restart
        )

    def show(self, text: str, done: int, total: int) -> None:
        """See `Line`."""
        self._line.total = total
        self._line.set_description(text, refresh=False)
        if not self._line.update(done - self._line.n) and done == total:
            self._line.refresh()

    def restart(self) -> None:
        """See `Line`. Nothing is drawn, unlike by `reset` of TQDM."""
        self._line.n = self._line.last_print_n = 0
        self._line.start_t = time.time()

    def close(self) -> None:
        """See `Line`."""
        self._line.close()


class RichLine(Line):
    """A task of the Rich bar."""

    def __init__(self, progress: Any) -> None:
        self._progress, self._task = progress, progress.add_task("Pruning", total=1)

    def show(self, text: str, done: int, total: int) -> None:
        """See `Line`."""
        self._progress.update(self._task, description=text, completed=done, total=total)

    def restart(self) -> None:
        """See `Line`."""
        self._progress.reset(self._task, total=1)

    def close(self) -> None:
        """Hide the task. It is not removed, because the bar finds its own tasks by their place in the list."""
        self._progress.update(self._task, visible=False)


def line_of(trainer: Trainer) -> Line:
    """Return a line in the bar that the Trainer shows; a line that shows nothing if there is none.

    A TQDM bar whose output goes into a file or a pipe gets none either: each update would be a line there.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, in_both(TQDMProgressBar)) and bar.is_enabled and _is_live():
        return TQDMLine(bar)
    if isinstance(bar, in_both(RichProgressBar)) and bar.is_enabled and bar.progress is not None:
        return RichLine(bar.progress)
    return Line()


def _is_live() -> bool:
    """Whether the standard output is a terminal or a notebook, where a line can be drawn again."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules


class ProgressLine(Display):
    """Shows the candidates of the current level in the progress bar.

    Args:
        trainer: The Trainer whose bar is used.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._line = line_of(trainer)

    def on_candidate(self, level: int, done: int, planned: int, best: float | None, sparsity: float) -> None:
        """Show how many candidates are judged, and the best score."""
        found = "" if best is None else f", best {best:.4g}"
        self._line.show(f"Pruning level {level} to {sparsity:.2%}{found}", done, planned)

    def on_level(self, report: SearchReport, mask: Mask) -> None:
        """Forget the speed of the level that has ended."""
        self._line.restart()

    def on_confirmed(self, report: SearchReport, level: Level) -> None:
        """Show how many levels are confirmed."""
        levels = len(report.accepted)
        self._line.show(f"Confirming level {level.level} of {levels}", level.level, levels)

    def close(self) -> None:
        """Remove the line."""
        self._line.close()
