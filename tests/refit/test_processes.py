"""Several processes, each with a share of the batches, give the refit and the importances of one with all of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_roulette.large.processes import FailedElsewhere, Processes
from lightning_roulette.refit import fitting
from lightning_roulette.refit.inputs import Calibration
from lightning_roulette.refit.sensitivity import NoGradients
from lightning_roulette.refit.solvers import shared
from lightning_roulette.refit.solvers.cost import solve_cost, worth_sharing
from lightning_roulette.refit.solvers.fastest import FastestPrepared
from lightning_roulette.refit_settings import LeastSquares
from tests.support.networks import KINDS, case, known, mask_of, related, slow_but_for_a_few, state_of
from tests.support.shares import assert_close, in_processes
from tests.support.together import together

CHOOSE = LeastSquares(choose=True)


@pytest.fixture
def everything_shared(monkeypatch):
    """Layers as small as these are solved in shares, too."""
    for module in (shared, fitting):
        monkeypatch.setattr(module, "worth_sharing", lambda work, entries, ranks: ranks > 1)


@pytest.mark.parametrize(
    ("kind", "how", "ranks"),
    [
        *(slow_but_for_a_few(kind, LeastSquares(), 2) for kind in KINDS),
        *((kind, CHOOSE, 3) for kind in ("mlp", "conv", "choosy")),
    ],
)
def test_a_refit_in_shares_is_that_of_one_process(kind, how, ranks, everything_shared):
    net, batches, mask = case(kind, sizes=(48, 40, 48, 40, 56)[: 5 if ranks == 2 else 2])
    expected = Calibration(net, batches).refit(mask, how)
    for found in in_processes(ranks, net, batches, lambda calibration: calibration.refit(mask, how)):
        assert found.mask_from(mask) == expected.mask_from(mask)
        assert found.undone == expected.undone
        assert_close(found.values, expected.values)


@pytest.mark.parametrize("word", ["sensitivity", "activation", "obs"])
@pytest.mark.parametrize("kind", ["mlp", "conv", "attention", "choosy", "late"])
def test_importances_in_shares_are_those_of_one_process(kind, word):
    net, batches, mask = case(kind, sizes=(48, 40, 48))
    of_all = Calibration(net, batches)
    if word != "sensitivity" and (left := of_all.left_alone(mask, LeastSquares())):
        mask = mask_of(net, without=tuple(left))
    expected = of_all.scales(word, mask, {})
    for found in in_processes(2, net, batches, lambda calibration: calibration.scales(word, mask, {})):
        assert_close(found, expected)


def test_several_refits_of_one_calibration_are_those_of_one_process():
    net, batches, mask = case("mlp")
    other = mask_of(net, 0.3, seed=5)

    def ask(calibration):
        return [calibration.refit(one).values for one in (mask, other, mask)]

    expected = ask(Calibration(net, batches))
    for found in in_processes(2, net, batches, ask):
        for one, two in zip(found, expected, strict=True):
            assert_close(one, two)


def test_rows_are_chosen_by_the_number_of_a_batch_among_those_of_all_processes():
    net, batches, mask = case("mlp", sizes=(90, 80, 70))
    expected = Calibration(net, batches, rows=60, seed=3).refit(mask)
    other = Calibration(net, batches, rows=60, seed=4).refit(mask)
    assert not torch.allclose(expected.values["0.weight"], other.values["0.weight"], rtol=1e-6)
    for found in in_processes(2, net, batches, lambda calibration: calibration.refit(mask), rows=60, seed=3):
        assert_close(found.values, expected.values)


def test_each_process_runs_its_own_batches_and_solves_its_own_outputs(monkeypatch, everything_shared):
    net, batches, mask = case("mlp", sizes=(40, 41, 42, 43))
    solved, solve = [], FastestPrepared.solve
    monkeypatch.setattr(
        FastestPrepared, "solve", lambda self, kept, start: solved.append(kept.shape[1]) or solve(self, kept, start)
    )
    in_processes(2, net, batches, lambda calibration: calibration.refit(mask))
    assert sorted(solved) == [2, 2, 4, 4, 6, 6]


def test_each_process_chooses_for_its_own_outputs(monkeypatch, everything_shared):
    net, batches, mask = case("mlp", sizes=(40, 41, 42, 43))
    asked, chosen = [], fitting.chosen
    monkeypatch.setattr(fitting, "chosen", lambda problem, kept: asked.append(kept.shape[1]) or chosen(problem, kept))
    in_processes(2, net, batches, lambda calibration: calibration.refit(mask, CHOOSE))
    assert sorted(asked) == [2, 2, 4, 4, 6, 6]


def test_small_layers_are_solved_by_every_process(monkeypatch):
    net, batches, mask = case("mlp")
    solved, solve = [], FastestPrepared.solve
    monkeypatch.setattr(
        FastestPrepared, "solve", lambda self, kept, start: solved.append(kept.shape[1]) or solve(self, kept, start)
    )
    in_processes(2, net, batches, lambda calibration: calibration.refit(mask))
    assert sorted(solved) == [4, 4, 8, 8, 12, 12]


def test_large_layers_are_worth_sharing_and_small_ones_are_not():
    some = torch.rand(1, 200, 2000, generator=torch.Generator().manual_seed(0)) < 0.3
    few = some[:, :10, :100]
    assert worth_sharing(solve_cost(some, 10**6), some.numel(), 2)
    assert not worth_sharing(solve_cost(some, 10**6), some.numel(), 1)
    assert not worth_sharing(solve_cost(few, 10**6), few.numel(), 2)


def test_a_process_without_a_batch_joins():
    net, batches, mask = case("conv", sizes=(48,))
    expected = Calibration(net, batches).refit(mask)
    for found in in_processes(3, net, batches, lambda calibration: calibration.refit(mask)):
        assert_close(found.values, expected.values)


def test_no_batch_at_all_is_refused():
    for found in in_processes(2, nn.Linear(4, 2), [], lambda calibration: calibration):
        assert isinstance(found, ValueError)
        assert "batches is empty" in str(found)


class Breaks(nn.Module):
    """Fails on one batch, from some call on."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.a, self.b, self.left = nn.Linear(4, 6), nn.Linear(6, 3), calls

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if len(x) == 41:
            self.left -= 1
            if self.left < 0:
                raise LookupError("broken")
        return self.b(h)


@pytest.mark.parametrize("calls", [0, 1])
def test_an_error_of_one_process_ends_all(calls):
    net, batches = known(Breaks(calls)), [related(size, 4, seed=size) for size in (40, 41, 42, 43)]
    mask, before = mask_of(net), state_of(net)[0]

    def ask(calibration):
        try:
            return calibration.refit(mask)
        finally:
            assert state_of(calibration._module)[0] == before

    first, second = in_processes(2, net, batches, ask, cache_bytes=0)
    assert isinstance(first, FailedElsewhere)
    assert isinstance(second, LookupError)


class Wayward(nn.Module):
    """Leaves out a layer on one batch where the layer before it is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if len(x) == 41 and not self.a.weight.all():
            return self.c(h)
        return self.c(torch.tanh(self.b(self.norm(h))))


def test_a_layer_that_one_process_does_not_reach_is_left_to_all_as_it_was():
    net, batches = known(Wayward()), [related(size, 4, seed=size) for size in (40, 41, 42, 43)]
    mask = mask_of(net)
    expected = Calibration(net, batches).refit(mask)
    assert list(expected.undone) == ["b.weight"]
    for found in in_processes(2, net, batches, lambda calibration: calibration.refit(mask)):
        assert found.undone == expected.undone
        assert_close(found.values, expected.values)


class Inferring(nn.Module):
    """Runs without derivatives on one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        with torch.inference_mode(len(x) == 41):
            return self.b(torch.tanh(self.a(x)))


def test_all_processes_say_that_there_are_no_derivatives_if_one_has_none():
    net, batches = known(Inferring()), [related(size, 4, seed=size) for size in (40, 41)]
    mask = mask_of(net)
    for found in in_processes(2, net, batches, lambda calibration: calibration.scales("sensitivity", mask, {})):
        assert isinstance(found, NoGradients)
        assert "inference mode" in str(found)


def test_networks_that_differ_are_refused():
    nets = [known(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))), known(nn.Sequential(nn.Linear(4, 6)))]

    def one(rank, add):
        return Calibration(nets[rank], [related(40, 4)], processes=Processes(rank, 2, add)).refit(mask_of(nets[rank]))

    for found in together(2, one):
        assert isinstance(found, ValueError)
        assert "differ between processes" in str(found)
