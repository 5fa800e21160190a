"""Every mistake is met early, with what came, what is allowed and what to do."""

from __future__ import annotations

import math

import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_roulette import HoldZeros, RouletteWheelPruning, Tree, Validation, Wheel
from tests.support.modules import Blobs, train_loader, val_loader


class CountsSteps(Callback):
    """How many training batches there were."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps += 1


class OnlyTraining(LightningDataModule):
    def train_dataloader(self):
        return train_loader()


# ---- the constructor

WRONG_ARGUMENTS = [
    ({"branches": 0}, ValueError, "branches is 0, but must be at least 1"),
    ({"branches": 2.5}, TypeError, "branches is 2.5, but must be a whole number"),
    ({"branches": True}, TypeError, "branches is True, but must be a whole number"),
    ({"tolerance": -0.1}, ValueError, "tolerance is -0.1, but must be at least 0. It is in the metric's own units"),
    ({"tolerance": math.nan}, ValueError, "tolerance is nan, but must be at least 0"),
    ({"tolerance": "1%"}, TypeError, "tolerance is '1%', but must be a number"),
    ({"monitor": 3}, TypeError, "monitor is 3, but must be"),
    ({"mode": "maximum"}, ValueError, "mode is 'maximum', but must be one of 'max', 'min'"),
    ({"target_sparsity": 1.0}, ValueError, "target_sparsity is 1.0, but must be more than 0 and less than 1"),
    ({"target_sparsity": 0}, ValueError, "target_sparsity is 0, but must be more than 0 and less than 1"),
    ({"target_sparsity": math.nan}, ValueError, "target_sparsity is nan, but must be"),
    ({"at_epoch": -1}, ValueError, "at_epoch is -1, but must be at least 0"),
    ({"at_epoch": 1.0}, TypeError, "at_epoch is 1.0, but must be a whole number"),
    ({"include": "net.*"}, TypeError, r"include is 'net.\*', but must be a list of patterns"),
    ({"exclude": "net.*"}, TypeError, r"exclude is 'net.\*', but must be a list of patterns"),
    ({"include": [1]}, TypeError, r"include is \[1\], but must be a list of patterns"),
    ({"wheel": 4.0}, TypeError, r"wheel is 4.0, but must be a Wheel\(...\) of lightning_roulette"),
    ({"tree": {"patience": 1}}, TypeError, r"tree is \{'patience': 1\}, but must be a Tree\(...\)"),
    ({"validation": ()}, TypeError, r"validation is \(\), but must be a Validation\(...\)"),
    ({"confidence": 1.0, "tolerance": 0.1}, ValueError, "confidence is 1.0, but must be more than 0 and less than 1"),
    ({"confidence": "high", "tolerance": 0.1}, TypeError, "confidence is 'high', but must be a number"),
    ({"confidence": 0.95}, ValueError, "tolerance is 0.* and confidence 0.95, but no finite sample can certify"),
    (
        {"confidence": 0.95, "tolerance": 0.1, "validation": Validation(confirm=0)},
        ValueError,
        "confirm is 0 and confidence 0.95, but data that chose the candidates cannot certify them. Hold some out",
    ),
    ({"seed": 0.5}, TypeError, "seed is 0.5, but must be a whole number"),
    ({"seed": 2**63}, ValueError, "seed is 9223372036854775808, but must be a signed 64-bit number"),
    ({"dirpath": 3}, TypeError, "dirpath is 3, but must be"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), WRONG_ARGUMENTS, ids=[f"{one[0]}" for one in WRONG_ARGUMENTS]
)
def test_a_wrong_argument_is_refused_where_it_is_written(arguments, error, message):
    with pytest.raises(error, match=message):
        RouletteWheelPruning(**arguments)


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="sharpness"):
        RouletteWheelPruning(sharpness=1.0)


# ---- setup, before any data is touched


def test_a_trainer_of_pytorch_lightning_is_refused_with_the_import_to_change(tmp_path):
    class Foreign(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(16, 10)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[RouletteWheelPruning(2)], default_root_dir=tmp_path, **quiet
    )
    with pytest.raises(
        TypeError, match="the Trainer is from 'pytorch_lightning'.*from lightning.pytorch import Trainer"
    ):
        trainer.fit(Foreign(), train_loader(), val_loader())


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
    "the default": ({}, "a refit needs whole layers.*Pass refit=None"),
    "running statistics": ({"refit": "batch_norm"}, "a refit needs whole layers.*Pass refit=None"),
    **{
        kind: ({"refit": None, "wheel": Wheel(importance=kind)}, f"importance '{kind}' needs whole layers.*'magnitude'")
        for kind in ("lamp", "sensitivity", "activation", "obs")
    },
    "a function": ({"refit": None, "wheel": Wheel(importance=_zero)}, "importance by a function needs whole layers"),
    "several epochs": ({"at_epoch": [1]}, r"at_epoch is \[1\].*Pass one epoch"),
}


@pytest.mark.parametrize("name", WHAT_NEEDS_WHOLE_LAYERS)
def test_what_needs_whole_layers_is_refused_where_they_are_sharded(make_trainer, name):
    options, why = WHAT_NEEDS_WHOLE_LAYERS[name]
    with pytest.raises(RuntimeError, match=f"ModelParallelStrategy, which shards weights, but {why}"):
        setup_under(make_trainer, ModelParallelStrategy, RouletteWheelPruning(**options))


def test_two_callbacks_with_one_state_key_are_refused(make_trainer):
    trainer = make_trainer(callbacks=[RouletteWheelPruning()])
    trainer.callbacks.append(RouletteWheelPruning())
    with pytest.raises(RuntimeError, match="2 callbacks with the state key 'RouletteWheelPruning'.*Keep one of them"):
        trainer.fit(Blobs(), train_loader(), val_loader())
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `RouletteWheelPruning`"):
        make_trainer(callbacks=[RouletteWheelPruning(), RouletteWheelPruning()])


def test_keep_callbacks_that_the_trainer_does_not_have_are_refused(fit):
    pruning = RouletteWheelPruning(validation=Validation(keep_callbacks=["Typo"]))
    with pytest.raises(
        ValueError, match="keep_callbacks names 'Typo', but the Trainer's other callbacks are .*CountsSteps"
    ):
        fit(CountsSteps(), pruning)


def test_at_epoch_beyond_max_epochs_is_refused(fit):
    with pytest.raises(ValueError, match="at_epoch is 3, but the Trainer stops after max_epochs=2. Lower at_epoch, or"):
        fit(RouletteWheelPruning(at_epoch=3))


def test_a_dirpath_that_cannot_be_a_folder_is_refused_before_training(fit, tmp_path):
    (tmp_path / "file").touch()
    steps = CountsSteps()
    with pytest.raises((ValueError, OSError), match="dirpath|file"):
        fit(steps, RouletteWheelPruning(2, tolerance=1.0, dirpath=tmp_path / "file"))
    assert steps.steps == 0


# ---- the start of fit


class NoValidationStep(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(16, 10)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class NothingPrunable(Blobs):
    def __init__(self) -> None:
        super().__init__()
        self.net.requires_grad_(False)
        self.shift = nn.Parameter(torch.zeros(10))

    def forward(self, x):
        return self.net(x) + self.shift


AT_THE_START = {
    "include": (
        RouletteWheelPruning(include=["nett.*"]),
        Blobs,
        {},
        "include has the pattern 'nett.*'.*'net.0.weight'",
    ),
    "exclude": (RouletteWheelPruning(exclude=["head"]), Blobs, {}, "exclude has the pattern 'head', which matches no"),
    "prunable": (
        RouletteWheelPruning(),
        NothingPrunable,
        {},
        "no parameter of NothingPrunable is prunable.*net.0.weight: frozen.*Pass include=",
    ),
    "all excluded": (RouletteWheelPruning(exclude=["*"]), Blobs, {}, "no parameter of Blobs is prunable.*excluded"),
    "limit": (RouletteWheelPruning(), Blobs, {"limit_val_batches": 0}, "limit_val_batches is 0.*Allow some validation"),
    "data": (
        RouletteWheelPruning(),
        Blobs,
        {"datamodule": OnlyTraining()},
        "there is no validation data.*Pass val_dataloaders to fit",
    ),
}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize(("pruning", "module", "options", "message"), AT_THE_START.values(), ids=AT_THE_START)
def test_what_cannot_be_searched_is_refused_before_training(fit, pruning, module, options, message):
    steps = CountsSteps()
    with pytest.raises((ValueError, RuntimeError), match=message):
        fit(steps, pruning, module=module(), **options)
    assert steps.steps == 0


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
def test_a_module_without_validation_step_is_refused_before_training(fit):
    steps = CountsSteps()
    with pytest.raises(RuntimeError, match="NoValidationStep has no validation_step.*Define one"):
        fit(steps, RouletteWheelPruning(), module=NoValidationStep())
    assert steps.steps == 0


def test_a_mask_of_another_network_is_refused(fit):
    with pytest.raises(ValueError, match="the mask names 'head', but the module has no such parameter: it has 'net.0"):
        fit(HoldZeros({"head": torch.ones(3, dtype=torch.bool)}))
    with pytest.raises(ValueError, match=r"the mask of 'net.0.weight' has shape \(2, 2\).*\(24, 16\)"):
        fit(HoldZeros({"net.0.weight": torch.ones(2, 2, dtype=torch.bool)}))
    with pytest.raises(TypeError, match="torch.float32, but must be torch.bool"):
        HoldZeros({"net.0.weight": torch.ones(24, 16)})


def test_a_file_without_a_mask_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"plain.ckpt holds no mask of RouletteWheelPruning. Pass its pruned.ckpt"):
        HoldZeros(tmp_path / "plain.ckpt")


# ---- the first validation


class Logs(Blobs):
    """Logs what it is given, under its name."""

    def __init__(self, **values) -> None:
        super().__init__()
        self.values = values

    def validation_step(self, batch, batch_idx):
        for name, value in self.values.items():
            self.log(name, value)


class PerClass(Blobs):
    def __init__(self) -> None:
        super().__init__()
        self.per_class = MulticlassAccuracy(10, average=None)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.per_class(self(batch[0]), batch[1])
        self.log("per_class", self.per_class)


AT_VALIDATION = {
    "typo": (
        {"monitor": "val_accuracy"},
        Blobs,
        "watches 'val_accuracy', which validation did not log. Logged: 'val_acc', 'val_loss'",
    ),
    "only in training": ({"monitor": "train_loss"}, Blobs, "watches 'train_loss', which validation did not log"),
    "nothing": ({}, Logs, r"cannot tell which metric to watch. Nothing was logged: call self.log\(...\)"),
    "several": ({}, lambda: Logs(a=1.0, b=2.0), "cannot tell which metric to watch. Logged: 'a', 'b'. Pass monitor="),
    "tolerance of which": (
        {"tolerance": 0.1},
        lambda: Logs(top1_acc=0.5, top5_acc=0.9),
        "tolerance is 0.1, in units of the metric, but several could be meant: 'top1_acc', 'top5_acc'. Pass monitor=",
    ),
    "direction": (
        {"monitor": "surprise"},
        lambda: Logs(surprise=0.5, val_acc=0.9),
        "cannot tell whether larger values of 'surprise' are better. Pass mode='max' or mode='min'",
    ),
    "rank_by": (
        {"monitor": "val_acc", "validation": Validation(rank_by="loss")},
        Blobs,
        "watches 'loss', which validation did not log. Logged: 'val_acc', 'val_loss'. Pass rank_by=",
    ),
    "direction of what ranks": (
        {"monitor": "val_acc", "validation": Validation(rank_by="surprise")},
        lambda: Logs(surprise=0.5, val_acc=0.9),
        "cannot tell whether larger values of 'surprise' are better. Rank by another metric",
    ),
    "not a scalar": (
        {"monitor": "per_class"},
        PerClass,
        r"watches 'per_class', which has shape \(10,\), but must be one",
    ),
}


@pytest.mark.parametrize(("arguments", "module", "message"), AT_VALIDATION.values(), ids=AT_VALIDATION)
@pytest.mark.parametrize("sanity_steps", [0, 1])
def test_a_metric_that_cannot_judge_is_refused_at_the_first_validation(fit, arguments, module, message, sanity_steps):
    steps = CountsSteps()
    with pytest.raises(RuntimeError, match=message):
        fit(steps, RouletteWheelPruning(2, **arguments), module=module(), num_sanity_val_steps=sanity_steps)
    assert steps.steps == (0 if sanity_steps else 8)


def test_a_metric_that_is_missing_when_the_search_comes_is_refused_with_what_was_logged(fit):
    class LogsInTraining(Blobs):
        def on_validation_epoch_end(self):
            if self.trainer.current_epoch < self.trainer.max_epochs:
                self.log("early", 1.0)

    module, pruning = LogsInTraining(), RouletteWheelPruning(2, monitor="early", mode="max")
    with pytest.raises(RuntimeError, match="'early', which validation did not log. Logged: 'val_acc', 'val_loss'"):
        fit(pruning, module=module)
    assert bool((module.net[0].weight != 0).all())


class LogsFromOutside(Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        self.log("outside", pl_module.net[0].weight.abs().mean())


def test_a_metric_that_a_callback_logs_is_refused_with_the_name_of_the_callback(fit):
    steps = CountsSteps()
    with pytest.raises(
        RuntimeError, match=r"did not log.*Your callback LogsFromOutside logs it.*keep_callbacks=\['LogsFromOutside'\]"
    ):
        fit(LogsFromOutside(), steps, RouletteWheelPruning(2, monitor="outside"))
    assert steps.steps == 0


def test_a_kept_callback_may_log_the_metric(fit):
    pruning = RouletteWheelPruning(
        2,
        monitor="outside",
        mode="max",
        tolerance=1.0,
        tree=Tree(0.2, max_levels=1),
        validation=Validation(keep_callbacks=["LogsFromOutside"]),
    )
    fit(LogsFromOutside(), pruning)
    assert pruning.report.monitor == "outside"
    assert pruning.report.score < pruning.report.dense_score  # fewer weights, smaller mean


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_dense_score_that_is_no_number_is_an_error_and_prunes_nothing(fit, value):
    module, pruning = Logs(val_acc=value), RouletteWheelPruning(2)
    with pytest.raises(ValueError, match="the score of the dense network is NaN or infinite.* Nothing was pruned"):
        fit(pruning, module=module)
    assert bool((module.net[0].weight != 0).all())
    assert pruning.mask is None


# ---- what only warns


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"barebones": True, "logger": None, "enable_checkpointing": None}, "barebones=True logs no metrics"),
        ({"max_epochs": 0}, "the Trainer trains for no epoch"),
        ({"max_steps": 0}, "the Trainer trains for no epoch"),
        ({"limit_train_batches": 0}, ""),
    ],
    ids=["barebones", "max_epochs=0", "max_steps=0", "limit_train_batches=0"],
)
@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_fit_that_cannot_search_says_so_and_leaves_the_network_dense(fit, options, why):
    options = (
        {"enable_progress_bar": None, "enable_model_summary": None} | options if "barebones" in options else options
    )
    module, pruning = Blobs(), RouletteWheelPruning(2, monitor="mistyped")
    with pytest.warns(UserWarning, match=f"RouletteWheelPruning does nothing in this fit: {why}"):
        fit(pruning, module=module, **options)
    assert pruning.report is None
    assert bool((module.net[0].weight != 0).all())


def test_a_mistyped_metric_is_refused_at_the_start_where_no_validation_comes_before_the_search(fit):
    steps, pruning = CountsSteps(), RouletteWheelPruning(2, monitor="val_ac")
    with pytest.raises(RuntimeError, match="watches 'val_ac', which validation did not log"):
        fit(steps, pruning, num_sanity_val_steps=0, check_val_every_n_epoch=9)
    assert steps.steps == 0


class LateAverage(Blobs):
    """Validates an average of its weights that it makes while training."""

    average = None

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.average = {name: value.clone() for name, value in self.net.state_dict().items()}

    def swap(self):
        if self.average is not None:
            now = {name: value.clone() for name, value in self.net.state_dict().items()}
            self.net.load_state_dict(self.average)
            self.average = now


class SwapsInHooks(LateAverage):
    def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self.swap()

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.swap()


class SwapsInStep(LateAverage):
    def validation_step(self, batch, batch_idx):
        self.swap()
        super().validation_step(batch, batch_idx)
        self.swap()


@pytest.mark.parametrize("module", [SwapsInHooks, SwapsInStep])
def test_a_validation_that_does_not_see_the_weights_is_refused(fit, module):
    network = module()
    with pytest.raises(RuntimeError, match="logs the same with all prunable weights at zero"):
        fit(RouletteWheelPruning(2, tolerance=1.0), module=network)
    assert bool((network.net[0].weight != 0).all())


@pytest.mark.filterwarnings("ignore:Total length of")
def test_validation_data_without_a_batch_is_refused_before_training(fit):
    steps = CountsSteps()
    with pytest.raises(RuntimeError, match="the validation data is empty"):
        fit(steps, RouletteWheelPruning(2), val=[])
    assert steps.steps == 0


def test_an_untrained_network_that_is_as_good_as_none_is_not_refused(fit):
    class Constant(Blobs):
        """Is as accurate with any weights until it is trained, and logs nothing else."""

        def validation_step(self, batch, batch_idx):
            x, y = batch
            untrained = self.trainer.global_step == 0
            self.val_acc(torch.zeros(len(y), 10) if untrained else self(x), y)
            self.log("val_acc", self.val_acc)

    pruning = RouletteWheelPruning(2, tolerance=1.0, tree=Tree(0.2, max_levels=1))
    fit(pruning, module=Constant())
    assert pruning.report.sparsity > 0
