"""What loggers get: TensorBoard's files, read back, equal the report."""

from __future__ import annotations

import csv
import math
from functools import partial

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_roulette import Tree, Validation, Wheel
from tests.support import fits
from tests.support.modules import Blobs, train_loader, val_loader

BRANCH = ("roulette/branch/min", "roulette/branch/median", "roulette/branch/max")


pruner = partial(fits.pruner, branches=3, tolerance=0.3, tree=Tree(0.2, max_levels=3))


@pytest.fixture
def fit(fit):
    """Fits three epochs and logs every other step."""
    return partial(fit, log_every_n_steps=2, max_epochs=3)


def events(logger) -> EventAccumulator:
    return EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0}).Reload()


def scalars(logger) -> dict[str, list[tuple[int, float]]]:
    read = events(logger)
    return {tag: [(one.step, one.value) for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def expected(pruning) -> dict[str, list[tuple[int, float]]]:
    """Every curve that the report and the masks ask for."""
    report, dense = pruning.report, (0, pruning.report.dense_score)
    curves = {
        "roulette/sparsity": [(0, 0.0)] + [(one.level, one.sparsity) for one in report.accepted],
        "roulette/score": [dense] + [(one.level, one.score) for one in report.accepted],
        "roulette/floor": [(level, report.floor) for level in range(len(report.accepted) + 1)],
        "roulette/score_error": [(one.level, one.error) for one in report.accepted if not math.isnan(one.error)],
    }
    if report.held_out_dense is not None:
        confirmed = [one for one in report.accepted if one.held_out_score is not None]
        curves["roulette/held_out"] = [(0, report.held_out_dense)] + [
            (one.level, one.held_out_score) for one in confirmed
        ]
        curves["roulette/held_out_error"] = [(one.level, one.held_out_error) for one in confirmed]
    for i, tag in enumerate(BRANCH):
        curves[tag] = [dense] + [(one.level, one.spread[i]) for one in report.accepted]
    for name in pruning.mask:
        levels = range(len(report.accepted) + 1)
        curves[f"roulette/density/{name}"] = [(at, pruning.mask_at(at).densities[name]) for at in levels]
    return {tag: points for tag, points in curves.items() if points}


def rounded(curves) -> dict[str, list[tuple[int, float]]]:
    return {tag: [(step, torch.tensor(value).item()) for step, value in points] for tag, points in curves.items()}


@pytest.mark.parametrize(
    ("arguments", "accepted"),
    [
        ({}, [True] * 3),
        ({"at_epoch": 1}, [True] * 3),
        ({"monitor": "val_loss", "tolerance": 1.0}, [True] * 3),
        ({"tolerance": 0.05, "tree": Tree(pruning_rate=0.8, max_levels=1, patience=4)}, [False, True]),
        ({"tolerance": 0.0, "wheel": Wheel(0.0), "tree": Tree(pruning_rate=0.95, patience=1)}, [False]),
    ],
    ids=str,
)
def test_event_files_read_back_equal_the_report(fit, tmp_path, arguments, accepted):
    pruning, logger = pruner(**arguments), TensorBoardLogger(tmp_path)
    fit(pruning, logger=logger)
    assert [level.accepted for level in pruning.report.levels] == accepted
    found = {tag: points for tag, points in scalars(logger).items() if tag.startswith("roulette/")}
    assert rounded(found) == rounded(expected(pruning))


def test_the_spread_of_a_branch_is_that_of_its_candidates(fit, tmp_path):
    pruning, logger = pruner(branches=4), TensorBoardLogger(tmp_path)
    fit(pruning, logger=logger)
    found = scalars(logger)
    for level in pruning.report.accepted:
        scores = sorted(one.score for one in level.candidates)
        middle = (scores[1] + scores[2]) / 2
        drawn = [dict(found[tag])[level.level] for tag in BRANCH]
        assert drawn == pytest.approx([scores[0], middle, scores[3]])


@pytest.mark.parametrize("at_epoch", [None, 1])
def test_the_users_own_curves_are_as_without_a_search_up_to_it(fit, tmp_path, at_epoch):
    loggers = [TensorBoardLogger(tmp_path, name=name) for name in ("without", "with")]
    fit(logger=loggers[0])
    fit(pruner(at_epoch=at_epoch), logger=loggers[1])
    without, searched = (scalars(one) for one in loggers)
    users = {tag: points for tag, points in searched.items() if not tag.startswith("roulette/")}
    assert users.keys() == without.keys() >= {"val_acc", "val_loss", "train_loss"}
    for tag, points in without.items():
        assert [step for step, _ in users[tag]] == [step for step, _ in points]
        before = [(step, value) for step, value in points if at_epoch is None or step < 8 * at_epoch]
        assert before
        assert users[tag][: len(before)] == before


def test_the_layout_puts_score_and_floor_in_one_chart_and_draws_the_branch_as_a_band(fit, tmp_path):
    pruning, logger = pruner(), TensorBoardLogger(tmp_path)
    fit(pruning, logger=logger)
    (event,) = events(logger).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = layout.category
    charts = {chart.title: chart for chart in category.chart}
    assert category.title == "roulette"
    lines = ["roulette/score$", "roulette/floor$", "roulette/held_out$"]
    assert list(charts["score and floor"].multiline.tag) == lines
    assert {tag.rstrip("$") for tag in lines} <= scalars(logger).keys()
    (band,) = charts["branch"].margin.series
    assert (band.lower, band.value, band.upper) == BRANCH
    assert set(BRANCH) <= scalars(logger).keys()


def test_the_text_tab_has_the_report_as_a_table(fit, tmp_path):
    pruning, logger = pruner(), TensorBoardLogger(tmp_path)
    fit(pruning, logger=logger)
    (event,) = events(logger).Tensors("roulette/report/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text == pruning.report.markdown()
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    head, ruler, *rows = table
    assert len({len(row) for row in table}) == 1
    assert head[:3] == ["level", "pruning rate", "sparsity"]
    assert set(ruler) == {"---:"}
    said = [dict(zip(head, row, strict=True)) for row in rows]
    assert [(row["level"], row["sparsity"], row["accepted"], row["held"]) for row in said] == [
        (str(one.level), f"{one.sparsity:.2%}", "yes" if one.accepted else "no", "yes" if one.held else "no")
        for one in pruning.report.levels
    ]
    assert [row["held-out"] for row in said] == [f"{one.held_out_score:.6g}" for one in pruning.report.levels]


def test_any_other_logger_gets_the_same_points(fit, tmp_path):
    pruning, loggers = pruner(), [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path)]
    fit(pruning, logger=loggers)
    with open(f"{loggers[0].log_dir}/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {
        tag: [(int(row["step"]), float(row[tag])) for row in rows if row[tag]]
        for tag in rows[0]
        if tag.startswith("roulette/")
    }
    assert rounded(found) == rounded(expected(pruning))
    drawn = {tag: points for tag, points in scalars(loggers[1]).items() if tag.startswith("roulette/")}
    assert rounded(drawn) == rounded(found)


def test_a_csv_loggers_own_rows_are_as_without_a_search(fit, tmp_path):
    rows = []
    for name, callbacks in (("without", []), ("with", [pruner()])):
        logger = CSVLogger(tmp_path, name=name)
        fit(*callbacks, logger=logger)
        with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
            read = list(csv.DictReader(file))
        ours = [any(value for tag, value in row.items() if tag.startswith("roulette/")) for row in read]
        assert any(ours) == (name == "with")
        users = [row for row, drawn in zip(read, ours, strict=True) if not drawn]
        rows.append([{tag: value for tag, value in row.items() if not tag.startswith("roulette/")} for row in users])
    assert rows[0] == rows[1]
    assert len(rows[0]) > 3


def test_without_a_logger_nothing_is_drawn(fit, tmp_path):
    pruning = pruner()
    fit(pruning, logger=False)
    assert pruning.report.sparsity > 0
    assert list(tmp_path.iterdir()) == []


def test_a_point_is_on_disk_when_its_level_is_done(make_trainer, tmp_path):
    """Who watches a long search in TensorBoard sees it grow."""
    logger, seen = TensorBoardLogger(tmp_path), []

    class Watches(Blobs):
        def on_validation_epoch_start(self):
            if self.trainer.current_epoch == 3:
                drawn = scalars(logger)
                seen.append(tuple(len(drawn.get(f"roulette/{tag}", [])) for tag in ("score", "held_out")))

    torch.manual_seed(0)
    pruning = pruner(branches=2, validation=Validation(race=False))
    trainer = make_trainer(callbacks=[pruning], logger=logger, max_epochs=3, log_every_n_steps=2)
    trainer.fit(Watches(), train_loader(), val_loader())
    # six validations come before the dense one, on each half of the data; a level is two candidates and the winner on
    # one half, and later the winner on the other; at last comes the loaded network
    levels = [(level, 1) for level in (1, 2, 3) for _ in range(3)]
    assert seen == [(0, 0)] * 8 + levels + [(4, 1), (4, 2), (4, 3), (4, 4)]
