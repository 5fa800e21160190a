"""A fit whose refit chooses which weights stay: files, levels, resuming, and training with masks that do not nest."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_roulette import Calibration, LeastSquares, Mask, Tree, apply_mask
from lightning_roulette.refit.refitted import Refitted
from lightning_roulette.trainer.scores.trainer_evaluator import TrainerEvaluator
from tests.support.choosing import chosen, nests
from tests.support.failing import Fails, counting
from tests.support.fits import pruner
from tests.support.limits import set_limits
from tests.support.modules import Blobs, blobs
from tests.support.results import Sparsities, load, nonzeros, told

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:RouletteWheelPruning. the search did not end"),
]

CHOICES = {"tree": Tree(0.2, max_levels=3), "tolerance": math.inf, "refit": LeastSquares(batches=2)}


@pytest.fixture(autouse=True)
def choosing(monkeypatch):
    """Every refit keeps as many weights of each layer as it is told, but others, with their dense values."""
    refit = Calibration.refit

    def choose(calibration, mask, *more, **choices):
        found, keeps = refit(calibration, mask, *more, **choices), chosen(mask)
        values = {name: calibration._module.get_parameter(name).detach() * kept for name, kept in keeps.items()}
        return Refitted({**found.values, **values}, found.undone, keeps)

    monkeypatch.setattr(Calibration, "refit", choose)
    monkeypatch.setattr(TrainerEvaluator, "_as", counting())


def levels_of(pruning) -> list[Mask]:
    return [pruning.mask_at(level) for level in range(len(pruning.report.accepted) + 1)]


@pytest.mark.parametrize("large", [False, True])
def test_every_file_and_copy_has_the_masks_of_all_levels(fit, large, monkeypatch):
    if large:
        set_limits(monkeypatch, unpacked_entries=0, copied_bytes=0)
    pruning = pruner(**CHOICES)
    module = fit(pruning, enable_checkpointing=True)
    masks = levels_of(pruning)
    assert len(masks) == 4
    assert not nests(masks)
    assert [mask.survivors for mask in masks[1:]] == [level.survivors for level in pruning.report.accepted]
    for level, mask in enumerate(masks):
        assert Mask.of_nonzeros({name: pruning.weights_at(level)[name] for name in mask}) == mask
    assert nonzeros(module) == pruning.mask == Mask.load(pruning.best_model_path)
    state = load(pruning.best_model_path)["callbacks"][pruning.state_key]
    assert len(state["level_bits"]) == 3
    read = pruner(**CHOICES)
    read.load_state_dict(state)
    for one in (read, copy.deepcopy(pruning), pickle.loads(pickle.dumps(pruning))):
        assert levels_of(one) == masks
        assert (one.mask, told(one)) == (pruning.mask, told(pruning))
    fresh = Blobs()
    apply_mask(fresh, pruning.best_model_path)
    assert nonzeros(fresh) == pruning.mask


def test_further_training_holds_the_zeros_of_the_winner_alone(fit, tmp_path):
    pruning, seen = pruner(at_epoch=1, **CHOICES), Sparsities()
    module = fit(pruning, seen, max_epochs=3)
    assert not nests(levels_of(pruning))
    assert seen.found[-1] == pytest.approx(pruning.report.sparsity)
    assert nonzeros(module) == pruning.mask


def cut_short(fit, folder: Path, at: int):
    with pytest.raises(RuntimeError, match="power cut"):
        fit(pruner(**CHOICES), ModelCheckpoint(folder, save_top_k=-1), module=Fails(at))
    return max(folder.glob("epoch=*.ckpt"))


def test_a_search_that_was_cut_short_validates_no_network_again(fit, tmp_path):
    options = {"train": DataLoader(blobs(400, 1), batch_size=50), "enable_checkpointing": True}
    whole, counts = pruner(**CHOICES), Fails()
    expected = fit(whole, module=counts, **options).state_dict()
    at = counts.judged // 2
    path = cut_short(lambda *both, **more: fit(*both, **options, **more), tmp_path / "cut", at)
    kept = Mask.load(path.parent / "interrupted.pt")
    assert kept in levels_of(whole)[1:]
    again, module = pruner(dirpath=tmp_path / "again", **CHOICES), Fails()
    fit(again, module=module, ckpt_path=path, **options)
    assert module.judged == counts.judged - at + 1
    assert levels_of(again) == levels_of(whole)
    assert told(again) == told(whole)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in expected.items())
