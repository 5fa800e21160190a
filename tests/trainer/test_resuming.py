"""What a search that did not end leaves, and what a fit that resumes it, or an ended training, makes of that."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_roulette import StopReason, Tree
from lightning_roulette.trainer import callback
from lightning_roulette.trainer.scores.trainer_evaluator import TrainerEvaluator
from lightning_roulette.trainer.searching import search_network
from tests.support.failing import Fails, counting
from tests.support.fits import pruner
from tests.support.isolated import ON_ALL
from tests.support.modules import Blobs, blobs, train_loader, val_loader
from tests.support.results import equal, load, nonzeros, told
from tests.support.state import content

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
    """Fits on the same batches in every epoch, so that a resumed run sees what the whole run saw.

    A Trainer has a `ModelCheckpoint` only where one is passed.
    """

    def fitted(*callbacks, **options):
        writes = any(isinstance(one, ModelCheckpoint) for one in callbacks)
        data = DataLoader(blobs(400, 1), batch_size=50)
        return fit(*callbacks, **{"train": data, "max_epochs": 3, "enable_checkpointing": writes} | options)

    return fitted


def journals(folder: Path) -> list[Path]:
    return sorted(folder.rglob("search*"))


def cut_short(fit, folder: Path, at: int = 6, **options) -> Path:
    """A run whose search failed; the last checkpoint before that."""
    with pytest.raises(RuntimeError, match="power cut"):
        fit(pruner(**options), ModelCheckpoint(folder, save_top_k=-1), module=Fails(at))
    return max(folder.glob("epoch=*.ckpt"))


def outcome(fit, pruning, *callbacks, **options):
    """Report and weights after a fit, to compare them, and the module."""
    module = fit(pruning, *callbacks, **{"module": Fails()} | options)
    return (told(pruning), content(module.state_dict())), module


SETTINGS = {
    "at the end": {},
    "at an epoch": {"at_epoch": 1},
    "refit": {"refit": "least_squares"},
    "no race": {"validation": ON_ALL},
    "certified": {"confidence": 0.8, "tolerance": 0.4},
    "by loss": {"monitor": "val_loss", "tolerance": math.inf},
}


# ---- a search that did not end


@pytest.mark.parametrize("name", SETTINGS)
def test_a_search_that_was_cut_short_is_taken_up_where_it_was(fit, tmp_path, name):
    options = {"tree": Tree(0.2, max_levels=3), **SETTINGS[name]}
    whole, cut = outcome(fit, pruner(**options))
    before = max(2, cut.judged // 2)
    path = cut_short(fit, tmp_path / "cut", before, **options)
    (journal,) = journals(tmp_path)
    assert journal.parent == tmp_path / "cut"
    resumed = pruner(dirpath=tmp_path / "elsewhere", **options)
    found, module = outcome(fit, resumed, ckpt_path=path)
    assert found == whole
    assert module.judged == cut.judged - before + 1
    assert journals(tmp_path) == []
    assert Path(resumed.best_model_path) == tmp_path / "elsewhere" / "pruned.ckpt"


def test_a_search_may_be_cut_short_again_and_again(fit, tmp_path):
    options = {"tree": Tree(0.2, max_levels=3)}
    whole, counts = outcome(fit, pruner(**options))
    path, judged = cut_short(fit, tmp_path / "cut", 3, **options), 2
    for number in range(100):
        try:
            found, _ = outcome(fit, pruner(dirpath=tmp_path / str(number), **options), module=Fails(3), ckpt_path=path)
            break
        except RuntimeError as error:
            assert "power cut" in str(error)  # noqa: PT017
            judged += 2
            assert journals(tmp_path)[0].parent == tmp_path / "cut"
    assert counts.judged - judged in (0, 1, 2)
    assert found == whole
    assert journals(tmp_path) == []


def test_it_is_found_beside_the_checkpoint_where_loggers_give_each_run_its_folder(fit, tmp_path, caplog):
    def run(module, ckpt_path=None):
        pruning, options = pruner(), {"logger": TensorBoardLogger(tmp_path / "logs"), "enable_checkpointing": True}
        fit(pruning, module=module, ckpt_path=ckpt_path, log_every_n_steps=1, max_epochs=2, **options)
        return pruning

    with pytest.raises(RuntimeError, match="power cut"):
        run(Fails(4))
    folder = tmp_path / "logs" / "lightning_logs" / "version_0" / "checkpoints"
    (path,), (journal,) = folder.glob("epoch=*.ckpt"), journals(tmp_path)
    assert journal.parent == folder
    module, whole = Fails(), Fails()
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        pruning = run(module, path)
    assert any(str(journal) in line and "not validated again" in line for line in caplog.messages)
    fit(pruner(), module=whole, max_epochs=2)
    assert module.judged == whole.judged - 3
    assert "version_1" in pruning.best_model_path
    assert journals(tmp_path) == []


@pytest.mark.parametrize("other", [{"seed": 1}, {"tolerance": 0.1}, {"tree": Tree(0.3)}, {"branches": 3}], ids=str)
def test_another_search_in_the_same_folder_leaves_the_journal_alone(fit, tmp_path, other):
    path = cut_short(fit, tmp_path / "cut")
    (journal,) = journals(tmp_path)
    noted, options = journal.read_bytes(), {"tree": Tree(0.2, max_levels=2), **other}
    found, module = outcome(fit, pruner(dirpath=tmp_path / "cut", **options), ckpt_path=path)
    expected, plain = outcome(fit, pruner(**options))
    assert found == expected
    assert module.judged == plain.judged
    assert journals(tmp_path) == [journal]
    assert journal.read_bytes() == noted


def test_a_network_that_was_trained_on_is_searched_anew(fit, tmp_path):
    path = cut_short(fit, tmp_path / "cut")
    module = fit(pruner(dirpath=tmp_path / "cut"), module=Fails(), max_epochs=4, ckpt_path=path)
    whole = fit(pruner(), module=Fails(), max_epochs=4)
    assert module.judged == whole.judged
    assert len(journals(tmp_path)) == 1  # that of the earlier network


def test_other_validation_data_make_the_journal_void(fit, tmp_path):
    path = cut_short(fit, tmp_path / "cut")
    again = partial(fit, ckpt_path=path)
    other, same = (again(pruner(dirpath=tmp_path / "cut"), module=Fails(), val=val_loader(size)) for size in (50, 64))
    assert other.judged > same.judged


@pytest.mark.parametrize("options", [{}, {"fast_dev_run": True, "enable_checkpointing": True}], ids=str)
def test_nothing_is_noted_where_no_file_is_to_be_written(fit, tmp_path, options):
    with pytest.raises(RuntimeError, match="power cut"):
        fit(pruner(), module=Fails(3), **options)
    assert list(tmp_path.rglob("*.*")) == []


def test_a_search_that_ended_leaves_no_journal(fit, tmp_path):
    seen = []

    class Looks(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            if pl_module.judged:
                seen.append(len(journals(tmp_path)))

    fit(pruner(), Looks(), ModelCheckpoint(), module=Fails(), max_epochs=2)
    assert seen == [1]  # until pruned.ckpt is written
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["epoch=1-step=16.ckpt", "pruned.ckpt"]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_search_keeps_its_journal(fit, tmp_path, ending):
    class Stops(Fails):
        def on_validation_epoch_start(self):
            if self.judged == 5:
                raise ending

    pruning = pruner(tree=Tree(0.2, max_levels=3))
    with pytest.raises((SystemExit, RuntimeError)):
        fit(pruning, module=Stops(), enable_checkpointing=True)
    assert pruning.report.stop_reason in (StopReason.INTERRUPTED, StopReason.FAILED)
    assert len(journals(tmp_path)) == 1


# ---- a training that had ended


def ended(fit, folder: Path, *callbacks, epochs: int = 3) -> Path:
    """The last checkpoint of a training without a search."""
    fit(*callbacks, ModelCheckpoint(folder), max_epochs=epochs)
    return max(folder.glob("epoch=*.ckpt"))


@pytest.mark.parametrize("name", ["at the end", "at an epoch", "refit"])
def test_the_search_of_an_ended_training_is_made_when_that_is_resumed(fit, tmp_path, caplog, name):
    whole, resumed = (pruner(dirpath=tmp_path / folder, **SETTINGS[name]) for folder in ("whole", "resumed"))
    expected, _ = outcome(fit, whole, max_epochs=1)
    path = ended(fit, tmp_path / "run", epochs=1)
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        found, module = outcome(fit, resumed, max_epochs=1, ckpt_path=path)
    assert sum("training had ended before this fit" in line for line in caplog.messages) == 1
    assert found == expected
    assert resumed.report.sparsity > 0
    assert equal(load(resumed.best_model_path)["state_dict"], module.state_dict())
    before, again = (fit(pruner(), ckpt_path=Path(one.best_model_path)) for one in (whole, resumed))
    assert equal(before.state_dict(), again.state_dict())  # trained on, that is
    assert not equal(before.state_dict(), module.state_dict())


def test_a_training_ended_by_its_steps_is_searched_as_well(fit, tmp_path):
    options = {"max_epochs": -1, "max_steps": 12}
    fit(ModelCheckpoint(tmp_path / "run", every_n_train_steps=12), **options)
    (path,) = (tmp_path / "run").glob("*.ckpt")
    assert outcome(fit, pruner(), ckpt_path=path, **options)[0] == outcome(fit, pruner(), **options)[0]


def test_what_training_made_of_the_winner_is_measured_when_its_end_was_cut_short(fit, tmp_path):
    whole, resumed = (pruner(at_epoch=1, dirpath=tmp_path / folder) for folder in ("whole", "resumed"))
    expected, _ = outcome(fit, whole, ModelCheckpoint(tmp_path / "run"))
    found, module = outcome(fit, resumed, ckpt_path=max((tmp_path / "run").glob("epoch=*.ckpt")))
    assert whole.report.trained_score is not None
    assert found == expected
    assert equal(load(resumed.best_model_path)["state_dict"], module.state_dict())


@pytest.mark.parametrize("at_epoch", [None, 1])
def test_what_was_searched_and_measured_is_left_as_it_is(fit, tmp_path, caplog, at_epoch):
    first, resumed = (pruner(at_epoch=at_epoch, dirpath=tmp_path / folder) for folder in ("first", "second"))
    weights = fit(first).state_dict()
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        module = fit(resumed, ckpt_path=Path(first.best_model_path))
    assert (resumed.report, resumed.mask) == (first.report, first.mask)
    assert equal(module.state_dict(), weights)
    assert not any("had ended before" in line for line in caplog.messages)
    assert not (tmp_path / "second").exists()


def test_a_search_cut_short_at_the_end_of_a_resumed_training_is_resumed_in_turn(fit, tmp_path):
    path = ended(fit, tmp_path / "run")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(pruner(), ModelCheckpoint(tmp_path / "run"), module=Fails(4), ckpt_path=path)
    assert len(journals(tmp_path)) == 1
    expected, whole = outcome(fit, pruner())
    found, module = outcome(fit, pruner(dirpath=tmp_path / "resumed"), ckpt_path=path)
    assert module.judged == whole.judged - 3
    assert found == expected


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
    average, resumed = partial(EMAWeightAveraging, decay=0.5), pruner(at_epoch=at_epoch)
    searched = [] if at_epoch is None else [pruner(at_epoch=at_epoch)]
    path = ended(fit, tmp_path / "run", *searched, average())
    expected, whole = outcome(fit, pruner(at_epoch=at_epoch), average())
    assert not equal(whole.state_dict(), fit().state_dict())
    found, module = outcome(fit, resumed, average(), ckpt_path=path)
    assert found == expected
    assert nonzeros(module) == resumed.mask


def test_stochastic_weight_averaging_cannot_be_made_up_for_and_that_is_said(fit, tmp_path):
    path = ended(fit, tmp_path / "run", StochasticWeightAveraging(1e-2, swa_epoch_start=1))
    pruning, averaging = pruner(), StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    needs = "does nothing in this fit: the search needs the weights of StochasticWeightAveraging"
    with pytest.warns(UserWarning, match=needs):
        fit(pruning, averaging, ckpt_path=path)
    assert pruning.report is None


# ---- nothing was trained


@pytest.mark.parametrize("options", [{"limit_train_batches": 0}, {"limit_train_batches": 0, "max_epochs": 3}], ids=str)
def test_a_resume_that_is_not_to_train_does_not_search(fit, tmp_path, options):
    path, pruning = ended(fit, tmp_path / "run", epochs=2), pruner()
    with pytest.warns(UserWarning, match="RouletteWheelPruning does nothing in this fit"):
        fit(pruning, ckpt_path=path, **{"max_epochs": 2} | options)
    assert pruning.report is None


def test_another_network_is_not_searched_by_a_trainer_that_has_ended(fit):
    pruning, other = pruner(), Blobs()
    trainer = fit(pruning).trainer
    with pytest.warns(UserWarning, match="does nothing in this fit: there was nothing left to train"):
        trainer.fit(other, train_loader(), val_loader())
    assert nonzeros(other).sparsity == 0
    assert pruning.report is None


def test_the_pruned_network_is_left_alone_by_a_trainer_that_has_ended(fit):
    pruning = pruner()
    module = fit(pruning)
    report = pruning.report
    module.trainer.fit(module, train_loader(), val_loader())
    assert pruning.report is report
