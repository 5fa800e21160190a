"""What is in which file: before a search, after it, after a resume, and when it was interrupted."""

from __future__ import annotations

import glob
import logging
import os
import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_roulette import (
    HoldZeros,
    Mask,
    SearchReport,
    StopReason,
    Tree,
    Validation,
    apply_mask,
    prunable_parameters,
    sparsity,
)
from tests.support.fits import pruner
from tests.support.modules import Blobs, train_loader, val_loader
from tests.support.results import PowerCut, Sparsities, equal, load, sparsity_of


@pytest.fixture
def fit(fit):
    """Fits with a ModelCheckpoint."""
    return partial(fit, enable_checkpointing=True)


def dense_state(fit, **options) -> dict[str, torch.Tensor]:
    return fit(enable_checkpointing=False, **options).state_dict()


def files(folder) -> dict[str, float]:
    """Name to sparsity of every checkpoint in the default folder."""
    return {os.path.basename(path): sparsity_of(path) for path in glob.glob(f"{folder}/checkpoints/*.ckpt")}


# ---- what a search writes


@pytest.mark.filterwarnings("error:RouletteWheelPruning", "ignore:Be aware that when using `ckpt_path`")
def test_pruned_ckpt_holds_the_module_with_mask_and_report_and_loads_into_the_unpruned_class(
    fit, make_trainer, tmp_path
):
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


@pytest.mark.parametrize("monitor", ["val_acc", "val_loss"])
def test_dense_weights_are_written_unless_a_checkpoint_of_the_trainer_holds_them(fit, tmp_path, monitor):
    # mode "min" on accuracy, "max" on loss: the first epoch stays the best one
    mode = "min" if monitor == "val_acc" else "max"
    dense = dense_state(fit)
    pruning = pruner()
    fit(pruning, ModelCheckpoint(monitor=monitor, mode=mode))
    assert files(tmp_path) == {"epoch=0-step=8.ckpt": 0.0, "dense.ckpt": 0.0, "pruned.ckpt": pruning.report.sparsity}
    stored = load(tmp_path / "checkpoints" / "dense.ckpt")
    assert equal(stored["state_dict"], dense)
    assert "RouletteWheelPruning" not in stored["callbacks"]


@pytest.mark.parametrize(
    "options",
    [{}, {"save_last": True}, {"save_last": "link"}, {"save_top_k": -1}, {"save_top_k": -1, "monitor": "train_loss"}],
    ids=str,
)
def test_a_checkpoint_that_holds_the_dense_weights_is_not_written_twice(fit, tmp_path, options):
    dense = dense_state(fit)
    fit(pruner(), ModelCheckpoint(**options))
    assert "dense.ckpt" not in files(tmp_path)
    assert equal(load(tmp_path / "checkpoints" / "epoch=1-step=16.ckpt")["state_dict"], dense)


@pytest.mark.parametrize("at_epoch", [None, 1])
@pytest.mark.parametrize("options", [{}, {"save_top_k": 0}, {"save_top_k": 0, "save_last": True}], ids=str)
def test_after_fit_some_file_holds_the_weights_before_the_search(fit, tmp_path, options, at_epoch):
    dense = dense_state(fit, max_epochs=at_epoch or 3)
    fit(pruner(at_epoch=at_epoch), ModelCheckpoint(**options), max_epochs=3)
    stored = [load(path)["state_dict"] for path in tmp_path.glob("checkpoints/*.ckpt")]
    assert any(equal(one, dense) for one in stored)


@pytest.mark.parametrize("save_last", [True, "link"])
def test_last_ckpt_of_a_search_at_the_end_holds_the_unpruned_weights(fit, tmp_path, save_last):
    dense = dense_state(fit)
    fit(pruner(), ModelCheckpoint(save_last=save_last))
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert equal(load(last)["state_dict"], dense)
    assert last.is_symlink() == (save_last == "link")


@pytest.mark.parametrize("options", [{"save_top_k": 0}, {"every_n_epochs": 9}], ids=str)
def test_last_ckpt_that_is_first_written_after_the_search_is_pruned(fit, tmp_path, options):
    pruning = pruner()
    fit(pruning, ModelCheckpoint(save_last=True, **options))
    slim = pruning.report.sparsity
    assert files(tmp_path) == {"dense.ckpt": 0.0, "pruned.ckpt": slim, "last.ckpt": slim}
    assert "RouletteWheelPruning" in load(tmp_path / "checkpoints" / "last.ckpt")["callbacks"]


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


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
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


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
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


@pytest.mark.filterwarnings("ignore:RouletteWheelPruning. the search did not end")
@pytest.mark.parametrize("unwritable", ["dense", "pruned"])
def test_a_winner_that_cannot_be_written_is_not_lost_and_names_no_file(make_trainer, monkeypatch, unwritable):
    pruning = pruner()
    trainer = make_trainer(callbacks=[pruning, ModelCheckpoint(save_top_k=0)], enable_checkpointing=True)
    save = trainer.save_checkpoint

    def full_disk(path, *arguments, **options):
        if unwritable in str(path):
            raise OSError("No space left on device")
        save(path, *arguments, **options)

    monkeypatch.setattr(trainer, "save_checkpoint", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(Blobs(), train_loader(), val_loader())
    assert pruning.best_model_path == ""
    assert pruning.report.sparsity > 0
    assert unwritable == "dense" or pruning.mask.sparsity == pruning.report.sparsity


# ---- names agree with contents


@pytest.mark.parametrize("at_epoch", [1, 2])
def test_a_checkpoint_keeps_what_its_name_says(fit, make_trainer, tmp_path, at_epoch):
    pruning = pruner(at_epoch=at_epoch, tree=Tree(pruning_rate=0.7, max_levels=1), tolerance=1.0)
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


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(("at_epoch", "which"), [(2, "pruned"), (2, "epoch=2-step=24"), (None, "pruned")])
def test_a_resume_from_after_the_search_holds_the_zeros_and_does_not_search_again(
    fit, tmp_path, caplog, at_epoch, which
):
    first = pruner(at_epoch=at_epoch)
    fit(first, ModelCheckpoint(save_top_k=-1), max_epochs=3)
    path = tmp_path / "checkpoints" / f"{which}.ckpt"
    content = path.read_bytes()
    resumed, notes = pruner(at_epoch=at_epoch), Sparsities()
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        module = fit(resumed, notes, ModelCheckpoint(save_top_k=-1), max_epochs=5, ckpt_path=path)
    assert not any("pruned before" in line for line in caplog.messages)
    assert notes.found == [first.report.sparsity] * 16
    assert resumed.mask == first.mask == Mask.of_nonzeros(prunable_parameters(module))
    assert resumed.report.levels == first.report.levels
    assert resumed.report.trained_score is not None
    assert path.read_bytes() == content


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("which", ["pruned", "dense"])
def test_a_crashed_run_resumes_from_a_file_of_the_search_and_misses_no_step(fit, tmp_path, which):
    whole = pruner(at_epoch=2, dirpath=tmp_path / "whole")
    fit(whole, enable_checkpointing=False, max_epochs=4)
    crashed = pruner(at_epoch=2, dirpath=tmp_path / "crashed")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(crashed, PowerCut(), enable_checkpointing=False, max_epochs=4)
    resumed, notes = pruner(at_epoch=2, dirpath=tmp_path / "resumed"), Sparsities()
    path = tmp_path / "crashed" / f"{which}.ckpt"
    module = fit(resumed, notes, enable_checkpointing=False, max_epochs=4, ckpt_path=path)
    assert notes.found == [whole.report.sparsity] * 16
    assert resumed.mask == whole.mask == Mask.of_nonzeros(prunable_parameters(module))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
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
    assert resumed.mask == Mask.of_nonzeros(prunable_parameters(module))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_the_same_callback_resumed_from_before_its_search_searches_anew(fit, tmp_path):
    pruning = pruner()
    module = fit(pruning, ModelCheckpoint(dirpath=tmp_path / "one"))
    first, notes = pruning.report, Sparsities()
    (path,) = tmp_path.glob("one/epoch=*.ckpt")
    fit(
        pruning,
        notes,
        ModelCheckpoint(dirpath=tmp_path / "two"),
        module=module,
        max_epochs=4,
        ckpt_path=path,
    )
    assert set(notes.found) == {0.0}
    assert pruning.report is not first
    assert pruning.report.trained_score is None
    assert pruning.mask == Mask.of_nonzeros(prunable_parameters(module))


# ---- loading unpruned weights after a search


class Judged(Blobs):
    def test_step(self, batch, batch_idx):
        self.log("test_acc", self.val_acc(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_loading_unpruned_weights_after_a_search_warns_and_names_the_pruned_file(make_trainer, verb, weights_only):
    pruning, module = pruner(), Judged()
    trainer = make_trainer(
        callbacks=[pruning, ModelCheckpoint(save_weights_only=weights_only)], enable_checkpointing=True
    )
    trainer.fit(module, train_loader(), val_loader())
    options = {} if verb == "predict" else {"verbose": False}
    with pytest.warns(UserWarning, match=r"holds unpruned weights. The pruned weights are in .*pruned\.ckpt") as caught:
        getattr(trainer, verb)(module, val_loader(), ckpt_path="best", **options)
    assert sum("unpruned" in str(one.message) for one in caught) == 1
    assert sparsity(prunable_parameters(module)) == 0


@pytest.mark.parametrize("weights_only", [False, True])
def test_loading_pruned_weights_of_any_file_does_not_warn(make_trainer, weights_only):
    pruning, module = pruner(at_epoch=1), Judged()
    trainer = make_trainer(
        callbacks=[pruning, ModelCheckpoint(save_weights_only=weights_only)], enable_checkpointing=True
    )
    trainer.fit(module, train_loader(), val_loader())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*num_workers|.*many workers|.*LeafSpec.*")
        for path in ("best", pruning.best_model_path):
            trainer.test(module, val_loader(), ckpt_path=path, verbose=False)
    assert sparsity(prunable_parameters(module)) == pruning.report.sparsity


def test_a_module_that_is_passed_is_judged_as_it_is_without_a_warning(fit):
    pruning = pruner()
    module = fit(pruning)
    (logged,) = module.trainer.validate(module, val_loader(), verbose=False)
    assert logged["val_acc"] == pytest.approx(pruning.report.score, abs=1e-7)


def test_a_file_saved_of_weights_that_were_loaded_unpruned_holds_them(make_trainer, tmp_path):
    pruning, module = pruner(), Judged()
    trainer = make_trainer(callbacks=[pruning], enable_checkpointing=True)
    trainer.fit(module, train_loader(), val_loader())
    with pytest.warns(UserWarning, match="holds unpruned weights"):
        trainer.validate(module, val_loader(), ckpt_path="best", verbose=False)
    trainer.save_checkpoint(tmp_path / "saved.ckpt", weights_only=False)
    assert equal(load(tmp_path / "saved.ckpt")["state_dict"], module.state_dict())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_after_a_search_a_checkpoint_of_another_network_can_be_validated(make_trainer, tmp_path):
    class Other(Judged):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(16, 10)

    pruning, other = pruner(), Other()
    trainer = make_trainer(callbacks=[pruning])
    trainer.fit(Judged(), train_loader(), val_loader())
    make_trainer(max_epochs=1, enable_checkpointing=True).fit(other, train_loader(), val_loader())
    (path,) = tmp_path.glob("checkpoints/epoch=*.ckpt")
    (logged,) = trainer.validate(other, val_loader(), ckpt_path=path, verbose=False)
    assert 0 <= logged["val_acc"] <= 1


# ---- interrupted


# Validations before the search judges the dense network. On all the data: to find the metric, and on the batches as
# they were read. On one fold: to see that it is taken, as the network is, with all weights at zero, and to see what is
# logged as the metric.
REHEARSALS = 6
# Then come, on all the data: the dense network; of each level two candidates, and the winner of them again.
ON_ALL = Validation(confirm=0, race=False)


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


ENDINGS = [(KeyboardInterrupt, SystemExit, StopReason.INTERRUPTED), (MemoryError, MemoryError, StopReason.FAILED)]


@pytest.mark.parametrize(("raised", "met", "reason"), ENDINGS)
@pytest.mark.parametrize("at_epoch", [None, 2])
def test_an_interrupted_search_gives_the_dense_network_back_and_keeps_the_accepted_levels(
    fit, tmp_path, raised, met, reason, at_epoch
):
    dense = dense_state(fit)
    pruning = pruner(at_epoch=at_epoch, tree=Tree(0.2, max_levels=4), validation=ON_ALL)
    module = Interrupted(8, raised())
    with pytest.raises(met), pytest.warns(UserWarning, match=r"The 2 levels accepted so far are in .*interrupted\.pt"):
        fit(pruning, module=module, max_epochs=2 if at_epoch is None else 3)
    assert equal(module.state_dict(), dense)
    report = pruning.report
    assert report.stop_reason is reason
    assert [level.accepted for level in report.levels] == [True, True]
    path = tmp_path / "checkpoints" / "interrupted.pt"
    apply_mask(module, path)
    assert sparsity(prunable_parameters(module)) == report.sparsity == report.levels[1].sparsity
    assert SearchReport.from_dict(load(path)["report"]) == report
    assert not (tmp_path / "checkpoints" / "pruned.ckpt").exists()


def test_the_masks_of_an_interrupted_search_are_those_of_the_whole_one(fit, tmp_path):
    whole = pruner(tree=Tree(0.2, max_levels=2), validation=ON_ALL)
    fit(whole, enable_checkpointing=False)
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match="The 2 levels accepted"):
        fit(pruner(tree=Tree(0.2, max_levels=4), validation=ON_ALL), module=Interrupted(8))
    assert Mask.load(tmp_path / "checkpoints" / "interrupted.pt") == whole.mask


@pytest.mark.parametrize(("at", "levels", "held"), [(9, 2, [None, None]), (10, 1, [True, None])])
def test_a_search_interrupted_while_its_levels_are_confirmed_keeps_what_held(fit, tmp_path, at, levels, held):
    """Until one is confirmed all accepted levels count."""
    dense = dense_state(fit)
    pruning = pruner(tree=Tree(0.2, max_levels=2), validation=Validation(race=False))
    module = Interrupted(at)  # the dense network is judged twice, on each half of the data
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match=r"accepted so far are in .*interrupted\.pt"):
        fit(pruning, module=module)
    assert equal(module.state_dict(), dense)
    report = pruning.report
    assert [level.held for level in report.accepted] == held
    assert report.stop_reason is StopReason.INTERRUPTED
    apply_mask(module, tmp_path / "checkpoints" / "interrupted.pt")
    assert sparsity(prunable_parameters(module)) == report.sparsity == report.levels[levels - 1].sparsity


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_search_interrupted_before_a_level_was_accepted_writes_nothing(fit, tmp_path, at):
    dense = dense_state(fit)
    pruning, module = pruner(validation=ON_ALL), Interrupted(at)
    with pytest.raises(SystemExit):
        fit(pruning, module=module)
    assert equal(module.state_dict(), dense)
    assert not (tmp_path / "checkpoints" / "interrupted.pt").exists()
    report = pruning.report
    # at 1 the dense network is not judged yet
    assert (report and (report.stop_reason, report.levels)) == (None if at == 1 else (StopReason.INTERRUPTED, ()))


def test_ctrl_c_while_the_loaded_winner_is_measured_loses_nothing(fit):
    pruning, module = pruner(tree=Tree(0.2, max_levels=2), validation=ON_ALL), Interrupted(8)
    with pytest.raises(SystemExit):
        fit(pruning, module=module)
    assert pruning.report.score is None
    assert sparsity(prunable_parameters(module)) == sparsity_of(pruning.best_model_path) == pruning.report.sparsity > 0
    assert len(pruning.report.accepted) == 2


@pytest.mark.filterwarnings("ignore:RouletteWheelPruning. the search did not end")
def test_an_interrupted_fit_can_be_fitted_again_and_searches(fit):
    pruning, module = pruner(tree=Tree(0.2, max_levels=2), validation=ON_ALL), Interrupted(5)
    with pytest.raises(SystemExit):
        fit(pruning, module=module, enable_checkpointing=False)
    module.at = 0
    fit(pruning, module=module, enable_checkpointing=False)
    assert pruning.report.stop_reason is StopReason.MAX_LEVELS
    assert pruning.mask == Mask.of_nonzeros(prunable_parameters(module))


@pytest.mark.parametrize(
    "callback",
    [lambda: pruner(at_epoch=1), lambda: HoldZeros({"net.0.weight": torch.eye(24, 16) > 0})],
    ids=["at_epoch", "HoldZeros"],
)
def test_an_error_in_training_takes_the_hold_off_the_weights(fit, callback):
    module, optimizers = Blobs(), []

    class Fails(PowerCut):
        def on_train_start(self, trainer, pl_module):
            optimizers.extend(trainer.optimizers)

    with pytest.raises(RuntimeError, match="power cut"):
        fit(callback(), Fails(), module=module, enable_checkpointing=False, max_epochs=4)
    for parameter in module.parameters():
        assert not parameter._post_accumulate_grad_hooks
    assert not optimizers[0]._optimizer_step_post_hooks


# ---- other networks, other stages, other runs


class Wider(Blobs):
    """The names of Blobs in other shapes."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10))


@pytest.mark.parametrize("other", [Blobs, Wider])
@pytest.mark.parametrize("hold", [False, True])
def test_a_file_saved_of_another_network_holds_that(make_trainer, tmp_path, other, hold):
    callback, another = HoldZeros({"net.0.weight": torch.eye(24, 16) > 0}) if hold else pruner(), other()
    trainer = make_trainer(callbacks=[callback])
    trainer.fit(Blobs(), train_loader(), val_loader())
    trainer.validate(another, val_loader(), verbose=False)
    trainer.save_checkpoint(tmp_path / "another.ckpt", weights_only=False)
    assert equal(load(tmp_path / "another.ckpt")["state_dict"], another.state_dict())


def test_validating_a_file_leaves_the_record_of_the_search(fit, make_trainer, tmp_path):
    fit(pruner(seed=5, dirpath=tmp_path / "older"))
    pruning = pruner(at_epoch=1, dirpath=tmp_path / "newer")
    trainer, module = make_trainer(callbacks=[pruning]), Blobs()
    trainer.fit(module, train_loader(), val_loader())
    report, mask, path = pruning.report, pruning.mask, pruning.best_model_path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.validate(module, val_loader(), ckpt_path=tmp_path / "older" / "pruned.ckpt", verbose=False)
    assert (pruning.report, pruning.mask, pruning.best_model_path) == (report, mask, path)
    assert report.trained_score is not None


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_second_fit_after_a_resume_holds_and_does_not_search(fit, tmp_path):
    first = pruner(dirpath=tmp_path / "first")
    fit(first)
    resumed = pruner(dirpath=tmp_path / "resumed")
    path = tmp_path / "first" / "pruned.ckpt"
    module = fit(resumed, enable_checkpointing=False, max_epochs=3, ckpt_path=path)
    fit(resumed, module=module, enable_checkpointing=False, max_epochs=1)
    assert resumed.mask == first.mask == Mask.of_nonzeros(prunable_parameters(module))


@pytest.mark.filterwarnings("ignore:RouletteWheelPruning. the search did not end")
def test_a_resume_from_a_checkpoint_of_the_interruption_misses_no_epoch(fit, tmp_path):
    class Saves(Callback):
        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "exception.ckpt", weights_only=False)

    class Epochs(Callback):
        def __init__(self):
            self.trained = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.trained.append(trainer.current_epoch)

    with pytest.raises(SystemExit):
        fit(
            pruner(at_epoch=1, validation=ON_ALL),
            Saves(),
            module=Interrupted(3, in_epoch=1),
            enable_checkpointing=False,
            max_epochs=3,
        )
    epochs, resumed = Epochs(), pruner(at_epoch=1)
    options = {"enable_checkpointing": False, "max_epochs": 3, "ckpt_path": tmp_path / "exception.ckpt"}
    fit(resumed, epochs, **options)
    assert epochs.trained == [1, 2]
    assert resumed.report.sparsity > 0
