"""Fits and searches of a real Trainer whose networks lose whole units."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_roulette import LeastSquares, Mask, Neuron, Reduction, Tree, Wheel, prune, remove_dead
from lightning_roulette.trainer import units
from lightning_roulette.wheel.units.grouping import units_of
from tests.support.fits import pruner
from tests.support.modules import QUIET, Blobs, train_loader, val_loader
from tests.support.results import load

pytest.importorskip("torch_pruning")


class Residual(nn.Module):
    """A convolutional network with a residual addition, batch normalisations and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(1, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.inner, self.outer = nn.Conv1d(6, 8, 3, padding=1), nn.Conv1d(8, 6, 3, padding=1)
        self.inner_norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(6, 3, batch_first=True)
        self.head = nn.Linear(6 * 4, 10)

    def forward(self, x, scale=1.0):
        x = self.norm(self.first(x.unsqueeze(1))).relu()
        x = x + self.outer(self.inner_norm(self.inner(x)).relu())
        return self.head(nn.functional.adaptive_avg_pool1d(x, 4).flatten(1) * scale)


class Attentive(Residual):
    """The same with attention over the positions."""

    def forward(self, x, scale=1.0):
        x = self.norm(self.first(x.unsqueeze(1))).relu()
        x = x + self.outer(self.inner_norm(self.inner(x)).relu())
        x = nn.functional.adaptive_avg_pool1d(x, 4).mT * scale
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).flatten(1))


class Pictures(Blobs):
    """Blobs whose network is called with a named argument."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = network or Residual()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x, scale=1.0)
        self.val_acc(logits, y)
        self.log("val_loss", cross_entropy(logits, y))
        self.log("val_acc", self.val_acc)


def zeros_of(module: nn.Module, mask: Mask) -> Mask:
    """Which of the weights that a mask names are not zero."""
    return Mask.of_nonzeros({name: module.get_parameter(name).detach() for name in mask})


NEURON = {"wheel": Wheel(unit="neuron"), "tolerance": math.inf}


def whole(mask: Mask, state: dict, rows: str, columns: list[str]) -> torch.Tensor:
    """Which units of a layer are left: its rows and what reads them are zero for the same units, in the file too."""
    left = mask[rows].flatten(1).any(1)
    assert torch.equal(left, state[rows].flatten(1).any(1))
    for name in columns:
        assert torch.equal(left, state[name].transpose(0, 1).flatten(1).any(1))
    return left


def test_a_fit_removes_channels_and_its_file_has_whole_rows_and_columns_of_zeros(fit, caplog):
    pruning = pruner(tree=Tree(0.3, target=Reduction(multiply_adds=0.5)), **NEURON)
    module = Pictures()
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        fit(pruning, module=module, enable_checkpointing=True)
    report, state = pruning.report, load(pruning.best_model_path)["state_dict"]
    inner = whole(pruning.mask, state, "net.inner.weight", ["net.outer.weight"])
    stream = whole(pruning.mask, state, "net.first.weight", ["net.inner.weight"])
    assert torch.equal(stream, state["net.outer.weight"].flatten(1).any(1))
    columns = state["net.head.weight"].view(10, 6, 4).any(2).any(0)
    assert torch.equal(stream, columns)
    assert zeros_of(module, pruning.mask) == pruning.mask
    assert report.winner.units == int(inner.sum()) + int(stream.sum()) < report.units == 14
    assert report.target_met
    assert report.winner.multiply_adds == report.footprint.effective_multiply_adds <= 0.5 * report.multiply_adds
    assert report.multiply_adds == report.footprint.dense_multiply_adds
    assert f"{report.winner.units} of 14 units left (unit: neuron)" in str(report)
    assert "14 units may leave (unit: neuron). Kept whole, without units: " in caplog.text
    assert any("head (its units are outputs of the network" in note for note in report.notes)


def test_a_refit_folds_removed_channels_into_the_rest(fit):
    errors = []
    for refit in (None, LeastSquares(batches=8)):
        module = Pictures()
        pruning = pruner(tree=Tree(0.5, coarse_rate=None, max_levels=1), refit=refit, branches=1, **NEURON)
        fit(pruning, module=module, max_epochs=3)
        dense = Pictures()
        dense.load_state_dict(module.state_dict())
        dense.load_state_dict(pruning.weights_at(0), strict=False)
        x = torch.cat([batch[0] for batch in val_loader()])
        with torch.no_grad():
            errors.append(float((module.eval().net(x) - dense.eval().net(x)).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_heads_alone_leave(fit):
    module = Pictures(Attentive())
    given = {"wheel": Wheel(unit="head"), "tolerance": math.inf, "refit": None}
    pruning = pruner(tree=Tree(0.01, coarse_rate=None), **given)
    fit(pruning, module=module)
    assert (pruning.report.unit, pruning.report.units, pruning.report.winner.units) == ("head", 3, 1)
    mask = pruning.mask
    heads = mask["net.attention.out_proj.weight"].view(6, 3, 2).any(0).any(1)
    assert int(heads.sum()) == 1
    assert torch.equal(mask["net.attention.in_proj_weight"].view(3, 3, 2, 6).all(3).all(2), heads.expand(3, 3))
    assert all(bool(mask[name].all()) for name in mask if "attention" not in name)


CHOOSE = LeastSquares(batches=4, choose=True)


def test_a_refit_that_chooses_removes_whole_channels(fit):
    pruning, module = pruner(refit=CHOOSE, tree=Tree(0.4, coarse_rate=None, max_levels=2), **NEURON), Pictures()
    fit(pruning, module=module, enable_checkpointing=True)
    state = load(pruning.best_model_path)["state_dict"]
    inner = whole(pruning.mask, state, "net.inner.weight", ["net.outer.weight"])
    stream = whole(pruning.mask, state, "net.first.weight", ["net.inner.weight"])
    assert pruning.report.winner.units == int(inner.sum()) + int(stream.sum()) < 14
    assert "survivors chosen" in pruning.report.refit


@pytest.mark.parametrize("refit", [None, CHOOSE])
def test_cuts_between_epochs_hold_whole_units_through_training(fit, refit):
    pruning = pruner(at_epoch=[1, 2], tree=Tree(0.3), refit=refit, **NEURON)
    module = Pictures()
    fit(pruning, module=module, max_epochs=4)
    report = pruning.report
    assert [level.accepted for level in report.levels] == [True, True]
    whole(pruning.mask, module.state_dict(), "net.inner.weight", ["net.outer.weight"])
    assert zeros_of(module, pruning.mask) == pruning.mask
    assert report.winner.units < report.levels[0].units < report.units == 14


@pytest.mark.parametrize("at_epoch", [None, [1, 2]])
@pytest.mark.parametrize("refit", [None, LeastSquares(batches=4), CHOOSE])
def test_multiples_of_channels_stay(fit, refit, at_epoch):
    given = NEURON | {"wheel": Wheel(unit=Neuron(multiple_of=3))}
    pruning, module = pruner(at_epoch=at_epoch, tree=Tree(0.3), refit=refit, **given), Pictures()
    fit(pruning, module=module, max_epochs=4)
    state = module.state_dict()
    inner = whole(pruning.mask, state, "net.inner.weight", ["net.outer.weight"])
    stream = whole(pruning.mask, state, "net.first.weight", ["net.inner.weight"])
    assert (int(inner.sum()), int(stream.sum())) in {(6, 6), (3, 6), (8, 3), (6, 3), (3, 3)}
    slim = remove_dead(module.net.eval(), torch.randn(2, 16))
    assert slim.inner.weight.shape == (int(inner.sum()), int(stream.sum()), 3)


def test_a_run_finds_its_units_once(fit, monkeypatch):
    found = []
    monkeypatch.setattr(units, "units_of", lambda *args, **named: found.append(units_of(*args, **named)) or found[-1])
    pruning = pruner(at_epoch=[1, 2], tree=Tree(0.3), **NEURON)
    fit(pruning, module=Pictures(Attentive()), max_epochs=4)
    assert len(pruning.report.levels) == 2
    assert len(found) == 1


class Divided(Pictures):
    """Calls two networks, one after the other."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 8), nn.ReLU()))
        self.last = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10))

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.last(self.net(x))
        self.val_acc(logits, y)
        self.log("val_loss", cross_entropy(logits, y))
        self.log("val_acc", self.val_acc)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.last(self.net(batch[0])), batch[1])


@pytest.mark.parametrize(
    ("target", "whole"),
    [
        (Reduction(multiply_adds=0.4), 20 * 24 + 12 * 18),
        (Reduction(parameters=0.4), 20 * 24 + 12 * 18 + 20 + 8 + 12 + 10),
    ],
)
def test_a_target_counts_what_the_module_calls_beside_the_traced_network(fit, target, whole):
    pruning = pruner(tree=Tree(0.3, target=target), **NEURON)
    fit(pruning, module=Divided())
    report = pruning.report
    assert report.multiply_adds == report.footprint.dense_multiply_adds == 20 * 24 + 12 * 18
    assert report.winner.multiply_adds == report.footprint.effective_multiply_adds
    assert report.cost == whole
    assert report.target_met
    assert report.winner.cost <= 0.6 * whole


def test_prune_uses_the_example_of_the_module(tmp_path):
    class Exemplary(Pictures):
        def forward(self, x):
            return self.net(x)

    module = Exemplary()
    module.example_input_array = torch.zeros(3, 16)
    trainer = Trainer(default_root_dir=tmp_path, **QUIET)
    tree = Tree(0.4, max_levels=1, coarse_rate=None)
    pruning = prune(trainer, module, train_loader(), val_loader(), branches=2, tree=tree, **NEURON)
    units = units_of(module.net, torch.zeros(3, 16))
    expected = {f"net.{name}": size for name, size in units.groups.items()}
    assert pruning.report.units == sum(expected.values())
    assert pruning.report.winner.multiply_adds < pruning.report.multiply_adds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exclude": ["net.outer.weight"]}, "no neuron of this network may leave"),
        ({"exclude": ["net.first.weight"]}, None),
    ],
)
def test_what_is_not_prunable_keeps_its_units(fit, changes, message):
    pruning = pruner(tree=Tree(0.2, max_levels=2), **NEURON, **changes)
    if message is None:
        fit(pruning, module=Pictures())
        (note,) = (one for one in pruning.report.notes if one.startswith("Kept whole"))
        assert "net.first (first.weight is not prunable)" in note
        assert 1 <= pruning.report.winner.units < pruning.report.units == 8
    else:
        with pytest.raises(RuntimeError, match=message):
            fit(pruning, module=Pictures(), max_epochs=1)


def test_a_network_without_units_is_refused_before_training(fit):
    class Untrained(Pictures):
        def training_step(self, batch, batch_idx):
            raise AssertionError("it trains")

    with pytest.raises(RuntimeError, match="unit is Head.*no head of this network may leave.*example_input_array"):
        fit(pruner(wheel=Wheel(unit="head")), module=Untrained(), num_sanity_val_steps=1, val=val_loader())


def test_a_step_that_calls_layers_one_by_one_is_told_to_use_a_forward(fit):
    class Loose(Pictures):
        def __init__(self):
            super().__init__(nn.Linear(16, 8))
            self.last = nn.Linear(8, 10)

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", cross_entropy(self.last(self.net(batch[0]).relu()), batch[1]))

    message = "the layer: its units are outputs of the network.*traced is 'net'.*one by one, give the module a forward"
    with pytest.raises(RuntimeError, match=message):
        fit(pruner(monitor="val_loss", **NEURON), module=Loose())
