"""What is in which file: before a search, after it, after a resume, and when it was interrupted."""

from __future__ import annotations

import logging
import math
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy

from lightning_roulette import HoldZeros, Mask, SearchReport, StopReason, Tree, Validation, apply_mask
from tests.support.callbacks import within
from tests.support.fits import pruner
from tests.support.isolated import ON_ALL
from tests.support.modules import Blobs, Judged, val_loader
from tests.support.results import PowerCut, Sparsities, equal, load, nonzeros, sparsity_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


@pytest.fixture
def fit(fit):
    """Fits with a ModelCheckpoint."""
    return partial(fit, enable_checkpointing=True)


def dense_state(fit, **options) -> dict[str, torch.Tensor]:
    return fit(enable_checkpointing=False, **options).state_dict()


# ---- what a search writes


def test_pruned_ckpt_holds_mask_and_report_and_loads_into_the_unpruned_class(fit, make_trainer, tmp_path):
    pruning = pruner()
    module = fit(pruning)
    path = pruning.best_model_path
    assert path == str(tmp_path / "checkpoints" / "pruned.ckpt")
    loaded = Blobs.load_from_checkpoint(path, strict=True, weights_only=True)
    assert equal(load(path)["state_dict"], module.state_dict())
    assert equal(loaded.state_dict(), module.state_dict())
    assert sparsity_of(path) == pruning.report.sparsity > 0
    state = load(path)["callbacks"]["RouletteWheelPruning"]
    assert SearchReport.from_dict(state["report"]) == pruning.report
    assert state["best_model_path"] == path
    assert Mask.load(path) == pruning.mask
    trainer = make_trainer(callbacks=[pruner()], enable_checkpointing=True)
    (logged,) = trainer.validate(Blobs(), val_loader(), ckpt_path=path, verbose=False)
    assert logged["val_acc"] == pytest.approx(pruning.report.score, abs=1e-7)


def kind_of(path: Path, dense: dict[str, torch.Tensor], pruning) -> str:
    """What a checkpoint holds, by its weights and by whether it has a record of the search."""
    stored, sparsity = load(path), sparsity_of(path)
    if "RouletteWheelPruning" in stored["callbacks"]:
        return "pruned" if sparsity == pruning.report.sparsity else "?"
    return "dense" if equal(stored["state_dict"], dense) else "earlier" if sparsity == 0 else "?"


BEST, ALL = {"epoch=1-step=16": "dense"}, {"epoch=0-step=8": "earlier", "epoch=1-step=16": "dense"}
DENSE, FIRST = {"dense": "dense"}, {"epoch=0-step=8": "earlier", "dense": "dense"}
FILES = {
    "the best is dense": (None, {}, BEST),
    "the last is dense": (None, {"save_last": True}, BEST | {"last": "dense"}),
    "the last is a link": (None, {"save_last": "link"}, BEST | {"last": "dense"}),
    "all kept": (None, {"save_top_k": -1}, ALL),
    "all kept, by training loss": (None, {"save_top_k": -1, "monitor": "train_loss"}, ALL),
    "the first is the best": (None, {"monitor": "val_acc", "mode": "min"}, FIRST),
    "the first is the best, by loss": (None, {"monitor": "val_loss", "mode": "max"}, FIRST),
    "none kept": (None, {"save_top_k": 0}, DENSE),
    "the last comes after the search": (None, {"save_top_k": 0, "save_last": True}, DENSE | {"last": "pruned"}),
    "the last comes long after it": (None, {"every_n_epochs": 9, "save_last": True}, DENSE | {"last": "pruned"}),
    "at an epoch": (1, {}, DENSE | {"epoch=2-step=24": "pruned"}),
    "at an epoch, none kept": (1, {"save_top_k": 0}, DENSE),
    "at an epoch, save_last": (1, {"save_top_k": 0, "save_last": True}, DENSE | {"last": "pruned"}),
}


@pytest.mark.parametrize(("at_epoch", "options", "expected"), FILES.values(), ids=FILES)
def test_some_file_holds_the_dense_weights_and_dense_ckpt_is_written_where_no_other_does(
    fit, tmp_path, at_epoch, options, expected
):
    dense, pruning = dense_state(fit, max_epochs=at_epoch or 2), pruner(at_epoch=at_epoch)
    fit(pruning, ModelCheckpoint(**options), max_epochs=3 if at_epoch else 2)
    found = {path.stem: kind_of(path, dense, pruning) for path in tmp_path.glob("checkpoints/*.ckpt")}
    assert found == {"pruned": "pruned", **expected}
    assert (tmp_path / "checkpoints" / "last.ckpt").is_symlink() == (options.get("save_last") == "link")


def test_nothing_is_written_where_checkpointing_is_disabled(fit, tmp_path):
    pruning = pruner()
    fit(pruning, enable_checkpointing=False)
    assert pruning.report.sparsity > 0
    assert pruning.best_model_path == ""
    assert list(tmp_path.iterdir()) == []


def test_dirpath_is_written_to_even_where_checkpointing_is_disabled(fit, tmp_path):
    pruning = pruner(dirpath=tmp_path / "a" / "b")
    fit(pruning, enable_checkpointing=False)
    assert pruning.best_model_path == str(tmp_path / "a" / "b" / "pruned.ckpt")
    assert sorted(path.name for path in tmp_path.rglob("*.ckpt")) == ["dense.ckpt", "pruned.ckpt"]


def test_files_lie_beside_the_checkpoints_of_the_trainer(fit, tmp_path):
    pruning = pruner()
    fit(pruning, ModelCheckpoint(dirpath=tmp_path / "mine"))
    assert pruning.best_model_path == str(tmp_path / "mine" / "pruned.ckpt")


def test_the_files_of_an_earlier_run_are_not_overwritten(fit, tmp_path):
    runs = [pruner(dirpath=tmp_path, seed=seed) for seed in (0, 1, 2)]
    contents = {}
    for pruning in runs:
        fit(pruning, enable_checkpointing=False)
        contents |= {path: path.read_bytes() for path in tmp_path.glob("*.ckpt") if path not in contents}
    names = [os.path.basename(one.best_model_path) for one in runs]
    assert names == ["pruned.ckpt", "pruned-v1.ckpt", "pruned-v2.ckpt"]
    assert {path.name for path in contents} == {*names, "dense.ckpt", "dense-v1.ckpt", "dense-v2.ckpt"}
    assert all(path.read_bytes() == content for path, content in contents.items())
    assert [Mask.load(one.best_model_path) for one in runs] == [one.mask for one in runs]


@pytest.mark.parametrize("folders", [("one", "two"), ("one", "one")])
def test_fitting_on_leaves_the_first_winner(fit, tmp_path, folders):
    pruning = pruner()
    module = fit(pruning, default_root_dir=tmp_path / folders[0])
    first = Path(pruning.best_model_path)
    content = first.read_bytes()
    fit(pruning, module=module, default_root_dir=tmp_path / folders[1])
    assert first.read_bytes() == content
    assert Path(pruning.best_model_path).parent == tmp_path / folders[1] / "checkpoints"
    assert equal(load(pruning.best_model_path)["state_dict"], module.state_dict())


class StepsUnseen(Blobs):
    """Takes its optimizer past the Trainer, whose global step stays 0."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_training_that_the_global_step_does_not_count_is_measured_and_saved(fit, make_trainer):
    pruning = pruner(at_epoch=1)
    module = fit(pruning, module=StepsUnseen(), max_epochs=3)
    assert module.trainer.global_step == 0
    (logged,) = make_trainer().validate(module, val_loader(), verbose=False)
    assert pruning.report.trained_score == pytest.approx(logged["val_acc"], abs=1e-7)
    assert pruning.report.trained_score > pruning.report.score
    assert equal(load(pruning.best_model_path)["state_dict"], module.state_dict())


@pytest.mark.filterwarnings("ignore:RouletteWheelPruning. the search did not end")
@pytest.mark.parametrize("unwritable", ["dense", "pruned"])
def test_a_winner_that_cannot_be_written_is_not_lost_and_names_no_file(fit, monkeypatch, unwritable):
    pruning, save = pruner(), Trainer.save_checkpoint

    def full_disk(trainer, path, *arguments, **options):
        if unwritable in str(path):
            raise OSError("No space left on device")
        save(trainer, path, *arguments, **options)

    monkeypatch.setattr(Trainer, "save_checkpoint", full_disk)
    with pytest.raises(OSError, match="No space left"):
        fit(pruning, ModelCheckpoint(save_top_k=0))
    assert pruning.best_model_path == ""
    assert pruning.report.sparsity > 0
    assert unwritable == "dense" or pruning.mask.sparsity == pruning.report.sparsity


# ---- names agree with contents


@pytest.mark.parametrize("at_epoch", [1, 2])
def test_a_checkpoint_keeps_what_its_name_says(fit, make_trainer, tmp_path, at_epoch):
    pruning = pruner(at_epoch=at_epoch, tree=Tree(pruning_rate=0.7, max_levels=1), tolerance=math.inf)
    every = ModelCheckpoint(save_top_k=-1, monitor="val_acc", filename="{epoch}-{val_acc:.5f}")
    module = fit(pruning, every, max_epochs=3)
    found = {path.name: path for path in tmp_path.glob("checkpoints/epoch=*.ckpt")}
    assert len(found) == 3
    for name, path in found.items():
        epoch, score = re.fullmatch(r"epoch=(\d)-val_acc=([\d.]+)\.ckpt", name).groups()
        pruned = int(epoch) >= at_epoch
        assert sparsity_of(path) == (pruning.report.sparsity if pruned else 0.0)
        assert ("RouletteWheelPruning" in load(path)["callbacks"]) == pruned
        loaded = Blobs.load_from_checkpoint(path, weights_only=True)
        (logged,) = make_trainer().validate(loaded, val_loader(), verbose=False)
        assert logged["val_acc"] == pytest.approx(float(score), abs=1e-5)
    assert equal(load(pruning.best_model_path)["state_dict"], module.state_dict())


# ---- resuming


@pytest.mark.parametrize(("at_epoch", "which"), [(2, "pruned"), (2, "epoch=2-step=24"), (None, "pruned")])
def test_a_resume_from_after_the_search_holds_the_zeros_and_searches_no_more(fit, tmp_path, caplog, at_epoch, which):
    first = pruner(at_epoch=at_epoch)
    fit(first, ModelCheckpoint(save_top_k=-1), max_epochs=3)
    path = tmp_path / "checkpoints" / f"{which}.ckpt"
    content = path.read_bytes()
    resumed, notes = pruner(at_epoch=at_epoch), Sparsities()
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        module = fit(resumed, notes, ModelCheckpoint(save_top_k=-1), max_epochs=5, ckpt_path=path)
    assert not any("pruned before" in line for line in caplog.messages)
    assert notes.found == [first.report.sparsity] * 16
    assert resumed.mask == first.mask == nonzeros(module)
    assert resumed.report.levels == first.report.levels
    assert resumed.report.trained_score is not None
    assert path.read_bytes() == content


@pytest.mark.parametrize("which", ["pruned", "dense"])
def test_a_crashed_run_resumes_from_a_file_of_the_search_and_misses_no_step(fit, tmp_path, which):
    whole = pruner(at_epoch=2, dirpath=tmp_path / "whole")
    fit(whole, enable_checkpointing=False, max_epochs=4)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(pruner(at_epoch=2, dirpath=tmp_path / "crashed"), PowerCut(), enable_checkpointing=False, max_epochs=4)
    resumed, notes = pruner(at_epoch=2, dirpath=tmp_path / "resumed"), Sparsities()
    path = tmp_path / "crashed" / f"{which}.ckpt"
    module = fit(resumed, notes, enable_checkpointing=False, max_epochs=4, ckpt_path=path)
    assert notes.found == [whole.report.sparsity] * 16
    assert resumed.mask == whole.mask == nonzeros(module)


@pytest.mark.parametrize("at_epoch", [None, 3])
def test_a_resume_from_before_the_search_searches(fit, tmp_path, at_epoch):
    fit(pruner(at_epoch=at_epoch), ModelCheckpoint(), max_epochs=2 if at_epoch is None else 3)
    (path,) = tmp_path.glob("checkpoints/epoch=*.ckpt")
    resumed, notes = pruner(at_epoch=at_epoch), Sparsities()
    module = fit(resumed, notes, max_epochs=4, ckpt_path=path)
    before = 16 if at_epoch is None else 0
    assert set(notes.found[:before]) <= {0.0}
    assert set(notes.found[before:]) <= {resumed.report.sparsity}
    assert resumed.report.sparsity > 0
    assert resumed.mask == nonzeros(module)


def test_the_same_callback_resumed_from_before_its_search_searches_anew(fit, tmp_path):
    pruning = pruner()
    module = fit(pruning, ModelCheckpoint(dirpath=tmp_path / "one"))
    first, notes = pruning.report, Sparsities()
    (path,) = tmp_path.glob("one/epoch=*.ckpt")
    two = ModelCheckpoint(dirpath=tmp_path / "two")
    fit(pruning, notes, two, module=module, max_epochs=4, ckpt_path=path)
    assert set(notes.found) == {0.0}
    assert pruning.report is not first
    assert pruning.report.trained_score is None
    assert pruning.mask == nonzeros(module)


# ---- loading unpruned weights after a search


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_unpruned_weights_loaded_after_a_search_warn_and_are_saved_as_they_are(fit, tmp_path, verb, weights_only):
    module = fit(pruner(), ModelCheckpoint(save_weights_only=weights_only), module=Judged())
    options = {} if verb == "predict" else {"verbose": False}
    with pytest.warns(UserWarning, match=r"holds unpruned weights. The pruned weights are in .*pruned\.ckpt") as caught:
        getattr(module.trainer, verb)(module, val_loader(), ckpt_path="best", **options)
    assert sum("unpruned" in str(one.message) for one in caught) == 1
    assert nonzeros(module).sparsity == 0
    module.trainer.save_checkpoint(tmp_path / "saved.ckpt", weights_only=False)
    assert equal(load(tmp_path / "saved.ckpt")["state_dict"], module.state_dict())


@pytest.mark.parametrize("weights_only", [False, True])
def test_loading_pruned_weights_of_any_file_does_not_warn(fit, weights_only):
    pruning = pruner(at_epoch=1)
    module = fit(pruning, ModelCheckpoint(save_weights_only=weights_only), module=Judged())
    for path in ("best", pruning.best_model_path):
        module.trainer.test(module, val_loader(), ckpt_path=path, verbose=False)
    assert nonzeros(module).sparsity == pruning.report.sparsity


def test_after_a_search_a_checkpoint_of_another_network_can_be_validated(fit, tmp_path):
    other = Blobs()
    other.net = torch.nn.Linear(16, 10)
    trainer = fit(pruner(), enable_checkpointing=False).trainer
    fit(module=other, max_epochs=1)
    (path,) = tmp_path.glob("checkpoints/epoch=*.ckpt")
    (logged,) = trainer.validate(other, val_loader(), ckpt_path=path, verbose=False)
    assert 0 <= logged["val_acc"] <= 1


# ---- interrupted


# Validations before the search judges the dense network. On all the data: to find the metric, and on the batches as
# they were read. On one fold: to see that it is taken, as the network is, with all weights at zero, to see which
# weights are used, and to see what is logged as the metric. On one batch: as the network is, and without either weight.
REHEARSALS = 12
# Then come, on all the data: the dense network; of each level two candidates, and the winner of them again.


class Interrupted(Blobs):
    """Ctrl-C, or an error, in the second batch of the nth validation that the search asks for."""

    def __init__(self, at: int, error: BaseException | None = None, *, in_epoch: int = 2) -> None:
        super().__init__()
        self.at, self.error, self.in_epoch, self.seen = at, error or KeyboardInterrupt(), in_epoch, -REHEARSALS

    def on_validation_epoch_start(self):
        self.seen += self._in_search()

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self._in_search() and self.seen == self.at and batch_idx == 1:
            raise self.error

    def _in_search(self) -> bool:
        return self.trainer.current_epoch == self.in_epoch


TWO, FOUR = ({"tree": Tree(0.2, max_levels=levels), "validation": ON_ALL} for levels in (2, 4))
HALVES = {"tree": Tree(0.2, max_levels=2), "validation": Validation(race=False)}  # each half judges the dense network
ENDINGS = {KeyboardInterrupt: (SystemExit, StopReason.INTERRUPTED), MemoryError: (MemoryError, StopReason.FAILED)}


def interrupted(fit, at: int, error=KeyboardInterrupt, at_epoch=None, **choices):
    """The report of a search that was interrupted, and its network, which is dense again."""
    dense, pruning, module = dense_state(fit), pruner(at_epoch=at_epoch, **choices), Interrupted(at, error())
    met, reason = ENDINGS[error]
    with pytest.raises(met):
        fit(pruning, module=module, max_epochs=3 if at_epoch else 2)
    assert equal(module.state_dict(), dense)
    assert pruning.report is None or pruning.report.stop_reason is reason
    return pruning.report, module


def assert_kept(folder: Path, report: SearchReport, module, level: int) -> None:
    path = folder / "checkpoints" / "interrupted.pt"
    assert SearchReport.from_dict(load(path)["report"]) == report
    apply_mask(module, path)
    assert nonzeros(module).sparsity == report.sparsity == report.levels[level - 1].sparsity
    assert not (folder / "checkpoints" / "pruned.ckpt").exists()


@pytest.mark.parametrize("error", ENDINGS)
@pytest.mark.parametrize("at_epoch", [None, 2])
def test_an_interrupted_search_gives_the_dense_network_back_and_keeps_accepted_levels(fit, tmp_path, error, at_epoch):
    with pytest.warns(UserWarning, match=r"The 2 levels accepted so far are in .*interrupted\.pt"):
        report, module = interrupted(fit, 8, error, at_epoch, **FOUR)
    assert [level.accepted for level in report.levels] == [True, True]
    assert_kept(tmp_path, report, module, 2)


def test_the_masks_of_an_interrupted_search_are_those_of_the_whole_one(fit, tmp_path):
    whole = pruner(**TWO)
    fit(whole, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="The 2 levels accepted"):
        interrupted(fit, 8, **FOUR)
    assert Mask.load(tmp_path / "checkpoints" / "interrupted.pt") == whole.mask


@pytest.mark.parametrize(("at", "level", "held"), [(9, 2, [None, None]), (10, 1, [True, None])])
def test_a_search_interrupted_while_its_levels_are_confirmed_keeps_what_held(fit, tmp_path, at, level, held):
    """Until one is confirmed all accepted levels count."""
    with pytest.warns(UserWarning, match=r"accepted so far are in .*interrupted\.pt"):
        report, module = interrupted(fit, at, **HALVES)
    assert [one.held for one in report.accepted] == held
    assert_kept(tmp_path, report, module, level)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_search_interrupted_before_a_level_was_accepted_writes_nothing(fit, tmp_path, at):
    report, _ = interrupted(fit, at, validation=ON_ALL)
    assert not (tmp_path / "checkpoints" / "interrupted.pt").exists()
    assert report is None if at == 1 else report.levels == ()  # at 1 the dense network is not judged yet


def test_ctrl_c_while_the_loaded_winner_is_measured_loses_nothing(fit):
    pruning, module = pruner(**TWO), Interrupted(8)
    with pytest.raises(SystemExit):
        fit(pruning, module=module)
    assert pruning.report.score is None
    assert nonzeros(module).sparsity == sparsity_of(pruning.best_model_path) == pruning.report.sparsity > 0
    assert len(pruning.report.accepted) == 2


@pytest.mark.filterwarnings("ignore:RouletteWheelPruning. the search did not end")
def test_an_interrupted_fit_can_be_fitted_again_and_searches(fit):
    pruning, module = pruner(**TWO), Interrupted(5)
    with pytest.raises(SystemExit):
        fit(pruning, module=module, enable_checkpointing=False)
    module.at = 0
    fit(pruning, module=module, enable_checkpointing=False)
    assert pruning.report.stop_reason is StopReason.MAX_LEVELS
    assert pruning.mask == nonzeros(module)


@pytest.mark.parametrize("hold", [False, True])
def test_an_error_in_training_takes_the_hold_off_the_weights(fit, hold):
    callback = HoldZeros({"net.0.weight": torch.eye(24, 16) > 0}) if hold else pruner(at_epoch=1)
    module, optimizers = Blobs(), []
    sees = within("on_train_start", lambda trainer, _: optimizers.extend(trainer.optimizers))
    with pytest.raises(RuntimeError, match="power cut"):
        fit(callback, sees, PowerCut(), module=module, enable_checkpointing=False, max_epochs=4)
    for parameter in module.parameters():
        assert not parameter._post_accumulate_grad_hooks
    assert not optimizers[0]._optimizer_step_post_hooks


# ---- other networks, other stages, other runs


@pytest.mark.parametrize("units", [24, 30])
@pytest.mark.parametrize("hold", [False, True])
def test_a_file_saved_of_another_network_holds_that(fit, tmp_path, units, hold):
    callback, another = HoldZeros({"net.0.weight": torch.eye(24, 16) > 0}) if hold else pruner(), Blobs()
    another.net[0], another.net[2] = torch.nn.Linear(16, units), torch.nn.Linear(units, 10)
    trainer = fit(callback, enable_checkpointing=False).trainer
    trainer.validate(another, val_loader(), verbose=False)
    trainer.save_checkpoint(tmp_path / "another.ckpt", weights_only=False)
    assert equal(load(tmp_path / "another.ckpt")["state_dict"], another.state_dict())


@pytest.mark.filterwarnings("ignore:RouletteWheelPruning. the checkpoint that was loaded holds unpruned weights")
def test_validating_a_file_leaves_the_record_of_the_search(fit, tmp_path):
    fit(pruner(seed=5, dirpath=tmp_path / "older"))
    pruning = pruner(at_epoch=1, dirpath=tmp_path / "newer")
    module = fit(pruning, enable_checkpointing=False)
    found = pruning.report, pruning.mask, pruning.best_model_path
    module.trainer.validate(module, val_loader(), ckpt_path=tmp_path / "older" / "pruned.ckpt", verbose=False)
    assert (pruning.report, pruning.mask, pruning.best_model_path) == found
    assert pruning.report.trained_score is not None


def test_a_second_fit_after_a_resume_holds_and_does_not_search(fit, tmp_path):
    first, resumed = pruner(dirpath=tmp_path / "first"), pruner(dirpath=tmp_path / "resumed")
    fit(first)
    module = fit(resumed, enable_checkpointing=False, max_epochs=3, ckpt_path=first.best_model_path)
    fit(resumed, module=module, enable_checkpointing=False, max_epochs=1)
    assert resumed.mask == first.mask == nonzeros(module)


@pytest.mark.filterwarnings("ignore:RouletteWheelPruning. the search did not end")
def test_a_resume_from_a_checkpoint_of_the_interruption_misses_no_epoch(fit, tmp_path):
    class Saves(Callback):
        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "exception.ckpt", weights_only=False)

    options = {"enable_checkpointing": False, "max_epochs": 3}
    with pytest.raises(SystemExit):
        fit(pruner(at_epoch=1, validation=ON_ALL), Saves(), module=Interrupted(3, in_epoch=1), **options)
    trained, resumed = [], pruner(at_epoch=1)
    notes = within("on_train_epoch_end", lambda trainer, _: trained.append(trainer.current_epoch))
    fit(resumed, notes, ckpt_path=tmp_path / "exception.ckpt", **options)
    assert trained == [1, 2]
    assert resumed.report.sparsity > 0
