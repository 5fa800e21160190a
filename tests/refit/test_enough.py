"""A refit and a sensitivity run only as many batches as have enough rows."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from lightning_roulette.refit.inputs import Calibration
from lightning_roulette.refit_settings import LeastSquares
from tests.support.networks import known, mask_of
from tests.support.shares import assert_close, in_processes

POSITIONS = 64


class Texts(nn.Module):
    """Two layers on each of 64 positions of a sample, and one on all of some batches."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.pooled = nn.Linear(4, 6), nn.Linear(6, 3), pooled

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h.mean(1) if self.pooled else h)


class Choosy(Texts):
    """Does not call its last layer on the first batch."""

    def forward(self, x):
        return torch.tanh(self.a(x)) if x[0, 0, 0] == 0 else super().forward(x)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6), nn.Conv1d(6, 3, 1)

    def forward(self, x):
        return self.b(torch.relu(self.norm(self.a(x))))


def texts(batches: int, samples: int = 64, positions: int = POSITIONS) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    mixed = torch.randn(4, 4, generator=chance)
    found = [torch.randn(samples, positions, 4, generator=chance) @ mixed for _ in range(batches)]
    found[0][0, 0, 0] = 0
    return found


def counted(net: nn.Module) -> list[int]:
    runs: list[int] = []
    net.register_forward_pre_hook(lambda _, given: runs.append(len(given[0])))
    return runs


def ready(net: nn.Module):
    net = known(net).float()
    return net, mask_of(net)


def alike(one, other) -> bool:
    return one.undone == other.undone and all(torch.equal(one.values[name], other.values[name]) for name in one.values)


def test_batches_with_four_times_the_rows_that_a_layer_needs_are_enough(caplog):
    caplog.set_level(logging.INFO)
    (net, mask), batches = ready(Texts()), texts(8)
    expected = Calibration(net, batches[:4]).refit(mask)  # 4 * 64 * 64 rows are four times 4,096
    assert caplog.messages == []
    runs, calibration = counted(net), Calibration(net, batches)
    calibration.others(mask, LeastSquares())
    assert len(runs) == 1 + 4  # rows of the first batch are chosen again
    calibration.refit(mask)
    runs.clear()
    assert alike(calibration.refit(mask), expected)
    assert len(runs) == 4
    assert caplog.messages == [
        "a refit runs 4 of 8 calibration batches, which have four times the rows that each layer needs."
    ]


@pytest.mark.parametrize(
    ("net", "options"),
    [
        (Texts(pooled=True), {}),  # a sample is a row of its last layer
        (Choosy(), {}),
        (Texts(), {"rows": 100}),
    ],
)
def test_all_batches_are_run_if_they_may_be_needed(net, options, caplog):
    caplog.set_level(logging.INFO)
    (net, mask), batches = ready(net), texts(8)
    runs, calibration = counted(net), Calibration(net, batches, **options)
    calibration.others(mask, LeastSquares())
    assert len(runs) == 8
    assert caplog.messages == []


@pytest.mark.parametrize(("positions", "enough"), [(2**11, 2), (2**10, 4)])
def test_running_statistics_need_more_rows(positions, enough):
    (net, mask), batches = ready(Normed()), [one.mT.contiguous() for one in texts(4, 64, positions)]
    runs, calibration = counted(net), Calibration(net, batches)
    calibration.refit(mask, "batch_norm")
    runs.clear()
    found = calibration.refit(mask, "batch_norm")
    assert len(runs) == enough
    assert alike(found, Calibration(net, batches[:enough]).refit(mask, "batch_norm"))


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_processes_share_the_batches_that_are_enough(ranks):
    (net, mask), batches = ready(Texts()), texts(8)
    net, batches = net.double(), [batch.double() for batch in batches]
    expected = Calibration(net, batches).refit(mask)
    for found in in_processes(ranks, net, batches, lambda calibration: calibration.refit(mask)):
        assert_close(found.values, expected.values)


@pytest.mark.parametrize("batches", [2, 8])
def test_a_sensitivity_needs_rows_of_outputs(batches):
    (net, mask), data = ready(Texts()), texts(batches)
    expected = Calibration(net, data[:4]).scales("sensitivity", mask, {})  # 4 * 64 * 64 rows are 16,384
    runs, calibration = counted(net), Calibration(net, data)
    found = calibration.scales("sensitivity", mask, {})
    assert len(runs) == 2 * min(batches, 4)
    assert all(torch.equal(found[name], expected[name]) for name in mask)


@pytest.mark.parametrize("net", [Texts(pooled=True), Choosy()])
def test_a_sensitivity_takes_all_samples_if_they_may_be_needed(net):
    (net, mask), data = ready(net), texts(8)
    runs = counted(net)
    Calibration(net, data).scales("sensitivity", mask, {})
    assert len(runs) == 2 * 8


def test_attention_counts_for_its_projections():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.b = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(self.attention(x, x, x, need_weights=False)[0])

    (net, mask), data = ready(Attends()), texts(8)
    runs = counted(net)
    Calibration(net, data).scales("sensitivity", mask, {})
    assert len(runs) == 2 * 4


def test_processes_share_the_samples_that_are_enough():
    (net, mask), data = ready(Texts()), [batch.double() for batch in texts(8)]
    net = net.double()
    expected = Calibration(net, data).scales("sensitivity", mask, {})
    for found in in_processes(3, net, data, lambda calibration: calibration.scales("sensitivity", mask, {})):
        assert_close(found, expected)
