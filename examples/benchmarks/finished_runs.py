"""Finished runs, stored as lines of JSON, so that no run is repeated."""

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["Row", "Runs", "read"]

Row = dict[str, Any]


class Runs:
    """Finished runs in a file. Incomplete lines, from a killed process, are removed from the file.

    Args:
        path: The file. It does not have to exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read(path) if path.exists() else []
        if path.exists() and len(self.rows) < len(path.read_text().splitlines()):
            whole = path.with_name(f"{path.name}.new")
            whole.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            whole.replace(path)

    def of(self, **key: object) -> list[Row]:
        """Return the rows with these entries."""
        return [row for row in self.rows if key.items() <= row.items()]

    def has(self, **key: object) -> bool:
        """Return whether there is a row with these entries."""
        return bool(self.of(**key))

    def add(self, **row: object) -> None:
        """Add a row, and write it to the file."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """Return the finished runs in a file, without incomplete lines."""
    return [row for line in path.read_text().splitlines(keepends=True) if (row := _row(line)) is not None]


def _row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and line.endswith("\n") else None
