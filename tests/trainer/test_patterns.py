"""Fits whose layers keep some of each few neighbouring weights, or lose blocks."""

from __future__ import annotations

import logging
import math
import pickle

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_roulette import Block, LeastSquares, NofM, Reduction, Tree, Wheel
from tests.support.fits import pruner
from tests.support.modules import Blobs
from tests.support.results import load


class Channels(Blobs):
    """A convolution whose inputs are a single channel, one with eight, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        first, second = nn.Conv1d(1, 8, 3, padding=1), nn.Conv1d(8, 4, 3, padding=1)
        self.net = nn.Sequential(nn.Unflatten(1, (1, -1)), first, nn.ReLU(), second, nn.Flatten(), nn.Linear(64, 10))


CHOSEN = {"wheel": Wheel(unit=NofM(2, 4)), "refit": LeastSquares(choose=True, batches=4), "tolerance": math.inf}


def two_of_four(kept: torch.Tensor) -> bool:
    return bool((kept.movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1) == 2).all())


def test_two_of_four_stay_in_every_layer_that_has_such_groups(fit, caplog):
    pruning = pruner(branches=2, tree=Tree(0.2, coarse_rate=None), **CHOSEN)
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        fit(pruning, module=Channels(), enable_checkpointing=True)
    stored = load(pruning.best_model_path)["state_dict"]
    assert two_of_four(stored["net.3.weight"] != 0)
    assert two_of_four(stored["net.5.weight"] != 0)
    assert bool((stored["net.1.weight"] != 0).all())
    assert (pruning.report.unit, pruning.report.units, pruning.report.winner.units) == ("layer", 2, 0)
    assert "net.1.weight (its number of inputs is no multiple of 4)" in caplog.text


@pytest.mark.parametrize("unit", [NofM(2, 4), Block(2, 4)])
def test_a_target_counts_the_multiply_adds_of_one_sample(fit, unit):
    tree = Tree(0.2, coarse_rate=None, target=Reduction(multiply_adds=0.3))
    module = Channels()
    pruning = pruner(wheel=Wheel(unit=unit), tolerance=math.inf, tree=tree, branches=2, refit=None)
    fit(pruning, module=module)
    report = pruning.report
    assert report.multiply_adds == 16 * 24 + 16 * 96 + 640
    left = sum(
        positions * int(module.get_parameter(f"net.{place}.weight").count_nonzero())
        for place, positions in ((1, 16), (3, 16), (5, 1))
    )
    assert report.winner.multiply_adds == left <= 0.7 * report.multiply_adds
    assert report.target_met


def test_what_processes_tell_each_other_can_be_sent(fit, monkeypatch):
    """Layers cannot be pickled, so each process finds them, and only costs are sent."""
    sent = []

    def broadcast(self, one, src=0):
        sent.append(type(one).__name__)
        return pickle.loads(pickle.dumps(one))

    monkeypatch.setattr(SingleDeviceStrategy, "broadcast", broadcast)
    monkeypatch.setattr("lightning_roulette.trainer.units._several", lambda fit: True)
    tree = Tree(0.4, coarse_rate=None, target=Reduction(multiply_adds=0.3))
    pruning = pruner(wheel=Wheel(unit=NofM(2, 4)), tolerance=math.inf, tree=tree, branches=1, refit=None)
    fit(pruning, module=Channels())
    assert "tuple" in sent
    assert pruning.report.target_met
