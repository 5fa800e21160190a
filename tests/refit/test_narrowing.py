"""Networks whose weights a refit rounds: every kind of layer ends on its grid, in the order of depth."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_roulette import Calibration, Codebook, LeastSquares, Mask, load_compressed, save_compressed
from lightning_roulette.large.processes import Processes
from lightning_roulette.refit import narrowing
from lightning_roulette.refit.solvers import rounds
from tests.support.grids import is_on_grid
from tests.support.networks import KINDS, case, changed, known, mask_of, numbers, related
from tests.support.together import together


def mlp() -> nn.Module:
    return known(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 5)))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        *((kind, "int8") for kind in KINDS),
        *((kind, Codebook(3)) for kind in ("mlp", "decoder", "attention", "gru")),
        *((kind, "float16") for kind in ("conv", "lstm")),
    ],
)
def test_all_weights_are_rounded_and_no_survivor_is_lost(kind, values):
    net, batches, mask = case(kind)
    plain = Calibration(net, batches).refit(mask)
    found = Calibration(net, batches).refit(mask, LeastSquares(values=values))
    for name, kept in mask.items():
        assert is_on_grid(found.values[name], values), name
        assert not is_on_grid(plain.values[name], values) or not int(kept.sum()) > 8
        assert torch.equal(found.values[name] != 0, kept)
    assert found.values.keys() == plain.values.keys()


def test_a_rounded_refit_is_closer_than_rounding_to_the_nearest_values():
    net = mlp()
    mask = mask_of(net, 0.4)
    batches = [related(200, 20, seed=seed) for seed in range(3)]
    fresh = related(200, 20, seed=9)
    calibration = Calibration(net, batches)
    plain = calibration.refit(mask).values
    near = {**plain, **{name: narrowing.Narrowing(Codebook(3)).nearest(plain[name]) for name in mask}}
    ours, int8 = (calibration.refit(mask, LeastSquares(values=values)).values for values in (Codebook(3), "int8"))

    def error(found) -> float:
        return float((changed(net, mask, found)(fresh) - net(fresh)).square().mean().detach())

    assert error(plain) < error(near)
    assert error(ours) - error(plain) < 0.5 * (error(near) - error(plain))
    assert error(int8) < 1.05 * error(plain)


def test_each_layer_is_solved_on_inputs_from_rounded_layers():
    """The biases of the last layer, which are not rounded, centre the error of the rounded network."""
    net, batches = mlp(), [related(200, 20, seed=seed) for seed in range(2)]
    mask = mask_of(net, 0.4)
    how = LeastSquares(values=Codebook(3), damping=1e-6)
    found = changed(net, mask, Calibration(net, batches).refit(mask, how).values)
    fitted = [batch[:175] for batch in batches]  # the rest judges the fit
    change = torch.cat([found(batch) - net(batch) for batch in fitted]).detach()
    assert float(change.square().mean()) > 1e-6
    assert float(change.mean(0).abs().max()) < 1e-3 * float(change.square().mean().sqrt())


def test_what_no_refit_reaches_and_what_is_undone_is_rounded_to_the_nearest_values():
    net, batches, mask = case("late")
    calibration = Calibration(net, batches)
    how = LeastSquares(values="int8")
    left = calibration.left_alone(mask, how)
    assert left
    found = calibration.refit(mask, how).values
    for name in left:
        dense = torch.where(mask[name], net.get_parameter(name).detach(), 0.0)
        assert torch.equal(found[name], narrowing.Narrowing("int8").nearest(dense))


def test_inputs_that_are_not_finite_round_to_the_nearest_values():
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    batch = related(100, 6)
    batch[3, 2] = torch.inf
    mask = mask_of(net)
    found = Calibration(net, [batch]).refit(mask, LeastSquares(values="int8"))
    assert set(found.undone) == {"0.weight", "2.weight"}
    for name, kept in mask.items():
        near = narrowing.Narrowing("int8").nearest(torch.where(kept, net.get_parameter(name).detach(), 0.0))
        assert torch.equal(found.values[name], near)


@pytest.mark.parametrize("values", ["float16", "int8", Codebook(3), Codebook(8)])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_rounded_without_inputs_is_what_a_file_rounds_to(values, kind, tmp_path):
    weight = torch.where(numbers(20, 30, seed=1).abs() > 0.5, numbers(20, 30), 0.0).to(kind)
    save_compressed({"weight": weight}, tmp_path / "small.lrw", values)
    near = narrowing.Narrowing(values).nearest(weight)
    assert torch.equal(near, load_compressed(tmp_path / "small.lrw")["weight"])
    assert torch.equal(narrowing.Narrowing(values).nearest(near), near)


def test_biases_are_not_rounded_even_if_they_are_pruned():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    mask = Mask({**mask_of(net), "0.bias": torch.arange(8) < 5})
    found = Calibration(net, [related(100, 6)]).refit(mask, LeastSquares(values=Codebook(3))).values
    assert torch.equal(found["0.bias"] != 0, mask["0.bias"])
    assert len(found["0.bias"].unique()) == 6
    assert narrowing.Narrowing("int8").nearest(bias := numbers(5)) is bias


def test_a_network_that_is_pruned_already_is_rounded_by_its_own_zeros():
    net, batches = mlp(), [related(200, 20, seed=seed) for seed in range(2)]
    mask = mask_of(net, 0.4)
    slim = changed(net, mask, Calibration(net, batches).refit(mask).values)
    own = Mask({name: slim.get_parameter(name).detach() != 0 for name in mask})
    found = changed(slim, own, Calibration(slim, batches).refit(own, LeastSquares(values="int8")).values)
    change = torch.cat([(found(batch) - slim(batch)).flatten() for batch in batches]).detach()
    assert all(is_on_grid(found.get_parameter(name).detach(), "int8") for name in mask)
    assert 0 < float(change.square().mean()) < 0.05 * float(slim(batches[0]).var().detach())


@pytest.mark.parametrize(
    ("kind", "values", "shared"),
    [
        ("mlp", Codebook(3), False),
        pytest.param("conv", "int8", True, marks=pytest.mark.slow),
        pytest.param("attention", Codebook(3), True, marks=pytest.mark.slow),
    ],
)
def test_processes_round_alike_and_as_one_process(kind, values, shared, monkeypatch):
    monkeypatch.setattr(rounds, "worth_sharing", lambda work, entries, ranks: shared and ranks > 1)
    net, batches, mask = case(kind, sizes=(48, 40, 48))
    how = LeastSquares(values=values)
    nets = [case(kind)[0] for _ in range(2)]

    def one(rank, add):
        processes = Processes(rank, 2, add)
        return Calibration(nets[rank], processes.share(batches), processes=processes).refit(mask, how).values

    expected = Calibration(net, batches).refit(mask, how).values
    first, second = together(2, one)
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert name not in mask or is_on_grid(value, values)
        if name in mask:  # rounding may decide otherwise between codes of nearly equal cost
            dense = torch.where(mask[name], net.get_parameter(name).detach(), 0.0)
            alike = torch.isclose(value, expected[name]).double().mean()
            assert alike > 0.9 or torch.dist(value, expected[name]) < torch.dist(value, dense)
