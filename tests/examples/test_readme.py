"""The code, the YAML and the links of the README and the other pages."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from lightning_roulette import (
    HoldZeros,
    LeastSquares,
    RouletteWheelPruning,
    Tree,
    Validation,
    Wheel,
    prunable_parameters,
    sparsity,
)
from tests.support.modules import Blobs, tiny_net, train_loader, val_loader

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language):
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_readme_runs_and_prunes(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    first, layer, in_turn, fine_tune, choices, plain = blocks("python")
    x, y = val_loader().dataset.tensors
    names = {"model": Blobs(), "train": train_loader(), "val": val_loader(), "net": tiny_net()}
    names["accuracy"] = lambda net: float((net(x).argmax(1) == y).float().mean())

    exec(first, names)
    assert names["pruning"].report.sparsity > 0
    headings = next(line for line in blocks("text")[0].splitlines() if line.startswith("level"))
    printed = capsys.readouterr().out.splitlines()
    assert headings.split() == next(line for line in printed if "level  " in line).split()
    shown = blocks("text")[0].split("\n\n")[0].splitlines()
    starts = ["val_acc on all validation data (half of it", "On the held-out half, which", "Stopped: ", "Time: "]
    for first, *lines in (shown, printed[printed.index("") - 5 : printed.index("")]):
        assert "prunable weights kept" in first
        assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))

    exec(fine_tune, names)
    assert sparsity({"all": names["pruning"].mask["net.0.weight"]}) > 0
    for name, kept in names["pruning"].mask.items():
        assert not names["slim"].get_parameter(name)[~kept].any()

    exec(in_turn, names)
    exec(layer, names)
    assert set(prunable_parameters(names["Projection"](3, 2))) == {"weight"}
    exec(choices, names)
    exec(plain, names)
    assert sparsity({"0": names["net"][0].weight}) > 0
    assert {HoldZeros, RouletteWheelPruning, Trainer} <= {v for v in names.values() if isinstance(v, type)}


def test_the_yaml_of_the_readme_builds_the_callback():
    (entry,) = yaml.safe_load(blocks("yaml")[0])["trainer"]["callbacks"]
    arguments = entry["init_args"]
    kinds = {"refit": LeastSquares, "wheel": Wheel, "tree": Tree, "validation": Validation}
    groups = {name: kind(**arguments.pop(name)) for name, kind in kinds.items()}
    callback = RouletteWheelPruning(**arguments, **groups)
    assert (callback.branches, callback.wheel.importance, callback.tree.patience) == (20, "lamp", 3)
    assert (callback.refit.batches, callback.validation.rank_by) == (200, "val_loss")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/measurements.md", "docs/published.md"])
def test_every_link_into_the_project_has_a_target(page):
    path = Path(__file__).parents[2] / page
    links = re.findall(r"\]\(([^):]*)\)", path.read_text())
    assert links
    for link in links:
        there, _, heading = link.partition("#")
        target = path.parent / there if there else path
        assert target.exists(), link
        if heading:
            headings = re.findall(r"(?m)^#+ (.*)$", target.read_text())
            assert heading in [one.lower().replace(" ", "-") for one in headings], link


def test_the_callback_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    RouletteWheelPruning(seed=5)
    assert torch.equal(state, torch.get_rng_state())
