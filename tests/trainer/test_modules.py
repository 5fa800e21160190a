"""End to end with the modules, data and Trainers that people have."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_roulette import Tree, Wheel
from tests.support import fits
from tests.support.modules import Blobs, BlobsData, tiny_net, train_loader, two_loaders, val_loader
from tests.support.results import Sparsities, equal, load

pruner = partial(fits.pruner, tolerance=math.inf, tree=Tree(0.2, max_levels=2))


def assert_pruned(pruning, module, **validation) -> None:
    """The module's zeros are the mask's, and validation gives the score that the report tells last."""
    report, monitor = pruning.report, pruning.report.monitor
    assert pruning.mask.sparsity == pytest.approx(report.sparsity)
    assert report.sparsity > 0.3
    weights = dict(module.named_parameters(remove_duplicate=False))
    assert all(torch.equal(weights[name] != 0, kept) for name, kept in pruning.mask.items())
    logged = module.trainer.validate(module, verbose=False, **validation)
    final = report.score if report.trained_score is None else report.trained_score
    assert {**logged[0], **logged[-1]}[monitor] == pytest.approx(final, abs=1e-7)


class With(Blobs):
    """Blobs with another network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


# ---- kinds of networks


def test_batchnorm_statistics_and_affine_weights_are_left_alone(fit):
    def module():
        torch.manual_seed(1)
        return With(nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10)))

    pruning = pruner()
    plain, pruned = fit(module=module()), fit(pruning, module=module())
    assert_pruned(pruning, pruned, dataloaders=val_loader())
    assert set(pruning.mask) == {"net.0.weight", "net.3.weight"}
    assert equal(plain.net[1].state_dict(), pruned.net[1].state_dict())


class Recurrent(nn.Module):
    """Reads the 16 numbers as 4 steps of 4."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.rnn, self.head = kind(4, 12, num_layers=2, batch_first=True), nn.Linear(12, 10)

    def forward(self, x):
        return self.head(self.rnn(x.view(-1, 4, 4))[0][:, -1])


class Tied(nn.Module):
    """The second layer is the first one again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self.again.weight = self.first.weight

    def forward(self, x):
        return self.head(self.again(self.first(x).relu()).relu())


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        steps = x.view(-1, 4, 4)
        return self.head(self.attention(steps, steps, steps, need_weights=False)[0].flatten(1))


def convolutions():
    square = nn.Unflatten(1, (1, 4, 4))
    return nn.Sequential(square, nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10))


def lazy():
    """Layers that get their shapes from the first batch."""
    return nn.Sequential(nn.LazyLinear(24), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(10))


class Configured(Blobs):
    """Makes its layers when the Trainer asks it to."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self):
        self.net = self.net or tiny_net()


class ByHand(Blobs):
    """Takes the steps of its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


RECURRENT = {"head.weight", *(f"rnn.weight_{which}_l{layer}" for which in ("ih", "hh") for layer in (0, 1))}
ATTENTION = {"attention.in_proj_weight", "attention.out_proj.weight", "head.weight"}
LINEAR = {"0.weight", "2.weight"}
NETWORKS = {
    **{kind.__name__: (lambda kind=kind: With(Recurrent(kind)), RECURRENT) for kind in (nn.LSTM, nn.GRU, nn.RNN)},
    "tied weights": (lambda: With(Tied()), {"first.weight", "head.weight"}),
    "attention": (lambda: With(Attends()), ATTENTION),
    "convolutions": (lambda: With(convolutions()), {"1.weight", "4.weight"}),
    "lazy layers": (lambda: With(lazy()), {"0.weight", "3.weight"}),
    "lazy layers, no sanity check": (lambda: With(lazy()), {"0.weight", "3.weight"}),
    "configure_model": (Configured, LINEAR),
    "manual optimization": (ByHand, LINEAR),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", "ignore:The total number of parameters detected")
@pytest.mark.parametrize(("name", "at_epoch"), [*product(NETWORKS, (None, 1)), ("lazy layers, no sanity check", 0)])
def test_networks_of_many_kinds(fit, tmp_path, name, at_epoch):
    make, names = NETWORKS[name]
    pruning = pruner(at_epoch=at_epoch, dirpath=tmp_path, wheel=Wheel(scope="layer"))
    module = fit(pruning, module=make(), num_sanity_val_steps=0 if "sanity" in name else None)
    assert_pruned(pruning, module, dataloaders=val_loader())
    assert set(pruning.mask) == {f"net.{one}" for one in names}
    assert pruning.mask.densities == pytest.approx(dict.fromkeys(pruning.mask, 0.64), abs=0.05)
    if name == "tied weights":
        stored = load(pruning.best_model_path)["state_dict"]
        assert pruning.report.size == 16 * 16 + 16 * 10
        assert module.net.again.weight is module.net.first.weight
        assert torch.equal(stored["net.again.weight"], stored["net.first.weight"])
        assert torch.equal(stored["net.first.weight"] != 0, pruning.mask["net.first.weight"])


# ---- kinds of Trainers and data


@pytest.mark.filterwarnings("ignore:You requested to overfit")
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
        {"accumulate_grad_batches": 3},
        {"inference_mode": False},
        {"reload_dataloaders_every_n_epochs": 1},
        {"profiler": "simple"},
        {"detect_anomaly": True},
        {"max_time": "00:01:00:00"},
        {"overfit_batches": 2},
    ],
    ids=str,
)
def test_trainers_of_many_kinds(fit, options, at_epoch):
    pruning = pruner(at_epoch=at_epoch)
    module = fit(pruning, **options)
    assert_pruned(pruning, module, dataloaders=val_loader())


class TwoLoaders(Blobs):
    """Logs one name for each loader: Lightning's, or its own."""

    apart = True

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        accuracy = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_acc" if self.apart else f"acc_{dataloader_idx}", accuracy, add_dataloader_idx=self.apart)


@pytest.mark.parametrize(
    ("apart", "monitor"), [(True, "val_acc/dataloader_idx_1"), (False, "acc_1"), (True, "val_acc/dataloader_idx_0")]
)
def test_any_of_several_validation_loaders_may_judge(fit, apart, monitor):
    pruning, module = pruner(monitor=monitor), TwoLoaders()
    module.apart = apart
    fit(pruning, module=module, val=two_loaders())
    assert_pruned(pruning, module, dataloaders=two_loaders())


def test_a_datamodule_gives_the_data_and_is_asked_for_it_once(fit):
    pruning, data = pruner(), BlobsData()
    module = fit(pruning, datamodule=data)
    assert data.asked == 1
    assert_pruned(pruning, module, datamodule=data)


def test_a_module_may_bring_the_data_and_the_callback_itself(make_trainer):
    class Brings(Blobs):
        def configure_callbacks(self):
            return [pruning]

        train_dataloader, val_dataloader = staticmethod(train_loader), staticmethod(val_loader)

    pruning, module = pruner(), Brings()
    make_trainer().fit(module)
    assert_pruned(pruning, module)


@pytest.mark.parametrize(
    "finder", [lambda: LearningRateFinder(num_training_steps=4), lambda: BatchSizeFinder("power", 1, max_trials=1)]
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_finder_that_fits_before_the_fit_does_not_search(fit, finder):
    sparsities, pruning, module = Sparsities(), pruner(), Blobs()
    module.batch_size = 50
    fit(finder(), pruning, sparsities, module=module, datamodule=BlobsData())
    assert set(sparsities.found) == {0.0}
    assert_pruned(pruning, module, dataloaders=val_loader())
    assert len(pruning.report.levels) == 2
