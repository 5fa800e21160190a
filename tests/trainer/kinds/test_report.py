"""Counted equals reported: what a report says of both networks is what `trainer.validate` says of them."""

from __future__ import annotations

import copy

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torchmetrics.classification import MulticlassF1Score

from lightning_roulette import Tree, Validation
from tests.support.callbacks import within
from tests.support.fits import pruner
from tests.support.modules import Blobs, Fetches, val_loader


class F1(Blobs):
    """Is judged by a metric that is no mean over samples."""

    def __init__(self):
        super().__init__()
        self.val_acc = MulticlassF1Score(10, average="macro")


class Reader(Fetches, Blobs):
    """Reads the iterator over its validation batches."""


class Centred(Blobs):
    """Logs other values on regrouped samples: it subtracts the mean of a batch."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


class Dense(Callback):
    """Copies the dense network: at the end of training, or before the first cut."""

    def __init__(self, at_epoch: int | None = None):
        self.at_epoch, self.network = at_epoch, None

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == self.at_epoch:
            self.network = copy.deepcopy(module.state_dict())

    def on_train_end(self, trainer, module):
        if self.at_epoch is None:
            self.network = copy.deepcopy(module.state_dict())


CUTS = {"at_epoch": range(1, 3), "branches": None, "tree": Tree(0.2)}
NOTHING_KEPT = Validation(cache_bytes=0)

KINDS = {
    "kept in memory": (Blobs, val_loader, {}),
    "nothing held out": (Blobs, val_loader, {"validation": Validation(confirm=0)}),
    "many batches": (Blobs, lambda: val_loader(20), {}),
    "streamed": (Blobs, lambda: val_loader(20), {"validation": NOTHING_KEPT}),
    "streamed, one batch": (Blobs, lambda: val_loader(200), {"validation": NOTHING_KEPT}),
    "read by the module": (Reader, val_loader, {}),
    "no mean over samples": (F1, val_loader, {}),
    "no mean, streamed": (F1, lambda: val_loader(20), {"validation": NOTHING_KEPT}),
    "regrouping matters": (Centred, val_loader, {}),
    "a loss": (Blobs, val_loader, {"monitor": "val_loss", "tolerance": 2.0}),
    "a network that stays dense": (Blobs, val_loader, {"tolerance": 0.0, "tree": Tree(0.99, patience=1)}),
    "search at an epoch": (Blobs, val_loader, {"at_epoch": 1}),
    "cuts": (Blobs, val_loader, CUTS),
    "cuts, streamed": (Blobs, lambda: val_loader(20), CUTS | {"validation": NOTHING_KEPT}),
    "cuts of several candidates": (Blobs, val_loader, CUTS | {"branches": 2}),
}


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
@pytest.mark.parametrize(("kind", "loader", "options"), KINDS.values(), ids=KINDS)
def test_both_networks_are_measured_on_all_validation_data(kind, loader, options, fit, make_trainer):
    first, monitor = options.get("at_epoch"), options.get("monitor", "val_acc")
    before = Dense(first[0] if isinstance(first, range) else first)
    pruning = pruner(**options)
    module = fit(before, pruning, module=kind(), val=loader(), max_epochs=3)

    def counted(weights):
        twin = kind()
        twin.load_state_dict(weights)
        return make_trainer().validate(twin, loader(), verbose=False)[-1][monitor]

    report = pruning.report
    assert report.dense_measured == pytest.approx(counted(before.network), abs=1e-6)
    measured = report.score if report.trained_score is None else report.trained_score
    assert measured == pytest.approx(counted(module.state_dict()), abs=1e-6)
    line = next(line for line in report.summary() if line.startswith(monitor))
    assert f"dense {report.dense_measured:.6g}" in line
    assert report.winner is None or f"pruned {report.score:.6g}" in line


def test_a_network_that_stays_dense_scores_what_the_dense_network_scored(fit):
    pruning = pruner(tolerance=0.0, tree=Tree(0.99, patience=1))
    fit(pruning)
    assert (pruning.report.winner, pruning.report.score) == (None, pruning.report.dense_measured)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_cuts_that_are_resumed_remember_the_dense_network(fit, tmp_path):
    def stop(trainer, module):
        if trainer.current_epoch == 2:
            raise RuntimeError("killed")

    first, whole, resumed = (pruner(**CUTS | {"at_epoch": range(1, 4)}) for _ in range(3))
    keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    fit(whole, max_epochs=4)
    with pytest.raises(RuntimeError, match="killed"):
        fit(first, keep, within("on_train_epoch_end", stop, times=9), max_epochs=4, enable_checkpointing=True)
    fit(resumed, ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=4)
    assert resumed.report.dense_measured == whole.report.dense_measured == whole.report.held_out_dense
