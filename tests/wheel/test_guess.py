"""The guessed threshold: later spins need no logarithms, and a wrong guess changes nothing."""

from __future__ import annotations

import pytest
import torch

from lightning_roulette.wheel.guess import Guess
from lightning_roulette.wheel.level import LevelWheel
from tests.support.wheels import by_law, network, partly


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alive", [0.7, 1.0])
@pytest.mark.parametrize("sharpness", [0.0, 4.0, 20.0])
def test_later_spins_need_no_logarithms_and_draw_as_the_law_does(monkeypatch, dtype, alive, sharpness):
    weights = {name: values.to(dtype) for name, values in network(a=(6000,), b=(2700,), c=(7,)).items()}
    parent, guessed, kept = partly(weights, alive), [], Guess.kept

    def told(*arguments):
        guessed.append((found := kept(*arguments)) is not None)
        return found

    monkeypatch.setattr(Guess, "kept", told)
    wheel = LevelWheel(weights, parent, sharpness=sharpness)
    for candidate in range(8):
        mask = wheel.spin(parent.survivors // 5, seed=0, level=1, candidate=candidate)
        assert mask == by_law(weights, parent, parent.survivors // 5, sharpness=sharpness, candidate=candidate)
    assert guessed == [True] * 7
    # the guess is not valid for another number of draws
    draws = parent.survivors // 5 - 1
    assert wheel.spin(draws, seed=0, level=1, candidate=0) == by_law(weights, parent, draws, sharpness=sharpness)
    assert guessed == [True] * 7


@pytest.mark.parametrize("shift", [-1.0, -0.02, 0.02, 1.0])
def test_a_guess_that_misleads_changes_nothing(monkeypatch, shift):
    weights = network(a=(6000,), b=(2700,))
    parent, guess = partly(weights, 1.0), Guess.of
    monkeypatch.setattr(Guess, "of", lambda terms, keys, *rest: guess(terms, keys + shift, *rest))
    wheel = LevelWheel(weights, parent, sharpness=4.0)
    for candidate in range(4):
        mask = wheel.spin(1500, seed=0, level=1, candidate=candidate)
        assert mask == by_law(weights, parent, 1500, sharpness=4.0, candidate=candidate)
