"""The example that prunes in turn with training, on a few random images."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import prune_while_training as example

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def images(shape: tuple[int, ...]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    chance, sizes = torch.Generator().manual_seed(0), {"train": 300, "val": 100, "test": 100}
    return {
        part: (torch.randn(size, *shape, generator=chance), torch.randint(10, (size,), generator=chance))
        for part, size in sizes.items()
    }


@pytest.mark.parametrize(
    ("name", "shape"), [("lenet-300-100", (1, 28, 28)), pytest.param("resnet", (3, 32, 32), marks=pytest.mark.slow)]
)
def test_a_network_is_pruned_and_printed_in_the_table(tmp_path, monkeypatch, capsys, name, shape):
    monkeypatch.chdir(tmp_path)
    recipe = example.Recipe(4, range(1, 4), 1e-3, 5e-4, 1e-4, None, pruning_rate=0.3)
    row = example.run(name, 3, images(shape), recipe, tolerance=math.inf, dense=True)
    assert row["left"] == pytest.approx(0.7**3, abs=0.01)
    assert row["levels"] == 3
    assert row["judged"] >= row["floor"]
    assert all(0 <= row[key] <= 1 for key in ("test", "dense_test", "dense_to_the_end"))
    example.show(name, [{**row, "seed": 3}])
    assert f"{1 / row['left']:.0f}x" in capsys.readouterr().out


def test_the_learning_rate_falls_to_zero_before_the_first_cut_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = example.Recipe(4, range(2, 4), 1e-3, 5e-4, 0.0, 0.9)
    module = example.Annealed(example.NETS["lenet-300-100"](), recipe)
    module.trainer = type("Stub", (), {"estimated_stepping_batches": 400})()
    schedule = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    rate = schedule.lr_lambdas[0]
    assert [rate(0), rate(200), rate(400)] == pytest.approx([1e-3, 5e-4, 0.0])
    assert rate(199) < 1e-6
