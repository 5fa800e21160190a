"""Lazy layers that `trainer.validate` gave their weights are pruned and trained like others."""

from __future__ import annotations

import math

import pytest
from lightning.pytorch import Trainer
from torch import nn

from lightning_roulette import HoldZeros, Mask, RouletteWheelPruning, Tree, apply_mask, prune, sparsity
from tests.support.modules import QUIET, Blobs, train_loader, val_loader

ONE_LEVEL = {"tolerance": math.inf, "branches": 2, "tree": Tree(0.2, max_levels=1, coarse_rate=None)}


class Lazy(Blobs):
    """`Blobs` whose layers find their inputs in the first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(24), nn.ReLU(), nn.LazyLinear(10))


@pytest.fixture
def validated():
    """A module after `trainer.validate`, which makes its weights in inference mode."""
    module = Lazy()
    Trainer(**QUIET, accelerator="cpu").validate(module, val_loader(), verbose=False)
    assert all(one.is_inference() for one in module.parameters())
    return module


def test_they_are_pruned_and_refitted(validated):
    pruning = prune(Trainer(**QUIET, accelerator="cpu"), validated, train_loader(), val_loader(), **ONE_LEVEL)
    assert sparsity({name: validated.get_parameter(name) for name in pruning.mask}) == pytest.approx(125 / 624)


@pytest.mark.parametrize("kind", ["search", "HoldZeros"])
def test_they_are_trained(validated, kind):
    callback = RouletteWheelPruning(**ONE_LEVEL) if kind == "search" else HoldZeros(mask_of_half())
    parameters = list(validated.parameters())
    before = [one.clone() for one in parameters]
    trainer = Trainer(**QUIET, accelerator="cpu", max_epochs=1, callbacks=[callback])
    trainer.fit(validated, train_loader(), val_loader())
    assert all(one is other for one, other in zip(parameters, validated.parameters(), strict=True))
    assert not any(bool((one == old).all()) for one, old in zip(parameters, before, strict=True))


def test_a_mask_of_layers_without_shapes_is_refused():
    with pytest.raises(ValueError, match=r"names 'net.0.weight', but the parameter belongs to a lazy layer and has no"):
        apply_mask(Lazy(), mask_of_half())


def mask_of_half() -> Mask:
    weights = Blobs().net.state_dict()
    return Mask({f"net.{name}": one > 0 for name, one in weights.items() if name.endswith("weight")})
