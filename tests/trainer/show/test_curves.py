"""What loggers get: TensorBoard's files, read back, equal the report."""

from __future__ import annotations

import csv
import math
import re
from functools import partial

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_roulette import Mask, SearchReport, Tree, Validation, Wheel
from lightning_roulette.trainer.show.curves import Curves
from tests.support import fits
from tests.support.events import events, scalars
from tests.support.modules import Blobs

BRANCH = ("roulette-branch/min", "roulette-branch/median", "roulette-branch/max")
pruner = partial(fits.pruner, branches=3, tolerance=0.3, tree=Tree(0.2, max_levels=3))


@pytest.fixture
def fit(fit):
    """Fits three epochs and logs every other step."""
    return partial(fit, log_every_n_steps=2, max_epochs=3)


def ours(curves: dict) -> dict:
    return {tag: points for tag, points in curves.items() if tag.startswith("roulette")}


def users(curves: dict) -> dict:
    return {tag: points for tag, points in curves.items() if not tag.startswith("roulette")}


def rows_of(logger: CSVLogger) -> list[dict[str, str]]:
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def expected(pruning) -> dict[str, list[tuple[int, float]]]:
    """Every curve that the report and the masks ask for."""
    report, dense = pruning.report, (0, pruning.report.dense_score)
    accepted, levels = report.accepted, range(len(report.accepted) + 1)
    curves = {
        "roulette/sparsity": [(0, 0.0)] + [(one.level, one.sparsity) for one in accepted],
        "roulette/score": [dense] + [(one.level, one.score) for one in accepted],
        "roulette/floor": [(level, report.floor) for level in levels],
        "roulette-branch/score_error": [(one.level, one.error) for one in accepted if not math.isnan(one.error)],
    }
    if report.multiply_adds:
        shares = [(one.level, one.multiply_adds / report.multiply_adds) for one in accepted]
        curves["roulette/multiply_adds"] = [(0, 1.0), *shares]
    if report.held_out_dense is not None:
        held_out = [(one.level, one.held_out_score) for one in accepted if one.held_out_score is not None]
        errors = [(one.level, one.held_out_error) for one in accepted if one.held_out_score is not None]
        curves["roulette/held_out"] = [(0, report.held_out_dense), *held_out]
        curves["roulette/held_out_floor"] = [(level, report.held_out_floor) for level, _ in curves["roulette/held_out"]]
        curves["roulette-branch/held_out_error"] = errors
    for i, tag in enumerate(BRANCH):
        curves[tag] = [dense] + [(one.level, one.spread[i]) for one in accepted]
    for name in pruning.mask:
        curves[f"roulette-density/{name.removesuffix('.weight')}"] = [
            (at, pruning.mask_at(at).densities[name]) for at in levels
        ]
    return {tag: points for tag, points in curves.items() if points} | final(report)


def final(report) -> dict[str, list[tuple[int, float]]]:
    """The final numbers, which are a point each at the level of the result."""
    winner, sign = report.winner, 1 if report.mode == "max" else -1
    numbers = {
        "sparsity": report.sparsity,
        "weights_left": report.survivors,
        "score": report.score,
        "tolerance": report.tolerance,
        "decline": report.decline,
        "seconds": report.seconds,
        "validations": report.validations,
        "bytes": report.footprint.compressed_bytes,
        "multiply_adds": report.footprint.effective_multiply_adds,
    }
    if winner is not None:
        numbers["held_out_decline"] = sign * (report.held_out_dense - winner.held_out_score)
    step = 0 if winner is None else winner.level
    known = {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
    return {f"roulette-result/{name}": [(step, value)] for name, value in known.items()}


def rounded(curves) -> dict[str, list[tuple[int, float]]]:
    return {tag: [(step, torch.tensor(value).item()) for step, value in points] for tag, points in curves.items()}


ACCEPTED = [
    ({}, [True] * 3),
    ({"at_epoch": 1}, [True] * 3),
    ({"monitor": "val_loss", "tolerance": math.inf}, [True] * 3),
    ({"tolerance": 0.05, "tree": Tree(pruning_rate=0.8, max_levels=1, patience=4)}, [False, True]),
    ({"tolerance": math.inf, "wheel": Wheel(unit="neuron")}, [True] * 3),
    ({"tolerance": 0.0, "wheel": Wheel(0.0), "tree": Tree(pruning_rate=0.95, patience=1)}, [False]),
]


@pytest.mark.parametrize(("arguments", "accepted"), ACCEPTED, ids=str)
def test_event_files_read_back_equal_the_report(fit, tmp_path, arguments, accepted):
    pruning, logger = pruner(**arguments), TensorBoardLogger(tmp_path)
    fit(pruning, logger=logger)
    assert [level.accepted for level in pruning.report.levels] == accepted
    found, wanted = rounded(ours(scalars(logger.log_dir))), rounded(expected(pruning))
    if pruning.report.trained_score is not None:  # the report was measured again after the training that followed
        for tag in ("roulette-result/bytes", "roulette-result/multiply_adds"):
            del found[tag], wanted[tag]
    assert found == wanted


@pytest.mark.parametrize("at_epoch", [None, 1])
def test_the_users_own_curves_are_as_without_a_search_up_to_it(fit, tmp_path, at_epoch):
    loggers = [TensorBoardLogger(tmp_path, name=name) for name in ("without", "with")]
    fit(logger=loggers[0])
    fit(pruner(at_epoch=at_epoch), logger=loggers[1])
    without, searched = scalars(loggers[0].log_dir), users(scalars(loggers[1].log_dir))
    assert searched.keys() == without.keys() >= {"val_acc", "val_loss", "train_loss"}
    for tag, points in without.items():
        assert [step for step, _ in searched[tag]] == [step for step, _ in points]
        before = [(step, value) for step, value in points if at_epoch is None or step < 8 * at_epoch]
        assert before
        assert searched[tag][: len(before)] == before


def test_the_layout_draws_scores_with_their_floors_and_the_branch_as_a_band(fit, tmp_path):
    pruning, logger = pruner(), TensorBoardLogger(tmp_path)
    fit(pruning, logger=logger)
    (event,) = events(logger.log_dir).Tensors("custom_scalars__config__")
    (category,) = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]).category
    charts = {chart.title: chart for chart in category.chart}
    lines = {title: [re.compile(one) for one in chart.multiline.tag] for title, chart in charts.items()}
    tags = scalars(logger.log_dir).keys()
    drawn = {title: [tag for tag in tags if any(one.match(tag) for one in lines[title])] for title in charts}
    assert category.title == "roulette"
    assert drawn == {
        "score and floor": [],
        "held-out score and floor": ["roulette/held_out", "roulette/held_out_floor"],
        "sparsity": ["roulette/sparsity"],
        "density of each layer": [f"roulette-density/net.{number}" for number in (0, 2)],
    }
    bands = [(one.lower, one.value, one.upper) for one in charts["score and floor"].margin.series]
    assert bands == [(BRANCH[0], "roulette/score", BRANCH[2]), ("roulette/floor",) * 3]
    assert {tag for band in bands for tag in band} <= tags


def test_every_curve_says_what_it_is_and_what_its_axis_is(fit, tmp_path):
    pruning, logger = pruner(), TensorBoardLogger(tmp_path)
    fit(pruning, logger=logger)
    read = events(logger.log_dir)
    said = {tag: read.SummaryMetadata(tag).summary_description for tag in ours(scalars(logger.log_dir))}
    assert all("level" in text for text in said.values())  # what the step is
    assert len(set(said.values())) == len(said) > 10
    assert said["roulette/score"].startswith(pruning.report.monitor)


def test_only_the_largest_layers_have_a_curve(tmp_path, make_trainer):
    mask = Mask({f"blocks.{i}.weight": torch.ones(1 + i, 2, dtype=torch.bool) for i in range(25)})
    logger = TensorBoardLogger(tmp_path)
    report = SearchReport("val_acc", "max", 1.0, 0.1, 1, 0, mask.size)
    Curves(make_trainer(logger=logger)).on_dense(report, mask, 1.0)
    drawn = [tag for tag in scalars(logger.log_dir) if tag.startswith("roulette-density/")]
    assert drawn == [f"roulette-density/blocks.{i}" for i in range(5, 25)]


def test_the_text_tab_has_the_report_as_a_table(fit, tmp_path):
    pruning, logger = pruner(), TensorBoardLogger(tmp_path)
    fit(pruning, logger=logger)
    (event,) = events(logger.log_dir).Tensors("roulette/report/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text == pruning.report.markdown(brief=True)
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    head, ruler, *rows = table
    assert len({len(row) for row in table}) == 1
    assert head[:3] == ["level", "sparsity", "weights left"]
    assert set(ruler) == {"---:"}
    said = [dict(zip(head, row, strict=True)) for row in rows]
    assert [(row["level"], row["sparsity"], row["accepted"], row["held"]) for row in said] == [
        (str(one.level), f"{one.sparsity:.2%}", "yes" if one.accepted else "no", "yes" if one.held else "no")
        for one in pruning.report.levels
    ]
    assert [row["held-out"] for row in said] == [f"{one.held_out_score:.6g}" for one in pruning.report.levels]


def test_the_curves_of_levels_cut_between_epochs_are_in_the_event_files(fit, tmp_path):
    pruning, logger = pruner(tolerance=math.inf, at_epoch=[2, 3, 4, 5], tree=Tree(0.4)), TensorBoardLogger(tmp_path)
    fit(pruning, logger=logger, max_epochs=8)
    found, report = scalars(logger.log_dir), pruning.report
    assert found["roulette/sparsity"] == [
        (0, 0.0),
        *((one.level, pytest.approx(one.sparsity)) for one in report.levels),
    ]
    *judged, (last, _) = found["roulette/held_out"]
    scores = ((one.level, pytest.approx(one.held_out_score)) for one in report.levels[:-1])
    assert judged == [(0, pytest.approx(report.held_out_dense)), *scores]
    assert last == 4
    (table,) = events(logger.log_dir).Tensors("roulette/report/text_summary")
    assert b"judged" in table.tensor_proto.string_val[0]


def test_any_other_logger_gets_the_same_points(fit, tmp_path):
    pruning, loggers = pruner(), [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path)]
    fit(pruning, logger=loggers)
    rows = rows_of(loggers[0])
    found = {tag: [(int(row["step"]), float(row[tag])) for row in rows if row[tag]] for tag in ours(rows[0])}
    assert rounded(found) == rounded(ours(scalars(loggers[1].log_dir))) == rounded(expected(pruning))


def test_a_csv_loggers_own_rows_are_as_without_a_search(fit, tmp_path):
    rows = []
    for name, callbacks in (("without", []), ("with", [pruner()])):
        logger = CSVLogger(tmp_path, name=name)
        fit(*callbacks, logger=logger)
        read = rows_of(logger)
        assert any(any(ours(row).values()) for row in read) == (name == "with")
        rows.append([users(row) for row in read if not any(ours(row).values())])
    assert rows[0] == rows[1]
    assert len(rows[0]) > 3


def test_without_a_logger_nothing_is_drawn(fit, tmp_path):
    pruning = pruner()
    fit(pruning, logger=False)
    assert pruning.report.sparsity > 0
    assert list(tmp_path.iterdir()) == []


def test_a_point_is_on_disk_when_its_level_is_done(fit, tmp_path):
    """Who watches a long search in TensorBoard sees it grow."""
    logger, seen = TensorBoardLogger(tmp_path), []

    class Watches(Blobs):
        def on_validation_epoch_start(self):
            if self.trainer.current_epoch == 3:
                drawn = scalars(logger.log_dir)
                seen.append(tuple(len(drawn.get(f"roulette/{tag}", [])) for tag in ("score", "held_out")))

    fit(pruner(branches=2, validation=Validation(race=False)), module=Watches(), logger=logger)
    # twelve validations come before the dense one, on each half of the data; a level is two candidates and the winner
    # on one half, and later the winner on the other; at last comes the loaded network, and a step that is counted
    levels = [(level, 1) for level in (1, 2, 3) for _ in range(3)]
    assert seen == [(0, 0)] * 14 + levels + [(4, 1), (4, 2), (4, 3), (4, 4), (4, 4)]
