"""Calibration batches that run by turns within a fit."""

from __future__ import annotations

import logging
import math
import threading

import pytest
import torch
from torch import nn

from lightning_roulette import LeastSquares, Tree
from lightning_roulette.trainer.data.training_inputs import TrainerCalibration
from tests.support import fits
from tests.support.limits import set_limits
from tests.support.modules import Blobs, dense_net
from tests.support.results import equal


class Deep(Blobs):
    """Seven layers with a batch normalisation and dropout, and a list that gathers outputs of steps."""

    forwards = 0  # of the class, as attributes of the module are put back

    def __init__(self) -> None:
        super().__init__()
        layers = [*dense_net(16, *[12] * 6, 10)]
        self.net = nn.Sequential(*layers[:1], nn.BatchNorm1d(12), *layers[1:6], nn.Dropout(0.5), *layers[6:])
        self.outputs = []

    def forward(self, x):
        Deep.forwards += 1
        return super().forward(x)

    def on_validation_epoch_start(self):
        self.outputs.clear()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx, dataloader_idx)
        self.outputs.append(batch_idx)


class Calibrating(Deep):
    """Has a calibration step, which logs."""

    def calibration_step(self, batch):
        self.log("seen", self(batch[0]).mean())


class Keeping(Deep):
    """Keeps a tensor on itself between two layers."""

    def forward(self, x):
        Deep.forwards += 1
        self.kept = self.net[0](x)
        return self.net[2:](self.net[1](self.kept) + self.kept)


@pytest.fixture
def searched(fit, monkeypatch):
    set_limits(monkeypatch, joined_bytes=0)

    def search(module, cache_bytes, **options):
        refit = LeastSquares(batches=5, cache_bytes=cache_bytes)
        pruning = fits.pruner(refit=refit, tolerance=math.inf, tree=Tree(0.2, max_levels=2))
        fit(pruning, module=module, max_epochs=1, **options)
        return pruning

    return search


@pytest.fixture
def forwards_of_refits(monkeypatch):
    """How often the network runs in each refit by least squares."""
    counted, refit = [], TrainerCalibration.refit

    def watched(self, mask, how, *rest, **options):
        before, threads = Deep.forwards, threading.active_count()
        found = refit(self, mask, how, *rest, **options)
        if isinstance(how, LeastSquares):
            counted.append(Deep.forwards - before)
        assert threading.active_count() == threads
        return found

    monkeypatch.setattr(TrainerCalibration, "refit", watched)
    return counted


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", [Deep, Calibrating])
def test_each_batch_runs_once_in_a_refit_and_results_are_the_same(
    searched, forwards_of_refits, caplog, kind, precision
):
    caplog.set_level(logging.INFO)
    by_turns = searched(kind(), 2**31, precision=precision)
    assert forwards_of_refits == [5, 5]  # it was tried when the running statistics of the dense network were computed
    assert not any("calibration batches" in message for message in caplog.messages)
    forwards_of_refits.clear()
    one_by_one = searched(kind(), 0, precision=precision)
    assert forwards_of_refits == [8 * 5, 7 * 5]
    assert by_turns.report.levels == one_by_one.report.levels
    assert all(equal(by_turns.weights_at(level), one_by_one.weights_at(level)) for level in range(3))
    assert torch.get_default_dtype() == torch.float32


def test_a_module_that_keeps_something_is_refitted_layer_by_layer_and_it_is_said(searched, forwards_of_refits, caplog):
    caplog.set_level(logging.INFO)
    searched(Keeping(), 2**31)
    (message,) = [message for message in caplog.messages if "calibration batches" in message]
    assert message == (
        "RouletteWheelPruning: the calibration batches run anew for each layer, because they cannot run by turns (the "
        "inputs of net.3.weight change then)."
    )
    assert forwards_of_refits[1:] == [7 * 5]
