"""Memory of live tensors is counted once for each storage, as long as it lives."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import relu

from lightning_roulette.large.live import LiveBytes

SIZE = 100 * 4


def test_only_what_is_still_held_is_counted():
    with LiveBytes() as live:
        x = torch.ones(100)
        assert live.total() == SIZE
        y = x + 1
        assert live.total() == 2 * SIZE
        x = relu(y) * 2
        assert live.total() == 2 * SIZE
    del y
    assert live.total() == SIZE
    del x
    assert live.total() == 0


def test_views_count_with_what_they_view():
    outside = torch.ones(100)
    with LiveBytes() as live:
        parts = outside.split(10), outside.view(10, 10), outside.view(10, 10).mT, outside[3:]
        assert live.total() == 0
        x = outside + 1
        half, rest = x.split(50)
        x.add_(half.sum())
        assert live.total() == SIZE
        del x, half
        assert live.total() == SIZE
    assert parts
    assert rest is not None


def test_several_results_and_the_state_of_a_module_count():
    net = nn.LSTM(3, 4)
    inputs = torch.ones(5, 2, 3)
    with LiveBytes() as live:
        output, state = net(inputs)
        values, order = inputs.sort()
    assert live.total() >= sum(one.nbytes for one in (output, *state, values, order))
    sparse = torch.eye(3).to_sparse()
    with LiveBytes() as live:
        assert (sparse * 2).is_sparse
