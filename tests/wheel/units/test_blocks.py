"""Blocks of weights: which entries leave together, at the edges of matrices too."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_roulette import Mask
from lightning_roulette.network.parameters import prunable_parameters
from lightning_roulette.unit import Block
from lightning_roulette.wheel.units.blocks import blocks_of
from lightning_roulette.wheel.units.unit_wheel import UnitWheel, importance_of_units
from tests.support.networks import numbers


def labels_of(net: nn.Module, block: Block) -> dict[str, torch.Tensor]:
    units = blocks_of(net, list(prunable_parameters(net)), block)
    return {part.name: part.labels for part in units.parts}


def test_blocks_at_the_end_of_a_matrix_are_smaller():
    found = labels_of(nn.Linear(5, 3), Block(2, 2))["weight"]
    assert found.tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]
    units = blocks_of(nn.Linear(5, 3), ["weight"], Block(2, 2))
    assert units.costs(Mask({"weight": torch.ones(3, 5, dtype=torch.bool)})).tolist() == [4, 4, 2, 2, 2, 1]


def test_a_block_of_a_convolution_has_neighbouring_channels_at_one_position():
    found = labels_of(nn.Conv2d(4, 2, (1, 3)), Block(2, 2))["weight"]
    assert found[:, :, 0, 0].tolist() == [[0, 0, 1, 1]] * 2
    assert found[:, :, 0, 2].tolist() == [[4, 4, 5, 5]] * 2
    grouped = labels_of(nn.Conv1d(4, 4, 1, groups=2), Block(4, 4))["weight"]
    assert grouped[..., 0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_weights_that_hold_several_matrices_have_their_blocks_one_after_the_other():
    net = nn.Sequential(nn.MultiheadAttention(4, 2), nn.LSTM(4, 2))
    units = blocks_of(net, list(prunable_parameters(net)), Block(2, 2))
    assert sum(units.groups.values()) == units.count
    for (name, start, stop), part in zip(units.ranges(), units.parts, strict=True):
        assert name == part.name
        assert part.labels.unique().tolist() == list(range(start, stop))
    assert units.groups["0.in_proj_weight"] == 12


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    block=st.tuples(st.integers(1, 4), st.integers(1, 10)),
    share=st.floats(0.01, 0.99),
)
def test_blocks_leave_whole_until_the_budget_is_met(seed, shape, block, share):
    net = nn.Sequential(nn.Linear(*shape), nn.Linear(shape[1], 2))
    units = blocks_of(net, ["0.weight", "1.weight"], Block(*block))
    weights = {name: numbers(*one.shape, seed=seed) for name, one in prunable_parameters(net).items()}
    full = Mask.full(weights)
    if not units.removable(full):
        return
    importance = importance_of_units(units, {name: one.abs() for name, one in weights.items()}, full, False)
    mask = UnitWheel(units, importance, full, sharpness=math.inf).spin(
        share * full.size, seed=seed, level=1, candidate=0
    )
    for part in units.parts:
        for number in part.labels.unique():
            assert len(mask[part.name][part.labels == number].unique()) == 1
        assert bool(mask[part.name].any())
    assert full.size - mask.survivors - block[0] * block[1] < share * full.size


def test_a_network_without_matrices_is_refused():
    with pytest.raises(ValueError, match=r"unit is Block\(rows=2, columns=2\), but no weight is a matrix of a layer"):
        blocks_of(nn.Embedding(3, 4), ["weight"], Block(2, 2))
