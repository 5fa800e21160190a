"""A report as HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from lightning_roulette.report.table import SHORT, some_rows
from lightning_roulette.report.words import summary

if TYPE_CHECKING:
    from lightning_roulette.report.report import SearchReport


def html(report: SearchReport) -> str:
    """Return the summary and a short table of levels in HTML."""
    lines = "".join(f"<li>{escape(line)}</li>" for line in summary(report))
    return f"<div><ul>{lines}</ul>{_table(report) if report.levels else ''}</div>"


def _table(report: SearchReport) -> str:
    (head, *body), left_out = some_rows(report, SHORT)
    rows = "".join(_row(row, "td") for row in body)
    note = f"<p>{escape(left_out)}</p>" if left_out else ""
    return f"<table><thead>{_row(head, 'th')}</thead><tbody>{rows}</tbody></table>{note}"


def _row(cells: Sequence[str], kind: str) -> str:
    return f"<tr>{''.join(f'<{kind}>{escape(cell)}</{kind}>' for cell in cells)}</tr>"
