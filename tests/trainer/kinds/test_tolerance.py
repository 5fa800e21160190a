"""The default tolerance for metrics of every kind: counted from the network's outputs, in the report and in the log."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassF1Score

from lightning_roulette import RouletteWheelPruning, Tree, Validation
from lightning_roulette.report.words import start
from tests.support.fits import pruner
from tests.support.modules import Blobs, Fetches, trained, val_loader
from tests.support.results import SavesAtEnd

ON_ALL = Validation(confirm=0)
POINTS = 200


class Plain(Blobs):
    """Logs the loss of each batch as a number, and nothing else."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))


class Summed(Blobs):
    """Logs the number of errors of each batch, as a sum."""

    def validation_step(self, batch, batch_idx):
        self.log("val_errors", (self(batch[0]).argmax(1) != batch[1]).float().sum(), reduce_fx="sum")


class AtEpochEnd(Blobs):
    """Logs an accuracy that it counts itself."""

    def on_validation_epoch_start(self):
        self.right = []

    def validation_step(self, batch, batch_idx):
        self.right.append((self(batch[0]).argmax(1) == batch[1]).float())

    def on_validation_epoch_end(self):
        self.log("val_acc", torch.cat(self.right).mean())


class Squared(Blobs):
    """Is judged by a mean squared error, of a torchmetrics object."""

    def __init__(self):
        super().__init__()
        self.val_mse = MeanSquaredError()

    def validation_step(self, batch, batch_idx):
        self.val_mse(self(batch[0]).softmax(1)[:, 0], (batch[1] == 0).float())
        self.log("val_mse", self.val_mse)


class F1(Blobs):
    """Is judged by a metric that is no mean over samples."""

    def __init__(self):
        super().__init__()
        self.val_acc = MulticlassF1Score(10, average="macro")


class Iterator(Fetches, Blobs):
    """Reads the iterator over its batches, so the data cannot be divided."""


def hits(scores, labels):
    return (scores.argmax(1) == labels).double()


def squares(scores, labels):
    return (scores.softmax(1)[:, 0] - (labels == 0).float()).square().double()


def losses(scores, labels):
    return cross_entropy(scores, labels, reduction="none").double()


# the module; the score of a point; whether the metric is their sum; how far our number may be from the textbook's
KINDS = {
    "accuracy": (Blobs, hits, False, 1e-6),
    "accuracy, not divided": (Iterator, hits, False, 1e-6),
    "mean squared error, resampled": (Squared, squares, False, 0.5),
    "F1, resampled": (F1, hits, False, 0.5),
    "loss of batches": (Plain, losses, False, 0.6),
    "errors, summed": (Summed, hits, True, 0.6),
    "accuracy at the end of the epoch": (AtEpochEnd, hits, False, 0.6),
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Weights that have learned a little."""
    weights = trained(Blobs(), tmp_path_factory.mktemp("learned"))
    return {name: value for name, value in weights.items() if name.startswith("net")}


def dense(kind, learned):
    """A module with these weights, which training does not change."""
    module = kind()
    module.lr = 0.0
    module.load_state_dict(learned, strict=False)
    return module


def by_textbook(module, score, is_sum: bool) -> float:
    """Half the standard error of a mean, or of a sum, over all points."""
    x, y = val_loader().dataset.tensors
    with torch.no_grad():
        values = score(module.net(x), y)
    return float(values.std()) / math.sqrt(POINTS) * (POINTS if is_sum else 1) / 2


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
@pytest.mark.parametrize(("kind", "score", "is_sum", "far"), KINDS.values(), ids=KINDS)
def test_it_is_half_a_standard_error_of_the_dense_score(kind, score, is_sum, far, fit, learned):
    mode = "min" if is_sum else None
    module, pruning = dense(kind, learned), pruner(tolerance=None, validation=ON_ALL, mode=mode)
    expected = by_textbook(copy.deepcopy(module), score, is_sum)
    fit(pruning, module=module, max_epochs=1)
    report = pruning.report
    assert report.tolerance == pytest.approx(expected, rel=far)
    assert report.tolerance_why.startswith("half a standard error of the dense score on the validation data")
    assert f"allowed {report.tolerance:.4g} (half a standard error of the dense score" in str(report)


def test_fewer_samples_allow_more(fit, learned):
    halves, whole = pruner(tolerance=None), pruner(tolerance=None, validation=ON_ALL)
    for pruning in (halves, whole):
        fit(pruning, module=dense(Blobs, learned), max_epochs=1)
    assert halves.report.tolerance / whole.report.tolerance == pytest.approx(math.sqrt(2), rel=0.3)
    assert halves.report.tolerance_why.endswith("on the held-out half, from 100 samples")


@pytest.mark.parametrize(("monitor", "verb"), [("val_acc", "fall"), ("val_loss", "rise")])
@pytest.mark.parametrize("tolerance", [None, 0.05, 0.0, math.inf], ids=["none", "number", "zero", "infinity"])
def test_the_line_at_the_start_says_what_it_allows(monitor, verb, tolerance, fit, learned, caplog):
    pruning = pruner(tolerance=tolerance, monitor=monitor)
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        fit(pruning, module=dense(Blobs, learned), max_epochs=1)
    (line,) = (one for one in caplog.messages if "dense network on the search half (8 of 16 folds): " in one)
    report, sign = pruning.report, 1 if verb == "rise" else -1
    at = f"{monitor} {report.dense_score:.6g}, "
    to = f"may {verb} to {report.dense_score + sign * report.tolerance:.6g} (tolerance {report.tolerance:.3g}"
    endings = {None: f"{to}: {report.tolerance_why}; pass tolerance=... to choose another). ", 0.05: f"{to}). "}
    endings |= {0.0: f"may not {verb} (tolerance 0). ", math.inf: "no floor. "}
    assert at + endings[tolerance] in line


def test_a_network_without_errors_may_lose_nothing_and_this_is_said(fit, learned, caplog):
    module = dense(Blobs, learned)
    x = val_loader().dataset.tensors[0]
    with torch.no_grad():
        easy = torch.utils.data.TensorDataset(x, module(x).argmax(1))
    pruning = pruner(tolerance=None)
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        fit(pruning, module=module, val=torch.utils.data.DataLoader(easy, 64), max_epochs=1)
    why = "the standard error of the dense score on the held-out half is zero"
    assert (pruning.report.tolerance, pruning.report.tolerance_why) == (0.0, why)
    assert any(f"may not fall (tolerance 0: {why}; pass tolerance=" in line for line in caplog.messages)


def test_a_network_that_has_hardly_learned_keeps_what_it_has(fit, learned):
    """Half a standard error is a large part of what its weights add to the score. It may lose a tenth of that."""
    module, chance, points = dense(Blobs, learned), torch.Generator().manual_seed(0), 40
    x, y = (one[:points] for one in val_loader().dataset.tensors)
    y = torch.where(torch.rand(points, generator=chance) < 0.15, y, torch.randint(10, (points,), generator=chance))
    pruning = pruner(tolerance=None, validation=ON_ALL)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), points)
    with torch.no_grad():
        score, at_zero = (float(hits(one, y).mean()) for one in (module(x), module.net[2].bias.expand(points, 10)))
    fit(pruning, module=module, val=data, max_epochs=1)
    assert pruning.report.tolerance == pytest.approx(0.1 * (score - at_zero), rel=0.25)  # it is measured on a part
    assert "a tenth of what the prunable weights add to the score, because half a standard error" in str(pruning.report)


@pytest.mark.parametrize("branches", [1, 3])
def test_between_epochs_it_is_found_once_before_the_first_cut(branches, fit, learned, caplog):
    choices = {"at_epoch": range(1, 4), "branches": branches, "tree": Tree(0.3)}
    module, pruning = dense(Blobs, learned), pruner(tolerance=None, **choices)
    expected = by_textbook(copy.deepcopy(module), hits, False)
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        fit(pruning, module=module, max_epochs=5)
    report = pruning.report
    assert report.gradual
    assert report.tolerance == pytest.approx(expected, rel=1e-6 if branches == 1 else 1.0)
    (line,) = (one for one in caplog.messages if "dense network after 1 epoch: " in one)
    assert f"may fall to {report.held_out_floor:.6g} (tolerance {report.tolerance:.3g}: half a standard error" in line
    assert report.levels[0].accepted


def test_a_resumed_training_keeps_the_number_that_was_found_first(fit, tmp_path):
    first, second = (RouletteWheelPruning(at_epoch=range(1, 4), tree=Tree(0.3)) for _ in range(2))
    fit(first, SavesAtEnd(tmp_path / "half.ckpt", 2), max_epochs=5)
    found = first.report.tolerance
    fit(second, ckpt_path=tmp_path / "half.ckpt", max_epochs=5)
    assert second.report.tolerance == found > 0
    assert second.report.tolerance_why == first.report.tolerance_why
    assert start(second.report) == start(first.report)
