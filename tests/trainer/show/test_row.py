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
from tests.support.modules import Blobs, BlobsData

pruner = partial(fits.pruner, tolerance=0.3)


class WithHyperparameters(Blobs):
    """A module that logs its hyperparameters."""

    def __init__(self, lr: float = 1e-2, more: dict | None = None) -> None:
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
    pruning, logger = pruner(seed=3), TensorBoardLogger(tmp_path)
    fit(pruning, logger=logger)
    found, (settings, metrics) = row(logger.log_dir), columns(logger.log_dir)
    assert found.keys() == settings
    assert (found["roulette/tolerance"], found["roulette/refit"]) == ("0.3", "None")
    assert (found["roulette/branches"], found["roulette/seed"], found["roulette/tree.pruning_rate"]) == (2, 3, 0.2)
    points = {tag: found for tag, found in scalars(logger.log_dir).items() if tag.startswith("roulette-result/")}
    assert points.keys() == metrics
    assert {found[0][0] for found in points.values()} == {pruning.report.winner.level}
    assert points["roulette-result/sparsity"][0][1] == pytest.approx(pruning.report.sparsity)


class Data(BlobsData):
    """Data that logs its hyperparameters."""

    def __init__(self, batch_size: int = 50) -> None:
        super().__init__(batch_size)
        self.save_hyperparameters()


def test_the_hyperparameters_of_module_and_data_are_in_the_same_row(fit, tmp_path):
    pruning, logger = pruner(), TensorBoardLogger(tmp_path)
    module = WithHyperparameters(0.02, {"depth": {"of": 3}, "sizes": [3, 4]})
    fit(pruning, logger=logger, module=module, datamodule=Data(40))
    found, (settings, metrics) = row(logger.log_dir), columns(logger.log_dir)
    mine = {name: value for name, value in found.items() if not name.startswith("roulette")}
    assert mine == {"lr": 0.02, "more/depth/of": 3, "more/sizes": "[3, 4]", "batch_size": 40}
    assert found["roulette/branches"] == 2
    assert found.keys() == settings
    assert {"hp_metric", "roulette-result/sparsity"} <= metrics
    assert [one for one in Path(logger.log_dir).iterdir() if one.is_dir()] == []
    kept = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())
    assert (kept["lr"], kept["batch_size"], kept["roulette/seed"]) == (0.02, 40, 0)


def test_each_search_of_one_run_has_a_row(fit, tmp_path):
    logger, found = TensorBoardLogger(tmp_path), []
    for seed in range(3):
        found.append(pruner(seed=seed))
        fit(found[-1], logger=logger, module=WithHyperparameters(0.02))
    folders = [Path(logger.log_dir), *(Path(logger.log_dir, f"roulette_{number}") for number in (1, 2))]
    assert [(row(one)["roulette/seed"], row(one)["lr"]) for one in folders] == [(0, 0.02), (1, 0.02), (2, 0.02)]
    for folder, pruning in zip(folders[1:], found[1:], strict=True):
        assert scalars(str(folder))["roulette-result/score"][0][1] == pytest.approx(pruning.report.score)


def test_other_loggers_get_the_settings_as_hyperparameters(fit, tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path), CSVLogger(tmp_path, name="other")]
    fit(pruner(), logger=loggers, module=WithHyperparameters(0.02))
    for logger in (loggers[0], loggers[2]):
        kept = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())
        assert kept["lr"] == 0.02
        assert kept["roulette/wheel.sharpness"] == 16.0
        assert kept["roulette/tolerance"] == "0.3"


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
