"""Conjugate gradients against exact solutions, and the choice between the two."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_roulette import Calibration, Mask, prunable_parameters
from lightning_roulette.refit import layerwise
from lightning_roulette.refit.gram import GramSums
from lightning_roulette.refit.matrices import kept_in_matrix, matrix_of
from lightning_roulette.refit.solvers import accuracy, fastest
from lightning_roulette.refit.solvers.cholesky import Cholesky
from lightning_roulette.refit.solvers.conjugate_gradient import Equations, conjugate_gradient
from lightning_roulette.refit.solvers.cost import most_steps
from lightning_roulette.refit.solvers.fastest import Fastest
from lightning_roulette.refit.solvers.supports import codes_of, supports_of
from tests.support.limits import set_limits
from tests.support.networks import numbers


def sums_of(x: torch.Tensor, y: torch.Tensor) -> GramSums:
    sums = GramSums()
    sums.add(x, y)
    return sums


def kept_of(seed: int, shape, density: float) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


WAYS = "most_steps", "most_steps_on_inverse"


@pytest.fixture(params=WAYS)
def way(request) -> str:
    """Conjugate gradients on the matrix, and on its inverse."""
    return request.param


def iterated(
    sums: GramSums,
    kept: torch.Tensor,
    start: torch.Tensor,
    damping: float,
    of_sampling: float = 0.0,
    way: str = "most_steps",
) -> torch.Tensor:
    """All outputs, solved by conjugate gradients, however many steps it takes; within a thousandth by default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "_OF_SAMPLING", of_sampling)
        for one in WAYS:
            most = 1e5 if one == way else 0.0
            patch.setattr(fastest, one, lambda kept, rows, most=most: torch.full(kept.shape[:2], most))
        patch.setattr(fastest.CholeskyPrepared, "solve", None)  # an output that is solved by a factor fails
        return Fastest(damping).init(sums).solve(kept, start)


def excess(sums: GramSums, found: torch.Tensor, exact: torch.Tensor) -> float:
    """How much larger the error of a layer is than that of the exact solution, as a share of it or of rounding."""
    known = max(sums.error(exact), sums.rounding * sums.mean_square)
    return 0.0 if known == 0 else (sums.error(found) - sums.error(exact)) / known


# How the inputs of a layer look, from a matrix of independent numbers, shape (groups, rows, inputs).
def decaying(x, power):
    """Inputs whose covariance has eigenvalues that fall with a power of their number."""
    scale = torch.arange(1, x.shape[2] + 1, dtype=x.dtype) ** (-power / 2)
    return (x * scale) @ torch.linalg.qr(numbers(x.shape[2], x.shape[2], seed=77)).Q


def duplicated(x):
    return torch.cat([x[..., ::2], x[..., ::2]], 2)[..., : x.shape[2]]


def dead(x):
    return x * (torch.arange(x.shape[2]) % 3 > 0)


KINDS = {
    "independent": lambda x: x,
    "after a ReLU": lambda x: torch.relu(x + 0.3),
    "decaying": lambda x: decaying(x, 2),
    "strongly decaying": lambda x: decaying(x, 5),
    "of two sizes": lambda x: x * torch.where(torch.arange(x.shape[2]) % 2 == 0, 1.0, 1e-3),
    "duplicated": duplicated,
    "dead": dead,
    "almost constant": lambda x: 1 + 1e-3 * x,
    "zero": lambda x: 0 * x,
}


@pytest.mark.parametrize("damping", [1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("rows", [20, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_a_layer_is_within_a_thousandth_of_the_exact_one(kind, rows, damping, way):
    x = KINDS[kind](numbers(2, rows, 60, seed=1))
    start = numbers(2, 8, 60, seed=2)
    sums = sums_of(x, x @ start.mT)
    for density in (0.2, 0.5, 0.9):
        kept = kept_of(3, start.shape, density)
        found = iterated(sums, kept, start, damping, way=way)
        assert not found[~kept].any()
        assert excess(sums, found, Cholesky(damping).init(sums).solve(kept, start)) <= 1e-3


@pytest.mark.parametrize("rows", [30, 500])
@pytest.mark.parametrize("kind", [*KINDS, "of very different sizes", "far from zero"])
def test_float32_products_are_exact_enough(kind, rows, way):
    kinds = {
        "of very different sizes": lambda x: x * torch.where(torch.arange(x.shape[2]) % 2 == 0, 1e4, 1e-4),
        "far from zero": lambda x: 1e3 + x,
    }
    x, start = (KINDS | kinds)[kind](numbers(2, rows, 60, seed=1)).float(), numbers(2, 8, 60, seed=2)
    y = x @ start.float().mT
    single, double = sums_of(x, y), sums_of(x.double(), y.double())
    for density in (0.2, 0.5, 0.9):
        kept = kept_of(3, start.shape, density)
        exact = Cholesky(1e-3).init(double).solve(kept, start)
        for found in (iterated(single, kept, start, 1e-3, way=way), Cholesky(1e-3).init(single).solve(kept, start)):
            allowed = 1.001 * double.error(exact) + 1e-7 * double.mean_square
            assert double.error(found) <= allowed
            assert abs(single.error(found) - double.error(found)) <= single.rounding * double.mean_square


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(list(KINDS)),
    seed=st.integers(0, 2**32 - 1),
    groups=st.integers(1, 3),
    rows=st.integers(2, 80),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 6),
    density=st.floats(0, 1),
    damping=st.sampled_from([1e-6, 1e-4, 1e-2, 1.0]),
    way=st.sampled_from(WAYS),
)
def test_the_error_of_any_layer_is_within_a_thousandth_of_the_exact_one(
    kind, seed, groups, rows, inputs, outputs, density, damping, way
):
    x, start = KINDS[kind](numbers(groups, rows, inputs, seed=seed)), numbers(groups, outputs, inputs, seed=seed + 1)
    sums, kept = sums_of(x, x @ start.mT), kept_of(seed, start.shape, density)
    found = iterated(sums, kept, start, damping, way=way)
    assert not found[~kept].any()
    assert excess(sums, found, Cholesky(damping).init(sums).solve(kept, start)) <= 1e-3


def layers_of(net: nn.Module, inputs: list[torch.Tensor], sparsity: float, monkeypatch) -> list:
    """Gram sums, masks and starts of the layers of a network in which the smallest weights are pruned."""
    found, fit = [], layerwise.Layerwise._fit

    def record(self, layer, sums, fitting):
        found.append((sums.fit, kept_in_matrix(layer, fitting.mask), matrix_of(layer, self.tensors)))
        fit(self, layer, sums, fitting)

    monkeypatch.setattr(layerwise.Layerwise, "_fit", record)
    weights = prunable_parameters(net)
    least = torch.cat([weight.detach().abs().flatten() for weight in weights.values()]).quantile(sparsity)
    Calibration(net, inputs).refit(Mask({name: weight.detach().abs() >= least for name, weight in weights.items()}))
    return found


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10))


def convolutions() -> nn.Module:
    body = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2), nn.ReLU()]
    return nn.Sequential(*body, nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 16, 10))


@pytest.fixture(params=[perceptron, convolutions], scope="module")
def trained(request) -> tuple[nn.Module, torch.Tensor]:
    """A network that classifies digits well, and their images."""
    images, classes = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(classes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = request.param()
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for chosen in torch.randint(len(x), (150, 64)):
            optimizer.zero_grad()
            cross_entropy(net(x[chosen]), y[chosen]).backward()
            optimizer.step()
    net.eval()
    assert (net(x).argmax(1) == y).float().mean() > 0.95
    return net, x


@pytest.mark.parametrize("images", [30, 300])  # fewer rows than inputs, and more
@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
def test_layers_of_trained_networks_are_within_a_thousandth(sparsity, images, trained, way, monkeypatch):
    net, x = trained
    layers = layers_of(net, [x[:images]], sparsity, monkeypatch)
    assert len(layers) >= 3
    for sums, kept, start in layers:
        for damping in (1e-5, 1e-3):
            found = iterated(sums, kept, start, damping, way=way)
            assert excess(sums, found, Cholesky(damping).init(sums).solve(kept, start)) <= 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [50, 150, 600])
def test_with_few_rows_a_layer_is_solved_as_well_as_other_rows_can_tell(kind, rows, way):
    made = KINDS[kind](numbers(1, rows + 20_000, 100, seed=4))
    start = numbers(1, 8, 100, seed=5)
    # outputs that depend on more than the inputs, as those of the dense network do
    wanted = made @ start.mT + 0.3 * (made @ start.mT).std() * numbers(1, rows + 20_000, 8, seed=6)
    sums, others = sums_of(made[:, :rows], wanted[:, :rows]), sums_of(made[:, rows:], wanted[:, rows:])
    for density in (0.2, 0.5, 0.9):
        kept = kept_of(3, start.shape, density)
        found = iterated(sums, kept, start, 1e-3, of_sampling=0.1, way=way)
        assert excess(others, found, Cholesky(1e-3).init(sums).solve(kept, start)) <= 0.1


@pytest.mark.parametrize("kind", [*KINDS, "far from zero"])
def test_few_rows_are_solved_without_sums_as_with_them(kind, monkeypatch):
    made = (KINDS | {"far from zero": lambda x: 100 + x})[kind](numbers(2, 2_060, 150, seed=4))
    start = numbers(2, 8, 150, seed=5)
    wanted = made @ start.mT + 0.3 * (made @ start.mT).std() * numbers(2, 2_060, 8, seed=6)
    rows, others = (made[:, :60].float(), wanted[:, :60].float()), sums_of(made[:, 60:], wanted[:, 60:])
    monkeypatch.setattr(fastest, "most_steps", lambda kept, rows: torch.full(kept.shape[:2], 1e5))
    monkeypatch.setattr(fastest, "most_steps_on_inverse", lambda kept, rows: torch.zeros(kept.shape[:2]))
    for density in (0.4, 0.9):
        kept, few, summed = kept_of(3, start.shape, density), sums_of(*rows), sums_of(*rows)
        assert summed.gram.shape == (2, 150, 150)
        found, by_sums = (Fastest(1e-3).init(sums).solve(kept, start) for sums in (few, summed))
        assert few.few is not None  # nothing was summed
        assert summed.few is None
        assert not found[~kept].any()
        # rounding decides after which step an output ends
        assert abs(others.error(found) - others.error(by_sums)) <= 0.05 * others.error(by_sums)


def test_few_rows_are_summed_where_a_thousandth_is_allowed():
    x, start = numbers(1, 40, 100).float(), numbers(1, 8, 100, seed=1)
    sums, kept = sums_of(x, x @ start.float().mT), kept_of(2, start.shape, 0.05)
    assert accuracy.allowed_share(kept.sum(2), 40).min() < 0.1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastest, "most_steps", lambda kept, rows: torch.full(kept.shape[:2], 1e5))
        Fastest(1e-3).init(sums).solve(kept, start)
    assert sums.few is None


def test_the_allowed_share_grows_as_rows_get_few():
    share = accuracy.allowed_share(torch.tensor([0, 1, 10, 100, 500, 1000, 2000]), 1000)
    assert share.tolist() == pytest.approx([1e-3, 1e-3, 0.1 * 0.01 / 0.99**2, 0.01 / 0.81, 0.2, 1, 1])
    assert accuracy.allowed_share(torch.tensor([0, 10]), 0).tolist() == [1e-3, 1.0]


def one_group(outputs: int = 30, inputs: int = 40, seed: int = 0) -> tuple[Equations, torch.Tensor]:
    """Equations of one group, and their exact solutions."""
    x, y = numbers(1, 100, inputs, seed=seed), numbers(1, 100, outputs, seed=seed + 1)
    sums, kept = sums_of(x, y), kept_of(seed, (1, outputs, inputs), 0.5)
    exact = Cholesky(1e-3).init(sums)
    ridge, power = float(exact.matrix.ridges[0]), sums.power[0]
    solution = exact.solve(kept, torch.zeros_like(kept, dtype=torch.float64))[0]
    return Equations(
        sums.gram[0], ridge, sums.cross[0].mT.contiguous(), kept[0], power, power, 1e-9, sums.rows
    ), solution


def test_outputs_are_solved_alone_as_together(monkeypatch):
    equations, solution = one_group()
    steps = torch.full((30,), 1000)
    found, solved = conjugate_gradient(equations, steps)
    assert solved.all()
    assert torch.allclose(found, solution, atol=1e-2)
    set_limits(monkeypatch, system_bytes=1)
    alone, solved = conjugate_gradient(equations, steps)
    assert solved.all()
    assert torch.allclose(alone, found, rtol=1e-9, atol=1e-12)
    assert len(list(equations.blocks())) == 30


def test_an_output_without_steps_left_is_given_up():
    equations, _ = one_group()
    steps = torch.where(torch.arange(30) % 2 == 0, 1, 1000)
    found, solved = conjugate_gradient(equations, steps)
    assert torch.equal(solved, torch.arange(30) % 2 == 1)
    together, _ = conjugate_gradient(equations, torch.full((30,), 1000))
    assert torch.allclose(found[solved], together[solved], rtol=1e-9, atol=1e-12)


def test_outputs_that_are_not_finite_end_the_iteration():
    equations, _ = one_group()
    equations.right[3] = math.nan
    found, solved = conjugate_gradient(equations, torch.full((30,), 10**6))
    assert solved.all()
    assert torch.equal(found.isnan().any(1), torch.arange(30) == 3)


@pytest.mark.parametrize("rows", [200, 2000])  # float32 and float64
def test_equal_sums_have_equal_solutions_under_any_precision(rows):
    x, start = torch.relu(numbers(1, rows, 300)), numbers(1, 300, 300, seed=1)
    sums, kept = sums_of(x, x @ start.mT), kept_of(2, start.shape, 0.6)
    assert most_steps(kept, rows).any()
    found, before = Fastest(1e-3).init(sums).solve(kept, start), torch.get_float32_matmul_precision()
    assert torch.equal(Fastest(1e-3).init(sums).solve(kept, start), found)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(Fastest(1e-3).init(sums).solve(kept, start), found)
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_steps_do_not_solve_in_time_a_factor_solves(monkeypatch):
    x, start = decaying(numbers(1, 300, 60), 6), numbers(1, 12, 60, seed=1)
    sums, kept = sums_of(x, x @ start.mT), kept_of(2, start.shape, 0.9)
    monkeypatch.setattr(fastest, "most_steps", lambda kept, rows: torch.full(kept.shape[:2], 10.0))
    exact = Cholesky(1e-6).init(sums).solve(kept, start)
    assert torch.allclose(Fastest(1e-6).init(sums).solve(kept, start), exact, rtol=1e-8, atol=1e-8)
    assert isinstance(Fastest(1e-7).init(sums), type(Cholesky(1e-7).init(sums)))


@pytest.mark.parametrize(
    ("outputs", "inputs", "density", "steps"),
    [
        (768, 3072, 0.5, True),
        (512, 4608, 0.2, True),
        (768, 3072, 0.05, False),  # small factors
        (3, 100, 0.5, False),  # little work either way
        (1, 3072, 0.999, True),  # one output does not pay for an inverse
    ],
)
def test_the_way_with_less_work_is_taken(outputs, inputs, density, steps):
    assert bool((most_steps(kept_of(0, (1, outputs, inputs), density), 10**6) > 0).any()) is steps


def test_outputs_that_share_their_inputs_share_a_factor():
    one = kept_of(0, (1, 1, 3072), 0.5)
    assert not most_steps(one.expand(1, 768, 3072), 10**6).any()


@given(st.lists(st.lists(st.booleans(), min_size=70, max_size=70), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_codes_are_equal_where_supports_are(rows):
    members = torch.tensor(rows)
    codes = codes_of(members)
    for one, code in zip(rows, codes, strict=True):
        assert [torch.equal(code, other) for other in codes] == [one == other for other in rows]
    numbers_of, sharing = supports_of(members.unsqueeze(0))
    assert sharing[numbers_of].tolist() == [rows.count(one) for one in rows]


def test_groups_share_no_support():
    _, sharing = supports_of(torch.ones(3, 4, 5, dtype=torch.bool))
    assert sharing.tolist() == [4, 4, 4]
