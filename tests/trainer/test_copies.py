"""One callback object in one fit after another, in validate, test and predict; and copies of it."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_roulette import Mask, RouletteWheelPruning, Tree, prunable_parameters, sparsity
from tests.support.modules import Blobs, train_loader, val_loader
from tests.support.results import Sparsities, copied, equal, told

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda one: pickle.loads(pickle.dumps(one))}


def pruner(**options) -> RouletteWheelPruning:
    return RouletteWheelPruning(**{"branches": 2, "tolerance": 0.2, "tree": Tree(0.2, max_levels=2)} | options)


class Judged(Blobs):
    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


@pytest.fixture
def fit(fit):
    """Fits a module that can also be tested."""
    return lambda *callbacks, module=None, **options: fit(*callbacks, module=module or Judged(), **options)


# ---- one object


@pytest.mark.parametrize("at_epoch", [None, 1])
@pytest.mark.parametrize("same_trainer", [True, False])
def test_fit_fit_validate_test_predict(make_trainer, at_epoch, same_trainer):
    pruning, module = pruner(at_epoch=at_epoch), Judged()
    trainer = make_trainer(callbacks=[pruning])
    trainer.fit(module, train_loader(), val_loader())
    first = told(pruning)
    if same_trainer:
        trainer.fit_loop.max_epochs = 4
    else:
        trainer = make_trainer(callbacks=[pruning])
    trainer.fit(module, train_loader(), val_loader())
    second, mask, weights = told(pruning), pruning.mask, copied(module)
    assert second["levels"] == first["levels"]
    assert mask == Mask.of_nonzeros(prunable_parameters(module))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*num_workers|.*many workers|.*LeafSpec.*")
        (validated,) = trainer.validate(module, val_loader(), verbose=False)
        (tested,) = trainer.test(module, val_loader(), verbose=False)
        predicted = torch.cat(trainer.predict(module, val_loader()))
    assert validated["val_acc"] == tested["val_acc"] == pytest.approx(second["trained_score"], abs=1e-7)
    assert len(predicted) == 200
    assert (told(pruning), pruning.mask) == (second, mask)
    assert equal(copied(module), weights)
    assert not pruning._zeros


def test_between_two_fits_another_network_may_be_validated(fit, make_trainer):
    pruning, module, other = pruner(), Judged(), Judged()
    notes = Sparsities()
    fit(pruning, module=module)
    first = told(pruning)
    for trainer in (make_trainer(callbacks=[pruning]) for _ in range(2)):
        trainer.validate(other, val_loader(), verbose=False)
        trainer.predict(other, val_loader())
    fit(pruning, notes, module=module)
    assert told(pruning) | {"trained_score": None} == first
    assert set(notes.found) == {pruning.mask.sparsity}
    assert sparsity(prunable_parameters(other)) == 0


def test_a_third_fit_of_a_third_network_is_as_the_first(fit):
    pruning, reports = pruner(at_epoch=1), []
    for _ in range(3):
        module = fit(pruning, max_epochs=3)
        reports.append(told(pruning))
        assert pruning.mask == Mask.of_nonzeros(prunable_parameters(module))
    assert reports[0] == reports[1] == reports[2]


# ---- copies


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_copy_made_before_the_search_finds_the_same_and_tells_the_original_nothing(fit, how):
    pruning = pruner(at_epoch=1)
    twin = how(pruning)
    weights = copied(fit(twin))
    assert pruning.report is None
    assert pruning.mask is None
    assert equal(copied(fit(pruning)), weights)
    assert told(pruning) == told(twin)


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("at_epoch", [None, 1])
def test_a_copy_made_after_the_search_has_its_own_record(fit, how, at_epoch):
    pruning, module = pruner(at_epoch=at_epoch), Judged()
    fit(pruning, ModelCheckpoint(), module=module, enable_checkpointing=True)
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


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_copy_knows_the_network_by_its_zeros_and_searches_one_that_is_not_pruned(fit, how):
    pruning = pruner()
    module = fit(pruning)
    twin, other, notes, others = how(pruning), how(pruning), Sparsities(), Sparsities()
    fit(twin, notes, module=how(module))
    assert notes.found == [pruning.report.sparsity] * 16
    assert twin.report.trained_score is not None
    assert told(twin) | {"trained_score": None} == told(pruning)
    fit(other, others)
    assert others.found == [0.0] * 16
    assert told(other) == told(pruning)


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_callback_that_pruned_nothing_takes_no_network_for_searched(fit, how):
    """All networks have the zeros of a dense one."""
    dense = {"tolerance": 0.0, "tree": Tree(0.95, patience=1), "refit": None}
    pruning = pruner(**dense)
    module = fit(pruning)
    assert pruning.mask.sparsity == 0
    twin = how(pruning)
    fit(twin, module=module)
    assert twin.report.trained_score is None


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_copy_made_in_training_holds_no_zeros_and_takes_none_from_the_original(fit, how):
    twins = []

    class Copies(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 2 and batch_idx == 1:
                twins.append(how(pruning))
                assert not twins[0]._zeros
                twins[0].teardown(trainer, pl_module, "fit")

    pruning, notes = pruner(at_epoch=1), Sparsities()
    module = fit(pruning, Copies(), notes, max_epochs=4)
    (twin,) = twins
    assert twin.mask == pruning.mask == Mask.of_nonzeros(prunable_parameters(module))
    assert set(notes.found) == {0.0, pruning.report.sparsity}
    assert twin.report.trained_score is None
