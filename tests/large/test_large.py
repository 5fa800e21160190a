"""Large networks are pruned exactly like small ones, with less memory."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_roulette import Mask, RouletteWheelPruning, Tree, Validation, Wheel, Winner, search
from lightning_roulette.large.bits import Bits
from lightning_roulette.large.copies import OnDisk
from lightning_roulette.large.masking import RemovedValues
from lightning_roulette.network import lending
from lightning_roulette.network.lending import applied
from lightning_roulette.wheel import importance
from lightning_roulette.wheel.importance import Magnitudes, importance_of, magnitude, weighed
from lightning_roulette.wheel.level import LevelWheel
from tests.support.evaluators import Logged, noise
from tests.support.limits import set_limits
from tests.support.modules import Blobs, train_loader, val_loader

WEIGHTS = ("net.0.weight", "net.2.weight")


@pytest.fixture
def large(monkeypatch):
    """A function that makes the package treat every network as a large one, in many blocks."""

    def make_large() -> None:
        set_limits(
            monkeypatch,
            packed_entries=64,
            unpacked_entries=0,
            masked_entries=50,
            held_weights=0,
            block_keys=64,
            branch_mask_bytes=0,
            copied_bytes=0,
        )

    return make_large


def network(dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Weights with zeros, with ties, and in other memory formats."""
    chance = np.random.default_rng(5)
    found = {
        "conv": torch.from_numpy(chance.standard_normal((6, 4, 3, 3))).to(memory_format=torch.channels_last),
        "turned": torch.from_numpy(chance.standard_normal((20, 30))).T,
        "few": torch.from_numpy(chance.standard_normal(5)),
        "many": torch.from_numpy(chance.standard_normal((11, 37)).round(1)),
    }
    return {name: weight.to(dtype) for name, weight in found.items()}


def grown(weights, **options) -> Winner:
    return search(
        weights,
        Logged(noise, 4),
        **{"branches": 3, "tolerance": math.inf, "tree": Tree(0.3, max_levels=4), "seed": 3} | options,
    )


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("how", [Wheel(), Wheel(0), Wheel(math.inf), Wheel(4, scope="layer"), Wheel(4, allocation=0.5)])
def test_a_large_network_is_searched_as_a_small_one_is(large, dtype, how):
    small = grown(network(dtype), wheel=how)
    expected = [{name: kept.clone() for name, kept in small.mask_at(level).items()} for level in range(5)]
    large()
    found = grown(network(dtype), wheel=how)
    assert all(isinstance(kept, Bits) for kept in found.mask.stored.values())
    assert [dict(found.mask_at(level)).keys() for level in range(5)] == [one.keys() for one in expected]
    assert all(equal(dict(found.mask_at(level)), expected[level]) for level in range(5))
    assert found.report.levels == small.report.levels
    assert equal(found.weights_at(2), small.weights_at(2))


@pytest.mark.parametrize("kind", ["lamp", lambda weights: {name: one.abs() + 1 for name, one in weights.items()}])
def test_an_importance_that_is_held_gives_the_same_mask_in_blocks(large, kind):
    how = Wheel(4, importance=kind)
    expected = {name: kept.clone() for name, kept in grown(network(), wheel=how).mask.items()}
    large()
    assert equal(dict(grown(network(), wheel=how).mask), expected)


def test_magnitudes_are_computed_at_each_access(large):
    weights = network(torch.bfloat16)
    large()
    found = importance_of(weights, "magnitude")
    assert isinstance(found, Magnitudes)
    assert equal(dict(found), {name: magnitude(weight) for name, weight in weights.items()})
    thrice = weighed(found, dict.fromkeys(weights, 3.0))
    for name, weight in weights.items():
        assert torch.equal(thrice[name], magnitude(weight) * 3)
        assert torch.equal(thrice.part(name, 2, 5), magnitude(weight).flatten()[2:5] * 3)


def test_a_search_changes_neither_weights_nor_the_importance_of_a_user(large):
    weights, given = network(torch.float64), network(torch.float64)
    own = {name: weight.abs() for name, weight in network(torch.float64).items()}
    before = {name: values.clone() for name, values in own.items()}
    large()
    grown(weights, wheel=Wheel(4, importance=lambda _: own))
    assert equal(weights, given)
    assert equal(own, before)


def test_names_of_importances_are_looked_up_without_computing_them(large, monkeypatch):
    large()
    importances = importance_of(network(), "magnitude")
    monkeypatch.setattr(importance, "magnitude", lambda _: pytest.fail("computed"))
    assert "few" in importances
    assert "b" not in importances


@pytest.fixture
def set_aside(monkeypatch) -> list[int]:
    """The number of values that is set aside for each large weight."""
    sizes = []

    class Counted(RemovedValues):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            sizes.append(len(self.values))

    monkeypatch.setattr(lending, "RemovedValues", Counted)
    return sizes


def test_only_removed_values_are_set_aside(large, set_aside):
    weights = network()
    large()
    mask = Mask({name: torch.arange(one.numel()).view(one.shape) % 4 > 0 for name, one in weights.items()})
    with applied(mask, weights):
        assert not weights["turned"][~mask["turned"]].any()
    assert set_aside == [math.ceil(one.numel() / 4) for one in weights.values()]
    set_aside.clear()
    with applied(Mask.full(weights), weights):
        assert equal(weights, network())
    assert set_aside == [0] * 4


def test_no_mask_is_drawn_twice_in_a_row(large, monkeypatch):
    spins, spin = [], LevelWheel.spin

    def tell(self, *arguments, **place):
        spins.append(place["candidate"])
        return spin(self, *arguments, **place)

    large()
    monkeypatch.setattr(LevelWheel, "spin", tell)
    folds = Logged(lambda mask, fold: float(mask["many"][0, 0]) + noise(mask, fold), 4)
    winner = search(
        network(), folds, branches=2, tolerance=math.inf, tree=Tree(max_levels=1), validation=Validation(race=False)
    )
    first = winner.report.levels[0].winner
    assert spins == [0, 1] + [0] * (first == 0)


# ---- the callback


def test_the_copies_of_a_large_winner_are_on_disk(large):
    winner = grown(network())
    large()
    there = winner.cpu()
    assert isinstance(there.dense, OnDisk)
    assert all(equal(there.weights_at(level), winner.weights_at(level)) for level in range(5))


def fitted(make_trainer, folder, ckpt_path=None, **options) -> tuple[RouletteWheelPruning, Blobs]:
    pruning = RouletteWheelPruning(
        **{"branches": 3, "tolerance": 0.2, "refit": None, "tree": Tree(0.3, max_levels=3)} | options
    )
    module = Blobs()
    torch.manual_seed(0)
    trainer = make_trainer(callbacks=[pruning], enable_checkpointing=True, default_root_dir=folder)
    trainer.fit(module, train_loader(), val_loader(), ckpt_path=ckpt_path)
    return pruning, module


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # of ModelCheckpoint
@pytest.mark.parametrize("options", [{}, {"at_epoch": 1}, {"refit": "least_squares"}])
def test_the_callback_prunes_a_large_network_as_a_small_one(make_trainer, tmp_path, large, options):
    small, module = fitted(make_trainer, tmp_path / "small", **options)
    expected, levels = copy.deepcopy(dict(small.mask)), range(len(small.report.accepted) + 1)
    large()
    found, other = fitted(make_trainer, tmp_path / "large", **options)
    assert equal(dict(found.mask), expected)
    assert equal(other.state_dict(), module.state_dict())
    assert found.report.levels == small.report.levels
    with torch.no_grad():
        other.net[0].weight.zero_()
    assert all(equal(found.weights_at(level), small.weights_at(level)) for level in levels)
    assert torch.equal(Mask.load(found.best_model_path)[WEIGHTS[0]], expected[WEIGHTS[0]])
    resumed, _ = fitted(make_trainer, tmp_path / "resumed", ckpt_path=found.best_model_path, **options)
    assert equal(dict(resumed.mask), expected)


def test_whether_validation_depends_on_weights_is_found_without_setting_all_aside(
    make_trainer, tmp_path, large, set_aside
):
    large()
    fitted(make_trainer, tmp_path)
    # every eighth weight, before training and after it, and then the first parameter, whole
    assert set_aside[:5] == [48, 30, 48, 30, 16 * 24]


class Elsewhere(Blobs):
    """Validates weights that are not pruned."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_acc", self.net[0].bias.detach().sum())


def test_a_validation_that_does_not_depend_on_a_large_network_is_refused(make_trainer, large):
    large()
    trainer = make_trainer(callbacks=[RouletteWheelPruning(refit=None)])
    with pytest.raises(RuntimeError, match="validation logs the same with all prunable weights at zero"):
        trainer.fit(Elsewhere(), train_loader(), val_loader())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
def test_a_search_takes_less_than_a_byte_a_weight():
    program = Path(__file__).parents[2] / "examples" / "benchmarks" / "memory.py"
    command = [sys.executable, str(program), "--measure", "search", "--sizes", "2e7"]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    # a draw at any size, and libraries that are loaded late, need about sixty megabytes
    assert found["weights"] > 1.9e7
    assert found["peak"] - found["bytes"] < found["weights"] + 7e7
