"""The levels of a report as a DataFrame of pandas."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

pandas = pytest.importorskip("pandas")

from tests.support.reports import CONFIRMED, LEVELS, REPORT  # noqa: E402


def test_there_is_a_row_of_numbers_for_each_level():
    frame = CONFIRMED.to_dataframe()
    assert list(frame["level"]) == [1, 2, 2, 3]
    assert list(frame["accepted"]) == [True, False, True, False]
    assert list(frame["score"].dropna()) == [0.97, 0.962, 0.2]
    assert list(frame["candidates"]) == [3, 3, 4, 2]
    first = frame.iloc[0]
    assert (first["branch_min"], first["branch_median"], first["branch_max"]) == (0.93, 0.95, 0.97)
    assert first["held_out_score"] == 0.9511
    assert list(frame["survivors"]) == [level.survivors for level in LEVELS]
    assert {one.name for one in fields(LEVELS[0])} <= {*frame.columns}
    assert list(frame["undone"]) == [len(level.undone) for level in LEVELS]


def test_a_report_without_levels_has_the_same_columns():
    empty = replace(REPORT, levels=()).to_dataframe()
    assert list(empty.columns) == list(REPORT.to_dataframe().columns)
    assert len(empty) == 0
