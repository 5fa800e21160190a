"""Every mistake is met early, with what came, what is allowed and what to do."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_roulette import HoldZeros, LeastSquares, RouletteWheelPruning, Tree, Validation, Wheel
from tests.support.modules import Blobs, train_loader, val_loader


@pytest.fixture
def refused(fit):
    """A function that fits, sees the fit refused with a message, and returns the number of steps trained before."""

    def steps(message, *callbacks, module=None, **options):
        module = Blobs() if module is None else module
        with pytest.raises((RuntimeError, ValueError), match=message):
            fit(*callbacks, module=module, **options)
        return module.trainer.global_step

    return steps


# ---- the constructor

# `tests/search/test_search.py` has a table of the arguments that the callback passes on to `search`.
WRONG_ARGUMENTS = [
    ({"branches": 0}, ValueError, "branches is 0, but must be at least 1"),
    ({"monitor": 3}, TypeError, "monitor is 3, but must be"),
    ({"mode": "maximum"}, ValueError, "mode is 'maximum', but must be one of 'max', 'min'"),
    ({"at_epoch": -1}, ValueError, "at_epoch is -1, but must be at least 0"),
    ({"at_epoch": 1.0}, TypeError, "at_epoch is 1.0, but must be a whole number"),
    ({"include": "net.*"}, TypeError, r"include is 'net.\*', but must be a list of patterns"),
    ({"exclude": "net.*"}, TypeError, r"exclude is 'net.\*', but must be a list of patterns"),
    ({"include": [1]}, TypeError, r"include is \[1\], but must be a list of patterns"),
    ({"dirpath": 3}, TypeError, "dirpath is 3, but must be"),
    (
        {"confidence": 0.95, "tolerance": 0.1, "validation": Validation(confirm=0)},
        ValueError,
        "confirm is 0 and confidence 0.95, but data that chose the candidates cannot certify them. Hold some out",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG_ARGUMENTS, ids=str)
def test_a_wrong_argument_is_refused_where_it_is_written(arguments, error, message):
    with pytest.raises(error, match=message):
        RouletteWheelPruning(**arguments)


def test_a_dirpath_that_cannot_be_a_folder_is_refused_where_it_is_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="dirpath is '.*file', but must be a folder"):
        RouletteWheelPruning(dirpath=tmp_path / "file")


# ---- setup, before any data is touched


def setup_under(make_trainer, strategy, pruning):
    trainer = make_trainer(callbacks=[pruning])
    trainer._accelerator_connector.strategy = object.__new__(strategy)  # constructed, they ask for their hardware
    pruning.setup(trainer, Blobs(), "fit")


@pytest.mark.parametrize(
    ("strategy", "why"),
    [(FSDPStrategy, "into flat buffers"), (DeepSpeedStrategy, "into partitions that only it can write to")],
)
def test_strategies_that_shard_weights_out_of_reach_are_refused_by_name(make_trainer, strategy, why):
    with pytest.raises(RuntimeError, match=f"{strategy.__name__}, which shards weights {why}.*ModelParallelStrategy"):
        setup_under(make_trainer, strategy, RouletteWheelPruning(refit=None))


def _zero(weights):
    return {name: 0 * weight for name, weight in weights.items()}


WHAT_NEEDS_WHOLE_LAYERS = {
    **{
        kind: ({"wheel": Wheel(importance=kind)}, f"importance '{kind}' needs whole layers.*'magnitude'")
        for kind in ("lamp", "sensitivity", "activation", "obs")
    },
    "a function": ({"wheel": Wheel(importance=_zero)}, "importance by a function needs whole layers"),
    "gradient steps": ({"refit": LeastSquares(distill=5)}, r"distill 5 needs whole weights.*Pass LeastSquares\(dist"),
    "several epochs": ({"at_epoch": [1]}, r"at_epoch is \[1\].*Pass one epoch"),
}


@pytest.mark.parametrize("name", WHAT_NEEDS_WHOLE_LAYERS)
def test_what_needs_whole_layers_is_refused_where_they_are_sharded(make_trainer, name):
    options, why = WHAT_NEEDS_WHOLE_LAYERS[name]
    with pytest.raises(RuntimeError, match=f"ModelParallelStrategy, which shards weights, but {why}"):
        setup_under(make_trainer, ModelParallelStrategy, RouletteWheelPruning(**options))


class Mine(RouletteWheelPruning):
    """A subclass of a user."""


@pytest.mark.parametrize("other", [RouletteWheelPruning, Mine])
def test_two_callbacks_are_refused(make_trainer, other):
    trainer = make_trainer(callbacks=[RouletteWheelPruning(at_epoch=[0, 1]), other(at_epoch=[0, 1])])
    with pytest.raises(RuntimeError, match="the Trainer has 2 of these callbacks.*Keep one of them"):
        trainer.fit(Blobs(), train_loader(), val_loader())


# ---- the start of fit


class OnlyTraining(LightningDataModule):
    def train_dataloader(self):
        return train_loader()


class NoValidationStep(Blobs):
    validation_step = LightningModule.validation_step


class NothingPrunable(Blobs):
    def __init__(self) -> None:
        super().__init__()
        self.net.requires_grad_(False)
        self.shift = nn.Parameter(torch.zeros(10))

    def forward(self, x):
        return self.net(x) + self.shift


def masked(name, *shape):
    return HoldZeros({name: torch.ones(shape, dtype=torch.bool)})


AT_THE_START = {
    "include": (
        RouletteWheelPruning(include=["nett.*"]),
        Blobs,
        {},
        "include has the pattern 'nett.*'.*'net.0.weight'",
    ),
    "exclude": (RouletteWheelPruning(exclude=["head"]), Blobs, {}, "exclude has the pattern 'head', which matches no"),
    "all excluded": (RouletteWheelPruning(exclude=["*"]), Blobs, {}, "no parameter of Blobs is prunable.*excluded"),
    "prunable": (
        RouletteWheelPruning(),
        NothingPrunable,
        {},
        "no parameter of NothingPrunable is prunable.*Linear .*: frozen.*pass include=",
    ),
    "limit": (RouletteWheelPruning(), Blobs, {"limit_val_batches": 0}, "limit_val_batches is 0.*Allow some validation"),
    "no data": (
        RouletteWheelPruning(),
        Blobs,
        {"datamodule": OnlyTraining()},
        "there is no validation data.*Pass val_dataloaders",
    ),
    "no batch": (RouletteWheelPruning(2), Blobs, {"val": []}, "the validation data is empty"),
    "no validation_step": (
        RouletteWheelPruning(),
        NoValidationStep,
        {},
        "NoValidationStep has no validation_step.*Define one",
    ),
    "at_epoch": (
        RouletteWheelPruning(at_epoch=3),
        Blobs,
        {},
        "at_epoch is 3, but the Trainer stops after max_epochs=2. Lower at_e",
    ),
    "keep_callbacks": (
        RouletteWheelPruning(validation=Validation(keep_callbacks=["Typo"])),
        Blobs,
        {"enable_checkpointing": True},
        "keep_callbacks names 'Typo', but the Trainer's other callbacks are ModelCheckpoint",
    ),
    "metric, with no validation before the search": (
        RouletteWheelPruning(2, monitor="val_ac"),
        Blobs,
        {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 9},
        "watches 'val_ac', which validation did not log",
    ),
    "mask of other names": (
        masked("head", 3),
        Blobs,
        {},
        "the mask names 'head', but the module has no such parameter: it has 'net.0",
    ),
    "mask of other shapes": (
        masked("net.0.weight", 2, 2),
        Blobs,
        {},
        r"the mask of 'net.0.weight' has shape \(2, 2\).*\(24, 16\)",
    ),
}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
@pytest.mark.filterwarnings("ignore:Total length of")
@pytest.mark.parametrize(("callback", "module", "options", "message"), AT_THE_START.values(), ids=AT_THE_START)
def test_what_cannot_be_searched_is_refused_before_training(refused, callback, module, options, message):
    assert refused(message, callback, module=module(), **options) == 0


def test_what_holds_no_mask_is_refused(tmp_path):
    with pytest.raises(TypeError, match="torch.float32, but must be torch.bool"):
        HoldZeros({"net.0.weight": torch.ones(24, 16)})
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"plain.ckpt holds no mask of RouletteWheelPruning. Pass its pruned.ckpt"):
        HoldZeros(tmp_path / "plain.ckpt")


# ---- the first validation


class PerClass(Blobs):
    def __init__(self) -> None:
        super().__init__()
        self.per_class = MulticlassAccuracy(10, average=None)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.per_class(self(batch[0]), batch[1])
        self.log("per_class", self.per_class)


# `scores/test_monitored_metric.py` has a table of what else cannot judge.
AT_VALIDATION = {
    "typo": ("val_accuracy", "which validation did not log. Logged: 'val_acc', 'val_loss'"),
    "only in training": ("train_loss", "which validation did not log"),
    "not a scalar": ("per_class", r"which has shape \(10,\), but must be one"),
}


@pytest.mark.parametrize(("monitor", "message"), AT_VALIDATION.values(), ids=AT_VALIDATION)
@pytest.mark.parametrize("sanity_steps", [0, 1])
def test_a_metric_that_cannot_judge_is_refused_at_the_first_validation(refused, monitor, message, sanity_steps):
    module = PerClass() if monitor == "per_class" else Blobs()
    callback = RouletteWheelPruning(2, monitor=monitor)
    steps = refused(f"watches '{monitor}', {message}", callback, module=module, num_sanity_val_steps=sanity_steps)
    assert steps == (0 if sanity_steps else 8)


def test_a_metric_that_is_missing_when_the_search_comes_is_refused_with_what_was_logged(refused):
    class LogsInTraining(Blobs):
        def on_validation_epoch_end(self):
            if self.trainer.current_epoch < self.trainer.max_epochs:
                self.log("early", 1.0)

    module, message = LogsInTraining(), "'early', which validation did not log. Logged: 'val_acc', 'val_loss'"
    refused(message, RouletteWheelPruning(2, monitor="early", mode="max"), module=module)
    assert bool((module.net[0].weight != 0).all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_dense_score_that_is_no_number_is_an_error_and_prunes_nothing(refused, value):
    class Logs(Blobs):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", value)

    module, callback = Logs(), RouletteWheelPruning(2)
    refused("the score of the dense network is NaN or infinite.* Nothing was pruned", callback, module=module)
    assert bool((module.net[0].weight != 0).all())
    assert callback.mask is None


# ---- what only warns

BAREBONES = {"barebones": True} | dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (BAREBONES, "barebones=True logs no metrics"),
        ({"max_epochs": 0}, "the Trainer trains for no epoch"),
        ({"max_steps": 0}, "the Trainer trains for no epoch"),
        ({"limit_train_batches": 0}, ""),
    ],
    ids=["barebones", "max_epochs=0", "max_steps=0", "limit_train_batches=0"],
)
@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_fit_that_cannot_search_says_so_and_leaves_the_network_dense(fit, options, why):
    module, callback = Blobs(), RouletteWheelPruning(2, monitor="mistyped")
    with pytest.warns(UserWarning, match=f"RouletteWheelPruning does nothing in this fit: {why}"):
        fit(callback, module=module, **options)
    assert callback.report is None
    assert bool((module.net[0].weight != 0).all())


def test_an_untrained_network_that_is_as_good_as_none_is_not_refused(fit):
    class Constant(Blobs):
        """Is as accurate with any weights until it is trained, and logs nothing else."""

        def validation_step(self, batch, batch_idx):
            x, y = batch
            untrained = self.trainer.global_step == 0
            self.val_acc(torch.zeros(len(y), 10) if untrained else self(x), y)
            self.log("val_acc", self.val_acc)

    callback = RouletteWheelPruning(2, tolerance=math.inf, tree=Tree(0.2, max_levels=1))
    fit(callback, module=Constant())
    assert callback.report.sparsity > 0
