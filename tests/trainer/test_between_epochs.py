"""Pruning in turn with training, through a real Trainer."""

from __future__ import annotations

import logging
import math
import re
from functools import partial
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch.utils.data import DataLoader, TensorDataset

from lightning_roulette import (
    Calibration,
    LeastSquares,
    Mask,
    RouletteWheelPruning,
    StopReason,
    Tree,
    Validation,
    Wheel,
)
from tests.support.callbacks import within
from tests.support.copies import COPIES
from tests.support.modules import Blobs, blobs, val_loader
from tests.support.results import PowerCut, SavesAtEnd, Sparsities, copied, equal, nonzeros, told

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
EPOCHS = (2, 3, 4, 5)
MISSES = {"target_sparsity": 0.99, "tolerance": 0.2, "at_epoch": [2, 4, 6]}  # its second cut


def pruner(**choices) -> RouletteWheelPruning:
    usual = {"branches": 2, "tolerance": 0.05, "at_epoch": EPOCHS, "tree": Tree(pruning_rate=0.4), "monitor": "val_acc"}
    return RouletteWheelPruning(**usual | choices)


@pytest.fixture
def fit(fit):
    """Fits on the same batches in every epoch, so that a resumed run sees what the whole run saw."""
    data = DataLoader(blobs(400, 1), batch_size=50)
    return partial(fit, train=data, enable_checkpointing=True, max_epochs=8)


class Notes(Sparsities):
    """Also the network as each epoch begins, before it is cut, and as training ends."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.trained.append(copied(pl_module))

    def on_train_end(self, trainer, pl_module):
        self.trained.append(copied(pl_module))


def test_levels_are_cut_between_epochs_and_zeros_held_in_between(fit):
    pruning, notes = pruner(tolerance=math.inf), Notes()
    module = fit(pruning, notes)
    levels = pruning.report.levels
    assert [level.epoch for level in levels] == list(EPOCHS)
    expected = [0.0] * 16 + [level.sparsity for level in levels for _ in range(8)] + [levels[-1].sparsity] * 16
    assert notes.found == expected
    assert nonzeros(module) == pruning.mask == pruning.mask_at(4)
    assert all(pruning.mask_at(level + 1) <= pruning.mask_at(level) for level in range(4))
    assert equal(pruning.weights_at(4), dict(module.state_dict()))
    with pytest.raises(RuntimeError, match="weights of level 2 were not kept"):
        pruning.weights_at(2)


def test_a_refit_that_chooses_revives_no_weight_that_training_holds_at_zero(fit, monkeypatch):
    found, refit = [], Calibration.refit

    def recorded(self, mask, how="least_squares", allowed=None, **choices):
        found.append((mask, refit(self, mask, how, allowed, **choices)))
        return found[-1][1]

    monkeypatch.setattr(Calibration, "refit", recorded)
    pruning = pruner(tolerance=math.inf, tree=Tree(0.5), refit=LeastSquares(choose=True))
    module = fit(pruning)
    masks = [pruning.mask_at(level) for level in range(len(pruning.report.levels) + 1)]
    assert len(masks) > 3
    assert all(child <= parent for parent, child in pairwise(masks))
    assert nonzeros(module) == masks[-1]
    chosen = [refitted.mask for drawn, refitted in found if refitted.mask not in (None, drawn)]
    assert len(chosen) > 1
    assert all(mask in masks for mask in chosen)


@pytest.mark.parametrize("keep_files", [True, False])
def test_the_slimmest_level_that_held_is_loaded_as_it_was_then(fit, keep_files):
    pruning, notes = pruner(**MISSES), Notes()
    module = fit(notes, pruning, enable_checkpointing=keep_files)
    assert [level.held for level in pruning.report.levels] == [True, False]
    assert equal(module.state_dict(), notes.trained[4])
    assert pruning.report.sparsity == pruning.mask.sparsity == nonzeros(module).sparsity
    assert bool(pruning.best_model_path) == keep_files
    if keep_files:
        assert equal(Blobs.load_from_checkpoint(pruning.best_model_path).state_dict(), module.state_dict())
        assert Mask.load(pruning.best_model_path) == pruning.mask


def test_a_level_that_misses_is_not_cut_further_and_may_recover(fit):
    few = {"at_epoch": range(2, 12), "tolerance": 0.02, "tree": Tree(0.5), "wheel": Wheel(importance="magnitude")}
    pruning, notes = pruner(branches=1, **few), Notes()
    fit(pruning, notes, max_epochs=12)
    levels = pruning.report.levels
    assert [level.epoch for level in levels] == [2, 3, 6]  # what was cut before epoch 3 missed before 4 and 5
    assert all(level.held for level in levels)
    assert sorted(set(notes.found)) == [0.0, *(level.sparsity for level in levels)]


def test_where_no_level_holds_the_dense_network_comes_back(fit):
    pruning, notes = pruner(tree=Tree(pruning_rate=0.99), tolerance=0.0, at_epoch=[6]), Notes()
    module = fit(notes, pruning, max_epochs=7)
    assert pruning.report.winner is None
    assert equal(module.state_dict(), notes.trained[6])
    assert pruning.best_model_path == ""
    assert pruning.mask.sparsity == 0


def test_a_target_sparsity_is_reached_by_the_cubic_schedule(fit):
    pruning = pruner(target_sparsity=0.9, tolerance=math.inf)
    fit(pruning)
    goals = [0.9 * (1 - (1 - place / 4) ** 3) for place in (1, 2, 3, 4)]
    assert [level.sparsity for level in pruning.report.levels] == pytest.approx(goals, abs=1 / 624)
    assert pruning.report.stop_reason is StopReason.TARGET_REACHED


@pytest.mark.parametrize("monitor", ["val_acc", "val_loss"])
def test_the_score_of_a_level_is_what_the_trainer_finds_in_its_checkpoint(fit, make_trainer, monitor):
    pruning = pruner(monitor=monitor, tolerance=0.5, branches=1, refit=None)
    fit(pruning)
    module = Blobs.load_from_checkpoint(pruning.best_model_path)
    (found,) = make_trainer().validate(module, val_loader(), verbose=False)
    assert pruning.report.winner.held_out_score == pytest.approx(found[monitor], rel=1e-5)
    assert pruning.report.score == pytest.approx(found[monitor], rel=1e-5)
    sign = 1 if monitor == "val_acc" else -1
    assert sign * (pruning.report.held_out_floor - pruning.report.held_out_dense) == pytest.approx(-0.5)


class Quasi(Blobs):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)


CUTS = {"tree": Tree(pruning_rate=0.7), "tolerance": 0.1, "refit": None}
RESUMED = {
    "before the first cut": ("epoch=1-step=16", CUTS, Blobs),
    "between cuts": ("epoch=3-step=32", CUTS, Blobs),
    "after the last cut": ("epoch=6-step=56", CUTS, Blobs),
    "with a refit": ("epoch=4-step=40", CUTS | {"refit": "least_squares"}, Blobs),
    "from the last step of an epoch": ("step=24", {"tolerance": math.inf}, Blobs),
    "with LBFGS": ("epoch=3-step=32", {"tolerance": math.inf, "at_epoch": [2]}, Quasi),
}


@pytest.mark.parametrize(("file", "choices", "network"), RESUMED.values(), ids=RESUMED)
def test_a_run_resumed_from_any_file_ends_as_the_whole_one(fit, tmp_path, file, choices, network):
    whole, resumed = pruner(**choices), pruner(**choices)
    files = ModelCheckpoint(save_top_k=-1), ModelCheckpoint(filename="{step}", every_n_train_steps=8, save_top_k=-1)
    module = fit(whole, *files, module=network())
    again = fit(resumed, module=network(), ckpt_path=tmp_path / "checkpoints" / f"{file}.ckpt")
    assert len(whole.report.levels) > 1 or network is Quasi
    assert equal(again.state_dict(), module.state_dict())
    assert told(resumed) == told(whole)
    assert resumed.mask == whole.mask


@pytest.mark.slow
def test_a_run_resumed_from_a_level_that_held_ends_as_the_whole_one(fit):
    whole, stopped, resumed = (pruner(tolerance=math.inf) for _ in range(3))
    module = fit(whole)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(stopped, PowerCut(4, 3))
    again = fit(resumed, ckpt_path=stopped.best_model_path)
    assert equal(again.state_dict(), module.state_dict())
    # the level is judged once more
    assert told(resumed) | {"validations": 0} == told(whole) | {"validations": 0}


def test_a_checkpoint_keeps_what_its_name_says(fit, make_trainer, tmp_path):
    fit(pruner(), ModelCheckpoint(filename="{val_acc:.4f}-{epoch}", save_top_k=-1))
    paths = list(tmp_path.glob("checkpoints/val_acc*.ckpt"))
    assert len(paths) == 8
    for path in paths:
        (found,) = make_trainer().validate(Blobs.load_from_checkpoint(path), val_loader(), verbose=False)
        assert found["val_acc"] == pytest.approx(float(re.search(r"val_acc=([\d.]+)-", path.name)[1]), abs=1e-4)


@pytest.mark.filterwarnings("ignore:RouletteWheelPruning. EarlyStopping watches")
def test_a_run_that_stops_before_the_first_cut_searches_at_its_end(fit):
    stop = EarlyStopping("val_loss", patience=1, mode="min", min_delta=100.0)
    pruning = pruner(tree=Tree(pruning_rate=0.4, max_levels=1), tolerance=math.inf)
    module = fit(stop, pruning)
    assert not pruning.report.gradual
    assert nonzeros(module) == pruning.mask
    assert pruning.report.sparsity == pytest.approx(0.4, abs=0.01)


def test_a_run_that_stops_between_cuts_judges_the_last_level(fit):
    pruning = pruner(tolerance=math.inf)
    fit(pruning, max_steps=26)
    assert [level.held for level in pruning.report.levels] == [True, True]


@pytest.mark.parametrize("limits", [{}, {"max_steps": 10}], ids=["cuts", "a search of a run that stopped early"])
def test_a_second_fit_holds_the_winner_cuts_no_more_and_says_so(fit, caplog, limits):
    pruning, notes = pruner(tree=Tree(0.4, max_levels=1) if limits else Tree(0.4)), Sparsities()
    module = fit(pruning, **limits)
    mask, levels = pruning.mask, pruning.report.levels
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        fit(notes, pruning, module=module)
    assert set(notes.found) == {mask.sparsity}
    assert pruning.mask == mask
    assert pruning.report.levels == levels
    assert pruning.report.trained_score is not None
    (line,) = [one for one in caplog.messages if "pruned before" in one]
    assert f"{mask.sparsity:.2%}" in line


class Breaks(Callback):
    """Raises an error at the end of the fourth epoch, and saves a checkpoint then."""

    def __init__(self, error, first, path) -> None:
        self.error, self.first, self.path = error, first, path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 3:
            raise self.error

    def on_exception(self, trainer, pl_module, exception):
        self.first.on_exception(trainer, pl_module, exception)
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_training_that_broke_off_says_so_until_it_is_resumed(fit, tmp_path, error):
    reasons, first, resumed, path = (
        [],
        pruner(tolerance=math.inf),
        pruner(tolerance=math.inf),
        tmp_path / "broken off.ckpt",
    )
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fit(Breaks(error, first, path), first)
    assert first.report.stop_reason is StopReason.BROKEN_OFF
    assert len(first.report.levels) == 2
    notes = within("on_train_epoch_start", lambda *_: reasons.append(resumed.report.stop_reason))
    fit(notes, resumed, ckpt_path=path)
    assert reasons == [None] * 3
    assert resumed.report.stop_reason is StopReason.TRAINING_ENDED


@pytest.mark.slow
def test_a_resume_with_another_tolerance_keeps_the_floor_and_says_so(fit, tmp_path):
    first, second = pruner(tolerance=math.inf), pruner(tolerance=0.0)
    fit(SavesAtEnd(tmp_path / "begun.ckpt", 3), first)
    with pytest.warns(UserWarning, match=r"tolerance is 0\.0, but .* keeps the floor of its own tolerance inf"):
        fit(second, ckpt_path=tmp_path / "begun.ckpt")
    assert told(second) == told(first)


def test_one_candidate_a_cut_takes_two_validations_of_data_that_is_read_once(fit):
    seen, read = [], []

    class Reads(TensorDataset):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    class Counts(Blobs):
        def validation_step(self, *arguments):
            seen.append(arguments)
            super().validation_step(*arguments)

    class BetweenEpochs(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.clear()
            read.clear()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                counts.append((len(seen), len(read)))

    counts, data = [], Reads(*blobs(200, 2).tensors)
    pruning = pruner(branches=1, tolerance=math.inf, wheel=Wheel(importance="magnitude"))
    fit(BetweenEpochs(), pruning, module=Counts(), val=DataLoader(data, batch_size=64))
    once, nothing = len(val_loader()), [(0, 0)] * 2
    # before the first cut validation is tried on four networks; four batches more tell which weights it uses
    assert counts == [*nothing, (6 * once + 4, len(data)), *[(2 * once, len(data))] * 3, *nothing]


@pytest.mark.slow
def test_a_killed_cut_leaves_a_journal_that_its_resume_takes_away(fit, tmp_path):
    class Fails(Blobs):
        def validation_step(self, *arguments):
            if self.trainer.global_step == 32 and nonzeros(self).sparsity > 0.8:
                raise RuntimeError("power cut")
            super().validation_step(*arguments)

    choices = {"monitor": None, "branches": 1, "tolerance": math.inf, "tree": Tree(0.5), "refit": None}
    with pytest.raises(RuntimeError, match="power cut"):
        fit(pruner(**choices), ModelCheckpoint(tmp_path, save_top_k=-1), module=Fails())
    assert len(list(tmp_path.glob("search-*.jsonl"))) == 1
    last = max(tmp_path.glob("epoch*.ckpt"), key=lambda path: path.stat().st_mtime)
    resumed, whole = pruner(**choices), pruner(**choices)
    fit(resumed, ModelCheckpoint(tmp_path, save_top_k=-1), ckpt_path=last)
    assert not list(tmp_path.glob("search-*.jsonl"))
    fit(whole)
    assert told(resumed) == told(whole)


@pytest.mark.parametrize("how", [lambda one: one, *COPIES.values()], ids=["itself", *COPIES])
def test_a_copy_is_the_same_and_a_fit_of_another_module_starts_again(fit, how):
    pruning = pruner()
    fit(pruning)
    first, mask, other = told(pruning), pruning.mask, how(pruning)
    assert (told(other), other.mask) == (first, mask)
    module = fit(other)
    assert (told(other), other.mask) == (first, mask)
    assert nonzeros(module) == mask


AT_END = {"at_epoch": None, "tree": Tree(0.5, max_levels=3)}
AVERAGED = [(MISSES, WeightAveraging), ({}, WeightAveraging), (AT_END, WeightAveraging)]
AVERAGED += [(AT_END, lambda: EMAWeightAveraging(decay=0.5))]


@pytest.mark.parametrize(("choices", "averaging"), AVERAGED)
def test_with_averaged_weights_module_and_file_hold_what_was_measured(fit, make_trainer, choices, averaging):
    pruning = pruner(**choices)
    module = fit(averaging(), pruning)
    assert pruning.report.winner is not None
    assert nonzeros(module) <= pruning.mask
    loaded = Blobs.load_from_checkpoint(pruning.best_model_path)
    assert equal(loaded.state_dict(), module.state_dict())
    (found,) = make_trainer().validate(loaded, val_loader(), verbose=False)
    assert found["val_acc"] == pytest.approx(pruning.report.score)


@pytest.mark.slow
@pytest.mark.parametrize("thaws", [True, False])
def test_layers_that_freeze_or_thaw_while_levels_are_cut(fit, thaws):
    class Turns(Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.net[0].weight.requires_grad_(not thaws)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 3:
                pl_module.net[0].weight.requires_grad_(thaws)

    pruning = pruner(tolerance=math.inf)
    fit(Turns(), pruning)
    assert list(pruning.mask) == ["net.2.weight"] if thaws else ["net.0.weight", "net.2.weight"]
    assert len(pruning.report.levels) == 4


@pytest.mark.parametrize("now", [lambda old: torch.cat([old, old]), lambda old: None])
def test_buffers_that_were_replaced_come_back_with_the_winner(fit, now):
    class Buffered(Blobs):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.arange(3.0), persistent=False)

        def on_train_epoch_end(self):
            if self.current_epoch == 4:
                self.seen = now(self.seen)

    pruning = pruner(**MISSES)
    module = fit(pruning, module=Buffered())
    assert [level.held for level in pruning.report.levels] == [True, False]
    assert torch.equal(module.seen, torch.arange(3.0))


def test_a_run_that_has_not_ended_is_only_resumed_with_its_epochs(fit, make_trainer, tmp_path):
    path = tmp_path / "begun.ckpt"
    fit(pruner(tolerance=math.inf), SavesAtEnd(path, 3))
    with pytest.raises(ValueError, match="Pass the same at_epoch as in that training"):
        fit(pruner(at_epoch=None), ckpt_path=path)
    make_trainer(callbacks=[pruner(at_epoch=None)]).validate(Blobs(), val_loader(), ckpt_path=path, verbose=False)


@pytest.mark.slow
def test_the_same_module_made_dense_again_is_pruned_again(fit):
    pruning, module = pruner(tolerance=math.inf), Blobs()
    dense = copied(module)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(pruning, PowerCut(2, 0), module=module)
    module.load_state_dict(dense)
    fit(pruning, module=module)
    assert [(level.level, level.epoch) for level in pruning.report.levels] == [(1, 2), (2, 3), (3, 4), (4, 5)]


def test_by_default_one_candidate_is_drawn_by_sensitivity_and_nothing_refitted(fit):
    pruning = RouletteWheelPruning(at_epoch=EPOCHS, tolerance=math.inf)
    fit(pruning)
    assert (pruning.branches, pruning.refit) == (1, None)
    assert (pruning.report.importance, pruning.report.refit) == ("sensitivity", "")
    assert RouletteWheelPruning().branches == RouletteWheelPruning(at_epoch=3).branches == 20
    assert RouletteWheelPruning().refit == RouletteWheelPruning(at_epoch=3).refit == "least_squares"


def test_a_module_that_training_data_does_not_fit_is_told_what_to_do(fit):
    class Picky(Blobs):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            if len(batch[0]) == 50:
                raise KeyError("no such batch")
            super().validation_step(batch, batch_idx, dataloader_idx)

    with pytest.raises(RuntimeError, match=re.escape("or pass wheel=Wheel(importance='magnitude')")):
        fit(RouletteWheelPruning(at_epoch=EPOCHS), module=Picky())
    plain = RouletteWheelPruning(at_epoch=EPOCHS, tolerance=math.inf, wheel=Wheel(importance="magnitude"))
    fit(plain, module=Picky())
    assert plain.report.importance == "magnitude"


def test_confirmation_folds_judge_what_others_rank(fit):
    pruning = pruner(validation=Validation(confirm=0.25))
    fit(pruning)
    assert pruning.report.folds == (12, 4)
    assert "On the held-out half, which ranked no candidates: " in str(pruning.report)


RISE, TYPE = "several epochs must rise", "must be a number, or a list or range"
NO_EPOCHS = [(epochs, ValueError, RISE) for epochs in ([], [3, 3], [3, 2], range(0))] + [({2, 3}, TypeError, TYPE)]
NO_EPOCHS += [([-1, 2], ValueError, "an epoch of at_epoch is -1"), ([1.5], TypeError, "an epoch of at_epoch is 1.5")]
NO_EPOCHS += [(["2"], TypeError, "an epoch of at_epoch is '2'"), ("2", TypeError, "at_epoch is '2'")]


@pytest.mark.parametrize(("epochs", "error", "words"), NO_EPOCHS)
def test_epochs_that_are_none(epochs, error, words):
    with pytest.raises(error, match=re.escape(words)):
        RouletteWheelPruning(at_epoch=epochs)


def test_several_epochs_cannot_be_certified():
    with pytest.raises(ValueError, match="cannot be certified"):
        RouletteWheelPruning(at_epoch=[1, 2], confidence=0.95, tolerance=0.1)


def test_a_last_epoch_after_which_nothing_trains_is_refused(fit):
    with pytest.raises(ValueError, match="The last epoch of at_epoch may be 4 at most"):
        fit(pruner(), max_epochs=5)
