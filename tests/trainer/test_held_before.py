"""Zeros that `HoldZeros` holds beside a search stay zero in the network, its files and all levels."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_roulette import HoldZeros, LeastSquares, Mask, RouletteWheelPruning, Tree, Wheel, prune
from lightning_roulette.mask.history import History
from tests.support.modules import QUIET, Blobs, train_loader, val_loader
from tests.support.results import load, nonzeros

TWO_LEVELS = {"tolerance": math.inf, "branches": 2, "tree": Tree(0.2, max_levels=2, coarse_rate=None)}
SCHEDULES = [None, 1, [1, 2]]
each_refit = pytest.mark.parametrize("refit", [None, LeastSquares(choose=True)], ids=["no refit", "choose"])
each_unit = pytest.mark.parametrize("unit", ["weight", "neuron"])


def half() -> Mask:
    """About half of the weights of `Blobs`, at places without a pattern."""
    chance = torch.Generator().manual_seed(1)
    shapes = {"net.0.weight": (24, 16), "net.2.weight": (10, 24)}
    return Mask({name: torch.rand(shape, generator=chance) > 0.5 for name, shape in shapes.items()})


def trainer_with(callbacks, folder, **options) -> Trainer:
    quiet = {**QUIET, "enable_checkpointing": True}
    return Trainer(**quiet, accelerator="cpu", default_root_dir=folder, callbacks=callbacks, **options)


def check_zeros(pruning: RouletteWheelPruning, module: Blobs, held: Mask) -> None:
    """The report, the masks, the network and its file tell the same zeros, those that were held among them."""
    found, report = nonzeros(module), pruning.report
    assert found <= pruning.mask <= held
    assert (found.survivors, report.sparsity) == (report.survivors, pytest.approx(found.sparsity))
    assert pruning.mask_at(0) == held
    assert (report.held.survivors, report.held.sparsity) == (held.survivors, pytest.approx(held.sparsity))
    assert all(level.survivors < held.survivors for level in report.levels)
    file = load(pruning.best_model_path)
    assert Mask.of_nonzeros({name: file["state_dict"][name] for name in held}) == found
    assert Mask.load(pruning.best_model_path) == found
    assert History.from_state(file["callbacks"]["RouletteWheelPruning"]).mask_at(0) == held


@pytest.mark.parametrize("at_epoch", SCHEDULES, ids=str)
@each_refit
@each_unit
def test_held_zeros_stay_zero_in_a_fit(at_epoch, refit, unit, tmp_path, recwarn):
    held, module = half(), Blobs()
    pruning = RouletteWheelPruning(at_epoch=at_epoch, refit=refit, wheel=Wheel(unit=unit), **TWO_LEVELS)
    trainer_with([HoldZeros(held), pruning], tmp_path, max_epochs=3).fit(module, train_loader(), val_loader())
    check_zeros(pruning, module, held)
    assert not [one for one in recwarn if "changed after the network was measured" in str(one.message)]


@pytest.mark.parametrize("at_epoch", SCHEDULES, ids=str)
def test_the_order_of_the_callbacks_does_not_matter(at_epoch, tmp_path):
    found = []
    for number, turn in enumerate([1, -1]):
        module, pruning = Blobs(), RouletteWheelPruning(at_epoch=at_epoch, refit="least_squares", **TWO_LEVELS)
        callbacks = [HoldZeros(half()), pruning][::turn]
        train = train_loader(generator=torch.Generator().manual_seed(3))
        trainer_with(callbacks, tmp_path / str(number), max_epochs=3).fit(module, train, val_loader())
        check_zeros(pruning, module, half())
        found.append(pruning.mask)
    assert found[0] == found[1]


@each_refit
@each_unit
def test_held_zeros_stay_zero_in_prune(refit, unit, tmp_path):
    held, module = half(), Blobs()
    pruning = prune(
        trainer_with([HoldZeros(held)], tmp_path),
        module,
        train_loader(),
        val_loader(),
        refit=refit,
        wheel=Wheel(unit=unit),
        **TWO_LEVELS,
    )
    check_zeros(pruning, module, held)


def test_zeros_that_are_found_at_the_start_are_held_and_released_in_prune(tmp_path):
    module, holding = Blobs(), HoldZeros()
    for name, kept in half().items():
        module.get_parameter(name).data *= kept
    before = (trainer := trainer_with([holding], tmp_path)).callbacks
    pruning = prune(trainer, module, train_loader(), val_loader(), **TWO_LEVELS)
    check_zeros(pruning, module, half())
    assert trainer.callbacks == before
    module.net[0].weight.data.fill_(1.0)
    holding.on_train_end(trainer, module)
    assert bool((module.net[0].weight == 1.0).all())


def test_held_zeros_that_weight_averaging_fills_are_zero_before_the_dense_network_is_judged(tmp_path):
    held, module = half(), Blobs()
    pruning = RouletteWheelPruning(refit=None, **TWO_LEVELS)
    callbacks = [EMAWeightAveraging(decay=0.99), pruning, HoldZeros(held)]
    trainer_with(callbacks, tmp_path, max_epochs=2).fit(module, train_loader(), val_loader())
    check_zeros(pruning, module, held)
    for name, kept in pruning.weights_at(0).items():
        assert not bool(kept[~held[name]].any())


def test_a_bias_that_is_held_stays_zero_in_a_refit(tmp_path):
    module = Blobs()
    kept = torch.arange(24) % 2 == 0
    held = Mask({"net.0.bias": kept})
    pruning = RouletteWheelPruning(refit="least_squares", **TWO_LEVELS)
    trainer_with([HoldZeros(held), pruning], tmp_path, max_epochs=1).fit(module, train_loader(), val_loader())
    assert torch.equal(module.net[0].bias != 0, kept)
    assert pruning.report.held is None


def test_a_network_that_has_the_target_already_stays_as_it_was_and_is_reported_so(tmp_path):
    held, module = half(), Blobs()
    pruning = RouletteWheelPruning(refit=None, target_sparsity=0.3, **TWO_LEVELS)
    trainer_with([HoldZeros(held), pruning], tmp_path, max_epochs=1).fit(module, train_loader(), val_loader())
    report = pruning.report
    assert (report.levels, report.target_met, report.survivors) == ((), True, nonzeros(module).survivors)
    assert report.sparsity == pytest.approx(held.sparsity)
    assert type(report).from_dict(report.to_dict()) == report
    first, second = report.summary()[:2]
    assert first.startswith(f"{held.survivors} of 624 prunable weights kept")
    assert first.endswith("the network stays as it was.")
    assert second.startswith(f"{624 - held.survivors} of them were held at zero before the search.")
