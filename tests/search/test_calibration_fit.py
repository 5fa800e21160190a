"""Calibration data unlike that of training: it is found by the batch normalisations, and their statistics are kept."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_roulette import Calibration, LeastSquares, Scores, Singles, Tree, search
from lightning_roulette.refit_settings import Refit

NAMES = ("0.weight", "3.weight")
STATISTICS = ("1.running_mean", "1.running_var")
UNLIKE = "Running statistics computed on the calibration data worsen"


def data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of four classes in twelve dimensions."""
    chance = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    classes = torch.randint(4, (count,), generator=chance)
    return centres[classes] + torch.randn(count, 12, generator=chance), classes


@pytest.fixture(scope="module")
def net() -> nn.Sequential:
    """A small network with a batch normalisation, trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    x, y = data(2000, seed=1)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(3):
        for part in range(0, 2000, 50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[part : part + 50]), y[part : part + 50]).backward()
            optimizer.step()
    return net.eval()


class Accuracy:
    """Accuracy on 1,600 points in four folds; keeps the statistics of all candidates that it was asked for."""

    folds = 4

    def __init__(self, net: nn.Module) -> None:
        self.net, (self.x, self.y) = net, data(1600, seed=2)
        self.seen: list[torch.Tensor] = []

    @torch.no_grad()
    def recorded(self, candidate, folds):
        at = slice(400 * min(folds), 400 * (max(folds) + 1))
        outputs = functional_call(self.net, candidate.weights, (self.x[at],))
        if candidate.mask.sparsity and candidate.refitted:
            self.seen.append(candidate.weights["1.running_mean"])
        right = (outputs.argmax(1) == self.y[at]).double()
        loss = float(nn.functional.cross_entropy(outputs, self.y[at]))
        return Scores(rank=-loss, score=float(right.mean())), Singles(right, 0.0, 1.0)

    def __call__(self, candidate, folds):
        return self.recorded(candidate, folds)[0]


def found(net, inputs, refit="least_squares"):
    evaluate = Accuracy(net)
    winner = search(
        {name: net.get_parameter(name) for name in NAMES},
        evaluate,
        branches=2,
        tolerance=0.02,
        refit=refit,
        calibration=Calibration(net, [inputs]),
        tree=Tree(0.2, max_levels=2),
    )
    return winner, evaluate


@pytest.mark.parametrize("refit", ["least_squares", "batch_norm", LeastSquares(each_level=False)])
def test_trained_statistics_are_kept_where_the_calibration_data_is_unlike_that_of_training(net, refit):
    with pytest.warns(UserWarning, match=UNLIKE) as said:
        winner, evaluate = found(net, 2 * data(1000, seed=3)[0] + 1, refit)
    assert len(said) == 1
    assert "calibration_step" in str(said[0].message)
    assert winner.report.notes == (str(said[0].message),)
    assert UNLIKE in str(winner.report)
    assert "running statistics kept as trained" in winner.report.refit
    assert ("none" in winner.report.refit) == (refit == "batch_norm")
    assert winner.report.accepted
    assert evaluate.seen
    assert all(torch.equal(one, net[1].running_mean) for one in evaluate.seen)
    assert all(torch.equal(winner.weights[name], net.get_buffer(name)) for name in STATISTICS)


@pytest.mark.parametrize("refit", ["least_squares", "batch_norm"])
def test_nothing_is_said_where_the_calibration_data_fits(net, refit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        winner, evaluate = found(net, data(1000, seed=3)[0], refit)
    assert winner.report.notes == ()
    assert "kept" not in winner.report.refit
    assert not any(torch.equal(one, net[1].running_mean) for one in evaluate.seen)


def test_nothing_is_said_where_calibration_improves_the_network(net):
    moved = nn.Sequential(*net).eval()
    before = moved[1].running_mean.clone()
    moved[1].running_mean.add_(3.0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            winner, _ = found(moved, data(1000, seed=3)[0])
        assert float((winner.weights["1.running_mean"] - before).abs().mean()) < 1
    finally:
        moved[1].running_mean.copy_(before)


def test_a_network_without_batch_norms_is_not_judged_again():
    net = nn.Sequential(nn.Linear(12, 32), nn.Identity(), nn.ReLU(), nn.Linear(32, 4)).eval()
    asked = []

    def evaluate(candidate, folds):
        asked.append(candidate)
        return Scores(1.0, 1.0)

    evaluate.folds = 1
    weights = {name: net.get_parameter(name) for name in NAMES}
    calibration = Calibration(net, [2 * data(100, seed=3)[0] + 1])
    search(weights, evaluate, branches=1, refit=Refit(), calibration=calibration, tree=Tree(0.2, max_levels=1))
    assert [one.mask.sparsity > 0 for one in asked] == [False] + [True] * (len(asked) - 1)
