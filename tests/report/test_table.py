"""The table of a report, and the text that begins with its summary."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_roulette import StopReason
from tests.support.reports import CONFIRMED, HELD, LEVELS, MISSED, REPORT

TABLE = """\
7,200 of 10,000 prunable weights kept (72.00%): sparsity 28.00%, compression 1.39x.
val_acc on all validation data: dense 0.965, pruned 0.962.
No validation data was held out: the same data chose and judged the pruned network. Decline 0.003, allowed 0.005.
Stopped: a level missed the floor.
Time: 4.2 s, and as much work as 13 full validations.

level  pruning rate  sparsity  weights left  score  s.e.  branch min  median    max  accepted  held-out  s.e.  held
    1           0.2    20.00%         8,000   0.97     -        0.93    0.95   0.97       yes         -     -     -
    2           0.2    36.00%         6,400    nan     -         nan     nan    nan        no         -     -     -
    2           0.1    28.00%         7,200  0.962     -         0.3     0.5  0.962       yes         -     -     -
    3           0.1    35.20%         6,480    0.2     -         0.1    0.15    0.2        no         -     -     -"""


def test_the_report_reads_as_five_lines_and_a_table():
    assert str(REPORT).splitlines() == TABLE.splitlines()
    assert REPORT.table().splitlines() == TABLE.splitlines()[-5:]


def test_the_table_shows_what_was_judged_on_held_out_data():
    table = [line.split() for line in CONFIRMED.table().splitlines()]
    assert [row[-4:] for row in table] == [
        ["accepted", "held-out", "s.e.", "held"],
        ["yes", "0.9511", "0.0021", "yes"],
        ["no", "-", "-", "-"],
        ["yes", "0.94", "-", "no"],
        ["no", "-", "-", "-"],
    ]
    assert [row[5] for row in table[1:]] == ["0.002", "-", "0.003", "-"]


@pytest.mark.parametrize("branches", [1, 3])
def test_the_table_of_cuts_shows_epochs_and_no_branch_of_one(branches):
    levels = (replace(HELD, epoch=3), replace(MISSED, epoch=4))
    report = replace(CONFIRMED, gradual=True, levels=levels, stop_reason=StopReason.TRAINING_ENDED, branches=branches)
    table = report.table().splitlines()
    branch = ["s.e.", "0.002", "0.003"], ["branch", "min", "0.93", "0.3"]
    assert [row.split()[:2] for row in table] == [["level", "epoch"], ["1", "3"], ["2", "4"]]
    assert [row.split()[-2:] for row in table] == [["judged", "held"], ["0.9511", "yes"], ["0.94", "no"]]
    assert ("s.e." in table[0], "branch min" in table[0]) == (branches > 1,) * 2
    assert all((value in row) == (branches > 1) for value, row in zip(branch[0][1:], table[1:], strict=True))


LONG = tuple(
    replace(HELD, level=number, sparsity=number / 100, held=number < 30, held_out_score=0.95 if number <= 30 else None)
    for number in range(1, 41)
) + tuple(replace(LEVELS[3], level=41) for _ in range(5))


def test_a_printed_report_shows_the_levels_that_matter_and_says_how_many_it_leaves_out():
    report = replace(CONFIRMED, levels=LONG)
    assert report.winner.level == 29
    summary, table = str(report).split("\n\n")
    assert summary.splitlines() == report.summary()
    head, one, *some, last = table.splitlines()
    assert (head.split()[0], one.split()[0]) == ("level", "1")
    shown = [int(row.split()[0]) for row in some]
    assert {29, 30} <= set(shown)
    assert shown[-3:] == [41] * 3
    assert shown == sorted(shown)
    assert len(shown) == 9
    assert last == "35 of 45 levels are left out. report.table() returns all of them."
    assert len(report.table().splitlines()) == 46


@given(st.lists(st.sampled_from(["held", "missed", "accepted", "failed"]), max_size=40), st.integers(0, 45))
def test_a_short_table_has_the_first_the_last_and_the_winner(kinds, most):
    held = {"held": True, "missed": False}
    levels = tuple(
        replace(HELD, level=number, accepted=kind != "failed", held=held.get(kind))
        for number, kind in enumerate(kinds, start=1)
    )
    report = replace(CONFIRMED, levels=levels)
    _, *rows = report.table(most).splitlines()
    left_out = int(rows.pop().split()[0]) if rows and "left out" in rows[-1] else 0
    numbers = [int(row.split()[0]) for row in rows]
    assert numbers == sorted(set(numbers))
    assert len(numbers) + left_out == len(levels)
    assert len(numbers) <= max(most, 5)
    assert len(numbers) >= min(most, len(levels), sum(level.accepted for level in levels))
    assert not levels or {1, len(levels), (report.winner or levels[0]).level} <= set(numbers)
    if most >= len(levels):
        assert report.table(most) == report.table()


def test_the_markdown_holds_the_summary_and_one_row_per_level():
    *sentences, table = REPORT.markdown().split("\n\n")
    assert sentences == REPORT.summary()
    head, rule, *rows = table.splitlines()
    assert head == (
        "| level | pruning rate | sparsity | weights left | score | s.e. | branch min | median | max | accepted "
        "| held-out | s.e. | held |"
    )
    assert rule == "|" + " ---: |" * 13
    assert len(rows) == 4
    assert rows[2] == "| 2 | 0.1 | 28.00% | 7,200 | 0.962 | - | 0.3 | 0.5 | 0.962 | yes | - | - | - |"


def test_brief_markdown_leaves_out_the_columns_that_make_it_wide():
    head, _, *rows = CONFIRMED.markdown(brief=True).split("\n\n")[-1].splitlines()
    assert head == "| level | sparsity | weights left | score | s.e. | accepted | held-out | s.e. | held |"
    assert rows[0] == "| 1 | 20.00% | 8,000 | 0.97 | 0.002 | yes | 0.9511 | 0.0021 | yes |"
    assert len(rows) == 4


def test_a_refit_does_not_change_the_rows_of_the_table():
    assert replace(REPORT, importance="sensitivity", refit="survivors by least squares").rows() == REPORT.rows()
