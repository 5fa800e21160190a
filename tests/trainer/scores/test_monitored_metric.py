"""The logged metric that judges, the one that ranks, and their directions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from lightning_roulette import RouletteWheelPruning, Tree
from lightning_roulette.trainer.scores.monitored_metric import find_metric, watched_in
from lightning_roulette.trainer.validation.logged import Logged
from tests.support.modules import Blobs


def logged(*names, rises=(), falls=()):
    """A validation that logged these names; torchmetrics objects that rise or fall among them."""
    values = {name: torch.tensor(0.5) for name in (*names, *rises, *falls)}
    return Logged(values, dict.fromkeys(rises, True) | dict.fromkeys(falls, False))


def trainer_with(*callbacks, plateau=None):
    """A Trainer as far as it is asked; `plateau` is the metric and mode of a scheduler."""
    configs = [SimpleNamespace(monitor=None, reduce_on_plateau=False, scheduler=SimpleNamespace())]
    if plateau is not None:
        monitor, mode = plateau
        configs.append(SimpleNamespace(monitor=monitor, reduce_on_plateau=True, scheduler=SimpleNamespace(mode=mode)))
    return SimpleNamespace(callbacks=[LearningRateMonitor(), *callbacks], lr_scheduler_configs=configs)


def found(what, trainer=None, monitor=None, mode=None, tolerance=0.0, rank_by=None):
    return find_metric(what, watched_in(trainer or trainer_with()), monitor, mode, tolerance, rank_by)


CHECKPOINT = ModelCheckpoint(monitor="val_quality", mode="max")
STOPPING = EarlyStopping("val_smoothness", mode="max")
PLATEAU = ("val_spread", "min")
ANY = ("val_quality", "val_smoothness", "val_spread", "val_loss")


# ---- the metric


@pytest.mark.parametrize(
    ("what", "watched_by", "monitor", "why"),
    [
        # 1: the one torchmetrics object that rises, whatever its name, and whatever else is watched
        (logged("val_acc", *ANY, rises=["val_x"]), [CHECKPOINT, STOPPING], "val_x", "higher_is_better=True"),
        (logged("val_loss", rises=["val_x"], falls=["val_mse"]), [], "val_x", "higher_is_better=True"),
        # 2: the one name like an accuracy, where none rises or several do
        (logged("val_acc", *ANY), [CHECKPOINT, STOPPING], "val_acc", "like an accuracy"),
        (logged("val_loss", "val_acc"), [], "val_acc", "like an accuracy"),
        (logged("val_loss", rises=["val_acc", "val_x"]), [], "val_acc", "like an accuracy"),
        (logged("val_loss", "val_acc", falls=["val_x"]), [], "val_acc", "like an accuracy"),
        # 3: what ModelCheckpoint, then EarlyStopping, then a plateau scheduler watches
        (logged(*ANY), [STOPPING, CHECKPOINT], "val_quality", "ModelCheckpoint watches"),
        (logged(*ANY), [STOPPING], "val_smoothness", "EarlyStopping watches"),
        (logged(*ANY), [], "val_spread", "scheduler watches"),
        (logged("val_acc", "val_f1"), [ModelCheckpoint(monitor="val_f1", mode="max")], "val_f1", "ModelCheckpoint"),
        # 3: but only if it was logged
        (logged("val_smoothness", "val_spread"), [CHECKPOINT, STOPPING], "val_smoothness", "EarlyStopping watches"),
        (logged("val_spread", "val_loss"), [CHECKPOINT, STOPPING], "val_spread", "scheduler watches"),
        (logged(*ANY), [ModelCheckpoint()], "val_spread", "scheduler watches"),
        # 4: the only one
        (logged("val_loss"), [CHECKPOINT, STOPPING], "val_loss", "only metric"),
    ],
)
def test_without_a_monitor_the_first_rule_that_names_one_metric_decides(what, watched_by, monitor, why):
    metric = found(what, trainer_with(*watched_by, plateau=PLATEAU))
    assert metric.monitor == monitor
    assert why in metric.why


def test_a_monitor_that_is_passed_is_used():
    metric = found(logged("val_acc", "val_loss"), trainer_with(CHECKPOINT), monitor="val_loss")
    assert (metric.monitor, metric.mode, metric.why) == ("val_loss", "min", "as asked")


@pytest.mark.parametrize("loader", ["", "/dataloader_idx_0"])
def test_a_metric_under_two_names_is_one_metric(loader):
    both = logged(*(f"{name}{loader}" for name in ("val_acc", "val_acc_epoch", "val_loss", "val_loss_epoch")))
    assert found(both, tolerance=0.1).monitor == f"val_acc{loader}"
    assert found(logged(f"val_loss{loader}", f"val_loss_epoch{loader}")).monitor == f"val_loss{loader}"


def test_either_name_of_a_metric_may_be_logged_alone_passed_or_watched():
    both = logged("val_x", "val_x_epoch", "val_loss")
    rising = Logged(both.values, {"val_x": True})
    assert found(rising, monitor="val_x_epoch").mode == "max"
    assert found(logged("val_acc_epoch", "val_loss")).monitor == "val_acc_epoch"
    for name in ("val_x", "val_x_epoch"):
        metric = found(both, trainer_with(ModelCheckpoint(monitor=name, mode="max")))
        assert (metric.monitor.removesuffix("_epoch"), metric.mode) == ("val_x", "max")


def test_several_loaders_give_several_metrics():
    several = {f"val_acc/dataloader_idx_{i}": torch.tensor(0.5) for i in range(2)}
    two = Logged(several, {"val_acc": True})
    with pytest.raises(RuntimeError, match=r"'val_acc/dataloader_idx_0', 'val_acc/dataloader_idx_1'"):
        found(two)
    assert found(two, monitor="val_acc/dataloader_idx_1").mode == "max"
    watched = trainer_with(ModelCheckpoint(monitor="val_acc/dataloader_idx_0", mode="max"))
    assert found(two, watched).monitor == "val_acc/dataloader_idx_0"
    assert found(Logged({"val_acc/dataloader_idx_1": torch.tensor(0.5), **logged("val_loss").values}, {})).mode == "max"


# ---- its direction


@pytest.mark.parametrize(
    ("what", "trainer", "monitor", "mode"),
    [
        # what the metric says of itself, before the callback or scheduler that watches it
        (logged(rises=["val_acc"]), trainer_with(ModelCheckpoint(monitor="val_acc", mode="min")), "val_acc", "max"),
        (logged("val_loss"), trainer_with(EarlyStopping("val_loss", mode="max")), "val_loss", "max"),
        (logged("y"), trainer_with(EarlyStopping("y", mode="max")), "y", "max"),
        (logged("y"), trainer_with(plateau=("y", "max")), "y", "max"),
        (logged("x"), trainer_with(ModelCheckpoint(monitor="x", mode="max"), plateau=("x", "min")), "x", "max"),
        # not that of those who watch something else
        (logged("val_loss"), trainer_with(ModelCheckpoint(monitor="val_acc", mode="max")), "val_loss", "min"),
        # what the metric says of itself, before its name
        (logged(rises=["val_loss"]), trainer_with(), "val_loss", "max"),
        (logged(falls=["val_acc"]), trainer_with(), "val_acc", "min"),
    ],
)
def test_the_first_rule_that_tells_a_direction_decides(what, trainer, monitor, mode):
    assert found(what, trainer, monitor=monitor).mode == mode


@pytest.mark.parametrize("mode", ["min", "max"])
def test_an_explicit_mode_comes_before_all_else(mode):
    watched = trainer_with(ModelCheckpoint(monitor="val_acc", mode="max"), EarlyStopping("val_acc", mode="min"))
    assert found(logged("val_acc"), watched, monitor="val_acc", mode=mode).mode == mode
    assert found(logged("val_acc"), watched, mode=mode).sign == {"max": 1, "min": -1}[mode]


CONTRADICTIONS = [
    (logged(rises=["x"]), trainer_with(), {"mode": "min"}, "mode is 'min', but .*'x' has higher_is_better=True.*'max'"),
    (
        logged(falls=["x"]),
        trainer_with(),
        {"mode": "max"},
        "mode is 'max', but .*'x' has higher_is_better=False.*'min'",
    ),
    (
        logged("val_acc"),
        trainer_with(ModelCheckpoint(monitor="val_acc")),
        {},
        "ModelCheckpoint watches 'val_acc' with mode='min', its default.* or mode='min' to RouletteWheelPruning",
    ),
    (logged("val_acc"), trainer_with(plateau=("val_acc", "min")), {}, "a learning rate scheduler watches 'val_acc'"),
]


@pytest.mark.parametrize(("what", "trainer", "options", "message"), CONTRADICTIONS)
def test_a_direction_that_contradicts_the_metric_is_refused(what, trainer, options, message):
    (name,) = what.values
    with pytest.raises(RuntimeError, match=message):
        found(what, trainer, monitor=name, **options)
    found(what, trainer, monitor=name, mode="max" if "True" in message or name == "val_acc" else "min")


RISING = """val_acc acc valAcc val/accuracy valid-ACC top5_acc val_acc1 balanced_accuracy MulticlassAccuracy val_f1
    F1Score val_auroc mAP50 r2score val_r2 mIoU dice rouge1 psnr spearman val_acc/dataloader_idx_1"""
FALLING = """val_loss loss valLoss val/total-loss train_loss1 val_mse RMSE mae nll perplexity error_rate val_err wer
    loss_ema fid ece val_loss/dataloader_idx_0"""


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "max") for name in RISING.split()), *((name, "min") for name in FALLING.split())]
)
def test_a_name_may_tell_the_direction(name, mode):
    assert found(logged(name)).mode == mode


@pytest.mark.parametrize("name", ["val_quality", "x", "accordion", "macro", "lossless", "acc_loss", "terrier"])
def test_a_name_that_tells_no_direction_is_an_error(name):
    with pytest.raises(RuntimeError, match=f"larger values of '{name}' are better. Pass mode='max' or mode='min'"):
        found(logged(name))
    assert found(logged(name), mode="min").mode == "min"


def test_a_loss_named_after_an_accuracy_is_a_loss():
    assert found(logged("val_dice", "val_dice_loss"), tolerance=0.1).monitor == "val_dice"
    assert found(logged("val_loss", "val_dice_loss"), trainer_with(ModelCheckpoint(monitor="val_loss"))).mode == "min"


# ---- what ranks


@pytest.mark.parametrize(
    ("names", "monitor", "rank_by", "expected"),
    [
        # by default the loss ranks, and the metric breaks ties
        (("val_acc", "val_loss"), "val_acc", None, ("val_loss", "min", None)),
        (("val_acc", "val_loss", "aux_loss"), "val_acc", None, ("val_loss", "min", None)),
        (("val_acc", "val_loss", "val_loss_epoch"), "val_acc", None, ("val_loss", "min", None)),
        (("val_acc", "my_loss/dataloader_idx_0"), "val_acc", None, ("my_loss/dataloader_idx_0", "min", None)),
        # the metric ranks if there is no loss, or several, or if it is the loss
        (("val_acc",), "val_acc", None, ("val_acc", "max", None)),
        (("val_acc", "val_mse"), "val_acc", None, ("val_acc", "max", None)),
        (("val_acc", "loss_a", "loss_b"), "val_acc", None, ("val_acc", "max", None)),
        (("val_acc", "val_loss"), "val_loss", None, ("val_loss", "min", None)),
        (("loss_a", "val_loss"), "loss_a", None, ("loss_a", "min", "val_loss")),
        # what is asked for ranks, and the loss breaks ties
        (("val_acc", "val_loss"), "val_acc", "val_acc", ("val_acc", "max", "val_loss")),
        (("val_acc", "my_loss"), "val_acc", "val_acc", ("val_acc", "max", "my_loss")),
        (("val_acc", "val_loss"), "val_acc", "val_loss", ("val_loss", "min", None)),
        (("val_acc", "val_f1", "val_loss"), "val_acc", "val_f1", ("val_f1", "max", "val_loss")),
        (("val_acc", "val_mse"), "val_acc", "val_mse", ("val_mse", "min", None)),
    ],
)
def test_the_loss_ranks_unless_another_metric_is_asked_for(names, monitor, rank_by, expected):
    metric = found(logged(*names), monitor=monitor, rank_by=rank_by)
    assert metric.monitor == monitor
    assert (metric.rank_by, metric.rank_mode, metric.tiebreak) == expected
    assert metric.rank_sign == {"max": 1, "min": -1}[expected[1]]


@pytest.mark.parametrize(
    ("monitor", "mode", "rank_by", "expected"),
    [
        ("val_acc", "min", None, ("min", "val_loss", "min")),
        ("val_loss", "max", None, ("max", "val_loss", "max")),
        ("val_loss", "max", "val_loss", ("max", "val_loss", "max")),
    ],
)
def test_a_mode_is_that_of_the_metric_and_of_no_other_that_ranks(monitor, mode, rank_by, expected):
    metric = found(logged("val_acc", "val_loss"), monitor=monitor, mode=mode, rank_by=rank_by)
    assert (metric.mode, metric.rank_by, metric.rank_mode) == expected


def test_the_metric_that_ranks_may_have_two_names():
    both = logged("val_x", "val_x_epoch", "val_loss")
    metric = found(both, monitor="val_x", mode="max", rank_by="val_x_epoch")
    assert (metric.rank_by, metric.rank_mode) == ("val_x_epoch", "max")


# ---- errors


@pytest.mark.parametrize("names", [("val_acc", "val_f1"), ("val_f1", "val_acc", "val_loss")])
def test_a_tolerance_needs_a_monitor_if_several_metrics_could_be_meant(names):
    with pytest.raises(RuntimeError, match=r"tolerance is 0\.01.*'val_(acc|f1)', 'val_(acc|f1)'.*Pass monitor="):
        found(logged(*names), trainer_with(ModelCheckpoint(monitor="val_loss")), tolerance=0.01)
    watching = trainer_with(ModelCheckpoint(monitor="val_f1", mode="max"))
    assert found(logged(*names), watching, tolerance=0.01).monitor == "val_f1"
    assert found(logged(*names), monitor="val_f1", tolerance=0.01).monitor == "val_f1"


def test_a_tolerance_needs_no_monitor_if_one_metric_is_meant():
    assert found(logged("val_acc", "val_loss"), tolerance=0.01).monitor == "val_acc"
    assert found(logged("val_loss", "val_mse", rises=["val_x"]), tolerance=0.01).monitor == "val_x"


EACH = Logged({"each": torch.zeros(10), **logged("val_acc", "val_loss", "surprise").values}, {"each": True})
UNWATCHED = trainer_with(CHECKPOINT, STOPPING, plateau=PLATEAU)


@pytest.mark.parametrize(
    ("what", "arguments", "message"),
    [
        (
            logged("val_mse", "val_loss"),
            {},
            r"cannot tell which metric.* Logged: 'val_loss', 'val_mse'\. Pass monitor=",
        ),
        (logged("val_f1", "val_acc"), {}, r"cannot tell which .* Logged: 'val_acc', 'val_f1'\. Pass monitor="),
        (logged(), {}, r"Nothing was logged: call self\.log"),
        (logged(), {"monitor": "val_acc"}, r"Nothing was logged: call self\.log"),
        (
            logged("val_loss", "val_acc"),
            {"monitor": "val_ac"},
            r"watches 'val_ac', which .* did not log\. Logged: 'val_acc', 'val_loss'\.",
        ),
        (EACH, {}, r"'each', which has shape \(10,\), but must be one number.*'val_loss'"),
        (EACH, {"monitor": "each"}, r"'each', which has shape \(10,\), but must be one number.*'val_loss'"),
        (
            EACH,
            {"monitor": "val_acc", "rank_by": "each"},
            r"rank_by is 'each', .* shape \(10,\).* pass rank_by=",
        ),
        (
            EACH,
            {"monitor": "val_acc", "rank_by": "val_los"},
            r"rank_by is 'val_los', .*Did you mean 'val_loss'\? Pass validation=Validation\(rank_by=",
        ),
        (
            EACH,
            {"monitor": "val_acc", "rank_by": "surprise"},
            "rank_by is 'surprise', but it cannot tell whether larger values .* are better. Rank by another metric",
        ),
    ],
)
def test_a_metric_that_cannot_judge_or_rank_is_an_error_that_lists_what_was_logged(what, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        found(what, UNWATCHED, **arguments)


# ---- as Lightning logs it


class Logging(Blobs):
    """Logs what it is told to, by name."""

    def __init__(self, forked=False, **metrics):
        super().__init__()
        self.metrics, self.forked = torch.nn.ModuleDict(metrics), forked

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        scores = self(batch[0])
        for name, metric in self.metrics.items():
            regression = isinstance(metric, MeanSquaredError)
            metric(scores, torch.eye(10)[batch[1]] if regression else batch[1])
            self.log(name, metric, on_step=self.forked, on_epoch=True)
        self.log("val_loss", torch.nn.functional.cross_entropy(scores, batch[1]), on_step=self.forked, on_epoch=True)


def accuracy():
    return MulticlassAccuracy(10, average="micro")


@pytest.mark.parametrize(
    ("module", "options", "expected"),
    [
        (lambda: Logging(hits=accuracy()), {}, ("hits", "max")),
        (lambda: Logging(spread=MeanSquaredError()), {"monitor": "spread", "tolerance": math.inf}, ("spread", "min")),
        (lambda: Logging(forked=True, hits=accuracy()), {"tolerance": math.inf}, ("hits", "max")),
    ],
    ids=["rises", "falls", "two names"],
)
def test_a_metric_object_tells_its_direction_whatever_its_name(module, options, expected, fit):
    pruning = RouletteWheelPruning(2, tree=Tree(0.2, max_levels=1, patience=1), **options)
    fit(pruning, module=module(), max_epochs=1)
    assert (pruning.report.monitor, pruning.report.mode) == expected
