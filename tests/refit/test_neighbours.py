"""Which weights stay if each group of neighbouring inputs keeps its own number."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, product
from statistics import mean

import torch
from torch import nn

from lightning_roulette import Calibration, Mask
from lightning_roulette.network.neighbours import neighbours
from lightning_roulette.network.parameters import prunable_parameters
from lightning_roulette.network.refittable import layers_of
from lightning_roulette.refit.solvers.choice import Problem, chosen
from lightning_roulette.refit.solvers.pieces import Segments
from lightning_roulette.unit import NofM
from lightning_roulette.wheel.units.nofm import neighbours_of
from tests.refit.test_choice import CHOOSE, problem, solved
from tests.support.networks import numbers


def in_segments(problem: Problem, size: int) -> Problem:
    """The layer with its inputs in segments: every fourth input of eight, for example."""
    inputs = problem.free.shape[2]
    return replace(problem, pieces=Segments(torch.arange(inputs).view(size, -1).mT))


def best_of_segments(problem: Problem, kept: int) -> float:
    """The smallest error of all choices with so many entries of each segment of a single output."""
    each = [combinations(one.tolist(), kept) for one in problem.pieces.inputs]
    errors = []
    for some in product(*each):
        mask = torch.zeros_like(problem.free)
        mask[0, 0, torch.tensor(some).flatten()] = True
        errors.append(solved(problem, mask))
    return min(errors)


def test_within_segments_the_error_is_close_to_that_of_the_best_of_all_choices():
    ours, given_first = [], []
    for seed in range(8):
        layer = in_segments(problem(seed, inputs=8), 4)
        kept = torch.zeros_like(layer.free)
        magnitudes = layer.dense.abs()[0, 0][layer.pieces.inputs]
        kept[0, 0, layer.pieces.inputs.gather(1, magnitudes.topk(2).indices).flatten()] = True
        least, found = best_of_segments(layer, 2), chosen(layer, kept)
        assert layer.pieces.whole(found).sum(3).flatten().tolist() == [2, 2]
        assert solved(layer, found) >= least * (1 - 1e-9)
        ours.append(math.log(solved(layer, found) / least))
        given_first.append(math.log(solved(layer, kept) / least))
    assert math.exp(mean(ours)) < 1.25
    assert mean(ours) < mean(given_first) / 3


def test_each_segment_keeps_its_own_number():
    layer = in_segments(problem(3, groups=2, inputs=12, outputs=5), 4)
    kept = numbers(*layer.free.shape, seed=4) > 0
    found = chosen(layer, kept)
    assert torch.equal(layer.pieces.whole(found).sum(3), layer.pieces.whole(kept).sum(3))
    assert not torch.equal(found, kept)


def test_inputs_outside_of_segments_stay_as_given():
    layer = problem(5, inputs=9, outputs=3, biased=True)
    layer = replace(layer, pieces=Segments(torch.arange(8).view(2, 4)))
    kept = torch.ones_like(layer.free)
    kept[..., :8:2] = False
    found = chosen(layer, kept)
    assert bool(found[..., 8].all())
    assert bool((layer.pieces.whole(found).sum(3) == 2).all())


def test_a_refit_chooses_among_neighbouring_channels_at_each_position():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 6)).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.3)
    weights = prunable_parameters(net)
    kept = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    kept["0.weight"][:, ::2], kept["3.weight"][:, ::2] = True, True
    found = Calibration(net, [numbers(64, 4, 6, 6, seed=0).float()]).refit(
        Mask(kept), CHOOSE, units=neighbours_of(net, list(kept), NofM(2, 4))
    )
    by_channels = found.mask["0.weight"].movedim(1, -1)
    assert bool((by_channels.sum(-1) == 2).all())
    assert not torch.equal(found.mask["0.weight"], kept["0.weight"])
    assert bool((found.mask["3.weight"].unflatten(1, (-1, 4)).sum(-1) == 2).all())


def test_a_refit_keeps_the_weights_of_layers_without_such_neighbours():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    kept = {name: torch.ones_like(one, dtype=torch.bool) for name, one in prunable_parameters(net).items()}
    kept["0.weight"][:, ::2], kept["2.weight"][:, ::2] = False, False
    found = Calibration(net, [numbers(200, 6, seed=0).float()]).refit(
        Mask(kept), CHOOSE, units=neighbours_of(net, list(kept), NofM(2, 4))
    )
    assert found.mask is None or torch.equal(found.mask["0.weight"], kept["0.weight"])


def test_neighbours_are_inputs_of_a_linear_layer_or_channels_of_a_convolution():
    net = nn.Sequential(nn.Conv2d(4, 2, (1, 2)), nn.Conv2d(6, 4, 2, groups=2), nn.Linear(8, 2), nn.Linear(6, 2))
    tensors = dict(net.named_parameters())
    conv, grouped, linear, odd = layers_of(net, [name for name in tensors if name.endswith("weight")])[0]
    assert neighbours(conv, tensors, 4).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert neighbours(grouped, tensors, 3).tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert neighbours(linear, tensors, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert neighbours(odd, tensors, 4) is None
    assert neighbours(grouped, tensors, 4) is None
