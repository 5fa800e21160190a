"""A file of a network without dead units builds it again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_roulette.slim.removal.removal import remove_dead
from lightning_roulette.slim.removal.shrunk import load_shrunk, save_shrunk
from tests.network.coupling.networks import IMAGES, NETWORKS, Joined
from tests.slim.removal.test_removal import made, others, unread
from tests.support.networks import known


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_loaded_network_is_the_one_that_was_written(name, tmp_path):
    model, inputs = made(name)
    unread(model, inputs)
    slim = save_shrunk(model, tmp_path / "shrunk.ckpt", inputs)
    loaded = load_shrunk(tmp_path / "shrunk.ckpt", lambda: NETWORKS[name][0]().double()).eval()
    assert torch.equal(loaded(others(inputs)), slim(others(inputs)))
    assert (loaded(others(inputs)) - model(others(inputs))).abs().max() < 1e-12
    assert all(
        torch.equal(one, loaded.state_dict()[key]) for key, one in remove_dead(model, inputs).state_dict().items()
    )
    sizes = [{key: one for key, one in vars(part).items() if isinstance(one, int)} for part in slim.modules()]
    assert [{key: getattr(part, key) for key in each} for part, each in zip(loaded.modules(), sizes, strict=True)] == [
        {**each} for each in sizes
    ]


NEW = """
import sys, torch
from lightning_roulette.slim.removal.shrunk import load_shrunk
from tests.network.coupling.networks import IMAGES, Joined
torch.save(load_shrunk(sys.argv[1], lambda: Joined().double()).eval()(IMAGES), sys.argv[2])
assert "torch_pruning" not in sys.modules
"""


@torch.no_grad()
def test_a_new_process_needs_no_graph(tmp_path):
    model, inputs = made("joined")
    unread(model, inputs)
    slim = save_shrunk(model, tmp_path / "shrunk.ckpt", inputs)
    subprocess.run([sys.executable, "-c", NEW, tmp_path / "shrunk.ckpt", tmp_path / "out.pt"], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), slim(IMAGES))


def test_other_files_and_other_networks_are_refused(tmp_path):
    model, inputs = made("joined")
    save_shrunk(model, tmp_path / "shrunk.ckpt", inputs)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="is no file of save_shrunk"):
        load_shrunk(tmp_path / "other.ckpt", Joined)
    with pytest.raises(ValueError, match="does not fit the Sequential"):
        load_shrunk(tmp_path / "shrunk.ckpt", nn.Sequential)


class Tied(nn.Module):
    """Has the weight of its embedding in its last layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.b, self.c = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 9)
        self.c.weight = self.e.weight

    def forward(self, x):
        return self.c(self.b(torch.relu(self.a(self.e(x)))))


@torch.no_grad()
def test_the_types_of_numbers_and_tied_weights_are_those_of_the_network(tmp_path):
    model = known(Tied()).bfloat16().eval()
    model.b.weight[:, ::2] = 0
    inputs = torch.arange(9).view(3, 3)
    save_shrunk(model, tmp_path / "shrunk.ckpt", inputs)
    loaded = load_shrunk(tmp_path / "shrunk.ckpt", Tied).eval()
    assert loaded.c.weight is loaded.e.weight
    assert loaded.a.out_features == 4
    assert {one.dtype for one in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded(inputs), model(inputs))


class Perceptron(LightningModule):
    """Two layers."""

    def build(self, width: int, between: nn.Module) -> None:
        self.a, self.between, self.b = nn.Linear(6, width), between, nn.Linear(width, 3)

    def forward(self, x):
        return self.b(self.between(self.a(x)))


class Configured(Perceptron):
    """Is built by LightningCLI from a number and the description of an object."""

    def __init__(self, width: int, between: nn.Module) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.build(width, between)


class InOneArgument(Perceptron):
    """Has all its arguments in one."""

    def __init__(self, settings: dict) -> None:
        super().__init__()
        self.save_hyperparameters(settings)
        self.build(settings["width"], nn.ReLU())


class WithMore(Perceptron):
    """Saves a value that it does not take."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters({"width": width, "epochs": 3})
        self.build(width, nn.ReLU())


def by_cli() -> Configured:
    arguments = ["--model.width=8", "--model.between=torch.nn.LeakyReLU", "--model.between.negative_slope=0.1"]
    return LightningCLI(Configured, run=False, args=arguments, seed_everything_default=False).model


@pytest.mark.filterwarnings("ignore")  # of jsonargparse, and of Lightning about a module among the arguments
@pytest.mark.parametrize(
    ("made_by", "arguments"),
    [
        (by_cli, {"between": nn.LeakyReLU(0.1)}),
        (lambda: InOneArgument({"width": 8}), {}),
        (lambda: WithMore(8), {}),
    ],
    ids=["LightningCLI", "one argument", "more than it takes"],
)
@torch.no_grad()
def test_modules_are_built_from_the_arguments_that_they_saved(made_by, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cli.py"])
    model, x = made_by().eval(), torch.randn(5, 6)
    model.b.weight[:, ::2] = 0
    slim = save_shrunk(model, tmp_path / "shrunk.ckpt", x)
    if arguments:
        with pytest.raises(ValueError, match="does not hold the arguments between of the module"):
            load_shrunk(tmp_path / "shrunk.ckpt", type(model))
    loaded = load_shrunk(tmp_path / "shrunk.ckpt", type(model), **arguments).eval()
    assert loaded.a.out_features == 4
    assert torch.equal(loaded(x), slim(x))
    again = load_shrunk(tmp_path / "shrunk.ckpt", lambda: made_by())
    assert torch.equal(again.eval()(x), slim(x))


@torch.no_grad()
def test_a_class_that_needs_other_arguments_is_named(tmp_path):
    model, x = WithMore(8).eval(), torch.randn(5, 6)
    model.b.weight[:, ::2] = 0
    save_shrunk(model, tmp_path / "shrunk.ckpt", x)
    with pytest.raises(TypeError, match=r"'Configured' cannot be called with width, which .*between.*Pass the class"):
        load_shrunk(tmp_path / "shrunk.ckpt", Configured)
