"""The torchmetrics object for sparsity counts what is zero now, and is never what a search watches."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_roulette import Sparsity, prunable_parameters, sparsity
from tests.support.fits import pruner
from tests.support.modules import Blobs, tiny_net


def thinned(share: float) -> nn.Module:
    """A small network with a share of zeros in its weights."""
    net = tiny_net()
    with torch.no_grad():
        for weight in prunable_parameters(net).values():
            weight.flatten()[: int(share * weight.numel())] = 0
    return net


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 1])
def test_it_is_the_share_of_zeros_that_the_function_counts(share):
    net, metric = thinned(share), Sparsity()
    metric.update(net)
    assert metric.compute() == pytest.approx(sparsity(prunable_parameters(net)), abs=1e-7)
    assert metric.compute() == pytest.approx(share, abs=1e-7)


def test_it_is_not_rounded_where_half_precision_is_the_default():
    net, metric = thinned(0.303), Sparsity()
    metric.update(net)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does in the steps of precision="bf16-true"
    try:
        found = metric.compute()
    finally:
        torch.set_default_dtype(before)
    assert float(found) == pytest.approx(sparsity(prunable_parameters(net)), abs=1e-7)


def test_a_call_and_an_update_both_give_the_network_as_it_is_now():
    metric = Sparsity()
    metric.update(thinned(0.5))
    metric.update(thinned(0.25))
    assert metric.compute() == 0.25
    assert metric(thinned(0.5)) == 0.5
    assert metric.compute() == 0.5


def test_patterns_choose_what_is_counted():
    net = tiny_net()
    nn.init.zeros_(net[0].weight)
    for patterns, expected in (({"include": ["0.weight"]}, 1), ({"exclude": ["0.weight"]}, 0)):
        assert Sparsity(**patterns)(net) == expected


def test_without_an_update_it_is_nan_and_without_prunable_weights_an_error():
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert Sparsity().compute().isnan()
    with pytest.raises(ValueError, match="no parameter of ReLU is prunable.*include="):
        Sparsity().update(nn.ReLU())
    with pytest.raises(ValueError, match=r"'nowhere\.\*'"):
        Sparsity(include=["nowhere.*"]).update(tiny_net())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_of_a_module_counts_its_own_weights(again):
    module = Blobs()
    module.sparsity = Sparsity()
    twin = again(module)
    nn.init.zeros_(twin.net[0].weight)
    assert module.sparsity(module) == 0
    assert twin.sparsity(twin) == pytest.approx(16 * 24 / 624)
    assert module.state_dict().keys() == Blobs().state_dict().keys()


class Counts(Blobs):
    """Logs the loss and the sparsity alone."""

    def __init__(self):
        super().__init__()
        self.sparsity = Sparsity()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def on_validation_epoch_end(self):
        self.sparsity.update(self)
        self.log("sparsity", self.sparsity)


def test_a_module_that_logs_it_is_searched_on_its_own_metric(fit, make_trainer):
    module = fit(pruning := pruner(tolerance=0.5), module=Counts())
    assert pruning.report.monitor == "val_loss"
    (found,) = make_trainer().validate(module, module.trainer.val_dataloaders, verbose=False)
    assert found["sparsity"] == pytest.approx(pruning.report.sparsity) == pytest.approx(pruning.mask.sparsity)
    assert pruning.report.sparsity > 0
