"""Trainers of `lightning.pytorch` and of `pytorch_lightning` in one process."""

from __future__ import annotations

import csv
import pickle
import subprocess
import sys
from functools import cache
from types import ModuleType

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch.utils.data import DataLoader

from lightning_roulette import HoldZeros, RouletteWheelPruning, Tree, prune
from lightning_roulette.trainer import lightning_names
from tests.support import modules
from tests.support.events import events
from tests.support.fits import pruner
from tests.support.modules import QUIET, train_loader, val_loader
from tests.support.results import equal, load, nonzeros, told

PACKAGES = (lightning.pytorch, pytorch_lightning)
both = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
SEARCH = {"refit": "auto", "tolerance": 0.05, "tree": Tree(0.3, max_levels=3)}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@cache
def of(package: ModuleType) -> type:
    """`Blobs` with the base class of a package."""

    class Blobs(package.LightningModule):
        forward, configure_optimizers = modules.Blobs.forward, modules.Blobs.configure_optimizers
        training_step, validation_step = modules.Blobs.training_step, modules.Blobs.validation_step

        def __init__(self):
            super().__init__()
            self.net, self.lr = modules.tiny_net(), 1e-2
            self.val_acc = modules.MulticlassAccuracy(10, average="micro")

    return Blobs


def calls_of(package: ModuleType) -> tuple[object, list[str]]:
    """A callback of the user, and the validation hooks that it was called in."""
    found: list[str] = []

    class Notes(package.Callback):
        def on_validation_start(self, trainer, pl_module):
            found.append("start")

        def on_validation_batch_end(self, trainer, pl_module, *rest):
            found.append("batch")

    return Notes(), found


def rows_of(path) -> list[dict[str, str]]:
    """What a CSVLogger wrote, without times."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def fitted(package: ModuleType, folder, *callbacks, ckpt_path=None, **options):
    """Train `Blobs` on the same batches in every epoch."""
    usual = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "default_root_dir": folder}
    module, trainer = of(package)(), package.Trainer(callbacks=list(callbacks), **QUIET | usual | options)
    torch.manual_seed(0)
    trainer.fit(module, DataLoader(modules.blobs(400, 1), 50), val_loader(), ckpt_path=ckpt_path)
    return module


def test_either_package_gives_the_same_network_report_and_curves_and_hides_candidates_from_callbacks(tmp_path):
    found = []
    for package in PACKAGES:
        pruning, (notes, calls), kinds = RouletteWheelPruning(3, **SEARCH), calls_of(package), package.callbacks
        folder = tmp_path / package.__name__
        board = package.loggers.TensorBoardLogger(folder, "board")
        loggers = [package.loggers.CSVLogger(folder), board]
        own = [kinds.EarlyStopping("val_loss"), kinds.ModelCheckpoint(folder, monitor="val_acc", mode="max"), notes]
        switches = {"enable_checkpointing": True, "logger": loggers, "log_every_n_steps": 4}
        module = fitted(package, folder, pruning, *own, **switches)
        metrics = module.trainer.callback_metrics
        saved = load(pruning.best_model_path)["state_dict"]
        curves = rows_of(folder / "lightning_logs/version_0/metrics.csv")
        tags = events(board.log_dir).Tags()
        assert pruning.report.sparsity > 0
        assert equal(saved, module.state_dict())
        assert "roulette/score" in [*tags["scalars"], *tags["tensors"]]
        found.append((module.state_dict(), told(pruning), calls, metrics, tags, curves))
    (weights, *facts), (others, *other_facts) = found
    assert equal(weights, others)
    assert facts == other_facts
    assert facts[1].count("start") == 3  # the sanity check and two epochs


@both
def test_a_search_that_broke_off_is_resumed(package, tmp_path):
    class Fails(package.Callback):
        def on_train_end(self, trainer, pl_module):
            raise RuntimeError("power cut")

    whole = pruner(dirpath=tmp_path / "whole")
    module = fitted(package, tmp_path, whole)
    saves = package.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    broken = pruner(dirpath=tmp_path / "broken")
    with pytest.raises(RuntimeError, match="power cut"):
        fitted(package, tmp_path, Fails(), broken, saves, enable_checkpointing=True)
    again = pruner(dirpath=tmp_path / "broken")
    resumed = fitted(package, tmp_path, again, ckpt_path=tmp_path / "last.ckpt")
    assert told(again) == told(whole)
    assert equal(resumed.state_dict(), module.state_dict())


def test_levels_between_epochs_and_averaged_weights_are_the_same(tmp_path):
    found = []
    for package in PACKAGES:
        average = package.callbacks.EMAWeightAveraging(decay=0.5)
        pruning = pruner(at_epoch=[1, 2], dirpath=tmp_path / package.__name__)
        module = fitted(package, tmp_path, average, pruning, max_epochs=4)
        assert nonzeros(module).sparsity == pruning.report.sparsity > 0.2
        found.append((told(pruning), module.state_dict()))
    assert found[0][0] == found[1][0]
    assert equal(found[0][1], found[1][1])


def test_prune_without_training_and_zeros_that_are_held_are_the_same(tmp_path):
    found = []
    for package in PACKAGES:
        module = fitted(package, tmp_path)
        trainer = package.Trainer(accelerator="cpu", default_root_dir=tmp_path, **QUIET)
        before = dict(vars(trainer))
        pruning = prune(trainer, module, train_loader(), val_loader(), branches=3, seed=1, **SEARCH)
        assert vars(trainer).keys() == before.keys()
        assert type(trainer.fit_loop) is type(before["fit_loop"])
        kept = nonzeros(module)
        further = package.Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[HoldZeros()], default_root_dir=tmp_path, **QUIET
        )
        torch.manual_seed(0)
        further.fit(module, train_loader(), val_loader())
        assert nonzeros(module).sparsity == kept.sparsity == pruning.report.sparsity > 0
        found.append((told(pruning), module.state_dict()))
    assert found[0][0] == found[1][0]
    assert equal(found[0][1], found[1][1])


@both
def test_a_callback_may_be_passed_alone(package, tmp_path):
    pruning = pruner()
    trainer = package.Trainer(accelerator="cpu", callbacks=pruning, default_root_dir=tmp_path, **QUIET)
    assert pruning in trainer.callbacks


@both
def test_the_loops_are_of_the_package_of_the_trainer(package, tmp_path):
    kinds = []

    class Validates(of(package)):
        def on_validation_start(self):
            kinds.append(type(self.trainer.fit_loop.epoch_loop.val_loop))

    module = Validates()
    trainer = package.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[pruner()],
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        **QUIET,
    )
    trainer.fit(module, train_loader(), val_loader())
    assert {kind.__name__ for kind in kinds} == {"_EvaluationLoop", "BorrowedLoop"}
    own = package.loops.evaluation_loop._EvaluationLoop
    (other,) = (one.loops.evaluation_loop._EvaluationLoop for one in PACKAGES if one is not package)
    assert all(issubclass(kind, own) and not issubclass(kind, other) for kind in kinds)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_a_module_or_data_of_the_other_package_is_refused(package, tmp_path):
    (other,) = (one for one in PACKAGES if one is not package)
    trainer = package.Trainer(accelerator="cpu", default_root_dir=tmp_path, **QUIET)
    names = f"of {other.__name__}, but the Trainer is of {package.__name__}. Import both from {package.__name__}"
    with pytest.raises(TypeError, match=f"model is a LightningModule {names}"):
        prune(trainer, of(other)(), train_loader(), val_loader())
    with pytest.raises(TypeError, match=f"datamodule is a LightningDataModule {names}"):
        prune(trainer, of(package)(), datamodule=other.LightningDataModule())


def test_a_trainer_of_another_version_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(lightning_names, "_STANDALONE", None)
    with pytest.raises(TypeError, match="from .pytorch_lightning.*Install pytorch-lightning 2"):
        fitted(pytorch_lightning, tmp_path, pruner())
    with pytest.raises(TypeError, match="the Trainer is a Loop from 'tests'.*from lightning.pytorch import Trainer"):
        prune(type("Loop", (), {"__module__": "tests.own"})(), of(lightning.pytorch)())


@pytest.mark.parametrize("found", ["1.9.5", "2.5.0", None])
def test_another_version_of_the_standalone_package_is_not_imported(found, monkeypatch):
    def version(name):
        if found is None:
            raise lightning_names.importlib.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(lightning_names.importlib.metadata, "version", version)
    assert lightning_names._standalone() is None


class Added:
    """What is added to a base class of Lightning."""

    def told(self):
        return self.value


@pytest.mark.slow
def test_lightning_keeps_its_logger_and_its_kind_of_warning():
    code = """
import lightning.pytorch
from lightning_utilities.core import rank_zero
before = rank_zero.log, rank_zero.rank_zero_deprecation_category
import lightning_roulette
lightning_roulette.RouletteWheelPruning
import sys
after = rank_zero.log, rank_zero.rank_zero_deprecation_category
print("pytorch_lightning" in sys.modules, after == before, rank_zero.log.name)
"""
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    assert ended.stdout.split() == ["True", "True", "lightning.pytorch.utilities.rank_zero"]


@both
def test_an_object_of_a_joined_class_is_pickled_for_spawned_processes(package):
    trainer = package.Trainer(**QUIET, accelerator="cpu")
    made = lightning_names.built_for(trainer, Added, lightning.pytorch.Callback)()
    made.value = 3
    again = pickle.loads(pickle.dumps(made))
    assert type(again) is type(made)
    assert isinstance(again, package.Callback)
    assert again.told() == 3
