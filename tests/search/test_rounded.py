"""Searches whose refit rounds the weights: what is judged, confirmed and returned is the rounded network."""

from __future__ import annotations

import pytest
import torch

from lightning_roulette import Codebook, LeastSquares, Tree
from tests.support.grids import is_on_grid
from tests.support.refits import WEIGHTS, equal, faithful, network, ranked


@pytest.mark.parametrize("values", ["float16", "int8", Codebook(3)], ids=str)
def test_every_level_is_judged_and_returned_with_rounded_weights(values):
    evaluate = faithful(net := network())
    winner = ranked(net, LeastSquares(values=values), evaluate, tree=Tree(0.2, max_levels=2), branches=1)
    assert winner.history.level == 2
    # a single candidate is judged after its refit alone: on the search half, and at the end on the held-out half
    judged = [(candidate.weights, folds) for candidate, folds in evaluate.log if candidate.mask.sparsity]
    for level in (1, 2):
        own = winner.weights_at(level)
        assert all(is_on_grid(own[name], values) for name in WEIGHTS)
        assert {fold for weights, folds in judged if equal(weights, own) for fold in folds} == {0, 1, 2, 3}
    assert all(is_on_grid(weights[name], values) for weights, _ in judged for name in WEIGHTS)
    assert all(torch.equal(winner.weights_at(0)[name], net.get_parameter(name)) for name in WEIGHTS)


def test_the_report_says_to_what_weights_are_rounded():
    for values, words in (("int8", "int8"), (Codebook(5), "a codebook of 5 bits")):
        report = ranked(network(), LeastSquares(values=values)).report
        assert report.refit.startswith(f"survivors by least squares, rounded to {words}, and running statistics")
        assert report.notes == (f"Weights are rounded to {words} before a level is judged.",)
    assert ranked(network()).report.notes == ()
