"""`python -m lightning_roulette prune`: configurations written for a fit, checkpoints of every kind, and mistakes."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_roulette.trainer.command import main as command
from lightning_roulette.trainer.command.given import Given
from tests.support.modules import QUIET, Blobs, trained, val_loader
from tests.support.results import load

HERE = "tests.trainer.command.test_command"
DATA = ["--data", "tests.support.modules.BlobsData"]
BLOBS = ["--model", "tests.support.modules.Blobs", *DATA]
QUIETLY = [f"--trainer.{name}=false" for name in QUIET] + ["--trainer.accelerator=cpu"]
SEARCH = ["branches=2", "tolerance=.inf", "refit=null", "tree={max_levels: 1, pruning_rate: 0.25}"]
SHORT = [*QUIETLY, *(f"--pruning.{one}" for one in SEARCH)]
CALLBACK = {"tolerance": math.inf, "refit": None, "branches": 2, "tree": {"max_levels": 2, "pruning_rate": 0.5}}


class Wide(Blobs):
    """As wide as it is told to be, which its checkpoint knows."""

    def __init__(self, width: int, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 10))


class Wider(Wide):
    """Hands its arguments on, and saves one that `__init__` does not have."""

    def __init__(self, **others) -> None:
        super().__init__(**others)
        self.save_hyperparameters({"note": "not an argument"})


class Faulty(Blobs):
    def __init__(self) -> None:
        super().__init__()
        raise ValueError("of a user")


class Unchecked(Blobs):
    """Has no validation."""

    validation_step = LightningModule.validation_step


@pytest.fixture(autouse=True)
def no_warnings_about_lightning(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of functions that LightningCLI calls


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, torch.Tensor]:
    return trained(Blobs(), tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Wide:
    module = Wide(40)
    trained(module, tmp_path_factory.mktemp("wide"))
    return module


@pytest.fixture
def folder(tmp_path, monkeypatch, weights) -> Path:
    """The folder in which the command runs, with a state dict of `Blobs`."""
    monkeypatch.chdir(tmp_path)
    torch.save(weights, "state.pt")
    return tmp_path


def checkpoint(module: LightningModule, path: Path, **options) -> None:
    trainer = Trainer(accelerator="cpu", **QUIET)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, **options)


def written(path: Path, **config) -> list[str]:
    path.write_text(yaml.safe_dump({"trainer": {**QUIET, "accelerator": "cpu"}, **config}))
    return ["--config", str(path)]


def of_fit(**arguments) -> dict:
    """The Trainer of a configuration for a fit."""
    entry = {"class_path": "lightning_roulette.RouletteWheelPruning", "init_args": CALLBACK | arguments}
    return {**QUIET, "accelerator": "cpu", "callbacks": [entry, {"class_path": "lightning.pytorch.callbacks.Timer"}]}


def zeros_in(path: str | Path) -> float:
    """The share of zeros in the matrices of a checkpoint."""
    matrices = [one for one in load(path)["state_dict"].values() if one.ndim == 2]
    return sum(int((one == 0).sum()) for one in matrices) / sum(one.numel() for one in matrices)


def printed(capsys) -> tuple[str, str]:
    """What a command has printed: all of it, and the path in its last line."""
    out = capsys.readouterr().out
    return out, out.splitlines()[-1].removeprefix("pruned network: ")


def refused(capsys, *args: str) -> tuple[object, str]:
    """The exit code and the message."""
    with pytest.raises(SystemExit) as caught:
        command.main(args)
    code = caught.value.code
    return (1, code) if isinstance(code, str) else (code, capsys.readouterr().err)


# ---- what it prunes


@pytest.mark.slow
def test_the_command_prunes_a_file_and_prints_the_report_and_the_path(folder):
    run = [sys.executable, "-m", "lightning_roulette", "prune", *BLOBS, *SHORT, "--ckpt_path", "state.pt"]
    done = subprocess.run(run, capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}, check=True)
    assert "468 of 624 prunable weights kept (75.00%)" in done.stdout
    assert zeros_in(done.stdout.splitlines()[-1].removeprefix("pruned network: ")) == 0.25
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("weights_only", [False, True])
def test_the_module_is_built_with_the_hyperparameters_of_the_checkpoint(folder, wide, capsys, weights_only):
    checkpoint(wide, folder / "wide.ckpt", weights_only=weights_only)
    command.main(["prune", "--model", f"{HERE}.Wide", *DATA, *SHORT, "--ckpt_path=wide.ckpt"])
    _, path = printed(capsys)
    assert load(path)["state_dict"]["net.0.weight"].shape == (40, 16)
    assert load(path)["hyper_parameters"] == {"width": 40, "lr": 1e-2}
    assert zeros_in(path) == 0.25


def test_hyperparameters_that_the_class_does_not_take_are_left_out(folder):
    checkpoint(Wider(width=40), folder / "wider.ckpt")
    given = Given.on(["--model", f"{HERE}.Wider", "--ckpt_path=wider.ckpt"])
    assert "note" in given.hyperparameters
    _, section, *_ = given.in_order
    assert yaml.safe_load(section) == {"class_path": f"{HERE}.Wider", "init_args": {"width": 40, "lr": 1e-2}}


def test_arguments_come_before_the_hyperparameters_of_the_checkpoint(folder, capsys):
    checkpoint(Wide(40), folder / "wide.ckpt")
    wide = ["--model", f"{HERE}.Wide", *DATA, *SHORT, "--ckpt_path=wide.ckpt", "--model.width=32"]
    code, said = refused(capsys, "prune", *wide)
    assert code == 1
    assert "net.0.weight (file (40, 16), module (32, 16))" in said


@pytest.mark.parametrize("form", ["class_path", "plain", "class in a second file", "some arguments in a second file"])
def test_a_configuration_of_a_fit_prunes(folder, wide, capsys, form):
    torch.save(wide.state_dict(), folder / "wide.pt")
    paths, arguments = {"model": f"{HERE}.Wide", "data": DATA[1]}, {"model": {"width": 40}, "data": {"batch_size": 20}}
    named = {part: {"class_path": paths[part], "init_args": arguments[part]} for part in paths}
    others = {"seed_everything": False, "ckpt_path": "missing.ckpt", "lr_scheduler": None, "optimizer": {"lr": 0.1}}
    if form == "some arguments in a second file":
        named["model"]["init_args"] = {"width": 30}
    parts = arguments if form in ("plain", "class in a second file") else named
    args = written(folder / "config.yaml", **parts, **others | {"trainer": of_fit()})
    if form == "class in a second file":
        args += ["-c", str(folder / "classes.yaml")]
        (folder / "classes.yaml").write_text(yaml.safe_dump({part: {"class_path": paths[part]} for part in paths}))
    elif form == "some arguments in a second file":
        args += written(folder / "some.yaml", model={"init_args": arguments["model"]})
    elif form == "plain":
        args += [f"--model={HERE}.Wide", *DATA]
    command.main(["prune", *args, "--ckpt_path=wide.pt", "--pruning.tree.max_levels=1"])
    _, path = printed(capsys)
    assert zeros_in(path) == 0.5  # the rate of the file, the number of levels of the command line


@pytest.mark.parametrize("at_epoch", [3, [3, 4]])
def test_at_epoch_of_a_configuration_has_no_effect(folder, capsys, caplog, monkeypatch, at_epoch):
    monkeypatch.setattr(logging.getLogger("lightning_roulette"), "propagate", True)
    args = written(folder / "config.yaml", trainer=of_fit(at_epoch=at_epoch, branches=None, tree={"max_levels": 1}))
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        command.main(["prune", *args, *BLOBS, "--ckpt_path=state.pt"])
    assert "at_epoch has no effect here, because nothing is trained." in caplog.text
    assert zeros_in(printed(capsys)[1]) == pytest.approx(0.1, abs=1e-3)


def test_the_optimizer_of_a_configuration_is_not_made(folder, capsys):
    sections = {
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}},
    }
    args = written(folder / "config.yaml", **sections)
    command.main(["prune", *args, *BLOBS, *SHORT, "--ckpt_path=state.pt"])  # a warning is an error
    assert zeros_in(printed(capsys)[1]) == 0.25


def test_the_file_is_written_even_if_the_trainer_writes_no_checkpoints(folder, capsys):
    command.main(["prune", *BLOBS, *SHORT, "--ckpt_path=state.pt", "--trainer.default_root_dir=here"])
    assert Path(printed(capsys)[1]) == Path("here/pruned.ckpt")
    command.main(["prune", *BLOBS, *SHORT, "--ckpt_path=state.pt", "--pruning.dirpath=there"])
    assert Path(printed(capsys)[1]) == Path("there/pruned.ckpt")


def test_the_validation_of_the_file_is_the_reported_one(folder, capsys, make_trainer):
    command.main(["prune", *BLOBS, *SHORT, "--ckpt_path=state.pt"])
    out, path = printed(capsys)
    pruned = Blobs.load_from_checkpoint(path, weights_only=True)
    (score,) = make_trainer().validate(pruned, val_loader(), verbose=False)
    assert f"pruned {score['val_acc']:.4g}" in out


# ---- mistakes

MISTAKES = {
    "a group": (["--pruning.wheel.sharpnes=3"], 1, "wheel has the field 'sharpnes'"),
    "a value": (["--pruning.tolerance=-1"], 1, "tolerance is -1.0, but must be at least 0"),
    "a type": (["--pruning.tolerance=much"], 2, "pruning.tolerance"),
    "an argument": (["--pruning.tolerancy=1"], 2, "--pruning.tolerancy=1"),
    "an argument of the Trainer": (["--trainer.epochs=1"], 2, "--trainer.epochs=1"),
    "a checkpoint": (["--ckpt_path=missing.ckpt"], 1, "there is no such file"),
    "a device": (["--trainer.accelerator=cuda"], 1, "ccelerator"),
    "a class": (["--model=tests.support.modules.Blob"], 2, "no attribute 'Blob'"),
    "a file": (["--config=missing.yaml"], 2, "missing.yaml"),
    "no validation": ([f"--model={HERE}.Unchecked"], 1, "has no validation_step"),
}


@pytest.mark.filterwarnings("ignore:.*have no `validation_step`")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(folder, capsys, name):
    args, code, text = MISTAKES[name]
    found, said = refused(capsys, "prune", *BLOBS, *SHORT, *args)
    assert (found, text in said) == (code, True)


def test_a_configuration_without_a_class_is_told_where_to_name_it(folder, capsys):
    args = written(folder / "config.yaml", model={"lr": 0.1})
    assert "Add --model my_module.MyClass" in refused(capsys, "prune", *args, *DATA, *SHORT)[1]


def test_errors_of_the_module_keep_their_traceback(folder):
    with pytest.raises(ValueError, match="of a user"):
        command.main(["prune", f"--model={HERE}.Faulty", *DATA, *SHORT])


@pytest.mark.parametrize(("args", "text"), [([], "required: command"), (["prun"], "prune"), (["prune"], "model")])
def test_a_command_and_a_module_are_required(capsys, args, text):
    code, said = refused(capsys, *args)
    assert (code, text in said) == (2, True)


def test_help_has_the_arguments_of_the_search(capsys):
    with pytest.raises(SystemExit):
        command.main(["prune", "--help"])
    out = capsys.readouterr().out
    assert all(f"--{name} " in out for name in ("pruning.tolerance", "ckpt_path", "model", "data", "trainer.devices"))


def test_a_missing_jsonargparse_is_told_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(command, "RequirementCache", lambda name: False)
    assert "pip install 'jsonargparse[signatures]" in str(refused(capsys, "prune")[1])
