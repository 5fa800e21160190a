"""One callback object in one fit after another, in validate, test and predict; and copies of it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_roulette import Tree
from tests.support import fits
from tests.support.copies import COPIES
from tests.support.modules import Judged, train_loader, val_loader
from tests.support.results import Sparsities, copied, equal, nonzeros, told

pruner = partial(fits.pruner, refit="least_squares", tree=Tree(0.2, max_levels=2))
by_each_copy = pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)


@pytest.fixture
def fit(fit):
    """Fits a module that can also be tested."""
    return lambda *callbacks, **options: fit(*callbacks, **{"module": Judged()} | options)


# ---- one object


@pytest.mark.parametrize("at_epoch", [None, 1])
@pytest.mark.parametrize("same_trainer", [True, False])
def test_fit_fit_validate_test_predict(fit, make_trainer, at_epoch, same_trainer):
    pruning = pruner(at_epoch=at_epoch)
    module = fit(pruning)
    first, trainer = told(pruning), module.trainer
    if same_trainer:
        trainer.fit_loop.max_epochs = 4
    else:
        trainer = make_trainer(callbacks=[pruning])
    trainer.fit(module, train_loader(), val_loader())
    second, mask, weights = told(pruning), pruning.mask, copied(module)
    assert second["levels"] == first["levels"]
    assert mask == nonzeros(module)
    (validated,) = trainer.validate(module, val_loader(), verbose=False)
    (tested,) = trainer.test(module, val_loader(), verbose=False)
    predicted = torch.cat(trainer.predict(module, val_loader()))
    assert validated["val_acc"] == tested["val_acc"] == pytest.approx(second["trained_score"], abs=1e-7)
    assert len(predicted) == 200
    assert (told(pruning), pruning.mask) == (second, mask)
    assert equal(copied(module), weights)
    assert not pruning._zeros


def test_between_two_fits_another_network_may_be_validated(fit, make_trainer):
    pruning, other, notes = pruner(), Judged(), Sparsities()
    module = fit(pruning)
    first = told(pruning)
    for trainer in (make_trainer(callbacks=[pruning]) for _ in range(2)):
        trainer.validate(other, val_loader(), verbose=False)
        trainer.predict(other, val_loader())
    fit(pruning, notes, module=module)
    assert told(pruning) | {"trained_score": None, "footprint": first["footprint"]} == first
    assert set(notes.found) == {pruning.mask.sparsity}
    assert nonzeros(other).sparsity == 0


def test_a_third_fit_of_a_third_network_is_as_the_first(fit):
    pruning, reports = pruner(at_epoch=1), []
    for _ in range(3):
        module = fit(pruning, max_epochs=3)
        reports.append(told(pruning))
        assert pruning.mask == nonzeros(module)
    assert reports[0] == reports[1] == reports[2]


# ---- copies


@by_each_copy
def test_a_copy_made_before_the_search_finds_the_same_and_tells_the_original_nothing(fit, how):
    pruning = pruner(at_epoch=1)
    twin = how(pruning)
    weights = copied(fit(twin))
    assert pruning.report is None
    assert pruning.mask is None
    assert equal(copied(fit(pruning)), weights)
    assert told(pruning) == told(twin)


@by_each_copy
@pytest.mark.parametrize("at_epoch", [None, 1])
def test_a_copy_made_after_the_search_has_its_own_record(fit, how, at_epoch):
    pruning = pruner(at_epoch=at_epoch)
    fit(pruning, ModelCheckpoint(), enable_checkpointing=True)
    twin, first = how(pruning), told(pruning)
    assert (told(twin), twin.mask, twin.best_model_path) == (first, pruning.mask, pruning.best_model_path)
    for level in range(3):
        assert twin.mask_at(level) == pruning.mask_at(level)
        assert equal(twin.weights_at(level), pruning.weights_at(level))
    mask = pruning.mask
    twin.seed = 5
    fit(twin)  # another network, which it searches
    assert (told(pruning), pruning.mask) == (first, mask)
    assert twin.mask != mask


@by_each_copy
def test_a_copy_knows_the_network_by_its_zeros_and_searches_one_that_is_not_pruned(fit, how):
    pruning = pruner()
    module = fit(pruning)
    twin, other, notes, others = how(pruning), how(pruning), Sparsities(), Sparsities()
    fit(twin, notes, module=how(module))
    assert notes.found == [pruning.report.sparsity] * 16
    assert twin.report.trained_score is not None
    first = told(pruning)
    assert told(twin) | {"trained_score": None, "footprint": first["footprint"]} == first
    fit(other, others)
    assert others.found == [0.0] * 16
    assert told(other) == told(pruning)


@by_each_copy
def test_a_copy_of_a_callback_that_pruned_nothing_takes_no_network_for_searched(fit, how):
    """All networks have the zeros of a dense one."""
    pruning = pruner(tolerance=0.0, tree=Tree(0.95, patience=1), refit=None)
    module = fit(pruning)
    assert pruning.mask.sparsity == 0
    twin = how(pruning)
    fit(twin, module=module)
    assert twin.report.trained_score is None


@by_each_copy
def test_a_copy_made_in_training_holds_no_zeros_and_takes_none_from_the_original(fit, how):
    class Copies(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 2 and batch_idx == 1:
                self.twin = how(pruning)
                assert not self.twin._zeros
                self.twin.teardown(trainer, pl_module, "fit")

    pruning, notes, copies = pruner(at_epoch=1), Sparsities(), Copies()
    module = fit(pruning, copies, notes, max_epochs=4)
    twin = copies.twin
    assert twin.mask == pruning.mask == nonzeros(module)
    assert set(notes.found) == {0.0, pruning.report.sparsity}
    assert twin.report.trained_score is None
