"""The main path: one line in a Lightning script, and after `fit` the network is slim."""

from __future__ import annotations

import logging
import math
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.nn.functional import cross_entropy

from lightning_roulette import RouletteWheelPruning, StopReason, Tree, Validation, Wheel, apply_mask
from lightning_roulette.trainer.data.streamed_data import dealt
from tests.support import fits
from tests.support.callbacks import within
from tests.support.isolated import ON_ALL
from tests.support.modules import Blobs, val_loader
from tests.support.results import Sparsities, copied, equal, nonzeros

pruner = partial(fits.pruner, branches=3, tolerance=0.1, tree=Tree(0.2, max_levels=2))


# ---- the main path


def test_after_fit_the_network_is_slim_and_keeps_the_floor(fit):
    pruning = pruner()
    module = fit(pruning)
    report = pruning.report
    assert report.sparsity == 1 - report.survivors / 624 == pytest.approx(0.36, abs=0.01)
    assert pruning.mask == nonzeros(module)
    assert pruning.mask.survivors == report.survivors
    assert report.dense_score > 0.8
    assert (report.floor, report.held_out_floor) == (report.dense_score - 0.1, report.held_out_dense - 0.1)
    assert report.search_score >= report.floor - 1e-6  # scores are rounded
    assert report.winner.held_out_score >= report.held_out_floor - 1e-6
    assert report.score >= min(report.floor, report.held_out_floor) - 1e-6
    assert report.stop_reason is StopReason.MAX_LEVELS


def test_parameters_keep_their_identity_and_only_pruned_entries_differ_from_what_training_left(fit):
    pruning, module = pruner(), Blobs()
    before = {name: id(one) for name, one in module.named_parameters()}
    dense, pruned = copied(fit()), copied(fit(pruning, module=module))
    assert {name: id(one) for name, one in module.named_parameters()} == before
    assert dense.keys() == pruned.keys()
    for name, values in dense.items():
        kept = pruning.mask.get(name, torch.ones_like(values, dtype=torch.bool))
        assert torch.equal(pruned[name], values.masked_fill(~kept, 0)), name


@pytest.mark.parametrize("validation", [Validation(), ON_ALL], ids=["halves", "all"])
def test_the_reported_score_is_what_validation_gives_afterwards(fit, make_trainer, validation):
    pruning = pruner(validation=validation)
    module = fit(pruning)
    (logged,) = make_trainer().validate(module, val_loader(), verbose=False)
    report = pruning.report
    assert report.score == pytest.approx(logged["val_acc"], abs=1e-7)
    scores = [report.search_score] if validation is ON_ALL else [report.search_score, report.winner.held_out_score]
    assert report.score == pytest.approx(sum(scores) / len(scores), abs=1e-6)


def test_half_of_the_data_ranks_and_the_other_half_confirms(fit, make_trainer):
    dense, pruning = fit(), pruner()
    fit(pruning)
    report = pruning.report
    (logged,) = make_trainer().validate(dense, val_loader(), verbose=False)
    assert report.folds == (8, 8)
    assert report.samples == 100
    assert (report.dense_score + report.held_out_dense) / 2 == pytest.approx(logged["val_acc"], abs=1e-6)
    assert [level.held for level in report.levels] == [True, True]
    assert all(level.held_out_score >= report.held_out_floor - 1e-6 for level in report.levels)


def test_masks_of_all_levels_nest_and_have_the_scores_of_the_report(fit, make_trainer):
    dense, pruning = fit(), pruner(validation=ON_ALL)
    fit(pruning)
    masks = [pruning.mask_at(level) for level in (0, 1, 2)]
    assert [mask.survivors for mask in masks] == [624, 499, 399]
    assert masks[2] <= masks[1] <= masks[0]
    assert masks[2] == pruning.mask
    assert not masks[1] <= masks[2]
    with pytest.raises(ValueError, match="level is 3, but must lie between 0"):
        pruning.mask_at(3)
    for level in pruning.report.accepted:
        module = Blobs()
        module.load_state_dict(dense.state_dict())
        apply_mask(module, masks[level.level])
        (logged,) = make_trainer().validate(module, val_loader(), verbose=False)
        assert level.score == pytest.approx(logged["val_acc"], abs=1e-7)


def confirming_inputs():
    """The first number of each sample that does not rank."""
    data = dealt(lambda: ((batch, 0) for batch in val_loader()), [4], seed=0, cache_bytes=2**31)
    return torch.cat([batch[0][:, 0] for batch, _ in data.of(range(8, 16))])


def test_levels_beyond_the_winner_keep_their_masks(fit):
    """All levels keep the floor on the ranking data; that the second does not on the other data is arranged."""

    class SlimIsBadOnTheOtherHalf(Blobs):
        def on_validation_epoch_start(self):
            self.slim = nonzeros(self).sparsity > 0.3

        def validation_step(self, batch, batch_idx):
            wrong = self.slim & torch.isin(batch[0][:, 0], others)
            self.log("val_acc", (~wrong).float().mean())
            self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    pruning, others = pruner(tree=Tree(0.2, max_levels=3)), confirming_inputs()
    module = fit(pruning, module=SlimIsBadOnTheOtherHalf())
    report = pruning.report
    assert [level.accepted for level in report.levels] == [True, True, True]
    assert [level.held for level in report.levels] == [True, False, None]
    assert report.winner.level == 1
    assert pruning.mask == pruning.mask_at(1) == nonzeros(module)
    masks = [pruning.mask_at(level) for level in range(4)]
    assert [mask.survivors for mask in masks] == [624, *(level.survivors for level in report.levels)]
    assert masks[3] <= masks[2] <= masks[1] <= masks[0]


def test_before_a_search_there_is_no_mask():
    pruning = pruner()
    assert pruning.mask is None
    assert pruning.report is None
    assert pruning.best_model_path == ""
    with pytest.raises(RuntimeError, match="no search has ended"):
        pruning.mask_at(0)


def test_the_network_stays_dense_where_no_level_keeps_the_floor(fit, tmp_path):
    hopeless = {"tolerance": 0.0, "wheel": Wheel(sharpness=0.0), "tree": Tree(0.95, patience=1)}
    pruning = pruner(dirpath=tmp_path, validation=ON_ALL, **hopeless)
    assert equal(copied(fit()), copied(fit(pruning)))
    assert pruning.report.stop_reason is StopReason.DECLINED
    assert pruning.report.winner is None
    assert pruning.report.score == pruning.report.dense_score
    assert pruning.mask.sparsity == 0
    assert pruning.best_model_path == ""
    assert list(tmp_path.glob("*.ckpt")) == []


# ---- what the arguments mean


def test_importance_may_be_a_function_of_all_weights(fit):
    def first_layer_matters(weights):
        return {name: torch.full_like(one, 1e6 if name == "net.0.weight" else 1.0) for name, one in weights.items()}

    pruning = pruner(wheel=Wheel(importance=first_layer_matters), tolerance=math.inf)
    fit(pruning)
    assert pruning.mask.densities["net.0.weight"] == 1
    assert pruning.mask.densities["net.2.weight"] < 0.1


def test_the_target_sparsity_is_reached_exactly_and_ends_the_search(fit):
    pruning = pruner(target_sparsity=0.5, tree=Tree(pruning_rate=0.4), tolerance=math.inf)
    fit(pruning)
    assert pruning.mask.survivors == 312
    assert pruning.report.stop_reason is StopReason.TARGET_REACHED


def test_include_replaces_the_default_choice_and_exclude_subtracts(fit):
    pruning = pruner(include=["net.*"], exclude=["*.0.weight", "net.2.bias"], tolerance=math.inf)
    module = fit(pruning)
    assert set(pruning.mask) == {"net.2.weight", "net.0.bias"}
    assert bool((module.net[0].weight != 0).all())


JUDGES = [
    ({}, ("val_acc", "max")),
    ({"monitor": "val_loss"}, ("val_loss", "min")),
    ({"monitor": "val_loss", "mode": "max", "tolerance": math.inf}, ("val_loss", "max")),
]


@pytest.mark.parametrize(("arguments", "expected"), JUDGES)
def test_monitor_and_mode_choose_what_judges(fit, make_trainer, arguments, expected):
    validation = Validation(rank_by=expected[0], confirm=0, race=False)
    pruning = pruner(validation=validation, **arguments)
    module = fit(pruning, ModelCheckpoint(monitor="val_loss"), enable_checkpointing=True)
    report = pruning.report
    (logged,) = make_trainer().validate(module, val_loader(), verbose=False)
    assert [report.score, report.search_score] == pytest.approx([logged[report.monitor]] * 2, abs=1e-6)
    assert (report.monitor, report.mode) == expected
    best = max if report.mode == "max" else min
    for level in report.levels:
        assert level.score == best(one.score for one in level.candidates)
    worse = report.dense_score - report.floor if report.mode == "max" else report.floor - report.dense_score
    assert worse == pytest.approx(report.tolerance)


def test_a_branch_is_ranked_by_the_loss_and_the_floor_kept_by_the_metric(fit, make_trainer):
    pruning = pruner(branches=6, tree=Tree(pruning_rate=0.6, max_levels=1), tolerance=math.inf, validation=ON_ALL)
    module = fit(pruning)
    (logged,) = make_trainer().validate(module, val_loader(), verbose=False)
    report, (level,) = pruning.report, pruning.report.levels
    assert (report.monitor, report.rank_by) == ("val_acc", "val_loss")
    ranks = {one.index: one.rank for one in level.candidates}
    assert level.winner == max(ranks, key=ranks.get)
    assert ranks[level.winner] == pytest.approx(-logged["val_loss"], abs=1e-6)
    assert level.score == pytest.approx(logged["val_acc"], abs=1e-7)
    assert len(set(ranks.values())) == 6


class LogsOnly(Blobs):
    """Logs plain numbers, under the names given."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def validation_step(self, batch, batch_idx):
        for name in self.names:
            self.log(name, cross_entropy(self(batch[0]), batch[1]))


class Plateau(LogsOnly):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="min")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "b"}}


HINTS = {
    "name": (LogsOnly("val_loss", "top1_accuracy"), [], "top1_accuracy (max, the only logged name like an accuracy)"),
    "checkpoint": (
        LogsOnly("a", "b"),
        [ModelCheckpoint(monitor="b", mode="max")],
        "b (max, what ModelCheckpoint watches)",
    ),
    "stopping": (LogsOnly("a", "b"), [EarlyStopping("a", mode="min")], "a (min, what EarlyStopping watches)"),
    "only one": (LogsOnly("val_loss"), [], "val_loss (min, the only metric logged)"),
    "scheduler": (Plateau("a", "b"), [], "b (min, what a learning rate scheduler watches)"),
}


@pytest.mark.parametrize(("module", "callbacks", "expected"), HINTS.values(), ids=HINTS)
def test_without_a_monitor_the_module_and_its_callbacks_tell(fit, caplog, module, callbacks, expected):
    pruning = pruner(tolerance=math.inf, tree=Tree(0.2, max_levels=1, patience=1))
    writes = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        fit(pruning, *callbacks, module=module, enable_checkpointing=writes)
    assert expected.startswith(f"{pruning.report.monitor} ({pruning.report.mode}, ")
    (line,) = [one for one in caplog.messages if "judges candidates by" in one]
    assert expected in line


def test_equal_seeds_give_equal_masks_whatever_the_global_seed(fit):
    masks = []
    for seed, world in ((5, 1), (5, 2), (6, 1)):
        pruning = pruner(seed=seed, tolerance=math.inf)
        fit(pruning, module=Blobs(lr=0.0), seed=world)
        masks.append(pruning.mask)
    assert masks[0].sparsity > 0
    assert masks[0] == masks[1] != masks[2]


# ---- at an epoch


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_at_epoch_searches_before_that_epoch_and_trains_on_without_the_weights(fit, make_trainer, epoch):
    notes, pruning = Sparsities(), pruner(at_epoch=epoch, tolerance=math.inf)
    module = fit(notes, pruning, max_epochs=3)
    slim = pruning.report.sparsity
    assert slim == pytest.approx(0.36, abs=0.01)
    assert notes.found == [0.0] * 8 * epoch + [slim] * 8 * (3 - epoch)
    assert pruning.mask == nonzeros(module)
    (logged,) = make_trainer().validate(module, val_loader(), verbose=False)
    assert pruning.report.trained_score == pytest.approx(logged["val_acc"], abs=1e-7)


def stop(trainer, module):
    trainer.should_stop = True


ENDS = {
    "the last epoch": (2, [], {}, 16),
    "stopped": (3, [within("on_train_epoch_end", stop)], {"max_epochs": 4}, 8),
    "steps": (None, [], {"max_epochs": -1, "max_steps": 12}, 12),
    "steps and epochs": (None, [], {"max_epochs": 2, "max_steps": 12}, 12),
    "fast_dev_run": (5, [], {"fast_dev_run": True}, 1),
}


@pytest.mark.parametrize(("at_epoch", "callbacks", "limits", "batches"), ENDS.values(), ids=ENDS)
def test_a_run_that_ends_before_the_epoch_is_searched_at_its_end(fit, at_epoch, callbacks, limits, batches):
    notes, pruning = Sparsities(), pruner(at_epoch=at_epoch)
    module = fit(*callbacks, notes, pruning, **limits)
    assert notes.found == [0.0] * batches
    assert pruning.mask == nonzeros(module)
    assert pruning.report.sparsity > 0
    assert pruning.report.trained_score is None


# ---- fitting again


def test_a_network_made_dense_again_is_searched_again(fit):
    dense, pruning, notes = copied(fit()), pruner(), Sparsities()
    module = fit(pruning)
    first = pruning.report
    module.load_state_dict(dense)
    fit(notes, pruning, module=module)
    assert set(notes.found) == {0.0}
    assert pruning.report is not first
    assert pruning.report.sparsity > 0


# ---- a dry run


def test_fast_dev_run_sees_every_part_work_once(fit, tmp_path):
    pruning = RouletteWheelPruning(20, dirpath=tmp_path / "here", tree=Tree(pruning_rate=0.9))
    module = fit(pruning, module=fit(), fast_dev_run=True)
    (level,) = pruning.report.levels
    assert len(level.candidates) == 2
    assert level.accepted
    assert level.score < pruning.report.dense_score  # the floor is ignored
    assert pruning.mask == nonzeros(module)
    assert list(tmp_path.rglob("*.*")) == []
