"""Searches whose layers keep some of each few neighbours, or lose blocks."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from lightning_roulette import Calibration, LeastSquares, Mask, StopReason, Tree, Wheel, search
from lightning_roulette.unit import Block, NofM
from lightning_roulette.wheel.units.blocks import blocks_of
from lightning_roulette.wheel.units.nofm import neighbours_of
from tests.search.test_units import Likeness
from tests.support.units import perceptron

NET = perceptron((8, 12, 16, 3), seed=1)
WEIGHTS = {name: one.detach() for name, one in NET.named_parameters() if name.endswith("weight")}
INPUTS = torch.randn(300, 8, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def error(winner) -> float:
    return float((torch.func.functional_call(NET, winner.weights, (INPUTS,)) - NET(INPUTS)).square().mean())


def found(choose: bool, **more):
    arguments = {"tolerance": math.inf, "branches": 3, "tree": Tree(0.2, coarse_rate=None), **more}
    return search(
        WEIGHTS,
        Likeness(NET, INPUTS),
        wheel=Wheel(unit=NofM(2, 4)),
        units=neighbours_of(NET, list(WEIGHTS), NofM(2, 4)),
        refit=LeastSquares(choose=choose),
        calibration=Calibration(NET, list(INPUTS.split(100))),
        **arguments,
    )


@pytest.mark.parametrize("choose", [False, True])
def test_each_level_takes_whole_layers_until_all_are_taken(choose):
    winner = found(choose)
    report = winner.report
    assert report.stop_reason is StopReason.EXHAUSTED
    assert (report.unit, report.units) == ("layer", 3)
    for level in report.accepted:
        mask = winner.mask_at(level.level)
        counts = [set(kept.unflatten(1, (-1, 4)).sum(2).flatten().tolist()) for kept in mask.values()]
        assert all(one in ({2}, {4}) for one in counts)
        assert level.units == counts.count({4})
    assert [level.units for level in report.accepted][-1] == 0
    assert winner.mask.survivors == winner.mask.size // 2
    assert all(one.survivors > two.survivors for one, two in pairwise(report.accepted))


def test_choosing_within_the_groups_leaves_a_smaller_error():
    assert error(found(True)) < error(found(False))


def test_blocks_leave_whole_in_a_search():
    wheel = Wheel(unit=Block(2, 4))
    units = blocks_of(NET, list(WEIGHTS), Block(2, 4))
    winner = search(
        WEIGHTS, Likeness(NET, INPUTS), wheel=wheel, units=units, tolerance=math.inf, target_sparsity=0.6, branches=2
    )
    assert winner.report.stop_reason is StopReason.TARGET_REACHED
    assert 0.6 <= winner.mask.sparsity < 0.6 + 8 / winner.mask.size
    for part in units.parts:
        kept = winner.mask[part.name]
        assert all(len(kept[part.labels == number].unique()) == 1 for number in part.labels.unique())


def test_a_refit_that_chooses_keeps_blocks_whole():
    def blocked(choose: bool):
        return search(
            WEIGHTS,
            Likeness(NET, INPUTS),
            wheel=Wheel(unit=Block(2, 4)),
            units=units,
            tolerance=math.inf,
            target_sparsity=0.5,
            branches=1,
            refit=LeastSquares(choose=choose),
            calibration=Calibration(NET, list(INPUTS.split(100))),
        )

    units = blocks_of(NET, list(WEIGHTS), Block(2, 4))
    winner, drawn = blocked(True), blocked(False)
    assert all(units.without(Mask.full(WEIGHTS), ~units.alive(one)) == one for one in (winner.mask, drawn.mask))
    assert 0.5 <= winner.mask.sparsity < 0.5 + 8 / winner.mask.size
    assert winner.mask != drawn.mask
