"""examples/cli.py and examples/pruned.yaml: every argument from the file and from the command line."""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from lightning_roulette import LeastSquares, Mask, RouletteWheelPruning, Tree, Validation, Wheel, prunable_parameters

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = EXAMPLES / "pruned.yaml"
GROUPS = {"wheel": Wheel, "tree": Tree, "validation": Validation}


def cubes(weights):
    """An importance of one's own."""
    return {name: weight.abs() ** 3 for name, weight in weights.items()}


# argument: as it is written, and what it becomes; none of them the default, nor what pruned.yaml has
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
    "tree.max_levels": ("4", 4),
    "tree.patience": ("2", 2),
    "tree.smallest_rate": ("0.125", 0.125),
    "validation.rank_by": ("val_acc", "val_acc"),
    "validation.confirm": ("0.25", 0.25),
    "validation.race": ("false", False),
    "validation.cache_bytes": ("0", 0),
    "validation.keep_callbacks": ("[Says, Shouts]", ("Says", "Shouts")),
    "seed": ("-5", -5),
    "dirpath": ("somewhere", "somewhere"),
}


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """The module examples/cli.py, in an empty folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cli.py"])  # LightningCLI warns where a process has arguments of its own
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    import cli as module

    return module


def built(cli, config: Path, *arguments: str) -> RouletteWheelPruning:
    """The callback that a file and a command line stand for."""
    args = ["--config", str(config), "--seed_everything=false", *arguments]
    made = cli.PruningCLI(cli.Classifier, cli.Digits, args=args, run=False, save_config_callback=None)
    (pruning,) = [one for one in made.trainer.callbacks if isinstance(one, RouletteWheelPruning)]
    return pruning


def value(pruning: RouletteWheelPruning, name: str):
    for part in name.split("."):
        pruning = getattr(pruning, part)
    return pruning


def expected() -> dict:
    return {name: wanted for name, (_, wanted) in ARGUMENTS.items()}


def of_pruned_yaml() -> dict:
    return yaml.safe_load(CONFIG.read_text())


def test_the_table_above_has_every_argument():
    outer = set(inspect.signature(RouletteWheelPruning).parameters) - set(GROUPS)
    inner = {f"{name}.{one.name}" for name, group in GROUPS.items() for one in fields(group)}
    assert set(ARGUMENTS) == outer | inner


def test_every_argument_from_the_command_line(cli):
    given = [f"--trainer.callbacks.{name}={written}" for name, (written, _) in ARGUMENTS.items()]
    pruning = built(cli, CONFIG, *given)
    assert {name: value(pruning, name) for name in ARGUMENTS} == expected()


def test_every_argument_from_a_file(cli, tmp_path):
    config = of_pruned_yaml()
    (callback,) = config["trainer"]["callbacks"]
    for name, (written, _) in ARGUMENTS.items():
        *group, last = name.split(".")
        place = callback["init_args"]
        for part in group:
            place = place[part]
        place[last] = yaml.safe_load(written)
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(config))
    pruning = built(cli, tmp_path / "changed.yaml")
    assert {name: value(pruning, name) for name in ARGUMENTS} == expected()


@pytest.mark.parametrize(
    ("argument", "name", "wanted"),
    [
        ("refit=null", "refit", None),
        ("refit=batch_norm", "refit", "batch_norm"),
        ("refit.damping=0.25", "refit", LeastSquares(damping=0.25)),
        ("tolerance=.inf", "tolerance", float("inf")),
        ("monitor=null", "monitor", None),
        ("wheel={sharpness: .inf, importance: lamp}", "wheel", Wheel(sharpness=float("inf"), importance="lamp")),
        ("wheel={allocation: null, importance: null}", "wheel", Wheel()),
        ("wheel.importance=obs", "wheel", Wheel(importance="obs")),
        ("exclude+=net.4.*", "exclude", ["net.4.*"]),
    ],
)
def test_other_ways_to_write_an_argument(cli, argument, name, wanted):
    assert value(built(cli, CONFIG, f"--trainer.callbacks.{argument}"), name) == wanted


def test_infinity_has_a_dot(cli, capsys):
    with pytest.raises(SystemExit):
        built(cli, CONFIG, "--trainer.callbacks.wheel.sharpness=inf")
    assert "wheel.sharpness" in capsys.readouterr().err


def test_pruned_yaml_names_every_argument_at_its_default():
    (callback,) = of_pruned_yaml()["trainer"]["callbacks"]
    given = callback["init_args"]
    defaults = {name: one.default for name, one in inspect.signature(RouletteWheelPruning).parameters.items()}
    assert given.keys() == defaults.keys()
    for name, group in GROUPS.items():
        assert given[name].keys() == {one.name for one in fields(group)}
        given[name] = group(**given[name])
    changed = {name for name, default in defaults.items() if given[name] != default}
    assert changed == {"tolerance", "monitor", "mode"}  # as its comments say


def test_the_example_trains_and_prunes(cli, tmp_path, capsys):
    changes = {
        "seed_everything": "false",
        "trainer.max_epochs": "2",
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks.branches": "3",
        "trainer.callbacks.at_epoch": "1",
        "trainer.callbacks.tolerance": "1.0",
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
