"""End to end with the modules, data and Trainers that people have."""

from __future__ import annotations

import sys

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_roulette import (
    LeastSquares,
    Mask,
    RouletteWheelPruning,
    StopReason,
    Tree,
    Validation,
    Wheel,
    prunable_parameters,
    sparsity,
)
from tests.support.modules import Blobs, blobs, tiny_net, train_loader, val_loader


def pruner(**options) -> RouletteWheelPruning:
    return RouletteWheelPruning(
        **{"branches": 2, "tolerance": 1.0, "refit": None, "tree": Tree(0.2, max_levels=2)} | options
    )


def fitted(make_trainer, callback, module, *, val=None, callbacks=(), **options):
    torch.manual_seed(0)
    trainer = make_trainer(callbacks=[*callbacks, callback], **options)
    trainer.fit(module, train_loader(), val_loader() if val is None else val)
    return module


def assert_pruned(pruning, module) -> None:
    """The module's zeros are the mask's, and the report's score is what validation gives."""
    assert pruning.mask.sparsity == pytest.approx(pruning.report.sparsity)
    assert pruning.report.sparsity > 0.3
    weights = dict(module.named_parameters(remove_duplicate=False))
    assert all(torch.equal(weights[name] != 0, kept) for name, kept in pruning.mask.items())


class With(Blobs):
    """Blobs with another network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


# ---- kinds of networks


def test_batchnorm_statistics_and_affine_weights_are_left_alone(make_trainer):
    def module():
        torch.manual_seed(1)
        return With(nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10)))

    pruning, plain = pruner(), module()
    pruned = fitted(make_trainer, pruning, module())
    torch.manual_seed(0)
    make_trainer().fit(plain, train_loader(), val_loader())
    assert_pruned(pruning, pruned)
    assert set(pruning.mask) == {"net.0.weight", "net.3.weight"}
    for name, value in plain.net[1].state_dict().items():
        assert torch.equal(value, pruned.net[1].state_dict()[name]), name


class Recurrent(nn.Module):
    """Reads the 16 numbers as 4 steps of 4."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.rnn, self.head = kind(4, 12, num_layers=2, batch_first=True), nn.Linear(12, 10)

    def forward(self, x):
        return self.head(self.rnn(x.view(-1, 4, 4))[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("at_epoch", [None, 1])
def test_recurrent_layers(make_trainer, kind, at_epoch):
    pruning = pruner(at_epoch=at_epoch)
    module = fitted(make_trainer, pruning, With(Recurrent(kind)))
    assert_pruned(pruning, module)
    weights = {f"net.rnn.weight_{which}_l{layer}" for which in ("ih", "hh") for layer in (0, 1)}
    assert set(pruning.mask) == weights | {"net.head.weight"}
    (logged,) = make_trainer().validate(module, val_loader(), verbose=False)
    final = pruning.report.score if at_epoch is None else pruning.report.trained_score
    assert logged["val_acc"] == pytest.approx(final, abs=1e-7)


class Tied(nn.Module):
    """The second layer is the first one again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self.again.weight = self.first.weight

    def forward(self, x):
        return self.head(self.again(self.first(x).relu()).relu())


@pytest.mark.parametrize("at_epoch", [None, 1])
def test_tied_weights_count_once_and_stay_tied(make_trainer, tmp_path, at_epoch):
    pruning = pruner(dirpath=tmp_path, at_epoch=at_epoch)
    module = fitted(make_trainer, pruning, With(Tied()))
    assert_pruned(pruning, module)
    assert set(pruning.mask) == {"net.first.weight", "net.head.weight"}
    assert pruning.report.size == 16 * 16 + 16 * 10
    assert module.net.again.weight is module.net.first.weight
    stored = torch.load(pruning.best_model_path, weights_only=True)["state_dict"]
    assert torch.equal(stored["net.again.weight"], stored["net.first.weight"])
    assert torch.equal(stored["net.first.weight"] != 0, pruning.mask["net.first.weight"])


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        steps = x.view(-1, 4, 4)
        return self.head(self.attention(steps, steps, steps, need_weights=False)[0].flatten(1))


def test_attention_projections(make_trainer):
    pruning = pruner(at_epoch=1)
    module = fitted(make_trainer, pruning, With(Attends()))
    assert_pruned(pruning, module)
    names = ("attention.in_proj_weight", "attention.out_proj.weight", "head.weight")
    assert set(pruning.mask) == {f"net.{name}" for name in names}


def test_convolutions(make_trainer):
    net = nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10)
    )
    pruning = pruner(wheel=Wheel(scope="layer"))
    module = fitted(make_trainer, pruning, With(net))
    assert_pruned(pruning, module)
    assert pruning.mask.densities == pytest.approx({"net.1.weight": 0.64, "net.4.weight": 0.64}, abs=0.02)


class Lazy(Blobs):
    """Its layers get their shapes from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(24), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(10))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", "ignore:The total number of parameters detected")
@pytest.mark.parametrize("options", [{}, {"num_sanity_val_steps": 0}], ids=str)
@pytest.mark.parametrize("at_epoch", [None, 1])
def test_lazy_layers_are_pruned_once_they_have_a_shape(make_trainer, options, at_epoch):
    pruning = pruner(at_epoch=at_epoch)
    module = fitted(make_trainer, pruning, Lazy(), **options)
    assert_pruned(pruning, module)
    assert set(pruning.mask) == {"net.0.weight", "net.3.weight"}


class Configured(Blobs):
    """Makes its layers when the Trainer asks it to."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self):
        self.net = self.net or tiny_net()


def test_a_network_made_in_configure_model(make_trainer):
    pruning = pruner()
    assert_pruned(pruning, fitted(make_trainer, pruning, Configured()))


def test_a_callback_that_the_module_itself_configures(make_trainer):
    pruning = pruner()

    class Configures(Blobs):
        def configure_callbacks(self):
            return [pruning]

    module = Configures()
    make_trainer().fit(module, train_loader(), val_loader())
    assert_pruned(pruning, module)


class ByHand(Blobs):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


@pytest.mark.parametrize("at_epoch", [None, 1])
def test_manual_optimization(make_trainer, at_epoch):
    pruning = pruner(at_epoch=at_epoch)
    assert_pruned(pruning, fitted(make_trainer, pruning, ByHand()))


# ---- kinds of Trainers and data


@pytest.mark.parametrize("at_epoch", [None, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"check_val_every_n_epoch": 2, "max_epochs": 3},
        {"check_val_every_n_epoch": 5},
        {"val_check_interval": 0.5},
        {"val_check_interval": 5, "check_val_every_n_epoch": None},
        {"num_sanity_val_steps": 0},
        {"num_sanity_val_steps": -1},
        {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 5},
        {"limit_val_batches": 2},
        {"limit_train_batches": 3},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"accumulate_grad_batches": 3},
        {"inference_mode": False},
        {"reload_dataloaders_every_n_epochs": 1},
        {"profiler": "simple"},
        {"detect_anomaly": True},
        {"max_time": "00:01:00:00"},
    ],
    ids=str,
)
def test_trainers_of_many_kinds(make_trainer, options, at_epoch):
    pruning = pruner(at_epoch=at_epoch)
    module = fitted(make_trainer, pruning, Blobs(), **options)
    assert_pruned(pruning, module)
    precision = {"precision": options["precision"]} if "precision" in options else {}
    limit = {"limit_val_batches": options.get("limit_val_batches", 1.0)}
    (logged,) = make_trainer(**precision, **limit).validate(module, val_loader(), verbose=False)
    final = pruning.report.score if at_epoch is None else pruning.report.trained_score
    assert logged["val_acc"] == pytest.approx(final, abs=1e-7)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfit_batches(make_trainer):
    pruning, module = pruner(), Blobs()
    fitted(make_trainer, pruning, module, overfit_batches=2)
    assert_pruned(pruning, module)


def test_the_search_uses_all_validation_batches_whatever_the_sanity_check_took(make_trainer):
    class Counts(Blobs):
        samples = 0

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.samples += len(batch[0]) * (self.trainer.current_epoch == 2)

    pruning, module = pruner(validation=Validation(confirm=0, race=False)), Counts()
    fitted(make_trainer, pruning, module, num_sanity_val_steps=1)
    # all twice to find the metric and see that cut batches tell the same, one fold of 12 samples four times to see
    # that it is taken, that it minds and what it is; then all, for the dense network, two branches of two, the winner
    # of each again, and the last once it is loaded
    assert module.samples == 2 * 200 + 4 * 12 + 200 * (1 + 2 * (2 + 1) + 1)


class TwoLoaders(Blobs):
    def __init__(self, *, apart: bool = True) -> None:
        super().__init__()
        self.apart = apart

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        scores = self(batch[0])
        accuracy = (scores.argmax(1) == batch[1]).float().mean()
        name = "val_acc" if self.apart else f"acc_{dataloader_idx}"
        self.log(name, accuracy, add_dataloader_idx=self.apart)


@pytest.mark.parametrize(
    ("apart", "monitor"), [(True, "val_acc/dataloader_idx_1"), (False, "acc_1"), (True, "val_acc/dataloader_idx_0")]
)
def test_any_of_several_validation_loaders_may_judge(make_trainer, apart, monitor):
    loaders = [val_loader(), DataLoader(blobs(100, 3), batch_size=50)]
    pruning, module = pruner(monitor=monitor), TwoLoaders(apart=apart)
    fitted(make_trainer, pruning, module, val=loaders)
    assert_pruned(pruning, module)
    logged = make_trainer().validate(module, loaders, verbose=False)
    values = {name: value for each in logged for name, value in each.items()}
    assert len(values) == 2
    assert pruning.report.score == pytest.approx(values[monitor], abs=1e-7)


def test_several_validation_loaders_without_a_monitor_are_refused_with_their_names(make_trainer):
    loaders = [val_loader(), DataLoader(blobs(100, 3), batch_size=50)]
    with pytest.raises(RuntimeError, match=r"'val_acc/dataloader_idx_0', 'val_acc/dataloader_idx_1'. Pass monitor="):
        fitted(make_trainer, pruner(), TwoLoaders(), val=loaders)


class BlobsData(LightningDataModule):
    def __init__(self, batch_size: int = 50) -> None:
        super().__init__()
        self.batch_size, self.asked = batch_size, 0

    def train_dataloader(self):
        return DataLoader(blobs(400, 1), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        self.asked += 1
        return val_loader()


def test_a_datamodule_gives_the_data_and_is_asked_for_it_once(make_trainer):
    pruning, module, data = pruner(), Blobs(), BlobsData()
    make_trainer(callbacks=[pruning]).fit(module, datamodule=data)
    assert_pruned(pruning, module)
    assert data.asked == 1


def test_data_that_the_module_brings_itself(make_trainer):
    class Brings(Blobs):
        def train_dataloader(self):
            return train_loader()

        def val_dataloader(self):
            return val_loader()

    pruning, module = pruner(), Brings()
    make_trainer(callbacks=[pruning]).fit(module)
    assert_pruned(pruning, module)


def test_loader_workers_give_the_same_mask(make_trainer):
    masks = []
    for options in ({}, {"num_workers": 1, "persistent_workers": True}):
        pruning = pruner(branches=2, tree=Tree(0.2, max_levels=1))
        fitted(make_trainer, pruning, Blobs(lr=0.0), val=val_loader(**options))
        masks.append(pruning.mask)
    assert masks[0] == masks[1]
    assert masks[0].sparsity > 0


@pytest.mark.parametrize(
    "finder", [lambda: LearningRateFinder(num_training_steps=4), lambda: BatchSizeFinder("power", 1, max_trials=1)]
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_finder_that_fits_before_the_fit_does_not_search(make_trainer, finder):
    class Starts(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sparsities.append(sparsity(prunable_parameters(pl_module)))

    sparsities, pruning, module, data = [], pruner(), Blobs(), BlobsData()
    module.batch_size = 50
    make_trainer(callbacks=[finder(), pruning, Starts()]).fit(module, datamodule=data)
    assert set(sparsities) == {0.0}
    assert_pruned(pruning, module)
    assert len(pruning.report.levels) == 2


# ---- LightningCLI

CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_roulette.RouletteWheelPruning
      init_args:
        branches: 2
        tolerance: 1.0
        target_sparsity: 0.5
        exclude: ["net.2.*"]
        wheel:
          sharpness: .inf
          importance: lamp
          scope: layer
        refit:
          batches: 3
          damping: 0.01
        tree:
          pruning_rate: 0.25
          max_levels: 2
        validation:
          keep_callbacks: [Says]
        dirpath: null
    - class_path: tests.trainer.test_modules.Says
model:
  lr: 0.01
"""


class Says(Callback):
    pass


@pytest.fixture
def bare_command_line(monkeypatch):
    """LightningCLI 2.6 warns where arguments are given twice, and of its own use of jsonargparse."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


@pytest.mark.usefixtures("bare_command_line")
def test_a_yaml_file_builds_the_callback_with_its_groups(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    cli = LightningCLI(
        Blobs, BlobsData, args=["--config", str(tmp_path / "config.yaml")], run=False, save_config_callback=None
    )
    (pruning,) = [one for one in cli.trainer.callbacks if isinstance(one, RouletteWheelPruning)]
    assert pruning.wheel == Wheel(sharpness=float("inf"), importance="lamp", scope="layer")
    assert pruning.tree == Tree(pruning_rate=0.25, max_levels=2)
    assert pruning.refit == LeastSquares(batches=3, damping=0.01)
    assert pruning.validation == Validation(keep_callbacks=("Says",))
    assert (pruning.branches, pruning.tolerance, pruning.target_sparsity) == (2, 1.0, 0.5)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert set(pruning.mask) == {"net.0.weight"}
    assert pruning.report.stop_reason is StopReason.MAX_LEVELS
    assert pruning.mask == Mask.of_nonzeros(prunable_parameters(cli.model, exclude=["net.2.*"]))


@pytest.mark.parametrize(
    ("line", "message"),
    [("sharpness: -1", "sharpness is -1"), ("sharpnes: 1", "sharpnes"), ("importance: size", "importance is 'size'")],
)
@pytest.mark.usefixtures("bare_command_line")
def test_a_mistake_in_a_yaml_file_is_named(tmp_path, capsys, line, message):
    (tmp_path / "config.yaml").write_text(CONFIG.replace("sharpness: .inf", line).replace("importance: lamp\n", "\n"))
    with pytest.raises((SystemExit, ValueError)) as caught:
        LightningCLI(Blobs, BlobsData, args=["--config", str(tmp_path / "config.yaml")], run=False)
    assert message in f"{caught.value} {capsys.readouterr().err}"


@pytest.mark.usefixtures("bare_command_line")
def test_a_callback_given_on_the_command_line(tmp_path):
    arguments = [
        "--seed_everything=false",
        "--trainer.callbacks+=lightning_roulette.RouletteWheelPruning",
        "--trainer.callbacks.wheel.sharpness=2.0",
        "--trainer.callbacks.at_epoch=1",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu",
    ]
    cli = LightningCLI(Blobs, BlobsData, args=arguments, run=False, save_config_callback=None)
    (pruning,) = [one for one in cli.trainer.callbacks if isinstance(one, RouletteWheelPruning)]
    assert pruning.wheel == Wheel(sharpness=2.0)
    assert pruning.at_epoch == 1
    written = cli.parser.dump(cli.config)  # what Lightning saves beside a run
    assert "sharpness: 2.0" in written
    assert "pruning_rate: 0.1" in written


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_that_no_sanity_check_has_shaped_are_pruned(make_trainer):
    module = Blobs()
    module.net = nn.Sequential(nn.LazyLinear(24), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(10))
    pruning = RouletteWheelPruning(2, tolerance=1.0, at_epoch=0, tree=Tree(0.2, max_levels=1))
    make_trainer(callbacks=[pruning], num_sanity_val_steps=0, max_epochs=1).fit(module, train_loader(), val_loader())
    assert pruning.report.sparsity > 0
