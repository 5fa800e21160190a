"""The lines that sum up a report."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lightning_roulette import Method, SearchReport, StopReason
from lightning_roulette.report.records import Footprint, Skipped
from tests.support.reports import CONFIRMED, DENSE, HELD, LEVELS, MISSED, REPORT

MEASURED = replace(CONFIRMED, score=0.9602, dense_measured=0.9621, confidence=None, method=None)
GRADUAL = replace(
    CONFIRMED,
    gradual=True,
    confidence=None,
    method=None,
    levels=(replace(HELD, epoch=3), replace(MISSED, epoch=4)),
    stop_reason=StopReason.TRAINING_ENDED,
)
WHOLE = replace(GRADUAL, folds=(1, 0))  # one candidate for each cut: nothing is held out
NOTHING_HELD = replace(CONFIRMED, levels=(replace(HELD, held=False, held_out_score=0.93), LEVELS[3]))
LEVEL_2 = "Level 1 of 2 is the result: level 2 missed the floor 0.9473 on the"


def test_five_lines_say_what_is_kept_the_metric_the_decline_the_end_and_the_time():
    assert MEASURED.summary() == [
        "8,000 of 10,000 prunable weights kept (80.00%): sparsity 20.00%, compression 1.25x.",
        "val_acc on all validation data (half of it ranked the candidates): dense 0.9621, pruned 0.9602.",
        "On the held-out half, which ranked no candidates: dense 0.9523, pruned 0.9511. Estimated decline "
        "0.005 (standard error 0.0021), allowed 0.005.",
        f"Stopped: a level missed the floor. {LEVEL_2} held-out half (val_acc 0.94).",
        "Time: 4.2 s, and as much work as 7.125 full validations.",
    ]


@pytest.mark.parametrize(
    ("footprint", "lines"),
    [
        (None, []),
        (Footprint(40_000), ["Bytes: 40,000 dense."]),
        (Footprint(40_000, 9_000), ["Bytes: 40,000 dense, 9,000 compressed by save_compressed (lossless)."]),
        (
            Footprint(40_000, None, 10_000, 7_200),
            ["Bytes: 40,000 dense. Multiply-adds of a sample: 10,000 dense, 7,200 effective."],
        ),
    ],
)
def test_a_line_says_what_the_network_takes(footprint, lines):
    assert replace(MEASURED, footprint=footprint).summary() == [
        MEASURED.summary()[0],
        *lines,
        *MEASURED.summary()[1:],
    ]


EMBEDDING = Skipped(("embed.weight",), 7000, "embedding")
TIED = Skipped(("a", "b", "c"), 3000, "tied")


@pytest.mark.parametrize(
    ("found", "lines"),
    [
        ({}, []),
        ({"matrices": 10_000}, []),
        (
            {"matrices": 20_000, "skipped": (EMBEDDING, TIED)},
            [
                "Prunable: 10,000 of 20,000 weights in matrices (50.0%).",
                "Not prunable: 7,000 in embed.weight (embedding); 3,000 in a, b, c (tied).",
            ],
        ),
        (
            {"matrices": 10_007, "skipped": tuple(Skipped((f"p{i}",), 1, f"reason {i}") for i in range(7))},
            [
                "Prunable: 10,000 of 10,007 weights in matrices (99.9%).",
                "Not prunable: 1 in p0 (reason 0); 1 in p1 (reason 1); 1 in p2 (reason 2); 1 in p3 (reason 3); "
                "1 in p4 (reason 4); 2 for other reasons.",
            ],
        ),
    ],
)
def test_two_lines_say_what_is_prunable(found, lines):
    report = replace(REPORT, **found)
    assert report.summary()[1:-4] == lines
    assert report.summary()[0].endswith("All weights in matrices are prunable.") == (report.matrices == report.size)


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (MEASURED, "val_acc on all validation data (half of it ranked the candidates): dense 0.9621, pruned 0.9602."),
        (
            replace(MEASURED, folds=(12, 4)),
            "val_acc on all validation data (75% of it ranked the candidates): dense 0.9621, pruned 0.9602.",
        ),
        (
            replace(MEASURED, trained_score=0.97),
            "val_acc on all validation data (half of it ranked the candidates): dense 0.9621, pruned 0.9602, 0.97 "
            "after the training that followed.",
        ),
        # without a Trainer nothing is measured after the search
        (CONFIRMED, "val_acc on the data that ranked the candidates: dense 0.965, pruned 0.97."),
        # an earlier version did not measure the dense network
        (
            replace(CONFIRMED, score=0.9602),
            "val_acc on the data that ranked the candidates: dense 0.965, pruned 0.97; pruned 0.9602 on all validation "
            "data.",
        ),
        (replace(REPORT, score=0.9602), "val_acc on all validation data: dense 0.965, pruned 0.9602."),
        (DENSE, "val_acc on all validation data: dense 0.965."),
        (replace(DENSE, score=0.9621, dense_measured=0.9621), "val_acc on all validation data: dense 0.9621."),
        (replace(WHOLE, score=0.95), "val_acc on all validation data: dense 0.9523, pruned 0.95."),
        (
            replace(GRADUAL, score=0.95, dense_measured=0.96),
            "val_acc on all validation data (half of it ranked the candidates): dense 0.96, pruned 0.95.",
        ),
    ],
)
def test_both_networks_are_compared_on_the_same_data(report, line):
    assert report.summary()[1] == line


def test_a_metric_to_be_minimised_is_said_in_its_own_units():
    loss = replace(MEASURED, dense_score=-0.5, score=-0.6, dense_measured=-0.55).in_metric("val_loss", "min")
    expected = "val_loss on all validation data (half of it ranked the candidates): dense 0.55, pruned 0.6."
    assert loss.summary()[1] == expected


ESTIMATED = "Estimated decline 0.005, allowed 0.005."
BEFORE = "The dense network is the one before the first cut, and the pruned one was trained further."
ALONE = "the same data chose and judged the pruned network."


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (REPORT, f"No validation data was held out: {ALONE} Decline 0.003, allowed 0.005."),
        (
            replace(REPORT, undivided_because="loader 0 gives 3 samples, fewer than 16", tolerance=math.inf),
            f"No validation data was held out (loader 0 gives 3 samples, fewer than 16): {ALONE} Decline 0.003.",
        ),
        (
            replace(REPORT, levels=(replace(LEVELS[0], error=0.0042),)),
            f"No validation data was held out: {ALONE} Decline -0.005 (standard error 0.0042), allowed 0.005.",
        ),
        (DENSE, f"No validation data was held out: {ALONE}"),
        (
            replace(GRADUAL, score=0.95, dense_measured=0.96),
            f"{BEFORE} On the held-out half, which ranked no candidates: dense 0.9523, pruned 0.9511. "
            "Estimated decline 0.005, allowed 0.005.",
        ),
        (
            replace(WHOLE, score=0.95),
            f"{BEFORE} The same data judged every cut. Estimated decline 0.005, allowed 0.005.",
        ),
    ],
)
def test_the_decline_is_said_with_the_data_it_comes_from(report, line):
    assert report.summary()[2] == line


def test_without_a_score_on_held_out_data_no_decline_is_said():
    for report in (replace(CONFIRMED, levels=LEVELS), NOTHING_HELD):
        assert "ecline" not in " ".join(report.summary())


END = "the search reached the target sparsity, but missed the floor there on held-out data."


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (REPORT, "Stopped: a level missed the floor."),
        (replace(REPORT, levels=(*LEVELS, LEVELS[3])), "Stopped: 2 levels in a row missed the floor."),
        (DENSE, "Stopped: a level missed the floor. No level kept the floor 0.96; the best scored 0.2."),
        (replace(REPORT, levels=(), stop_reason=StopReason.EXHAUSTED), "Stopped: no further weight can be pruned."),
        (
            NOTHING_HELD,
            "Stopped: a level missed the floor. No level held: level 1 could not be certified on the held-out half.",
        ),
        (
            CONFIRMED,
            "Stopped: a level missed the floor. Level 1 of 2 is the result: level 2 could not be certified on "
            "the held-out half.",
        ),
        (replace(WHOLE, score=0.95), f"Stopped: training ended. {LEVEL_2} validation data (val_acc 0.94)."),
        (replace(REPORT, target_sparsity=0.28, stop_reason=StopReason.TARGET_REACHED), "Target sparsity 28.00%: met."),
        (replace(REPORT, target_sparsity=0.99), "Target sparsity 99.00%: missed. Stopped: a level missed the floor."),
        (
            replace(MEASURED, target_sparsity=0.28, stop_reason=StopReason.TARGET_NOT_HELD),
            f"Target sparsity 28.00%: missed. Stopped: {END} {LEVEL_2} held-out half (val_acc 0.94).",
        ),
        # as an earlier version saved it
        (
            replace(MEASURED, target_sparsity=0.28, stop_reason=StopReason.TARGET_REACHED),
            f"Target sparsity 28.00%: missed. Stopped: {END} {LEVEL_2} held-out half (val_acc 0.94).",
        ),
        (replace(REPORT, stop_reason=None, target_sparsity=0.9), "The search is running."),
    ],
)
def test_one_line_says_whether_the_target_was_met_and_why_the_search_ended(report, line):
    assert report.summary()[-2] == line


@pytest.mark.parametrize("reason", StopReason)
def test_the_report_says_why_the_search_stopped(reason):
    assert reason.value.startswith("Stopped: ")
    assert reason.value.endswith(".")
    report = replace(REPORT, stop_reason=reason, levels=(*LEVELS, LEVELS[3]))
    assert reason.value.replace("`patience`", "2") in str(report)


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (DENSE, "All 10,000 prunable weights kept: the network stays dense."),
        (NOTHING_HELD, "All 10,000 prunable weights kept: the network stays dense."),
        *(
            (
                replace(REPORT, stop_reason=reason),
                "The slimmest accepted level keeps 7,200 of 10,000 prunable weights (72.00%): "
                "sparsity 28.00%, compression 1.39x. It was not loaded.",
            )
            for reason in (StopReason.INTERRUPTED, StopReason.FAILED)
        ),
    ],
)
def test_a_network_that_stays_dense_is_said_to(report, line):
    assert report.summary()[0] == line


REFITTED = replace(REPORT, importance="sensitivity", refit="survivors by least squares")
WHY = "it did not improve held-out inputs"
OWN = "not supported for LSTMCell"
CELL = dict.fromkeys(("cell.weight_ih", "cell.weight_hh"), OWN)
MANY = {f"w{number}": WHY for number in range(8)}


@pytest.mark.parametrize(
    ("report", "lines"),
    [
        (REFITTED, []),
        (replace(REFITTED, notes=("One.", "Two.")), ["One.", "Two."]),
        (
            replace(REFITTED, importance="magnitude, as the network has no gradients"),
            ["Importance: magnitude, as the network has no gradients."],
        ),
        (
            replace(REFITTED, left_alone={"a": "refit not supported for LSTM"}),
            ["Not refitted: a (refit not supported for LSTM)."],
        ),
        (
            replace(REFITTED, left_alone=CELL, not_refitted=(Skipped(tuple(CELL), REFITTED.size // 4, OWN),)),
            [f"Not refitted: 25.0% of the prunable weights, in cell.weight_ih, cell.weight_hh ({OWN})."],
        ),
        (
            replace(REFITTED, levels=(replace(LEVELS[2], undone={"b": WHY, "c": WHY}),)),
            [f"Refit not kept for b, c: {WHY}."],
        ),
        (
            replace(REFITTED, levels=(replace(LEVELS[2], undone=MANY),)),
            [f"Refit not kept for w0, w1, w2, w3, w4, w5, 2 more: {WHY}."],
        ),
        (replace(REFITTED, refit="x, not kept as it gained nothing"), ["Refit: x, not kept as it gained nothing."]),
    ],
)
def test_notes_and_what_is_unusual_come_last(report: SearchReport, lines: list[str]):
    assert report.summary()[5:] == lines


@pytest.mark.parametrize("method", Method)
def test_the_report_says_how_it_was_certified(method):
    line = f"the pruned network's true decline{{}} is at most 0.005. {method.value}"
    certified = replace(CONFIRMED, method=method)
    assert f"With confidence 0.95 {line.format('')}" in certified.summary()
    trained = replace(certified, trained_score=0.97)
    assert f"With confidence 0.95 {line.format(' before the training that followed')}" in trained.summary()
    none = replace(NOTHING_HELD, method=method).summary()
    assert "No level could be certified with confidence 0.95: the network stays dense." in none
