"""The picture of a report: every line is read back from the axes of matplotlib."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402

from tests.support.missing import without  # noqa: E402
from tests.support.reports import CONFIRMED, DENSE, REPORT  # noqa: E402


def drawn(report, over="sparsity"):
    """The axes, its lines by their labels as lists of (x, y), and the points of the candidates."""
    axes = Figure().add_subplot()
    assert report.plot(over, axes=axes) is axes
    lines = {line.get_label(): list(map(tuple, line.get_xydata().tolist())) for line in axes.lines}
    dots = [tuple(point) for dots in axes.collections for point in dots.get_offsets().filled(math.nan).tolist()]
    return axes, lines, dots


def test_every_candidate_is_a_dot_and_lines_join_the_winners_and_their_held_out_scores():
    _, lines, dots = drawn(CONFIRMED, "level")
    scored = [(level.level, one.score) for level in CONFIRMED.levels for one in level.candidates]
    assert sorted(point for point in dots if not math.isnan(point[1])) == sorted(
        point for point in scored if not math.isnan(point[1])
    )
    assert lines["winners: search half"] == [(0, 0.965), (1, 0.97), (2, 0.962)]
    assert lines["winners: held-out half"] == [(0, 0.9523), (1, 0.9511), (2, 0.94)]
    assert lines["dense: search half"] == [(0, 0.965)]
    assert [x for x, _ in lines["levels below the floor"]] == [2, 3]


def test_floors_and_the_result_are_marked():
    _, lines, _ = drawn(CONFIRMED, "level")
    assert {y for _, y in lines["floor: search half"]} == {CONFIRMED.floor}
    assert {y for _, y in lines["floor: held-out half"]} == {CONFIRMED.held_out_floor}
    assert {x for x, _ in lines["result: sparsity 20.00%"]} == {1}


def test_over_sparsity_the_axis_is_the_share_of_weights_left_and_its_marks_are_percents_of_sparsity():
    axes, lines, _ = drawn(CONFIRMED)
    assert [x for x, _ in lines["winners: search half"]] == pytest.approx([1, 0.8, 0.72])
    assert axes.get_xscale() == "log"
    right, left = axes.get_xlim()
    assert right > 1 > 0.64 > left
    assert dict(zip(axes.get_xticks(), (text.get_text() for text in axes.get_xticklabels()), strict=True)) == {1: "0"}


def test_a_network_without_weights_has_a_place_on_the_axis():
    empty = replace(REPORT, levels=(replace(REPORT.levels[0], sparsity=1.0, survivors=0),))
    _, lines, _ = drawn(empty)
    assert lines["winners: validation data"][-1][0] == 0.5 / empty.size


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_legend_says_how_many_candidates_are_outside(mode):
    report = REPORT if mode == "max" else REPORT.in_metric("val_loss", "min")
    axes, lines, dots = drawn(report)
    low, high = axes.get_ylim()
    outside = sum(not low <= y <= high for _, y in dots if not math.isnan(y))
    (label,) = (one.get_label() for one in axes.collections)
    assert label == f"candidates ({outside} are outside)"
    assert outside == 5
    winners = [y for _, y in lines["winners: validation data"]]
    assert all(low <= y <= high for y in (*winners, report.floor))


def test_without_held_out_data_nothing_of_it_is_drawn():
    _, lines, _ = drawn(REPORT)
    assert not [label for label in lines if "held-out" in label]
    assert "winners: validation data" in lines


@pytest.mark.parametrize("report", [DENSE, replace(REPORT, levels=()), replace(REPORT, tolerance=math.inf)])
def test_reports_without_a_winner_a_level_or_a_floor_are_drawn(report):
    axes, lines, _ = drawn(report)
    axes.figure.canvas.draw()
    assert ("floor: validation data" in lines) == math.isfinite(report.tolerance)
    assert any(label.startswith("result") for label in lines) == (report.winner is not None)


def test_levels_between_epochs_are_named_by_when_they_were_judged():
    _, lines, _ = drawn(replace(CONFIRMED, gradual=True))
    assert {"winners: at the cut", "winners: after training"} <= lines.keys()


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match=r"over.*'levels'.*level"):
        REPORT.plot("levels", axes=Figure().add_subplot())


@pytest.mark.parametrize(
    ("method", "package", "extra"), [("plot", "matplotlib", "plot"), ("to_dataframe", "pandas", "pandas")]
)
def test_a_missing_package_is_an_error_that_names_the_extra(method, package, extra, monkeypatch):
    without(monkeypatch, package)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'lightning-roulette\[{extra}\]'"):
        getattr(REPORT, method)()
