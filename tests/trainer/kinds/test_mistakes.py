"""Mistakes of ordinary users: each is refused with a remedy, or said."""

from __future__ import annotations

import logging

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from lightning_roulette import LeastSquares, RouletteWheelPruning, Tree, Validation, Wheel, search
from tests.support.fits import pruner
from tests.support.modules import Blobs, train_loader, val_loader


class WithObject(Blobs):
    """Logs a torchmetrics object."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def validation_step(self, batch, batch_idx):
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_acc", self.accuracy)


BEFORE_TRAINING = {
    "tolerance in percent": (
        {"tolerance": 5},
        "tolerance is 5, .*values from 0 to 1.*0.005 is half a point",
    ),
    "tolerance of the range": ({"tolerance": 1.0}, "tolerance is 1, .*No network can be worse"),
    "wrong direction": ({"monitor": "val_acc", "mode": "min"}, "mode is 'min', but .*higher_is_better=True.*'max'"),
    "rank_by": ({"validation": {"rank_by": "val_los"}}, "rank_by is 'val_los', .*not log.*Validation.rank_by="),
    "typo": ({"monitor": "val_ac"}, "'val_ac', which validation did not log.*Did you mean 'val_acc'"),
}


@pytest.mark.parametrize("name", BEFORE_TRAINING)
def test_what_the_first_validation_shows_is_refused_before_training(fit, name):
    options, message = BEFORE_TRAINING[name]
    module = WithObject()
    with pytest.raises(RuntimeError, match=message):
        fit(pruner(**options), module=module)
    assert module.trainer.global_step == 0


def test_a_floor_beyond_the_bound_is_refused_before_the_search(fit):
    class FailsAtZero(WithObject):
        """What it scores at zero weights, which comes first, is not known."""

        def forward(self, x):
            if not bool(self.net[0].weight.any()):
                raise ZeroDivisionError
            return super().forward(x)

    module = FailsAtZero()
    with pytest.raises(RuntimeError, match=r"tolerance is 0.99, .*so the floor would be -?0\.\d+, which any network"):
        fit(pruner(tolerance=0.99), module=module)
    assert bool((module.net[0].weight != 0).all())


def test_groups_may_be_dicts():
    pruning = RouletteWheelPruning(
        wheel={"sharpness": 4}, tree={"patience": 1}, validation={"confirm": 0.0}, refit={"batches": 7}
    )
    assert (pruning.wheel, pruning.tree) == (Wheel(4), Tree(patience=1))
    assert (pruning.validation, pruning.refit) == (Validation(confirm=0.0), LeastSquares(batches=7))


@pytest.mark.parametrize("argument", ["wheel", "tree", "validation", "refit"])
def test_a_misspelt_field_of_a_dict_is_refused_with_those_there_are(argument):
    with pytest.raises(TypeError, match=f"{argument} has the field 'sharpnes', but a .* has "):
        RouletteWheelPruning(**{argument: {"sharpnes": 1}})
    with pytest.raises(TypeError, match=f"{argument} has the field 'sharpnes', but a .* has "):
        search({"w": torch.ones(4)}, lambda mask: 0.0, **{argument: {"sharpnes": 1}})


@pytest.mark.parametrize("how", ["validate", "test", "predict"])
def test_a_trainer_that_only_validates_says_how_to_prune(make_trainer, caplog, how):
    class Module(Blobs):
        test_step = Blobs.validation_step

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    with caplog.at_level(logging.INFO, "lightning_roulette"):
        getattr(make_trainer(callbacks=[pruner()]), how)(Module(), val_loader())
    assert caplog.text.count("nothing is pruned here") == 1


@pytest.mark.parametrize("kind", ["weights alone", "a state dict"])
def test_a_fit_that_cannot_resume_says_how_to_prune(make_trainer, tmp_path, caplog, kind):
    module, path = Blobs(), tmp_path / "weights.ckpt"
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)
    if kind == "a state dict":
        torch.save(module.state_dict(), path)
    with caplog.at_level(logging.INFO, "lightning_roulette"), pytest.raises(KeyError):
        make_trainer(callbacks=[pruner()]).fit(module, train_loader(), val_loader(), ckpt_path=path)
    assert caplog.text.count("To prune its weights without training, call lightning_roulette.prune") == 1
