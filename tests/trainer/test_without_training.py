"""`prune`: the search of a fit without its training, from checkpoints of every kind, and the Trainer as it was."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_roulette import LeastSquares, RouletteWheelPruning, StopReason, Tree, Wheel, prune, sparsity
from lightning_roulette.trainer.scores.trainer_evaluator import TrainerEvaluator
from tests.support.events import scalars
from tests.support.failing import failing_forward
from tests.support.fits import pruner
from tests.support.modules import Blobs, BlobsData, train_loader, trained, val_loader
from tests.support.results import copied, equal, load, nonzeros, sparsity_of
from tests.support.state import changed, state_of

HOW = {"branches": 3, "tolerance": 0.2, "tree": Tree(0.3, max_levels=2), "refit": LeastSquares(batches=2)}


class Untrainable(LightningModule):
    """Only the parts of `Blobs` that a search needs."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.val_acc = Blobs().net, Blobs().val_acc

    forward, validation_step = Blobs.forward, Blobs.validation_step


class Counting(Blobs):
    """Counts what training would call."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def training_step(self, batch, batch_idx):
        self.called.append("training_step")
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        self.called.append("configure_optimizers")
        return super().configure_optimizers()

    def on_train_start(self):
        self.called.append("on_train_start")

    def on_train_batch_start(self, batch, batch_idx):
        self.called.append("on_train_batch_start")


class Heard(Callback):
    """Keeps the names of its hooks that were called."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def setup(self, trainer, pl_module, stage):
        self.heard.append("setup")

    def on_fit_start(self, trainer, pl_module):
        self.heard.append("on_fit_start")

    def on_validation_epoch_end(self, trainer, pl_module):
        self.heard.append("on_validation_epoch_end")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, torch.Tensor]:
    return trained(Blobs(), tmp_path_factory.mktemp("trained"))


@pytest.fixture
def module(weights) -> Blobs:
    found = Blobs()
    found.load_state_dict(weights)
    return found


def pruned(make_trainer, module, trainer=None, **arguments) -> RouletteWheelPruning:
    trainer = make_trainer() if trainer is None else trainer
    return prune(trainer, module, train_loader(), val_loader(), **HOW | arguments)


# ---- the search of a fit


def test_the_winner_is_that_of_a_search_at_the_end_of_a_fit(fit, make_trainer):
    pruning = RouletteWheelPruning(**HOW)
    expected = fit(pruning)
    module = pruned_alone = fit()
    found = pruned(make_trainer, pruned_alone)
    assert 0 < found.report.sparsity == pruning.report.sparsity
    assert equal(copied(module), copied(expected))
    assert dict(found.mask).keys() == dict(pruning.mask).keys()
    assert all(torch.equal(found.mask[name], kept) for name, kept in pruning.mask.items())


def test_the_zeros_of_the_report_are_in_the_module_and_in_the_file(make_trainer, module, tmp_path):
    pruning = pruned(make_trainer, module, dirpath=tmp_path)
    zeros = sum(int((one == 0).sum()) for one in (module.net[0].weight, module.net[2].weight))
    assert zeros == pruning.report.size - pruning.report.survivors > 0
    assert sparsity_of(pruning.best_model_path) == pytest.approx(pruning.report.sparsity)
    assert equal(load(pruning.best_model_path)["state_dict"], copied(module))
    assert all(torch.equal(kept, nonzeros(module)[name]) for name, kept in pruning.mask.items())
    assert torch.equal(pruning.weights_at(pruning.report.winner.level)["net.0.weight"], module.net[0].weight)


def test_nothing_is_trained(make_trainer, weights):
    module = Counting()
    module.load_state_dict(weights)
    trainer = make_trainer()
    pruned(make_trainer, module, trainer)
    assert module.called == []
    assert trainer.global_step == 0
    assert all(one.grad is None for one in module.parameters())


def test_a_module_needs_no_training_step_and_no_optimizers(make_trainer, weights):
    module = Untrainable()
    module.load_state_dict(weights)
    pruning = pruned(make_trainer, module)
    assert sparsity({"w": module.net[0].weight, "v": module.net[2].weight}) == pytest.approx(pruning.report.sparsity)
    assert "training_step" not in vars(module)
    assert "configure_optimizers" not in vars(module)


LIMITS = {
    "no epoch": {"max_epochs": 0},
    "no step": {"max_steps": 0},
    "rare validation": {"val_check_interval": 1000},
    "a sanity check": {"num_sanity_val_steps": 2},
    "a learning rate that is watched": {"callbacks": [LearningRateMonitor()]},
    "averaged weights": {"callbacks": [WeightAveraging()]},
}


@pytest.mark.parametrize("limit", LIMITS)
def test_what_a_trainer_limits_in_training_changes_nothing(make_trainer, module, weights, limit):
    pruned(make_trainer, module, make_trainer(**LIMITS[limit]))
    expected = Blobs()
    expected.load_state_dict(weights)
    pruned(make_trainer, expected)
    assert nonzeros(module).sparsity > 0
    assert equal(copied(module), copied(expected))


def test_weights_are_ordinary_tensors_that_can_be_trained(make_trainer, module):
    pruned(make_trainer, module)
    assert not any(one.is_inference() for one in (*module.parameters(), *module.buffers()))
    module(torch.randn(3, 16)).sum().backward()
    assert module.net[0].weight.grad is not None


# ---- checkpoints


def of_lightning(folder: Path, make_trainer, module, weights_only: bool) -> Path:
    trainer, path = make_trainer(), folder / "of_lightning.ckpt"
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=weights_only)
    return path


def of_torch(folder: Path, contents) -> Path:
    torch.save(contents, path := folder / "of_torch.pt")
    return path


def of_safetensors(folder: Path, contents) -> Path:
    pytest.importorskip("safetensors.torch").save_file(contents, path := folder / "model.safetensors")
    return path


KINDS = {
    "full": lambda folder, make, module: of_lightning(folder, make, module, False),
    "weights alone": lambda folder, make, module: of_lightning(folder, make, module, True),
    "a state dict": lambda folder, make, module: of_torch(folder, module.state_dict()),
    "a state dict of the inner network": lambda folder, make, module: of_torch(folder, module.net.state_dict()),
    "a state dict under a key": lambda folder, make, module: of_torch(
        folder, {"model": module.state_dict(), "epoch": 2}
    ),
    "safetensors": lambda folder, make, module: of_safetensors(folder, module.net.state_dict()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_gives_the_network_that_is_pruned(make_trainer, tmp_path, module, kind):
    path = KINDS[kind](tmp_path, make_trainer, module)
    other = Blobs()
    found = pruned(make_trainer, other, ckpt_path=path, dirpath=tmp_path / "other")
    expected = pruned(make_trainer, module, dirpath=tmp_path / "expected")
    assert found.report.sparsity == expected.report.sparsity > 0
    assert equal(copied(other), copied(module))


@pytest.mark.parametrize("name", ["best", "last"])
def test_best_and_last_are_files_of_the_fit_before(make_trainer, tmp_path, name):
    checkpoints = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max", save_last=True, filename="{epoch}")
    trainer = make_trainer(callbacks=[checkpoints], enable_checkpointing=True)
    trainer.fit(Blobs(), train_loader(), val_loader())
    path = {"best": checkpoints.best_model_path, "last": checkpoints.last_model_path}[name]
    found, expected = Blobs(), Blobs()
    pruned(make_trainer, found, trainer, ckpt_path=name)
    pruned(make_trainer, expected, ckpt_path=path)
    assert checkpoints.best_model_path.endswith("epoch=0.ckpt")  # the two names stand for different files
    assert equal(copied(found), copied(expected))


def test_on_load_checkpoint_may_change_what_is_loaded(make_trainer, tmp_path, module):
    class Older(Blobs):
        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {name[4:]: one for name, one in checkpoint["state_dict"].items()}

    old = {"state_dict": {f"old_{name}": one for name, one in module.state_dict().items()}}
    found = Older()
    pruned(make_trainer, found, ckpt_path=of_torch(tmp_path, old))
    pruned(make_trainer, module)
    assert equal(copied(found), copied(module))


def test_a_module_that_is_built_in_configure_model_is_loaded(make_trainer, tmp_path, module):
    class Late(Blobs):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            self.net = Blobs().net if self.net is None else self.net

    late = Late()
    pruned(make_trainer, late, ckpt_path=of_torch(tmp_path, module.state_dict()))
    pruned(make_trainer, module)
    assert equal(copied(late), copied(module))


def test_the_dense_network_is_not_written_again_if_it_was_loaded_from_a_checkpoint(make_trainer, tmp_path, module):
    path = of_lightning(tmp_path, make_trainer, module, weights_only=False)
    pruned(make_trainer, Blobs(), ckpt_path=path, dirpath=tmp_path / "loaded")
    pruned(make_trainer, module, dirpath=tmp_path / "given")
    assert sorted(one.name for one in (tmp_path / "loaded").iterdir()) == ["pruned.ckpt"]
    assert sorted(one.name for one in (tmp_path / "given").iterdir()) == ["dense.ckpt", "pruned.ckpt"]


# ---- the Trainer


def test_a_new_trainer_is_as_it_was(make_trainer, module):
    trainer = make_trainer(callbacks=[ModelCheckpoint(), EarlyStopping("val_loss")], enable_checkpointing=True)
    trainer.strategy.connect(module)
    before = trainer_state(trainer)
    pruned(make_trainer, module, trainer)
    assert changed(before, trainer_state(trainer)) == set()


def test_a_trainer_that_has_fitted_is_as_it_was(make_trainer, tmp_path):
    callbacks = [ModelCheckpoint(tmp_path, monitor="val_loss"), EarlyStopping("val_loss")]
    trainer, module = make_trainer(callbacks=callbacks, enable_checkpointing=True), Blobs()
    trainer.fit(module, train_loader(), val_loader())
    before = trainer_state(trainer)
    pruned(make_trainer, module, trainer)
    assert trainer.current_epoch == 2
    assert trainer.global_step == 2 * len(train_loader())
    assert set(trainer.callback_metrics) == {"train_loss", "val_loss", "val_acc"}
    assert changed(before, trainer_state(trainer)) == set()


def trainer_state(trainer) -> dict:
    """All of `state_of` but the module, which is pruned, and what a run leaves in a strategy."""
    skipped = ("module.", "identities", "gradients", "strategy.")
    return {
        name: one for name, one in state_of(trainer, trainer.lightning_module).items() if not name.startswith(skipped)
    }


def test_a_later_fit_is_that_of_a_trainer_that_never_pruned(make_trainer, module):
    trainer, found, expected = make_trainer(), Blobs(), Blobs()
    pruned(make_trainer, module, trainer)
    for one, by in ((found, trainer), (expected, make_trainer())):
        torch.manual_seed(0)
        by.fit(one, train_loader(), val_loader())
    assert trainer.current_epoch == 2
    assert equal(copied(found), copied(expected))


@pytest.mark.parametrize("how", ["validate", "test", "predict"])
def test_the_trainer_evaluates_the_pruned_network(make_trainer, module, how):
    class Module(Blobs):
        test_step = Blobs.validation_step

        def predict_step(self, batch, batch_idx):
            return self(batch[0]).argmax(1) == batch[1]

    judged = Module()
    judged.load_state_dict(module.state_dict())
    trainer = make_trainer()
    pruning = pruned(make_trainer, judged, trainer)
    if how == "predict":
        right = torch.cat(trainer.predict(judged, val_loader())).float().mean()
        assert float(right) == pytest.approx(pruning.report.score)
    else:
        (logged,) = getattr(trainer, how)(judged, val_loader(), verbose=False)
        assert logged["val_acc"] == pytest.approx(pruning.report.score)


def test_callbacks_are_not_called_but_those_to_keep(make_trainer, module):
    quiet, kept = Heard(), type("Kept", (Heard,), {})()
    trainer = make_trainer(callbacks=[quiet, kept])
    pruned(make_trainer, module, trainer, validation={"keep_callbacks": ["Kept"]})
    assert quiet.heard == []
    assert {"setup", "on_fit_start", "on_validation_epoch_end"} <= set(kept.heard)


def test_callbacks_of_the_module_are_not_called_but_those_to_keep(make_trainer, weights):
    quiet, kept = Heard(), type("Kept", (Heard,), {})()

    class Module(Blobs):
        def configure_callbacks(self):
            return [quiet, kept]

    module = Module()
    module.load_state_dict(weights)
    pruned(make_trainer, module, validation={"keep_callbacks": ["Kept"]})
    assert quiet.heard == []
    assert "on_fit_start" in kept.heard


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
def test_callbacks_that_train_do_not_train(make_trainer, weights, finder):
    module = Counting()
    module.load_state_dict(weights)
    module.batch_size = 50
    pruned(make_trainer, module, make_trainer(callbacks=[finder()]))
    assert module.called == []
    assert (module.lr, module.batch_size) == (1e-2, 50)


def test_curves_of_the_search_are_in_the_event_files_and_no_others(make_trainer, module, tmp_path):
    logger = TensorBoardLogger(tmp_path, "runs")
    pruning = pruned(make_trainer, module, make_trainer(logger=logger))
    found = scalars(logger.log_dir)
    levels = [0.0, *(level.sparsity for level in pruning.report.accepted)]
    assert [value for _, value in found["roulette/sparsity"]] == pytest.approx(levels)
    groups = {"roulette", "roulette-branch", "roulette-density", "roulette-result"}
    assert {tag.split("/")[0] for tag in found} == groups


# ---- training data


def test_training_data_may_come_from_a_data_module(make_trainer, module, weights):
    pruning = prune(make_trainer(), module, datamodule=BlobsData(), **HOW)
    other = Blobs()
    other.load_state_dict(weights)
    prune(make_trainer(), other, BlobsData(), **HOW)
    assert pruning.report.refit
    assert equal(copied(module), copied(other))


def test_without_training_data_nothing_is_refitted_and_a_line_says_so(make_trainer, module, weights, caplog):
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        pruning = prune(make_trainer(), module, val_dataloaders=val_loader(), branches=3, tolerance=0.2)
    assert caplog.text.count("there is no training data") == 1
    kept = {name: one != 0 for name, one in copied(module).items() if name in pruning.mask}
    assert 0 < pruning.report.sparsity < 1
    assert all(torch.equal(copied(module)[name][kept[name]], weights[name][kept[name]]) for name in kept)
    assert pruning.report.refit == ""
    assert pruning.report.importance == "magnitude"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"refit": "least_squares"}, "refit is 'least_squares', which needs inputs from training data"),
        ({"refit": {"batches": 3}}, "refit is {'batches': 3}, which needs"),
        ({"wheel": Wheel(importance="sensitivity")}, "importance of the wheel is 'sensitivity', which needs"),
    ],
)
def test_an_argument_that_needs_training_data_is_refused_without_it(make_trainer, module, arguments, match):
    before = copied(module)
    with pytest.raises(ValueError, match=match):
        prune(make_trainer(), module, val_dataloaders=val_loader(), **arguments)
    assert equal(copied(module), before)


# ---- the Trainer's own callback, and further training


def test_the_callback_of_the_trainer_is_used_and_holds_zeros_in_a_later_fit(make_trainer, module):
    own = RouletteWheelPruning(**HOW)
    trainer = make_trainer(callbacks=[own])
    assert prune(trainer, module, train_loader(), val_loader()) is own
    zeros = {name: one == 0 for name, one in copied(module).items() if name in own.mask}
    found, before = own.report.sparsity, copied(module)
    trainer.fit(module, train_loader(), val_loader())
    assert found > 0
    assert all(int(one[zeros[name]].count_nonzero()) == 0 for name, one in copied(module).items() if name in zeros)
    assert not torch.equal(module.net[0].weight, before["net.0.weight"])
    assert own.report.sparsity == found


def test_with_arguments_a_new_callback_prunes(make_trainer, module):
    own = pruner()
    pruning = pruned(make_trainer, module, make_trainer(callbacks=[own]))
    assert pruning is not own
    assert pruning.report is not None
    assert own.report is None


def test_a_network_can_be_pruned_again(make_trainer, module):
    own = RouletteWheelPruning(**HOW)
    trainer = make_trainer(callbacks=[own])
    first = prune(trainer, module, train_loader(), val_loader()).report
    second = prune(trainer, module, train_loader(), val_loader()).report
    assert second is not first
    assert 0 < first.sparsity <= second.sparsity == pytest.approx(nonzeros(module).sparsity)


def test_the_returned_callback_holds_zeros_when_training_goes_on(make_trainer, module):
    pruning = pruned(make_trainer, module)
    before, found = nonzeros(module), pruning.report.sparsity
    make_trainer(callbacks=[pruning]).fit(module, train_loader(), val_loader())
    assert nonzeros(module).sparsity >= found
    assert all(not (nonzeros(module)[name] & ~kept).any() for name, kept in before.items())


def test_a_fit_resumes_from_the_pruned_file_and_holds_its_zeros(make_trainer, module, tmp_path):
    path = pruned(make_trainer, module, dirpath=tmp_path).best_model_path
    other = Blobs()
    make_trainer(callbacks=[pruner()]).fit(other, train_loader(), val_loader(), ckpt_path=path)
    assert all(not (nonzeros(other)[name] & ~kept).any() for name, kept in nonzeros(module).items())


# ---- what is refused


def wrong_file(folder: Path, contents: bytes) -> Path:
    (path := folder / "wrong.ckpt").write_bytes(contents)
    return path


REFUSED = {
    "at_epoch": ({"at_epoch": 3}, ValueError, "at_epoch is 3, but prune takes no training step"),
    "a wrong argument": ({"tolerance": -1}, ValueError, "tolerance"),
    "an unknown argument": ({"tolerence": 3}, TypeError, "no argument 'tolerence'. Did you mean 'tolerance'?"),
    "a singular": ({"train_dataloader": 3}, TypeError, "Did you mean 'train_dataloaders'?"),
    "an argument of nobody": ({"xyz": 3}, TypeError, "prune has no argument 'xyz'. It has those of fit and"),
    "a class": ({"datamodule": BlobsData}, TypeError, "datamodule is .*BlobsData.*, an instance and no class"),
    "no file": ({"ckpt_path": ""}, ValueError, "ckpt_path is '', but there is no such file"),
    "no such file": (
        {"ckpt_path": "nowhere.ckpt"},
        ValueError,
        "ckpt_path is 'nowhere.ckpt', but there is no such file",
    ),
    "no path": ({"ckpt_path": 3}, TypeError, "ckpt_path is of type int, but must be a path"),
    "no fit before": ({"ckpt_path": "best"}, ValueError, "knows no such checkpoint of an earlier fit"),
    "not last": ({"ckpt_path": "last"}, ValueError, r"ModelCheckpoint\(save_last=True\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_input_is_refused_and_nothing_is_changed(make_trainer, module, tmp_path, kind):
    arguments, error, match = REFUSED[kind]
    before = copied(module)
    with pytest.raises(error, match=match):
        pruned(make_trainer, module, **arguments)
    assert equal(copied(module), before)
    assert list(tmp_path.iterdir()) == []


WRONG = {
    "text": (partial(wrong_file, contents=b"weights"), "torch cannot read it. It is damaged, or it was not written by"),
    "letters": (partial(wrong_file, contents=b"hello"), "torch cannot read it"),
    "empty": (partial(wrong_file, contents=b""), "torch cannot read it"),
    "damaged": (partial(wrong_file, contents=b"PK\x03\x04" + bytes(99)), "torch cannot read it"),
    "objects": (lambda folder: of_torch(folder, {"state_dict": Blobs()}), "pass weights_only=False"),
    "another network": (
        lambda folder: of_torch(folder, torch.nn.Linear(3, 2).state_dict()),
        r"do not fit Blobs: 4 of the module's names are missing .* unknown to the module \(bias, weight\)",
    ),
    "another width": (
        lambda folder: of_torch(folder, Blobs().state_dict() | {"net.0.weight": torch.ones(8, 16)}),
        r"net.0.weight \(file \(8, 16\), module",
    ),
    "no state dict": (
        lambda folder: of_torch(folder, torch.ones(3)),
        "but it holds an object of the class Tensor, and no",
    ),
    "no weights": (lambda folder: of_torch(folder, {"epoch": 3}), "it holds no state dict. Its keys are: 'epoch'"),
    "a folder": (lambda folder: folder, "it is a folder that SingleDeviceStrategy cannot load"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_refused_and_the_module_keeps_its_weights(make_trainer, module, tmp_path, kind):
    make, match = WRONG[kind]
    before, trainer = copied(module), make_trainer()
    with pytest.raises(ValueError, match=match) as raised:
        pruned(make_trainer, module, trainer, ckpt_path=make(tmp_path))
    assert str(raised.value).startswith("ckpt_path is ")
    assert equal(copied(module), before)
    assert trainer.fit_loop.epoch_progress.current.started == 0


def test_a_model_that_is_no_lightning_module_is_refused(make_trainer):
    with pytest.raises(TypeError, match="model is Linear, but must be a LightningModule"):
        prune(make_trainer(), torch.nn.Linear(3, 2), train_loader(), val_loader())


def test_barebones_is_refused(make_trainer, module):
    with pytest.raises(ValueError, match="barebones=True"):
        prune(make_trainer(barebones=True, **dict.fromkeys(("enable_checkpointing", "logger"), False)), module)


def test_a_callback_that_prunes_between_epochs_is_refused(make_trainer, module):
    with pytest.raises(ValueError, match=r"at_epoch=\[1\], which prunes between epochs"):
        prune(make_trainer(callbacks=[pruner(at_epoch=[1])]), module, train_loader(), val_loader())


def test_missing_validation_data_is_refused(make_trainer, module):
    with (
        pytest.raises(RuntimeError, match="no validation data"),
        pytest.warns(UserWarning, match="no `val_dataloader`"),
    ):
        prune(make_trainer(), module, train_loader())


# ---- interrupted


def test_ctrl_c_leaves_the_dense_network_the_report_and_the_trainer(make_trainer, module):
    own = RouletteWheelPruning(**HOW)
    trainer = make_trainer(callbacks=[own])
    before, state = copied(module), trainer.fit_loop
    with failing_forward(module, 60, KeyboardInterrupt()), pytest.raises(SystemExit):
        prune(trainer, module, train_loader(), val_loader())
    assert equal(copied(module), before)
    assert trainer.fit_loop is state
    assert trainer.callbacks[0] is own
    assert own.report is None or own.report.stop_reason is StopReason.INTERRUPTED


@pytest.mark.parametrize("place", ["dirpath", "another version of the logger"])
def test_a_search_that_failed_goes_on_from_its_journal(make_trainer, tmp_path, module, weights, monkeypatch, place):
    def run() -> None:
        if place == "dirpath":
            pruned(make_trainer, module, dirpath=tmp_path)
        else:
            trainer = make_trainer(logger=CSVLogger(tmp_path), enable_checkpointing=True)
            pruned(make_trainer, module, trainer)

    judged = []
    original = TrainerEvaluator._as

    def counted(evaluator, candidate):
        judged.append(candidate)
        if len(judged) == 6:
            raise RuntimeError("power cut")
        return original(evaluator, candidate)

    monkeypatch.setattr(TrainerEvaluator, "_as", counted)
    with pytest.raises(RuntimeError, match="power cut"):
        run()
    first = len(judged)
    run()
    resumed = copied(module)
    repeated = len(judged) - first
    judged.clear()
    judged.extend([None] * 6)  # no further power cut
    module.load_state_dict(weights)
    pruned(make_trainer, module, dirpath=tmp_path / "whole")
    assert 0 < repeated < len(judged) - 6
    assert equal(copied(module), resumed)
