"""Loggers and writers that a module keeps: a search writes nothing with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from lightning_roulette.trainer.validation.writers import muted_writers
from tests.support.fits import pruner
from tests.support.modules import Blobs


class Keeps(Blobs):
    """Writes a number at every step of a validation; a subclass says how."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.steps = folder, 0
        self.begin()

    def begin(self):
        pass

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.write(float(self.net[0].weight.norm()))
        self.steps += 1

    def points(self):
        """The numbers that were written."""
        events = EventAccumulator(str(self.folder)).Reload()
        return [one.value for one in events.Scalars("norm")]


class KeepsWriter(Keeps):
    def begin(self):
        self.writer = SummaryWriter(str(self.folder))

    def write(self, value):
        self.writer.add_scalar("norm", value, self.steps)
        self.writer.add_histogram("all", self.net[0].weight, self.steps)
        self.writer.flush()


class KeepsList(KeepsWriter):
    def begin(self):
        self.writers = [SummaryWriter(str(self.folder))]

    def write(self, value):
        self.writers[0].add_scalars("several", {"norm": value}, self.steps)
        self.writers[0].add_scalar("norm", value, self.steps)
        self.writers[0].flush()


class InSubmodule(KeepsWriter):
    def begin(self):
        self.part = nn.Identity()
        self.part.writer = SummaryWriter(str(self.folder))

    def write(self, value):
        self.part.writer.add_scalar("norm", value, self.steps)
        self.part.writer.flush()


class KeepsLogger(Keeps):
    def begin(self):
        self.own = TensorBoardLogger(self.folder, name="", version="")

    def write(self, value):
        self.own.log_metrics({"norm": value}, self.steps)
        self.own.experiment.add_scalar("other", value, self.steps)
        self.own.log_graph(self, torch.zeros(1, 16))
        self.own.experiment.flush()


class KeepsCSV(Keeps):
    def begin(self):
        self.own = {"csv": CSVLogger(self.folder, name="", version="")}

    def write(self, value):
        self.own["csv"].log_metrics({"norm": value}, self.steps)
        self.own["csv"].save()

    def points(self):
        head, *lines = (self.folder / "metrics.csv").read_text().splitlines()
        return [float(line.split(",")[head.split(",").index("norm")]) for line in lines]


class KeepsExperiment(Keeps):
    """Keeps what its Trainer's logger gave it."""

    def on_fit_start(self):
        self.experiment = self.logger.experiment

    def write(self, value):
        self.experiment.add_scalar("norm", value, self.steps)
        self.experiment.flush()


class Run:
    """An experiment tracker's run; it may write in any method."""

    def __init__(self):
        self.found = []

    def track(self, value):
        self.found.append(value)


Run.__module__ = "aim.sdk.run"


class KeepsRun(Keeps):
    def begin(self):
        self.run = Run()

    def write(self, value):
        self.run.track(value)

    def points(self):
        return self.run.found


KINDS = [KeepsWriter, KeepsList, InSubmodule, KeepsLogger, KeepsCSV, KeepsExperiment, KeepsRun]


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_curves_are_those_without_a_search(kind, fit, tmp_path):
    found = []
    for name, callbacks in (("plain", ()), ("searched", (pruner(refit="least_squares"),))):
        module = kind(tmp_path / name)
        logger = TensorBoardLogger(tmp_path / name, name="", version="") if kind is KeepsExperiment else False
        fit(*callbacks, module=module, max_epochs=3, logger=logger, num_sanity_val_steps=0)
        found.append(module.points())
    assert found[0] == found[1]
    assert len(found[0]) == 12  # four batches in each of three validations


def test_what_is_no_writer_is_left_as_it_is():
    class Plain(Blobs):
        def __init__(self):
            super().__init__()
            self.names, self.sizes, self.table, self.chance = ["a"], {"b": 1}, (torch.zeros(1),), torch.Generator()
            self.itself = self.names

    assert muted_writers(Plain(), []) == []
