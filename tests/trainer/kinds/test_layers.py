"""Networks of recurrent, attention and transposed layers, pruned and refitted in a fit; cells are named."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_roulette import Tree
from tests.support.fits import pruner
from tests.support.modules import Blobs


class Forecaster(Blobs):
    """Reads four vectors of four numbers, from both ends, in two layers."""

    kind: type[nn.RNNBase] = nn.LSTM

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.read = self.kind(4, 10, num_layers=2, batch_first=True, bidirectional=True)
        self.net = nn.Linear(20, 10)

    def forward(self, x):
        return self.net(self.read(x.view(-1, 4, 4))[0].mean(1))


class Gated(Forecaster):
    kind = nn.GRU


class Encoder(Blobs):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.look = nn.TransformerEncoderLayer(4, 2, 16, dropout=0.1, batch_first=True)
        self.net = nn.Linear(16, 10)

    def forward(self, x):
        return self.net(self.look(x.view(-1, 4, 4)).flatten(1))


class Decoder(Blobs):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.ConvTranspose1d(16, 8, 3), nn.BatchNorm1d(8), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.ConvTranspose1d(8, 2, 3, stride=2, padding=1), nn.Flatten())

    def forward(self, x):
        return self.net(x.unsqueeze(2))


@pytest.mark.parametrize("module", [Forecaster, Gated, Encoder, Decoder])
def test_every_weight_is_refitted(fit, module):
    pruning = pruner(tolerance=math.inf, refit="least_squares", tree=Tree(0.3, max_levels=2))
    pruned = fit(pruning, module=module(), max_epochs=2)
    report, dense = pruning.report, pruning.weights_at(0)
    assert (report.left_alone, report.not_refitted) == ({}, ())
    assert not any(level.undone for level in report.accepted)
    weights = {name: pruned.get_parameter(name) for name in pruning.mask}
    assert sum(int((one == 0).sum()) for one in weights.values()) == report.size - pruning.mask.survivors
    assert report.size == sum(one.numel() for one in weights.values()) > pruning.mask.survivors
    for name, weight in weights.items():
        kept = pruning.mask[name]
        assert torch.equal(weight != 0, kept)
        assert not torch.equal(weight[kept], dense[name][kept])


class Cells(Blobs):
    """Reads four vectors of four numbers by a cell."""

    def __init__(self):
        super().__init__()
        self.cell, self.net = nn.GRUCell(4, 10), nn.Linear(10, 10)

    def forward(self, x):
        state = None
        for one in x.view(-1, 4, 4).unbind(1):
            state = self.cell(one, state)
        return self.net(state)


def test_the_weights_of_a_cell_are_named_in_one_line_with_their_share(fit):
    pruning = pruner(tolerance=math.inf, refit="least_squares", tree=Tree(0.3, max_levels=1))
    fit(pruning, module=Cells(), max_epochs=1)
    share = (120 + 300) / (120 + 300 + 100)
    line = f"Not refitted: {share:.1%} of the prunable weights, in cell.weight_ih, cell.weight_hh"
    assert f"{line} (not supported for GRUCell)." in str(pruning.report)
