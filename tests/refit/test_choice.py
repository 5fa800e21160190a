"""Which weights of an output stay: counts, the error against every possible choice, and networks that come out."""

from __future__ import annotations

import math
from itertools import combinations, product
from statistics import mean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_roulette import Calibration, LeastSquares, Mask
from lightning_roulette.network.parameters import prunable_parameters
from lightning_roulette.refit.gram import GramSums
from lightning_roulette.refit.solvers import choice
from lightning_roulette.refit.solvers.choice import Problem, chosen, largest
from lightning_roulette.refit.solvers.cholesky import Cholesky, DampedGram
from tests.support.networks import numbers

CHOOSE = LeastSquares(choose=True)


def sums_of(x: torch.Tensor, y: torch.Tensor) -> GramSums:
    sums = GramSums()
    sums.add(x, y)
    return sums


def problem(seed: int, groups=1, rows=60, inputs=8, outputs=1, damping=1e-3, biased=False) -> Problem:
    """A layer with inputs that depend on one another; the last one is a bias if `biased`."""
    x = numbers(groups, rows, inputs, seed=seed) @ numbers(groups, inputs, inputs, seed=seed + 1000)
    dense = numbers(groups, outputs, inputs, seed=seed + 2000)
    free = torch.ones(dense.shape, dtype=torch.bool)
    if biased:
        x[..., -1] = 1
        free[..., -1] = False
    sums = sums_of(x, x @ dense.mT)
    return Problem(sums, DampedGram(sums.gram, damping).ridges, dense, free, dense.shape[1])


def first(problem: Problem, count: int) -> torch.Tensor:
    """As many of the free entries, the largest ones of the layer, and all that are not free."""
    flat = problem.dense.abs().masked_fill(~problem.free, -1.0).flatten()
    return (
        torch.zeros(len(flat), dtype=torch.bool).index_fill(0, flat.topk(count).indices, True).view_as(problem.free)
        | ~problem.free
    )


def solved(problem: Problem, kept: torch.Tensor, damping=1e-3) -> float:
    """The damped error that is left after the kept entries are solved."""
    start = torch.where(kept, problem.dense, 0.0)
    return problem.error(Cholesky(damping).init(problem.sums).solve(kept, start))


def every(problem: Problem, counts: list[int]):
    """All choices with so many entries of each output."""
    rows = problem.free[0]
    places = [combinations(free.nonzero().flatten().tolist(), count) for free, count in zip(rows, counts, strict=True)]
    for some in product(*places):
        kept = ~problem.free
        for row, inputs in enumerate(some):
            kept[0, row, list(inputs)] = True
        yield kept


@pytest.mark.parametrize(("outputs", "biased"), [(1, False), (2, True)])
def test_the_error_is_close_to_that_of_the_best_of_all_choices(outputs, biased):
    ours, given_first = [], []
    for seed in range(8):
        layer = problem(seed, inputs=8 if outputs == 1 else 4, outputs=outputs, biased=biased)
        for count in (2, 3, 5):
            kept = first(layer, count)
            counts = (kept & layer.free)[0].sum(1).tolist()
            errors = torch.tensor([solved(layer, one) for one in every(layer, counts)], dtype=torch.float64)
            found = solved(layer, chosen(layer, kept))
            assert found >= float(errors.min()) * (1 - 1e-9)
            ours.append(math.log(found / float(errors.min())))
            given_first.append(math.log(solved(layer, kept) / float(errors.min())))
    assert math.exp(mean(ours)) < 1.25
    assert mean(ours) < mean(given_first) / 3


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    groups=st.integers(1, 3),
    rows=st.integers(1, 30),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 4),
    share=st.floats(0, 1),
    damping=st.sampled_from([0.0, 1e-3, 1.0]),
    biased=st.booleans(),
    scale=st.sampled_from([1e-30, 1.0, 1e25]),
)
def test_the_count_is_exact_and_what_is_not_free_stays(
    seed, groups, rows, inputs, outputs, share, damping, biased, scale
):
    layer = problem(seed, groups, rows, inputs, outputs, damping, biased and inputs > 1)
    x = numbers(groups, rows, inputs, seed=seed) * scale
    x[..., seed % inputs] = x[..., 0]  # inputs that are equal
    x[..., (seed + 1) % inputs] *= seed % 2  # an input that is always zero
    sums = sums_of(x, x @ layer.dense.mT)
    layer = Problem(sums, DampedGram(sums.gram, damping).ridges, layer.dense, layer.free, layer.outputs)
    kept = first(layer, round(share * int(layer.free.sum())))
    found = chosen(layer, kept)
    assert torch.equal(found.sum(2), kept.sum(2))
    assert torch.equal(found[~layer.free], kept[~layer.free])
    assert torch.equal(found, chosen(layer, kept))


def test_entries_that_are_not_free_may_be_pruned():
    layer = problem(1, inputs=6, outputs=3)
    layer.free[:, 0] = False
    kept = first(layer, 5)
    kept[:, 0] = torch.tensor([True, False, False, True, False, False])
    found = chosen(layer, kept)
    assert torch.equal(found[:, 0], kept[:, 0])
    assert found.sum() == kept.sum()


@pytest.mark.parametrize("count", [0, 24])
def test_nothing_and_everything_is_no_choice(count):
    layer = problem(1, inputs=8, outputs=3)
    kept = first(layer, count)
    assert chosen(layer, kept) is kept


def test_of_equal_values_the_first_are_the_largest():
    values = torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0, 3.0]).expand(1, 3, 6)
    among = torch.tensor([True, True, True, True, True, False]).expand(1, 3, 6)
    found = largest(values, among, torch.tensor([2, 4, 0]).view(1, 3, 1))
    assert found[0].int().tolist() == [[0, 1, 1, 0, 0, 0], [1, 1, 1, 0, 1, 0], [0] * 6]


def test_inverses_pay_unless_a_layer_has_many_more_inputs_than_outputs():
    assert choice.inverses_pay(768, 768, 3, 240)
    assert choice.inverses_pay(4608, 512, 3, 240)
    assert not choice.inverses_pay(4096, 16, 3, 240)


def test_steps_choose_as_well_as_inverses(monkeypatch):
    ours = []
    for seed in range(10):
        layer = problem(seed, inputs=40, outputs=6, rows=200)
        kept = first(layer, 60)
        errors = []
        for pays in (True, False):
            monkeypatch.setattr(choice, "inverses_pay", lambda *_, pays=pays: pays)
            errors.append(solved(layer, chosen(layer, kept)))
        ours.append(errors[1] / errors[0])
    assert mean(ours) < 1.05


class Grouped(nn.Sequential):
    """Convolutions with and without groups, a batch normalisation and a linear layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8, bias=False),
            nn.ReLU(),
            nn.Conv2d(8, 6, 1, groups=2),
            nn.Flatten(),
            nn.Linear(96, 10),
        )


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Grouped().eval()


def batches(count=2, size=40) -> list[torch.Tensor]:
    """Images whose pixels are like their neighbours."""
    return [numbers(size, 3, 6, 6, seed=seed).cumsum(2).cumsum(3).float() for seed in range(count)]


def masks(net: nn.Module, sparsity: float) -> tuple[dict[str, torch.Tensor], Mask]:
    weights = {name: weight.detach() for name, weight in prunable_parameters(net).items()}
    return weights, Mask({name: one.abs() > one.abs().quantile(sparsity) for name, one in weights.items()})


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_a_refit_returns_the_mask_that_it_chose(sparsity):
    net = network()
    _, mask = masks(net, sparsity)
    before = {name: one.clone() for name, one in net.state_dict().items()}
    found = Calibration(net, batches()).refit(mask, CHOOSE)
    assert found.mask is not None
    assert found.mask.counts == mask.counts
    assert found.mask != mask
    for name, kept in found.mask.items():
        assert not found.values[name][~kept].any()
        assert found.values[name][kept].all()
        assert torch.equal(kept.flatten(1).sum(1), mask[name].flatten(1).sum(1))
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())


def test_a_choice_lowers_the_error_of_the_network():
    net, inputs = network(), batches(4)
    wanted = net(inputs[3]).detach()
    ratios = []
    for sparsity in (0.4, 0.6, 0.8):
        _, mask = masks(net, sparsity)
        errors = []
        for how in (LeastSquares(), CHOOSE):
            found = Calibration(net, inputs[:3]).refit(mask, how)
            got = torch.func.functional_call(net, dict(found.values), (inputs[3],)).detach()
            errors.append(float((got - wanted).square().mean()))
        ratios.append(errors[1] / errors[0])
    assert max(ratios) < 0.9


def test_only_allowed_weights_are_chosen():
    net = network()
    _, parent = masks(net, 0.5)
    _, mask = masks(net, 0.8)
    assert mask <= parent
    calibration = Calibration(net, batches())
    anywhere, within = calibration.refit(mask, CHOOSE), calibration.refit(mask, CHOOSE, parent)
    assert within.mask is not None
    assert within.mask <= parent
    assert within.mask.counts == mask.counts
    assert not anywhere.mask_from(mask) <= parent
    assert calibration.refit(mask, CHOOSE, mask).mask is None


def test_without_choose_the_mask_stays():
    net = network()
    _, mask = masks(net, 0.8)
    calibration = Calibration(net, batches())
    assert calibration.refit(mask, LeastSquares()).mask is None
    assert calibration.refit(mask, "batch_norm").mask is None


def test_a_choice_that_is_worse_is_not_kept(monkeypatch):
    net = network()
    _, mask = masks(net, 0.6)
    calibration = Calibration(net, batches())
    plain = calibration.refit(mask, LeastSquares())
    smallest = lambda values, among, counts: largest(values.amax() - values, among, counts)  # noqa: E731
    monkeypatch.setattr(choice, "largest", smallest)
    found = calibration.refit(mask, CHOOSE)
    assert found.mask is None
    assert all(torch.equal(value, plain.values[name]) for name, value in found.values.items())


def test_layers_that_are_left_alone_or_whose_refit_is_undone_keep_the_drawn_mask():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    net[2].weight = net[0].weight  # tied
    _, mask = masks(net, 0.5)
    found = Calibration(net, [numbers(60, 6, seed=1).float()]).refit(mask, CHOOSE)
    assert torch.equal(found.mask_from(mask)["0.weight"], mask["0.weight"])
    broken = [numbers(60, 6, seed=1).float()]
    broken[0][0, 0] = math.inf
    found = Calibration(net, broken).refit(mask, CHOOSE)
    assert found.undone
    assert found.mask is None


def test_the_choice_for_some_outputs_is_that_for_all_and_made_in_the_same_way(monkeypatch):
    layer, some = problem(5, rows=200, inputs=40, outputs=6), torch.tensor([1, 4, 5])
    layer.dense[:, 2] *= 1e3
    kept, asked = first(layer, 60), []
    monkeypatch.setattr(choice, "inverses_pay", lambda inputs, outputs, *_: asked.append(outputs) or outputs > 3)
    whole = chosen(layer, kept)
    assert not torch.equal(whole, kept)
    assert torch.equal(chosen(layer.of_outputs(some), kept[:, some]), whole[:, some])
    assert set(asked) == {6}
