"""A search also writes its winner without dead units, and returns it as a new module."""

from __future__ import annotations

import copy
import logging
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch import nn

from lightning_roulette import NofM, Tree, Wheel, load_shrunk, prune
from lightning_roulette.trainer import shrinking
from lightning_roulette.trainer.preflight import refuse_shrink
from tests.support.fits import pruner
from tests.support.modules import QUIET, Blobs, train_loader, val_loader
from tests.trainer.test_units import NEURON, Pictures

pytest.importorskip("torch_pruning")

X = torch.cat([batch[0] for batch in val_loader()])
HALF = {"tree": Tree(0.5, coarse_rate=None, max_levels=1), **NEURON}


class Arguments(Blobs):
    """Keeps its arguments, one of which is no plain value. Its step computes what its network is called with."""

    def __init__(self, lr: float, kind: type[nn.Module] = nn.ReLU) -> None:
        super().__init__(lr)
        self.save_hyperparameters()
        self.net[1] = kind()

    def forward(self, x):
        return self.net(x * 1.0)


def shapes(state) -> dict:
    return {name: tuple(value.shape) for name, value in state.items()}


def outputs(module) -> torch.Tensor:
    with torch.no_grad():
        return module.eval().net(X)


NEW = """
import sys, torch
from lightning_roulette import load_shrunk
from tests.trainer.test_shrinking import Pictures, outputs
torch.save(outputs(load_shrunk(sys.argv[1], Pictures)), sys.argv[2])
"""


def test_the_file_of_a_fit_has_fewer_channels_and_a_new_process_computes_the_same(fit, tmp_path, caplog):
    module, pruning = Pictures(), pruner(shrink=True, dirpath=tmp_path, **HALF)
    before = {name: id(one) for name, one in module.named_parameters()}
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        fit(pruning, module=module)
    assert {name: id(one) for name, one in module.named_parameters()} == before
    assert shapes(module.state_dict()) == shapes(Pictures().state_dict())
    state = torch.load(tmp_path / "shrunk.ckpt", weights_only=True)["state_dict"]
    inner = int(pruning.mask["net.inner.weight"].flatten(1).any(1).sum())
    first = int(pruning.mask["net.first.weight"].flatten(1).any(1).sum())
    assert inner < 8 or first < 6
    assert state["net.inner.weight"].shape == (inner, first, 3)
    assert state["net.outer.weight"].shape == (first, inner, 3)
    assert state["net.head.weight"].shape == (10, 4 * first)
    assert f"units of the network are dead. The network without them is in '{tmp_path}/shrunk.ckpt'" in caplog.text
    subprocess.run([sys.executable, "-c", NEW, tmp_path / "shrunk.ckpt", tmp_path / "out.pt"], check=True)
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(loaded, outputs(pruning.shrunk()))
    torch.testing.assert_close(loaded, outputs(module), rtol=0, atol=1e-5)
    assert shapes(pruning.shrunk().state_dict()) == shapes(state)


def steps_before_training(fit, **options) -> int:
    """How many validation steps a fit takes before it trains."""
    calls = []

    class Noted(Pictures):
        def validation_step(self, batch, batch_idx):
            calls.append("validation")
            super().validation_step(batch, batch_idx)

        def training_step(self, batch, batch_idx):
            calls.append("training")
            return super().training_step(batch, batch_idx)

    fit(pruner(tolerance=math.inf, **options), module=Noted(), max_epochs=1)
    return calls.index("training")


@pytest.mark.parametrize("unit", ["neuron", NofM(2, 4), "weight"], ids=str)
def test_one_step_shows_the_network_to_the_search_for_units_and_to_the_removal(fit, tmp_path, unit):
    plain = steps_before_training(fit)
    assert steps_before_training(fit, wheel=Wheel(unit=unit), shrink=True, dirpath=tmp_path) == plain + 1


def test_prune_writes_it_too_and_asks_for_arguments_that_are_no_plain_values(tmp_path):
    module = Arguments(0.5)
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, **QUIET)
    pruning = prune(
        trainer, module, train_loader(), val_loader(), branches=2, shrink=True, dirpath=tmp_path, refit=None, **HALF
    )
    slim = pruning.shrunk()
    assert type(slim) is Arguments
    assert slim.net[0].out_features == pruning.report.winner.units < module.net[0].out_features == 24
    torch.testing.assert_close(outputs(slim), outputs(module), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"does not hold the arguments kind of the module.*kind=\.\.\."):
        load_shrunk(tmp_path / "shrunk.ckpt", Arguments)
    loaded = load_shrunk(tmp_path / "shrunk.ckpt", Arguments, kind=nn.ReLU)
    assert loaded.lr == 0.5
    assert torch.equal(outputs(loaded), outputs(slim))


def test_further_training_writes_the_file_anew(fit, tmp_path):
    module, pruning = Pictures(), pruner(at_epoch=1, shrink=True, dirpath=tmp_path, **HALF)
    fit(pruning, module=module, max_epochs=2)
    loaded = load_shrunk(tmp_path / "shrunk.ckpt", Pictures)
    torch.testing.assert_close(outputs(loaded), outputs(module), rtol=0, atol=1e-5)


def test_cuts_between_epochs_end_with_the_file(fit, tmp_path):
    module, pruning = Pictures(), pruner(at_epoch=[1, 2], shrink=True, dirpath=tmp_path, tree=Tree(0.3), **NEURON)
    fit(pruning, module=module, max_epochs=3)
    loaded = load_shrunk(tmp_path / "shrunk.ckpt", Pictures)
    assert sum(one.numel() for one in loaded.parameters()) < sum(one.numel() for one in module.parameters())
    torch.testing.assert_close(outputs(loaded), outputs(module), rtol=0, atol=1e-5)


def test_without_shrink_no_file_is_written_and_a_new_module_needs_an_example(fit, tmp_path):
    module, pruning = Blobs(), pruner(dirpath=tmp_path, **HALF)
    with pytest.raises(RuntimeError, match="no search has ended, so no network was pruned that could be shrunk"):
        pruning.shrunk()
    fit(pruning, module=module)
    assert not list(tmp_path.glob("shrunk*"))
    with pytest.raises(ValueError, match=r"no example of the input.*shrunk\(example_input\)"):
        pruning.shrunk()
    given = pruning.shrunk(X[:3])
    module.example_input_array = X[:4]
    for slim in (given, pruning.shrunk()):
        assert slim.net[0].out_features == pruning.report.winner.units < 24
        torch.testing.assert_close(outputs(slim), outputs(module), rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="the module that was pruned is not known here"):
        copy.deepcopy(pruning).shrunk()  # a copy knows no module, like the callback of a process that started others


def test_the_winner_is_kept_if_it_cannot_be_shrunk(fit, tmp_path, monkeypatch):
    attempts = []

    def fails_later(found):
        attempts.append(found)
        if len(attempts) > 1:
            raise ValueError("no space")
        return contents(found)

    contents = shrinking.contents_of
    monkeypatch.setattr(shrinking, "contents_of", fails_later)
    module, pruning = Pictures(), pruner(at_epoch=1, shrink=True, dirpath=tmp_path, **HALF)
    with pytest.warns(UserWarning, match=r"was not shrunk \(ValueError: no space\). The winner .* in '.*pruned.ckpt'"):
        fit(pruning, module=module, max_epochs=2)
    assert len(attempts) == 2
    assert not (tmp_path / "shrunk.ckpt").exists()  # that of the search has other weights
    assert any("was not shrunk" in note for note in pruning.report.notes)
    stored = torch.load(pruning.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(one, stored[name]) for name, one in module.named_parameters())


def test_a_network_whose_forward_was_replaced_is_not_shrunk(fit, tmp_path):
    module, pruning = Pictures(), pruner(shrink=True, dirpath=tmp_path, tolerance=math.inf)
    norm = module.net.norm.forward
    module.net.norm.forward = lambda x: norm(x)
    with pytest.warns(UserWarning, match="the forward of net.norm was replaced, as torch.compile does"):
        fit(pruning, module=module)
    assert not (tmp_path / "shrunk.ckpt").exists()


def test_what_cannot_work_is_refused_before_training(fit, monkeypatch):
    class Untrained(Pictures):
        def training_step(self, batch, batch_idx):
            raise AssertionError("it trains")

    with pytest.raises(TypeError, match="shrink is 1, but must be True or False"):
        pruner(shrink=1)
    monkeypatch.setattr(shrinking, "example_of", lambda *_: (_ for _ in ()).throw(ValueError("No batch.")))
    with pytest.raises(RuntimeError, match="shrink is True, but there is no example .*: No batch. Set the module's"):
        fit(pruner(shrink=True), module=Untrained())
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match="units"):
        fit(pruner(shrink=True), module=Untrained())


def test_sharded_weights_are_refused():
    sharded = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(RuntimeError, match="shrink is True and the strategy is ModelParallelStrategy, which shards"):
        refuse_shrink(sharded, True)
    refuse_shrink(sharded, False)


class Redirected(SingleDeviceStrategy):
    """Takes validation steps as DDP does: the forward of the module is replaced, and the module is called."""

    def validation_step(self, *args, **named):
        return self._forward_redirection(
            self.lightning_module, self.lightning_module, "validation_step", *args, **named
        )


def test_the_network_is_found_where_the_module_is_called_in_place_of_its_step(fit, tmp_path):
    module, pruning = Pictures(), pruner(shrink=True, dirpath=tmp_path, **HALF)
    fit(pruning, module=module, max_epochs=1, strategy=Redirected("cpu"))
    assert "forward" in vars(module)
    loaded = load_shrunk(tmp_path / "shrunk.ckpt", Pictures)
    assert sum(one.numel() for one in loaded.parameters()) < sum(one.numel() for one in module.parameters())
    torch.testing.assert_close(outputs(loaded), outputs(module), rtol=0, atol=1e-5)
