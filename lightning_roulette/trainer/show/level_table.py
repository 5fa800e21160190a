"""The levels of a search as a table in the console of Lightning's Rich progress bar."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar

from lightning_roulette.report.report import SearchReport
from lightning_roulette.report.table import SHORT, some_rows
from lightning_roulette.trainer.lightning_names import in_both
from lightning_roulette.trainer.show.display import Display


class LevelTable(Display):
    """Prints a short table of levels at the end, if the Trainer shows a Rich progress bar.

    Args:
        trainer: The Trainer whose bar is used.
    """

    def __init__(self, trainer: Trainer) -> None:
        bar = trainer.progress_bar_callback
        self._bar = bar if isinstance(bar, in_both(RichProgressBar)) and bar.is_enabled else None

    def on_end(self, report: SearchReport) -> None:
        """Print the table."""
        if self._bar is None or self._bar.progress is None or not report.levels:
            return
        from rich.table import Table  # an optional package of Lightning, which this bar needs

        (head, *body), left_out = some_rows(report, SHORT)
        table = Table(title="Levels of the search", caption=left_out or None)
        for name in head:
            table.add_column(name, justify="right")
        for row in body:
            table.add_row(*row)
        self._bar.progress.console.print(table)
