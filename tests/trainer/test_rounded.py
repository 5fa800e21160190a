"""A fit whose refit rounds the weights: the network and its files have the values that were confirmed."""

from __future__ import annotations

import pytest
import torch

from lightning_roulette import Codebook, LeastSquares, RouletteWheelPruning, Tree, load_compressed, save_compressed
from tests.support.fits import pruner
from tests.support.grids import is_on_grid
from tests.support.results import WEIGHTS, load, nonzeros

VALUES = ["float16", "int8", Codebook(3)]


def rounded(fit, values):
    pruning = pruner(refit=LeastSquares(batches=4, values=values), tree=Tree(0.3, max_levels=2), tolerance=0.1)
    return pruning, fit(pruning, enable_checkpointing=True)


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_the_network_and_its_file_have_rounded_weights(fit, values):
    pruning, module = rounded(fit, values)
    assert pruning.report.winner is not None
    assert nonzeros(module) == pruning.mask
    stored = load(pruning.best_model_path)["state_dict"]
    for name in WEIGHTS:
        weight = module.get_parameter(name).detach()
        assert is_on_grid(weight, values)
        assert torch.equal(stored[name], weight)
        assert torch.equal(pruning.weights_at(pruning.report.winner.level)[name], weight)
    assert "rounded" in str(pruning.report)


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_a_small_file_loses_nothing_more(fit, values, tmp_path):
    pytest.importorskip("constriction")
    _, module = rounded(fit, values)
    exact, narrow = tmp_path / "exact", tmp_path / "narrow"
    save_compressed(module, exact)
    save_compressed(module, narrow, values)
    for path in (exact, narrow):
        found = load_compressed(path)
        assert all(torch.equal(found[name], one) for name, one in module.state_dict().items())


@pytest.mark.parametrize("at_epoch", [1, range(1, 3)])
def test_training_may_not_follow(at_epoch):
    refit = LeastSquares(values=Codebook(4))
    with pytest.raises(
        ValueError, match="the refit rounds weights to a codebook of 4 bits, but training after a search"
    ):
        RouletteWheelPruning(at_epoch=at_epoch, refit=refit)
    assert RouletteWheelPruning(refit={"values": {"bits": 4}}).refit == refit
