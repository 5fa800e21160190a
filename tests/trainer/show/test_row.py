"""A search as a row: in the table of hyperparameters of TensorBoard, and in what other loggers keep."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.plugins.hparams import metadata

from tests.support import fits
from tests.support.events import events, scalars
from tests.support.modules import Blobs

pruner = partial(fits.pruner, tolerance=0.3)


class WithHyperparameters(Blobs):
    """A module that logs its hyperparameters."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.save_hyperparameters()


def row(folder: Path | str) -> dict[str, float | str]:
    """The settings in the row of a run."""
    read = events(str(folder))
    stored = read.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    started = metadata.parse_session_start_info_plugin_data(stored)
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in started.hparams.items()}


def columns(folder: Path | str) -> tuple[set[str], set[str]]:
    """The names of settings and of metrics that the table of a run has."""
    stored = events(str(folder)).SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    table = metadata.parse_experiment_plugin_data(stored)
    return {one.name for one in table.hparam_infos}, {one.name.tag for one in table.metric_infos}


def test_a_search_is_a_row_of_its_settings_and_its_final_numbers(fit, tmp_path):
    pruning, logger = pruner(tolerance=None, seed=3), TensorBoardLogger(tmp_path)
    fit(pruning, logger=logger)
    found, (settings, metrics) = row(logger.log_dir), columns(logger.log_dir)
    assert found.keys() == settings
    assert found["roulette/tolerance"] == pruning.report.tolerance
    assert found["roulette/monitor"] == "val_acc"
    assert (found["roulette/branches"], found["roulette/seed"], found["roulette/refit"]) == (2, 3, "None")
    assert found["roulette/tree.pruning_rate"] == 0.2
    points = scalars(logger.log_dir)
    assert {points[tag][0][0] for tag in metrics} == {pruning.report.winner.level}
    assert points["roulette-result/sparsity"][0][1] == pytest.approx(pruning.report.sparsity)
    assert {
        f"roulette-result/{one}" for one in ("sparsity", "decline", "held_out_decline", "seconds", "bytes")
    } <= metrics


def test_the_row_of_the_modules_hyperparameters_stays_and_ours_has_them_too(fit, tmp_path):
    pruning, logger = pruner(), TensorBoardLogger(tmp_path)
    fit(pruning, logger=logger, module=WithHyperparameters(0.02))
    ours = Path(logger.log_dir, "roulette_1")
    assert row(logger.log_dir) == {"lr": 0.02}
    assert row(ours)["lr"] == 0.02
    assert row(ours)["roulette/branches"] == 2
    assert scalars(str(ours))["roulette-result/sparsity"][0][1] == pytest.approx(pruning.report.sparsity)


def test_each_search_of_one_run_has_a_row(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    for seed in range(3):
        fit(pruner(seed=seed), logger=logger)
    folders = [logger.log_dir, *(Path(logger.log_dir, f"roulette_{number}") for number in (1, 2))]
    assert [row(one)["roulette/seed"] for one in folders] == [0, 1, 2]


def test_other_loggers_get_the_settings_as_hyperparameters(fit, tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path), CSVLogger(tmp_path, name="other")]
    fit(pruner(), logger=loggers, module=WithHyperparameters(0.02))
    for logger in (loggers[0], loggers[2]):
        kept = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())
        assert kept["lr"] == 0.02
        assert kept["roulette/wheel.sharpness"] == 16.0
        assert kept["roulette/tolerance"] == 0.3


def test_a_logger_that_refuses_the_settings_does_not_end_the_fit(fit, tmp_path, caplog, monkeypatch):
    def refuse(params):
        raise ValueError("Changing param values is not allowed")

    caplog.set_level(logging.WARNING, logger="lightning_roulette")
    pruning, logger = pruner(), CSVLogger(tmp_path)
    monkeypatch.setattr(logger, "log_hyperparams", refuse)
    fit(pruning, logger=logger)
    assert "CSVLogger refused the settings of the search: Changing param values" in caplog.text
    assert pruning.report.sparsity > 0
    assert "roulette-result/sparsity" in Path(logger.log_dir, "metrics.csv").read_text()
