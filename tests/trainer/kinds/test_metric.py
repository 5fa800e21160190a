"""Metrics of every kind: what grows with the data is judged in units of all the data, and the report says so."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from torchmetrics import MaxMetric, Metric, SumMetric

from lightning_roulette import Validation
from lightning_roulette.trainer.observers import Comparable
from lightning_roulette.trainer.scores.monitored_metric import MonitoredMetric
from tests.support.fits import pruner
from tests.support.modules import Blobs, val_loader
from tests.support.reports import CONFIRMED


class Judged(Blobs):
    """Logs the number of its errors, or what is made of them, as `val_errors`."""

    def validation_step(self, batch, batch_idx):
        self.log_errors(self(batch[0]), batch[1])

    def log_errors(self, scores, labels):
        raise NotImplementedError


class ReducedBySum(Judged):
    def log_errors(self, scores, labels):
        self.log("val_errors", (scores.argmax(1) != labels).float().sum(), reduce_fx="sum")


class Forked(Judged):
    def log_errors(self, scores, labels):
        errors = (scores.argmax(1) != labels).float().sum()
        self.log("val_errors", errors, reduce_fx="sum", on_step=True, on_epoch=True)


class Summed(Judged):
    """With a SumMetric."""

    def __init__(self):
        super().__init__()
        self.errors = SumMetric()

    def log_errors(self, scores, labels):
        self.errors((scores.argmax(1) != labels).float())
        self.log("val_errors", self.errors)


class Errors(Metric):
    """A user's count of errors."""

    higher_is_better = False

    def __init__(self):
        super().__init__()
        self.add_state("wrong", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, scores, labels):
        self.wrong += (scores.argmax(1) != labels).sum()

    def compute(self):
        return self.wrong


class Counted(Judged):
    """With a torchmetrics object of the user."""

    def __init__(self):
        super().__init__()
        self.errors = Errors()

    def log_errors(self, scores, labels):
        self.errors(scores, labels)
        self.log("val_errors", self.errors)


class AtEpochEnd(Judged):
    """A plain number that Lightning takes for a mean."""

    def on_validation_epoch_start(self):
        self.wrong = 0

    def log_errors(self, scores, labels):
        self.wrong += int((scores.argmax(1) != labels).sum())

    def on_validation_epoch_end(self):
        self.log("val_errors", float(self.wrong))


class Perfect(AtEpochEnd):
    """Makes no errors before it is pruned: a sum of zero does not tell that it is one."""

    def log_errors(self, scores, labels):
        self.wrong += 0 if bool((self.net[0].weight != 0).any()) else len(labels)


class Mean(Judged):
    def log_errors(self, scores, labels):
        self.log("val_errors", (scores.argmax(1) != labels).float().mean())


class MeanAtEpochEnd(AtEpochEnd):
    """A mean that Lightning is told to sum."""

    def on_validation_epoch_start(self):
        self.wrong, self.seen = 0, 0

    def log_errors(self, scores, labels):
        super().log_errors(scores, labels)
        self.seen += len(labels)

    def on_validation_epoch_end(self):
        self.log("val_errors", self.wrong / self.seen, reduce_fx="sum")


class Largest(Judged):
    def __init__(self):
        super().__init__()
        self.largest = MaxMetric()

    def log_errors(self, scores, labels):
        self.largest(cross_entropy(scores, labels, reduction="none").max())
        self.log("val_errors", self.largest)


class Root(AtEpochEnd):
    """Neither a mean nor a sum."""

    def on_validation_epoch_end(self):
        self.log("val_errors", float(self.wrong) ** 0.5)


def errors_of(module) -> int:
    """The errors on all validation data, counted here."""
    x, y = val_loader().dataset.tensors
    with torch.no_grad():
        return int((module.eval()(x).argmax(1) != y).sum())


def pruned(fit, kind, **options):
    usual = {"monitor": "val_errors", "mode": "min", "tolerance": float("inf")}
    pruning = pruner(**usual | options)
    return pruning, fit(pruning, module=kind(), val=val_loader(25), max_epochs=1)


SUMS = (ReducedBySum, Forked, Summed, Counted, AtEpochEnd)


@pytest.mark.parametrize("batch_size", [10, 30])
@pytest.mark.parametrize("kind", SUMS)
def test_a_sum_is_judged_in_units_of_all_the_data(fit, kind, batch_size):
    """The parts of the data, each scaled to all of it, have a weighted mean that is about the sum over all of it."""
    pruning = pruner(monitor="val_errors", mode="min", tolerance=float("inf"), validation=Validation(confirm=0.25))
    module, report = fit(pruning, module=kind(), val=val_loader(batch_size), max_epochs=1), pruning.report
    assert report.score == errors_of(module)
    module.load_state_dict(pruning.weights_at(0), strict=False)
    dense = errors_of(module)
    assert dense > 0
    assert 0.75 * report.dense_score + 0.25 * report.held_out_dense == pytest.approx(dense, rel=0.2)
    assert min(report.dense_score, report.held_out_dense) > 0.6 * dense
    assert "val_errors is a sum over the data" in " ".join(report.notes)


@pytest.mark.parametrize("kind", SUMS)
def test_a_tolerance_of_a_sum_holds_for_all_the_data(fit, kind):
    """The tolerance, a count, is kept on all the data, up to what held-out data of half the size can tell."""
    pruning, module = pruned(fit, kind, tolerance=6)
    report = pruning.report
    for level in report.accepted:
        assert level.score <= report.dense_score + 6
    assert report.score == errors_of(module)


def test_a_sum_of_zero_is_found_on_the_network_without_weights(fit):
    pruning, _ = pruned(fit, Perfect)
    assert "is a sum over the data" in " ".join(pruning.report.notes)


@pytest.mark.parametrize("kind", [Mean, MeanAtEpochEnd])
def test_a_mean_is_left_as_it_is_and_nothing_is_said(fit, kind):
    pruning, _ = pruned(fit, kind)
    assert pruning.report.notes == ()
    assert pruning.report.dense_score <= 1


@pytest.mark.parametrize("kind", [Largest, Root])
def test_what_is_neither_a_mean_nor_a_sum_is_said(fit, kind):
    pruning, _ = pruned(fit, kind)
    assert "val_errors is neither a mean nor a sum" in " ".join(pruning.report.notes)


@pytest.mark.parametrize("kind", [ReducedBySum, Counted])
def test_the_error_of_a_sum_is_in_its_units(fit, kind):
    """A level's paired error follows from the changes of single batches or samples, which are not below one error."""
    pruning, _ = pruned(fit, kind)
    (level,) = pruning.report.accepted
    assert level.held_out_score != pruning.report.held_out_dense
    assert level.held_out_error > 0.5


class LooksUp(Blobs):
    """Looks up its targets by the number of the batch."""

    def validation_step(self, batch, batch_idx):
        targets = val_loader(10).dataset.tensors[1].split(10)[batch_idx]
        self.log("val_acc", (self(batch[0]).argmax(1) == targets).float().mean())


class FillsATable(Blobs):
    """Fills a table of all samples, and counts the hits in the whole table."""

    def on_validation_epoch_start(self):
        self.hits = torch.zeros(200)

    def validation_step(self, batch, batch_idx):
        inputs = val_loader(10).dataset.tensors[0]
        places = (batch[0][:, None] == inputs[None]).all(2).int().argmax(1)
        self.hits[places] = (self(batch[0]).argmax(1) == batch[1]).float()

    def on_validation_epoch_end(self):
        self.log("val_acc", self.hits.mean())


@pytest.mark.parametrize("kind", [LooksUp, FillsATable])
def test_a_metric_that_parts_of_the_data_do_not_tell_is_refused(kind, fit):
    module = kind()
    with pytest.raises(RuntimeError, match=r"of the dense network is 0\.9\d* on all validation data, but 0\."):
        fit(pruner(tolerance=0.02), module=module, val=val_loader(10), max_epochs=4)
    assert bool((module.net[0].weight != 0).all())
    pruning = pruner(tolerance=0.05, validation=Validation(confirm=0, race=False))
    module = fit(pruning, module=kind(), val=val_loader(10), max_epochs=4)
    inputs, classes = val_loader(10).dataset.tensors
    counted = float((module(inputs).argmax(1) == classes).float().mean())
    assert counted == pytest.approx(pruning.report.score, abs=1e-6)
    assert counted >= pruning.report.dense_measured - 0.05 - 1e-6


def test_the_error_gives_the_values_as_they_were_logged():
    metric = MonitoredMetric("likelihood", "max", "", None, "likelihood", "max")
    report = replace(CONFIRMED, dense_score=-9.0, held_out_dense=-8.0)
    with pytest.raises(RuntimeError, match=r"likelihood of the dense network is -3 on all.* but -9 on .* and -8 on"):
        Comparable(-3.0, metric).on_dense(SimpleNamespace(report=report), 1.0)
