"""Normal numbers from counters: their moments, their independence, and their formula."""

from __future__ import annotations

import math

import torch

from lightning_roulette.wheel.chance import normal, stream, uniforms


def test_normal_numbers_have_mean_0_and_variance_1():
    found = torch.tensor([normal(stream(0, 1, place, "layer")) for place in range(6000)], dtype=torch.float64)
    # five standard errors of the mean, the variance, the third and the fourth moment
    root = math.sqrt(len(found))
    assert abs(float(found.mean())) < 5 / root
    assert abs(float(found.var()) - 1) < 5 * math.sqrt(2) / root
    assert abs(float((found**3).mean())) < 5 * math.sqrt(15) / root
    assert abs(float((found**4).mean()) - 3) < 5 * math.sqrt(96) / root
    assert len(set(found.tolist())) == len(found)
    below = (found < 0.5).double().mean()
    assert abs(float(below) - 0.6914624612740131) < 5 * 0.4619 / root


def test_normal_numbers_are_independent_of_the_uniforms_of_the_weights():
    keys = [stream(0, 1, place, "layer") for place in range(2000)]
    index = torch.arange(20)
    both = torch.stack([torch.cat([torch.tensor([normal(key)]).double(), uniforms(key, index)]) for key in keys])
    found = torch.corrcoef(both.T)[0, 1:]
    assert float(found.abs().max()) < 5 / math.sqrt(len(keys))
    squares = torch.corrcoef(torch.cat([both[:, :1] ** 2, both[:, 1:]], 1).T)[0, 1:]
    assert float(squares.abs().max()) < 5 / math.sqrt(len(keys))


def test_normal_numbers_follow_box_and_muller_on_counters_that_no_weight_has():
    key = stream(3, 1, 4, "layer")
    radius, angle = uniforms(key, torch.tensor([-1, -2])).tolist()
    assert normal(key) == math.sqrt(-2 * math.log(radius)) * math.cos(2 * math.pi * angle)
    assert normal(key) == normal(key)
    assert normal(key) != normal(stream(3, 1, 4, "other"))
