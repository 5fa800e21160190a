"""What a report says in words and tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_roulette import Method, StopReason
from tests.support.reports import CONFIRMED, HELD, LEVELS, MISSED, REPORT

TABLE = """\
7,200 of 10,000 prunable weights kept (72.00%): sparsity 28.00%, level 2 of 2 accepted levels.
val_acc: dense 0.965, floor 0.96, pruned 0.962 (all validation data).
No validation data was held out: the same data chose and judged the pruned network.
Stopped: a level missed the floor. Work: as much as 13 full validations, 4.2 s.

level  pruning rate  sparsity  weights left  score  s.e.  branch min  median    max  accepted  held-out  s.e.  held
    1           0.2    20.00%         8,000   0.97     -        0.93    0.95   0.97       yes         -     -     -
    2           0.2    36.00%         6,400    nan     -         nan     nan    nan        no         -     -     -
    2           0.1    28.00%         7,200  0.962     -         0.3     0.5  0.962       yes         -     -     -
    3           0.1    35.20%         6,480    0.2     -         0.1    0.15    0.2        no         -     -     -"""


def test_the_report_reads_as_a_table():
    assert str(REPORT).splitlines() == TABLE.splitlines()


def test_a_confirmed_report_reads_as_a_table():
    lines = str(CONFIRMED).splitlines()
    assert lines[:4] == [
        "8,000 of 10,000 prunable weights kept (80.00%): sparsity 20.00%, level 1 of 2 accepted levels.",
        "val_acc: dense 0.965, floor 0.96, pruned 0.97 (search half).",
        "On the held-out half of the validation data: dense 0.9523, pruned 0.9511 (s.e. 0.0021); estimated decline "
        "0.005.",
        f"With confidence 0.95 the pruned network's true decline is at most 0.005. {Method.BETTING.value}",
    ]
    assert "as much as 7.125 full validations" in lines[4]
    table = [line.split() for line in lines[6:]]
    assert [row[-4:] for row in table] == [
        ["accepted", "held-out", "s.e.", "held"],
        ["yes", "0.9511", "0.0021", "yes"],
        ["no", "-", "-", "-"],
        ["yes", "0.94", "-", "no"],
        ["no", "-", "-", "-"],
    ]
    assert [row[5] for row in table[1:]] == ["0.002", "-", "0.003", "-"]


GRADUAL = replace(
    CONFIRMED,
    gradual=True,
    levels=(replace(HELD, epoch=3), replace(MISSED, epoch=4)),
    stop_reason=StopReason.TRAINING_ENDED,
)


@pytest.mark.parametrize("branches", [1, 3])
def test_a_report_of_cuts_between_epochs_reads_as_a_table(branches):
    sizes, scores, ended, _, *table = str(replace(GRADUAL, branches=branches, score=0.955)).splitlines()
    assert sizes.endswith("level 1 of 2 pruned levels.")
    assert scores == (
        "val_acc on the held-out half of the validation data, after further training: dense 0.9523, floor 0.9473, "
        "pruned 0.9511, 0.955 after loading (all validation data)."
    )
    assert ended.startswith("Stopped: training ended.")
    branch = ["s.e.", "0.002", "0.003"], ["branch", "min", "0.93", "0.3"]
    assert [row.split()[:2] for row in table] == [["level", "epoch"], ["1", "3"], ["2", "4"]]
    assert [row.split()[-2:] for row in table] == [["judged", "held"], ["0.9511", "yes"], ["0.94", "no"]]
    assert ("s.e." in table[0], "branch min" in table[0]) == (branches > 1,) * 2
    assert all((value in row) == (branches > 1) for value, row in zip(branch[0][1:], table[1:], strict=True))


NOTHING_HELD = replace(CONFIRMED, levels=(replace(HELD, held=False),))
REFITTED = replace(REPORT, importance="sensitivity", refit="survivors by least squares")
UNDONE = replace(
    LEVELS[2], undone={"b": "it did not improve held-out inputs", "c": "it did not improve held-out inputs"}
)


@pytest.mark.parametrize(
    ("report", "present", "absent"),
    [
        (NOTHING_HELD, "No level could be certified with confidence 0.95: the network stays dense.", "With confidence"),
        (NOTHING_HELD, "level 0 of 1 accepted levels.", "level 1"),
        (replace(CONFIRMED, confidence=None, method=None), "pruned 0.9511 (s.e. 0.0021)", "confidence"),
        (
            replace(REPORT, undivided_because="loader 0 gives 3 samples, fewer than 16"),
            "No validation data was held out (loader 0 gives 3 samples, fewer than 16): the same data chose",
            "half",
        ),
        (replace(REPORT, score=0.9613), "pruned 0.962 (all validation data), 0.9613 after loading (all", "followed"),
        (replace(REPORT, trained_score=0.9702), "val_acc after the training that followed: 0.9702.", "loading"),
        (
            replace(CONFIRMED, trained_score=0.97),
            "the pruned network's true decline before the training that followed is at most 0.005.",
            "loading",
        ),
        (replace(REPORT, stop_reason=None), "The search is running. Work: as much as 13 full", "Stopped"),
        (replace(REPORT, importance="magnitude"), "7,200 of", "Importance"),
        (REFITTED, "Importance: sensitivity. Refit: survivors by least squares.", "not"),
        (
            replace(REFITTED, left_alone={"a": "refit not supported for LSTM"}),
            "least squares. Not refitted: a (refit not supported for LSTM).",
            "not kept",
        ),
        (
            replace(REFITTED, levels=(UNDONE,)),
            "least squares. Refit not kept for b, c: it did not improve held-out inputs.",
            "Not refitted",
        ),
    ],
)
def test_a_summary_has_the_sentences_that_apply(report, present, absent):
    words = " ".join(report.summary())
    assert present in words
    assert absent not in words


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


@pytest.mark.parametrize("method", Method)
def test_the_report_says_how_it_was_certified(method):
    text = str(replace(CONFIRMED, method=method))
    assert f"With confidence 0.95 the pruned network's true decline is at most 0.005. {method.value}" in text


@pytest.mark.parametrize("reason", StopReason)
def test_the_report_says_why_the_search_stopped(reason):
    assert reason.value.startswith("Stopped: ")
    assert reason.value.endswith(".")
    report = replace(REPORT, stop_reason=reason, levels=(*LEVELS, LEVELS[3]))
    assert reason.value.replace("`patience`", "2") in str(report)


def test_a_refit_does_not_change_the_rows_of_the_table():
    assert REFITTED.rows() == REPORT.rows()
