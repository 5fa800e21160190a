"""Runs in processes of their own: how they are started, how they search, and how they compare."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_roulette import RouletteWheelPruning, Tree
from tests.support.modules import train_loader, val_loader
from tests.support.processes import QUIET
from tests.support.results import told


def run_script(script: str | Path, *arguments: object, **environment: object) -> None:
    """Run a file of tests in a process of its own, in the folder that is its first argument."""
    variables = {"PYTHONPATH": Path(__file__).parents[2], "OMP_NUM_THREADS": 1, **environment}
    variables = os.environ | {name: str(value) for name, value in variables.items()}
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, cwd=arguments[0], env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]


def train_with_search(
    module: LightningModule, weights: dict[str, Tensor], folder: Path, choices: dict[str, Any], **options: Any
) -> tuple[RouletteWheelPruning, dict[str, Any]]:
    """Prune a module with these weights, and return the callback and what it found and warned of."""
    module.load_state_dict(weights)
    given = {"tolerance": 0.1, "tree": Tree(0.2, max_levels=3), **choices}
    pruning = RouletteWheelPruning(3, dirpath=folder, **given)
    trainer = Trainer(accelerator="cpu", max_epochs=2, default_root_dir=folder, callbacks=[pruning], **options, **QUIET)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, train_loader(), val_loader(batch_size=25))
    said = [str(one.message) for one in caught if "RouletteWheelPruning" in str(one.message)]
    return pruning, {
        "mask": dict(pruning.mask),
        "report": told(pruning),
        "path": pruning.best_model_path,
        "warnings": said,
    }


def assert_same_winners(alone: dict[str, Any], both: dict[str, Any]) -> None:
    """Two reports name the same candidates, with equal scores and ranks; some candidates differ."""
    for one, two in zip(alone["levels"], both["levels"], strict=True):
        assert one["winner"] == two["winner"]
        for value in ("score", "rank"):
            values = [[candidate[value] for candidate in level["candidates"]] for level in (one, two)]
            assert values[0] == pytest.approx(values[1], abs=1e-6)
    assert both["score"] == pytest.approx(alone["score"], abs=1e-6)
    assert any(len({one["rank"] for one in level["candidates"]}) > 1 for level in alone["levels"])
