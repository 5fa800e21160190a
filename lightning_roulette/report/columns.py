"""Cells of text below each other."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def in_columns(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> list[str]:
    """Return a line for each row, whose cells stand below each other, two spaces apart.

    Args:
        rows: Cells of text, the same number in each row.
        left: Columns that are aligned on the left. The others are aligned on the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
