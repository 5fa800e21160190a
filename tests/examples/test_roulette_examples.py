"""The examples that are run by name: what each prunes, and what it skips and why."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from roulette_examples.__main__ import CONFIGS, main, run

SHORT = [
    "--seed_everything=false",
    "--data.train=200",
    "--data.val=100",
    "--trainer.max_epochs=1",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.callbacks.branches=1",
    "--trainer.callbacks.tolerance=.inf",
    "--trainer.callbacks.tree.max_levels=2",
]

# what is pruned, and what is skipped: the kind of reason for each
PRUNED = {
    "gan": ({f"generator.{i}.weight" for i in (0, 2, 4)}, {f"discriminator.{i}.weight": "unused" for i in (0, 2, 4)}),
    "image": ({f"features.{i}.weight" for i in (0, 4, 8)} | {"direction.weight"}, {}),
    "lstm": ({f"lstm.weight_{part}h_l{i}" for part in "ih" for i in (0, 1)} | {"future.weight"}, {}),
    "multitask": (
        {"trunk.0.weight", "trunk.2.weight", "kind.weight", "distance.weight"},
        {"decoder.weight": "unused"},
    ),
    "text": (
        {
            f"encoder.layers.{i}.{name}"
            for i in (0, 1)
            for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
        }
        | {"topic.weight"},
        {"words.weight": "Embedding", "places": "places"},
    ),
    "unet": (
        {f"{part}.{i}.weight" for part in ("down", "bottom", "join") for i in (0, 3)} | {"up.weight", "pixel.weight"},
        {},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_example_prunes_what_it_says_and_names_what_it_skips(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["roulette_examples"])  # LightningCLI warns about other arguments of the process
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    pruning = run(name, [*SHORT, f"--trainer.default_root_dir={tmp_path}"]).pruning
    pruned, skipped = PRUNED[name]
    assert set(pruning.mask) == pruned
    reasons = {one: group.why for group in pruning.report.skipped for one in group.names}
    assert reasons.keys() == skipped.keys()
    assert all(why in reasons[one] for one, why in skipped.items())
    weights = torch.load(pruning.best_model_path, weights_only=True)["state_dict"]
    zeros = sum(int((weights[one] == 0).sum()) for one in pruned)
    assert zeros / sum(weights[one].numel() for one in pruned) == pytest.approx(1 - 0.8**2, abs=1e-3)


def test_without_a_name_the_examples_are_listed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["roulette_examples"])
    with pytest.raises(SystemExit, match="usage: python -m roulette_examples NAME") as listed:
        main()
    assert all(f"  {name} " in str(listed.value) for name in CONFIGS)
