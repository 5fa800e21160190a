"""examples/cli.py and examples/pruned.yaml: every argument of the callback, from a file and from the command line."""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields
from functools import reduce
from operator import attrgetter, getitem
from pathlib import Path

import pytest
import yaml

from lightning_roulette import (
    Block,
    Codebook,
    LeastSquares,
    Mask,
    Neuron,
    NofM,
    Reduction,
    RouletteWheelPruning,
    Tree,
    Validation,
    Wheel,
    prunable_parameters,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = EXAMPLES / "pruned.yaml"
GROUPS = {"wheel": Wheel, "tree": Tree, "validation": Validation}


def cubes(weights):
    """A user's importance."""
    return {name: weight.abs() ** 3 for name, weight in weights.items()}


# argument: its text and its value; no value is the default or the one in pruned.yaml
ARGUMENTS = {
    "branches": ("7", 7),
    "tolerance": ("0.25", 0.25),
    "monitor": ("val_loss", "val_loss"),
    "mode": ("min", "min"),
    "target_sparsity": ("0.75", 0.75),
    "confidence": ("0.9", 0.9),
    "at_epoch": ("3", 3),
    "refit": ("{class_path: lightning_roulette.LeastSquares, init_args: {damping: 0.5}}", LeastSquares(damping=0.5)),
    "include": ("[net.0.*, net.2.*]", ["net.0.*", "net.2.*"]),
    "exclude": ("[net.2.*]", ["net.2.*"]),
    "wheel.sharpness": (".inf", float("inf")),
    "wheel.importance": ("tests.examples.test_cli.cubes", cubes),
    "wheel.scope": ("layer", "layer"),
    "wheel.allocation": ("0.25", 0.25),
    "tree.pruning_rate": ("0.25", 0.25),
    "tree.coarse_rate": ("0.375", 0.375),
    "tree.max_levels": ("4", 4),
    "tree.patience": ("2", 2),
    "tree.smallest_rate": ("0.125", 0.125),
    "tree.max_time": ("00:30:00", "00:30:00"),
    "validation.rank_by": ("val_acc", "val_acc"),
    "validation.confirm": ("0.25", 0.25),
    "validation.race": ("false", False),
    "validation.cache_bytes": ("0", 0),
    "validation.keep_callbacks": ("[Says, Shouts]", ("Says", "Shouts")),
    "seed": ("-5", -5),
    "dirpath": ("somewhere", "somewhere"),
    "shrink": ("true", True),
}

ALONE = {"wheel.unit", "tree.target"}  # they exclude others, and are read in a test of their own


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """The module examples/cli.py, in an empty folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cli.py"])  # LightningCLI warns about other arguments of the process
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    import cli as module

    return module


def callback_of(cli, *args: str) -> RouletteWheelPruning:
    """The callback that a command line configures."""
    made = cli.PruningCLI(cli.Classifier, cli.Digits, args=list(args), run=False, save_config_callback=None)
    (pruning,) = [one for one in made.trainer.callbacks if isinstance(one, RouletteWheelPruning)]
    return pruning


def built(cli, config: Path, *arguments: str) -> RouletteWheelPruning:
    """The callback that a file and arguments of the command line configure."""
    return callback_of(cli, "--config", str(config), "--seed_everything=false", *arguments)


def values(pruning: RouletteWheelPruning) -> dict:
    return {name: attrgetter(name)(pruning) for name in ARGUMENTS}


def in_pruned_yaml() -> dict:
    """The configuration of the file."""
    return yaml.safe_load(CONFIG.read_text())


def test_the_table_of_arguments_is_complete():
    outer = set(inspect.signature(RouletteWheelPruning).parameters) - set(GROUPS)
    inner = {f"{name}.{one.name}" for name, group in GROUPS.items() for one in fields(group)}
    assert set(ARGUMENTS) | ALONE == outer | inner


@pytest.mark.parametrize("source", ["file", "command line"])
def test_every_argument_is_read(cli, tmp_path, source):
    if source == "file":
        config, path, given = in_pruned_yaml(), tmp_path / "changed.yaml", []
        (callback,) = config["trainer"]["callbacks"]
        for name, (text, _) in ARGUMENTS.items():
            *group, last = name.split(".")
            reduce(getitem, group, callback["init_args"])[last] = yaml.safe_load(text)
        path.write_text(yaml.safe_dump(config))
    else:
        path, given = CONFIG, [f"--trainer.callbacks.{name}={text}" for name, (text, _) in ARGUMENTS.items()]
    assert values(built(cli, path, *given)) == {name: value for name, (_, value) in ARGUMENTS.items()}


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("refit=null", "refit", None),
        ("refit=batch_norm", "refit", "batch_norm"),
        ("refit.damping=0.25", "refit", LeastSquares(damping=0.25)),
        ("refit.values=int8", "refit", LeastSquares(values="int8")),
        ("refit.values={bits: 5}", "refit", LeastSquares(values=Codebook(5))),
        ("tolerance=.inf", "tolerance", float("inf")),
        ("monitor=null", "monitor", None),
        ("wheel={sharpness: .inf, importance: lamp}", "wheel", Wheel(sharpness=float("inf"), importance="lamp")),
        ("wheel={allocation: null, importance: null}", "wheel", Wheel()),
        ("wheel.importance=obs", "wheel", Wheel(importance="obs")),
        ("wheel.unit=neuron", "wheel", Wheel(unit=Neuron())),
        ("wheel={unit: {kept: 1, of: 4}, sharpness: 2}", "wheel", Wheel(2, unit=NofM(1, 4))),
        ("wheel.unit={rows: 8, columns: 1}", "wheel", Wheel(unit=Block(8, 1))),
        ("exclude+=net.4.*", "exclude", ["net.4.*"]),
    ],
)
def test_arguments_may_be_written_in_other_ways(cli, argument, name, value):
    assert getattr(built(cli, CONFIG, f"--trainer.callbacks.{argument}"), name) == value


def test_a_target_is_read_with_the_unit_that_it_needs(cli):
    given = ["wheel={unit: neuron}", "tree={target: {multiply_adds: 0.25}}"]
    pruning = built(cli, CONFIG, *(f"--trainer.callbacks.{one}" for one in given))
    assert (pruning.wheel.unit, pruning.tree.target) == (Neuron(), Reduction(multiply_adds=0.25))


WRONG = {"sharpness": "inf", "sharpnes": 1, "importance": "size"}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_a_file_is_named(cli, tmp_path, capsys, name):
    config, path = in_pruned_yaml(), tmp_path / "changed.yaml"
    config["trainer"]["callbacks"][0]["init_args"]["wheel"][name] = WRONG[name]
    path.write_text(yaml.safe_dump(config))
    with pytest.raises((SystemExit, ValueError)) as caught:
        built(cli, path)
    assert name in f"{caught.value} {capsys.readouterr().err}"


def test_a_callback_may_be_given_on_the_command_line_alone(cli):
    name = "--trainer.callbacks"
    given = [f"{name}+=lightning_roulette.RouletteWheelPruning", f"{name}.wheel.sharpness=2.0", f"{name}.at_epoch=1"]
    pruning = callback_of(cli, "--seed_everything=false", "--trainer.logger=false", *given)
    assert (pruning.wheel, pruning.at_epoch) == (Wheel(sharpness=2.0), 1)


def test_pruned_yaml_has_every_argument_and_changes_three_defaults():
    (callback,) = in_pruned_yaml()["trainer"]["callbacks"]
    given = callback["init_args"]
    defaults = {name: one.default for name, one in inspect.signature(RouletteWheelPruning).parameters.items()}
    assert given.keys() == defaults.keys()
    for name, group in GROUPS.items():
        assert given[name].keys() == {one.name for one in fields(group)}
        given[name] = group(**given[name])
    changed = {name for name, default in defaults.items() if given[name] != default}
    assert changed == {"tolerance", "monitor", "mode"}  # as the comments of the file say


def test_the_example_trains_and_prunes(cli, tmp_path, capsys):
    changes = {
        "seed_everything": "false",
        "trainer.max_epochs": "2",
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks.branches": "3",
        "trainer.callbacks.at_epoch": "1",
        "trainer.callbacks.tolerance": ".inf",
        "trainer.callbacks.target_sparsity": "0.5",
        "trainer.callbacks.exclude": "[net.4.*]",
        "trainer.callbacks.wheel.sharpness": ".inf",
        "trainer.callbacks.tree.pruning_rate": "0.3",
    }
    done = cli.main(["fit", "--config", str(CONFIG), *(f"--{name}={written}" for name, written in changes.items())])
    (pruning,) = [one for one in done.trainer.callbacks if isinstance(one, RouletteWheelPruning)]
    assert pruning.report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert str(pruning.report) in capsys.readouterr().out
    assert pruning.best_model_path == "runs/cli/version_0/checkpoints/pruned.ckpt"
    loaded = cli.Classifier.load_from_checkpoint(pruning.best_model_path, weights_only=True)
    assert Mask.of_nonzeros(prunable_parameters(loaded, exclude=["net.4.*"])) == pruning.mask
    written = yaml.safe_load((tmp_path / "runs/cli/version_0/config.yaml").read_text())
    assert written["trainer"]["callbacks"][0]["init_args"]["wheel"]["sharpness"] == float("inf")
