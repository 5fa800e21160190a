"""Calibrations of several processes, each with a share of the batches."""

from __future__ import annotations

from copy import deepcopy

import torch

from lightning_roulette.large.processes import Processes
from lightning_roulette.refit.inputs import Calibration
from tests.support.networks import state_of
from tests.support.together import together


def in_processes(ranks, net, batches, ask, **options):
    """What `ask` returns or raises in each process, given a calibration on its share of the batches."""

    def one(rank, add):
        processes = Processes(rank, ranks, add)
        return ask(Calibration(nets[rank], processes.share(batches), processes=processes, **options))

    nets = [deepcopy(net) for _ in range(ranks)]
    found = together(ranks, one)
    assert all(state_of(other)[0] == state_of(net)[0] for other in nets)
    return found


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-9), name
