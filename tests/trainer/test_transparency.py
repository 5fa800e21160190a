"""Training with searches in it is bit for bit training without."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable as Function
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_roulette import RouletteWheelPruning, Tree, Wheel
from tests.support.callbacks import HOOKS, counting_class, within
from tests.support.isolated import one_level
from tests.support.modules import Blobs, blobs, train_loader, val_loader
from tests.support.state import changed, content

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled.*"),
    pytest.mark.filterwarnings("ignore:.*requested to overfit but enabled.*"),
    pytest.mark.filterwarnings("ignore:.*`dataloader_iter`.*"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`.*"),
]


class Lively(Blobs):
    """Dropout, normalisation, noise, a metric of training on step and epoch, and a plateau scheduler."""

    monitor = "val_acc"

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.2))
        self.train_acc = MulticlassAccuracy(10)

    def forward(self, x):
        return self.net(self.front(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.train_acc(self(x), y)
        self.log("train_acc", self.train_acc, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        self.log("val_noise", noise, on_step=True, on_epoch=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.monitor}}


class Unscheduled(Lively):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class TwoLoaders(Lively):
    monitor = "val_acc/dataloader_idx_0"


class TwoAtOnce(Lively):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch["a"], batch_idx)
        self.log("other_loss", cross_entropy(self(batch["b"][0]), batch["b"][1]), batch_size=50)


class Iterating(Lively):
    """Fetches its validation batches itself."""

    def validation_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        super().validation_step(batch, batch_idx)


class Manual(Unscheduled):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


class Stream(IterableDataset):
    """Data without a length."""

    def __iter__(self):
        return iter(blobs(200, 2))


@dataclass(frozen=True)
class Case:
    """A way to train."""

    options: dict[str, Any] = field(default_factory=dict)
    loaders: Function[[], Any] = val_loader
    module: type[Lively] = Lively
    folds: tuple[int, int] = (8, 8)
    callbacks: Function[[], list[Callback]] = list


CASES = {
    "default": Case(),
    "validation twice an epoch": Case({"val_check_interval": 0.5}),
    "validation every 5 batches": Case({"val_check_interval": 5, "check_val_every_n_epoch": None}),
    "validation by the clock": Case({"val_check_interval": "00:00:00:00", "check_val_every_n_epoch": None}),
    "validation every second epoch": Case({"check_val_every_n_epoch": 2}, module=Unscheduled),
    "no sanity check": Case({"num_sanity_val_steps": 0}),
    "limited validation": Case({"limit_val_batches": 2}),
    "shuffled and limited validation": Case({"limit_val_batches": 2}, partial(val_loader, shuffle=True)),
    "two loaders": Case({}, lambda: [val_loader(), val_loader(50)], TwoLoaders),
    "two loaders at once": Case(
        {}, lambda: CombinedLoader({"a": val_loader(), "b": val_loader(50)}), TwoAtOnce, (1, 0)
    ),
    "loader without length": Case({}, lambda: DataLoader(Stream(), batch_size=64)),
    "dataloader_iter": Case(module=Iterating, folds=(1, 0)),
    "reloaded loaders": Case({"reload_dataloaders_every_n_epochs": 1}, partial(val_loader, shuffle=True)),
    "accumulated gradients": Case({"accumulate_grad_batches": 3}),
    "clipped gradients": Case({"gradient_clip_val": 0.1}),
    "bf16-mixed": Case({"precision": "bf16-mixed"}),
    "overfitted batches": Case({"overfit_batches": 2}),
    "max_steps": Case({"max_steps": 11, "max_epochs": -1}),
    "profiler": Case({"profiler": "simple"}),
    "weight averaging": Case(callbacks=lambda: [EMAWeightAveraging(decay=0.9)]),
    "stochastic averaging": Case(
        {"max_epochs": 3},
        module=Unscheduled,
        callbacks=lambda: [StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)],
    ),
    "manual optimization": Case(module=Manual),
    "workers": Case({}, partial(val_loader, num_workers=2)),
    "persistent workers": Case({}, partial(val_loader, num_workers=2, persistent_workers=True)),
}
SLOW = {"workers", "persistent workers"}
SUBTLE = {"validation twice an epoch", "two loaders", "reloaded loaders", "accumulated gradients", "weight averaging"}


def trained(make_trainer, folder, case, searching=()):
    """All that a training leaves behind, with `searching` among its callbacks."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    module, called = case.module(), []
    at_epoch_end = None if "val_check_interval" not in case.options else False  # Lightning fails to tell by the clock
    watching = [
        counting_class(called.append),
        EarlyStopping(module.monitor, mode="max", patience=1, check_on_train_epoch_end=at_epoch_end),
        ModelCheckpoint(folder / "files", "{epoch}-{step}", module.monitor, mode="max", save_top_k=2, save_last=True),
        LearningRateMonitor(),
        *case.callbacks(),
    ]
    logger = CSVLogger(folder, name="", version="")
    options = {"logger": logger, "enable_checkpointing": True, "log_every_n_steps": 1, "default_root_dir": folder}
    trainer = make_trainer(callbacks=[*searching, *watching], **options | case.options)
    trainer.fit(module, train_loader(), case.loaders())
    profiled = getattr(trainer.profiler, "recorded_durations", {})
    return {
        "weights": content(module.state_dict()),
        "optimizers": content([one.state_dict() for one in trainer.optimizers]),
        "curves": curves(folder / "metrics.csv"),
        "callbacks": [str(one.state_dict()).replace(str(folder), "") for one in watching],
        "hooks": called,
        "files": {path.name: saved(path) for path in folder.glob("files/*")},
        "progress": trainer.fit_loop.state_dict(),
        "end": (trainer.current_epoch, trainer.global_step, trainer.should_stop, str(trainer.state)),
        "metrics": content([trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics]),
        "profile": {name: len(times) for name, times in profiled.items() if "[Callback]Within" not in name},
        "chance": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002
    }


def curves(path):
    """The rows that are not about a search."""
    with open(path, newline="") as file:
        rows = [{name: x for name, x in row.items() if x and "roulette" not in name} for row in csv.DictReader(file)]
    return [row for row in rows if row.keys() - {"step"}]


def saved(path):
    stored = torch.load(path, weights_only=False)
    parts = ("epoch", "global_step", "loops", "state_dict", "optimizer_states", "lr_schedulers")
    return {name: content(stored[name]) for name in parts}


def tensor(stored):
    """The tensor of which `content` was stored."""
    dtype, shape, raw = stored
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


def searching(hook, monitor, done):
    """A callback that searches in one hook, and applies no winner."""
    return within(hook, lambda trainer, module: done.append(one_level(trainer, module, monitor=monitor)), times=2)


def differences(make_trainer, folder, case, hooks):
    done = {hook: [] for hook in hooks}
    callbacks = [searching(hook, case.module.monitor, done[hook]) for hook in hooks]
    plain = trained(make_trainer, folder / "plain", case)
    searched = trained(make_trainer, folder / "searched", case, callbacks)
    assert all(done.values())
    reports = [winner.report for winners in done.values() for winner in winners]
    assert {report.folds for report in reports} == {case.folds}
    # the dense network, two candidates, and the winner of them: on all the data, or some of it on half
    assert all(3 <= report.validations <= 4 for report in reports)
    return changed(plain, searched)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_training_is_the_same_with_searches_in_every_hook(name, make_trainer, tmp_path):
    assert not differences(make_trainer, tmp_path, CASES[name], HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["default", *(pytest.param(x, marks=pytest.mark.slow) for x in sorted(SUBTLE))])
def test_training_is_the_same_with_searches_in_one_hook(hook, name, make_trainer, tmp_path):
    assert not differences(make_trainer, tmp_path, CASES[name], [hook])


@pytest.mark.parametrize("refit", [None, "least_squares"])
@pytest.mark.parametrize("at_epoch", [None, 1])
def test_a_search_that_accepts_nothing_leaves_no_trace(at_epoch, refit, make_trainer, tmp_path):
    hopeless = Tree(pruning_rate=0.99, patience=1)
    pruning = RouletteWheelPruning(
        3, monitor="val_acc", at_epoch=at_epoch, refit=refit, tree=hopeless, wheel=Wheel(8.0)
    )
    plain = trained(make_trainer, tmp_path / "plain", Case())
    assert not changed(plain, trained(make_trainer, tmp_path / "searched", Case(), [pruning]))
    assert pruning.report.winner is None
    # folds: each half and those of the race; the race, whose first four folds fill one batch; a half
    dense, branch, winner = 8 + 8 + 8, 3 * 4 + 2 * 4, 8
    if refit is not None:  # the best sees all folds once more when it is refitted
        branch += 8
    assert pruning.report.validations == (dense + branch + winner) / 16


def test_a_search_at_the_end_changes_pruned_weights_and_nothing_else(make_trainer, tmp_path):
    pruning = RouletteWheelPruning(3, monitor="val_acc", tolerance=1.0, refit=None, target_sparsity=0.5)
    plain = trained(make_trainer, tmp_path / "plain", Case())
    searched = trained(make_trainer, tmp_path / "searched", Case(), [pruning])
    assert changed(plain, searched) == {"weights", "files", "hooks"}
    weights, pruned = ({name: tensor(stored) for name, stored in one["weights"].items()} for one in (plain, searched))
    assert pruning.mask.sparsity == 0.5
    for name, kept in pruning.mask.items():
        weights[name].masked_fill_(~kept, 0)
    assert all(torch.equal(weights[name], pruned[name]) for name in weights)
    assert searched["files"].keys() - plain["files"].keys() == {"pruned.ckpt"}  # last.ckpt is the dense one
    assert all(searched["files"][name] == stored for name, stored in plain["files"].items())
    assert searched["hooks"] == [*plain["hooks"][:-1], "on_save_checkpoint", plain["hooks"][-1]]


def test_training_differs_when_the_network_is_not_given_back(make_trainer, tmp_path):
    """The comparison can tell: one weight touched, one draw of chance, one validation that is not isolated."""
    plain = trained(make_trainer, tmp_path / "plain", Case())

    def after(name, action):
        return changed(plain, trained(make_trainer, tmp_path / name, Case(), [within("on_train_end", action)]))

    def touch(trainer, module):
        module.net[0].weight.data[0, 0] += 1e-6

    assert after("touched", touch) == {"weights"}
    assert after("drawn", lambda trainer, module: torch.rand(1)) == {"chance"}
    assert after("run", lambda trainer, module: trainer.fit_loop.epoch_loop.val_loop.run()) >= {"hooks", "curves"}
