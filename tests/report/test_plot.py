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


def test_candidates_of_units_are_drawn_at_their_own_sparsity():
    level = REPORT.levels[0]
    candidates = tuple(replace(one, sparsity=0.1 * one.index + 0.2) for one in level.candidates)
    _, _, dots = drawn(replace(REPORT, levels=(replace(level, candidates=candidates),)))
    assert [x for x, _ in dots] == pytest.approx([1 - one.sparsity for one in candidates])


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


def counted(report, dense, *left):
    """The report with multiply-adds of the dense network and of each level."""
    levels = (replace(one, multiply_adds=number) for one, number in zip(report.levels, left, strict=True))
    return replace(report, multiply_adds=dense, levels=tuple(levels))


def test_over_multiply_adds_the_axis_is_the_share_of_them_left_and_its_marks_are_percents_of_it():
    report = counted(CONFIRMED, 2000, 1800, 1500, 1600, 900)
    axes, lines, dots = drawn(report, "multiply_adds")
    assert [x for x, _ in lines["winners: search half"]] == pytest.approx([1, 0.9, 0.8])
    assert [x for x, _ in lines["winners: held-out half"]] == pytest.approx([1, 0.9, 0.8])
    assert [x for x, _ in lines["levels below the floor"]] == pytest.approx([0.75, 0.45])
    assert {x for x, y in dots if not math.isnan(y)} == {0.9, 0.8, 0.45}
    assert {x for x, _ in lines["result: 90.00% of the multiply-adds"]} == {0.9}
    assert axes.get_xscale() == "log"
    right, left = axes.get_xlim()
    assert right > 1 > 0.45 > left
    marks = dict(zip(axes.get_xticks(), (text.get_text() for text in axes.get_xticklabels()), strict=True))
    assert marks == {1: "100", 0.8: "80", 0.5: "50"}
    assert axes.get_xlabel() == "multiply-adds of a sample that are left (%)"


def test_a_network_without_multiply_adds_has_a_place_on_their_axis():
    report = counted(replace(REPORT, levels=REPORT.levels[:1]), 2000, 0)
    _, lines, _ = drawn(report, "multiply_adds")
    assert lines["winners: validation data"][-1][0] == 0.5 / 2000


def test_a_search_without_a_level_is_drawn_over_multiply_adds():
    axes, lines, _ = drawn(counted(replace(REPORT, levels=()), 2000), "multiply_adds")
    axes.figure.canvas.draw()
    assert lines["dense: validation data"] == [(1, 0.965)]


@pytest.mark.parametrize(
    "report", [REPORT, counted(REPORT, 2000, 1800, 1500, None, 900), replace(DENSE, multiply_adds=0)]
)
def test_multiply_adds_that_a_report_does_not_count_are_refused(report):
    with pytest.raises(ValueError, match=r"does not count them.*Wheel\(unit='neuron'\).*over='sparsity'"):
        report.plot("multiply_adds", axes=Figure().add_subplot())


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
