"""What a search that did not end leaves, and what a fit that resumes it, or an ended training, makes of that."""

from __future__ import annotations

import logging
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_roulette import Mask, StopReason, Tree, Validation, prunable_parameters, sparsity
from lightning_roulette.trainer import callback
from lightning_roulette.trainer.scores.trainer_evaluator import TrainerEvaluator
from lightning_roulette.trainer.searching import search_network
from tests.support.failing import Fails, counting
from tests.support.fits import pruner
from tests.support.modules import Blobs, blobs, train_loader, val_loader
from tests.support.results import equal, load, told

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:RouletteWheelPruning. the search did not end"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Counts candidates, without the dense network."""
    monkeypatch.setattr(TrainerEvaluator, "_as", counting())


@pytest.fixture
def fit(fit):
    """Fits on the same batches in every epoch, so that a resumed run sees what the whole run saw."""
    return partial(fit, train=DataLoader(blobs(400, 1), batch_size=50), enable_checkpointing=True)


def journals(folder: Path) -> list[Path]:
    return sorted(folder.rglob("search*"))


def cut_short(fit, folder: Path, at: int = 6, **options) -> Path:
    """A run whose search failed; the last checkpoint before that."""
    with pytest.raises(RuntimeError, match="power cut"):
        fit(pruner(**options), ModelCheckpoint(folder, save_top_k=-1), module=Fails(at), max_epochs=3)
    return max(folder.glob("epoch=*.ckpt"))


SETTINGS = {
    "at the end": {},
    "at an epoch": {"at_epoch": 1},
    "refit": {"refit": "least_squares"},
    "no race": {"validation": Validation(race=False, confirm=0)},
    "certified": {"confidence": 0.8, "tolerance": 0.4},
    "by loss": {"monitor": "val_loss", "tolerance": 5.0},
}


# ---- a search that did not end


@pytest.mark.parametrize("name", SETTINGS)
def test_a_search_that_was_cut_short_is_taken_up_where_it_was(fit, tmp_path, name):
    options = {"tree": Tree(0.2, max_levels=3), **SETTINGS[name]}
    whole, cut = pruner(**options), Fails()
    weights = fit(whole, module=cut, enable_checkpointing=False, max_epochs=3).state_dict()
    before = max(2, cut.judged // 2)
    path = cut_short(fit, tmp_path / "cut", before, **options)
    (journal,) = journals(tmp_path)
    assert journal.parent == tmp_path / "cut"
    resumed, module = pruner(dirpath=tmp_path / "elsewhere", **options), Fails()
    fit(resumed, module=module, enable_checkpointing=False, max_epochs=3, ckpt_path=path)
    assert equal(module.state_dict(), weights)
    assert told(resumed) == told(whole)
    assert module.judged == cut.judged - before + 1
    assert journals(tmp_path) == []
    assert Path(resumed.best_model_path) == tmp_path / "elsewhere" / "pruned.ckpt"


def test_a_search_may_be_cut_short_again_and_again(fit, tmp_path):
    options = {"tree": Tree(0.2, max_levels=3)}
    whole, counts = pruner(**options), Fails()
    weights = fit(whole, module=counts, enable_checkpointing=False, max_epochs=3).state_dict()
    path, judged = cut_short(fit, tmp_path / "cut", 3, **options), 2
    for number in range(100):
        resumed, module = pruner(dirpath=tmp_path / str(number), **options), Fails(3)
        try:
            fit(resumed, module=module, enable_checkpointing=False, max_epochs=3, ckpt_path=path)
            break
        except RuntimeError as error:
            assert "power cut" in str(error)  # noqa: PT017
            judged += 2
            assert journals(tmp_path)[0].parent == tmp_path / "cut"
    assert counts.judged - judged in (0, 1, 2)
    assert equal(module.state_dict(), weights)
    assert told(resumed) == told(whole)
    assert journals(tmp_path) == []


def test_it_is_found_beside_the_checkpoint_where_loggers_give_each_run_its_folder(fit, tmp_path, caplog):
    def run(module, ckpt_path=None):
        logger = TensorBoardLogger(tmp_path / "logs")
        pruning = pruner()
        fit(pruning, module=module, logger=logger, ckpt_path=ckpt_path, log_every_n_steps=1)
        return pruning

    with pytest.raises(RuntimeError, match="power cut"):
        run(Fails(4))
    folder = tmp_path / "logs" / "lightning_logs" / "version_0" / "checkpoints"
    (path,), (journal,) = folder.glob("epoch=*.ckpt"), journals(tmp_path)
    assert journal.parent == folder
    module = Fails()
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        pruning = run(module, path)
    assert any(str(journal) in line and "not validated again" in line for line in caplog.messages)
    whole = Fails()
    fit(pruner(), module=whole, enable_checkpointing=False)
    assert module.judged == whole.judged - 3
    assert "version_1" in pruning.best_model_path
    assert journals(tmp_path) == []


@pytest.mark.parametrize("other", [{"seed": 1}, {"tolerance": 0.1}, {"tree": Tree(0.3)}, {"branches": 3}], ids=str)
def test_another_search_in_the_same_folder_leaves_the_journal_alone(fit, tmp_path, other):
    path = cut_short(fit, tmp_path / "cut")
    (journal,) = journals(tmp_path)
    content, module, plain = journal.read_bytes(), Fails(), Fails()
    options = {"tree": Tree(0.2, max_levels=2), **other}
    pruning, expected = pruner(dirpath=tmp_path / "cut", **options), pruner(**options)
    fit(pruning, module=module, enable_checkpointing=False, max_epochs=3, ckpt_path=path)
    fit(expected, module=plain, enable_checkpointing=False, max_epochs=3)
    assert told(pruning) == told(expected)
    assert module.judged == plain.judged
    assert journals(tmp_path) == [journal]
    assert journal.read_bytes() == content


def test_a_network_that_was_trained_on_is_searched_anew(fit, tmp_path):
    path = cut_short(fit, tmp_path / "cut")
    module, pruning = Fails(), pruner(dirpath=tmp_path / "cut")
    fit(pruning, module=module, enable_checkpointing=False, max_epochs=4, ckpt_path=path)
    whole, expected = Fails(), pruner()
    fit(expected, module=whole, enable_checkpointing=False, max_epochs=4)
    assert module.judged == whole.judged
    assert len(journals(tmp_path)) == 1  # that of the earlier network


def test_other_validation_data_make_the_journal_void(fit, make_trainer, tmp_path):
    path = cut_short(fit, tmp_path / "cut")

    def resumed(batch_size):
        module, pruning = Fails(), pruner(dirpath=tmp_path / "cut")
        torch.manual_seed(0)
        trainer = make_trainer(callbacks=[pruning], max_epochs=3)
        trainer.fit(module, train_loader(), val_loader(batch_size), ckpt_path=path)
        return module.judged

    assert resumed(50) > resumed(64)


@pytest.mark.parametrize("options", [{"enable_checkpointing": False}, {"fast_dev_run": True}], ids=str)
def test_nothing_is_noted_where_no_file_is_to_be_written(fit, tmp_path, options):
    with pytest.raises(RuntimeError, match="power cut"):
        fit(pruner(), module=Fails(3), **options)
    assert list(tmp_path.rglob("*.*")) == []


def test_a_search_that_ended_leaves_no_journal(fit, tmp_path):
    pruning, module = pruner(), Fails()
    seen = []

    class Looks(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            if pl_module.judged:
                seen.append(len(journals(tmp_path)))

    fit(pruning, Looks(), ModelCheckpoint(), module=module)
    assert seen == [1]  # until pruned.ckpt is written
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["epoch=1-step=16.ckpt", "pruned.ckpt"]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_search_keeps_its_journal(fit, tmp_path, monkeypatch, ending):
    class Stops(Fails):
        def on_validation_epoch_start(self):
            if self.judged == 5:
                raise ending

    pruning = pruner(tree=Tree(0.2, max_levels=3))
    with pytest.raises((SystemExit, RuntimeError)):
        fit(pruning, module=Stops())
    assert pruning.report.stop_reason in (StopReason.INTERRUPTED, StopReason.FAILED)
    assert len(journals(tmp_path)) == 1


# ---- a training that had ended


def ended(fit, folder: Path, *callbacks, epochs: int = 3) -> Path:
    """The last checkpoint of a training without a search."""
    fit(*callbacks, ModelCheckpoint(folder), max_epochs=epochs)
    return max(folder.glob("epoch=*.ckpt"))


@pytest.mark.parametrize("name", ["at the end", "at an epoch", "refit"])
def test_the_search_of_an_ended_training_is_made_when_that_is_resumed(fit, tmp_path, caplog, name):
    whole = pruner(dirpath=tmp_path / "whole", **SETTINGS[name])
    weights = fit(whole, enable_checkpointing=False, max_epochs=1).state_dict()
    path, resumed = ended(fit, tmp_path / "run", epochs=1), pruner(dirpath=tmp_path, **SETTINGS[name])
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        module = fit(resumed, enable_checkpointing=False, max_epochs=1, ckpt_path=path)
    assert sum("training had ended before this fit" in line for line in caplog.messages) == 1
    assert equal(module.state_dict(), weights)
    assert told(resumed) == told(whole)
    assert resumed.report.sparsity > 0
    stored = load(resumed.best_model_path)
    assert equal(stored["state_dict"], weights)
    before, again = (
        fit(pruner(), enable_checkpointing=False, max_epochs=3, ckpt_path=Path(one.best_model_path))
        for one in (whole, resumed)
    )
    assert equal(before.state_dict(), again.state_dict())  # trained on, that is
    assert not equal(before.state_dict(), weights)


def test_a_training_ended_by_its_steps_is_searched_as_well(fit, tmp_path):
    options = {"max_epochs": -1, "max_steps": 12}
    whole = pruner()
    weights = fit(whole, enable_checkpointing=False, **options).state_dict()
    every = ModelCheckpoint(tmp_path / "run", every_n_train_steps=12)
    fit(every, **options)
    (path,) = (tmp_path / "run").glob("*.ckpt")
    resumed = pruner()
    module = fit(resumed, enable_checkpointing=False, ckpt_path=path, **options)
    assert equal(module.state_dict(), weights)
    assert told(resumed) == told(whole)


def test_what_training_made_of_the_winner_is_measured_when_its_end_was_cut_short(fit, tmp_path):
    whole = pruner(at_epoch=1, dirpath=tmp_path / "whole")
    weights = fit(whole, ModelCheckpoint(tmp_path / "run"), max_epochs=3).state_dict()
    path, resumed = max((tmp_path / "run").glob("epoch=*.ckpt")), pruner(at_epoch=1, dirpath=tmp_path / "resumed")
    module = fit(resumed, enable_checkpointing=False, max_epochs=3, ckpt_path=path)
    assert whole.report.trained_score is not None
    assert told(resumed) == told(whole)
    assert equal(module.state_dict(), weights)
    assert equal(load(tmp_path / "resumed" / "pruned.ckpt")["state_dict"], weights)


@pytest.mark.parametrize("at_epoch", [None, 1])
def test_what_was_searched_and_measured_is_left_as_it_is(fit, tmp_path, caplog, at_epoch):
    first = pruner(at_epoch=at_epoch, dirpath=tmp_path / "first")
    weights = fit(first, enable_checkpointing=False, max_epochs=3).state_dict()
    resumed = pruner(at_epoch=at_epoch, dirpath=tmp_path / "second")
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        module = fit(resumed, enable_checkpointing=False, max_epochs=3, ckpt_path=Path(first.best_model_path))
    assert (resumed.report, resumed.mask) == (first.report, first.mask)
    assert equal(module.state_dict(), weights)
    assert not any("had ended before" in line for line in caplog.messages)
    assert not (tmp_path / "second").exists()


def test_a_search_cut_short_at_the_end_of_a_resumed_training_is_resumed_in_turn(fit, tmp_path):
    path = ended(fit, tmp_path / "run")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(pruner(), ModelCheckpoint(tmp_path / "run"), module=Fails(4), max_epochs=3, ckpt_path=path)
    assert len(journals(tmp_path)) == 1
    whole, module = Fails(), Fails()
    fit(pruner(), module=whole, enable_checkpointing=False, max_epochs=3)
    options = {"module": module, "enable_checkpointing": False, "max_epochs": 3, "ckpt_path": path}
    fit(pruner(dirpath=tmp_path / "resumed"), **options)
    assert module.judged == whole.judged - 3
    assert equal(module.state_dict(), whole.state_dict())


def test_after_the_search_the_network_is_on_the_cpu_as_lightning_leaves_it(fit, make_trainer, tmp_path, monkeypatch):
    path, moved, pruning, module = ended(fit, tmp_path / "run"), [], pruner(), Blobs()
    trainer = make_trainer(callbacks=[pruning], max_epochs=3)
    to_device, away = trainer.strategy.model_to_device, module.cpu

    def search(run):
        moved.append("search")
        search_network(run)

    monkeypatch.setattr(trainer.strategy, "model_to_device", lambda: (moved.append("there"), to_device()))
    monkeypatch.setattr(callback, "search_network", search)
    monkeypatch.setattr(Blobs, "cpu", lambda self: (moved.append("away"), away())[1])
    trainer.fit(module, train_loader(), val_loader(), ckpt_path=path)
    assert moved[-4:] == ["away", "there", "search", "away"]


@pytest.mark.parametrize("at_epoch", [None, 1])
def test_averaged_weights_are_searched_as_they_would_have_been(fit, tmp_path, at_epoch):
    def average():
        return EMAWeightAveraging(decay=0.5)

    whole = pruner(at_epoch=at_epoch)
    weights = fit(whole, average(), enable_checkpointing=False, max_epochs=3).state_dict()
    plain = fit(enable_checkpointing=False, max_epochs=3).state_dict()
    assert not equal(weights, plain)
    fit(
        *([] if at_epoch is None else [pruner(at_epoch=at_epoch)]),
        average(),
        ModelCheckpoint(tmp_path / "run"),
        max_epochs=3,
    )
    path, resumed = max((tmp_path / "run").glob("epoch=*.ckpt")), pruner(at_epoch=at_epoch)
    options = {"enable_checkpointing": False, "max_epochs": 3, "ckpt_path": path}
    module = fit(resumed, average(), **options)
    assert told(resumed) == told(whole)
    assert equal(module.state_dict(), weights)
    assert Mask.of_nonzeros(prunable_parameters(module)) == resumed.mask


def test_stochastic_weight_averaging_cannot_be_made_up_for_and_that_is_said(fit, tmp_path):
    path = ended(fit, tmp_path / "run", StochasticWeightAveraging(1e-2, swa_epoch_start=1))
    pruning, averaging = pruner(), StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    with pytest.warns(
        UserWarning, match="does nothing in this fit: the search needs the weights of StochasticWeightAveraging"
    ):
        fit(pruning, averaging, enable_checkpointing=False, max_epochs=3, ckpt_path=path)
    assert pruning.report is None


# ---- nothing was trained


@pytest.mark.parametrize("options", [{"limit_train_batches": 0}, {"limit_train_batches": 0, "max_epochs": 3}], ids=str)
def test_a_resume_that_is_not_to_train_does_not_search(fit, tmp_path, options):
    path, pruning = ended(fit, tmp_path / "run", epochs=2), pruner()
    with pytest.warns(UserWarning, match="RouletteWheelPruning does nothing in this fit"):
        fit(pruning, enable_checkpointing=False, ckpt_path=path, **options)
    assert pruning.report is None


def test_another_network_is_not_searched_by_a_trainer_that_has_ended(fit, make_trainer):
    pruning, other = pruner(), Blobs()
    trainer = make_trainer(callbacks=[pruning])
    trainer.fit(Blobs(), train_loader(), val_loader())
    with pytest.warns(UserWarning, match="does nothing in this fit: there was nothing left to train"):
        trainer.fit(other, train_loader(), val_loader())
    assert sparsity(prunable_parameters(other)) == 0
    assert pruning.report is None


def test_the_pruned_network_is_left_alone_by_a_trainer_that_has_ended(make_trainer):
    pruning, module = pruner(), Blobs()
    trainer = make_trainer(callbacks=[pruning])
    trainer.fit(module, train_loader(), val_loader())
    report = pruning.report
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*num_workers|.*many workers|.*LeafSpec.*|.*logging interval.*")
        trainer.fit(module, train_loader(), val_loader())
    assert pruning.report is report
