"""The laws of every solver against NumPy, and the cost of removing an input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette.refit.gram import GramSums
from lightning_roulette.refit.solvers import cholesky
from lightning_roulette.refit.solvers.cholesky import Cholesky, inverse_diagonals
from lightning_roulette.refit.solvers.fastest import Fastest
from tests.support.exact import exact_diagonals, exact_fit
from tests.support.limits import set_limits
from tests.support.networks import numbers


@pytest.fixture(params=[Cholesky, Fastest], scope="module")
def solver(request):
    """Each solver. A new one is one more parameter."""
    return request.param


def problem(seed: int, groups=2, rows=60, inputs=9, outputs=5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs that depend on one another, wanted outputs, and a matrix to start from."""
    mixed = numbers(groups, rows, inputs, seed=seed) @ numbers(groups, inputs, inputs, seed=seed + 1000)
    y, start = numbers(groups, rows, outputs, seed=seed + 2000), numbers(groups, outputs, inputs, seed=seed + 3000)
    return mixed / math.sqrt(inputs), y, start


def degenerate(seed: int, rows: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two equal columns, one that is a sum of others, and two of zeros."""
    x, y, start = problem(seed, 2, rows, 9, 6)
    x[..., 3] = x[..., 2]
    x[..., 4] = x[..., 0] + x[..., 1]
    x[..., 6] = x[..., 8] = 0
    return x, y, start


def sums_of(x: torch.Tensor, y: torch.Tensor) -> GramSums:
    sums = GramSums()
    sums.add(x, y)
    return sums


def some_kept(seed: int, shape, density: float) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def kept_of(support: float | str, shape) -> torch.Tensor:
    if isinstance(support, float):
        return some_kept(1, shape, support)
    kept = some_kept(3, shape, 0.5)
    if support == "empty and full":
        kept[0, 0] = kept[-1, 1] = False
        kept[0, 2] = kept[-1, -1] = True
    elif support == "shared":  # three supports a group, and one of them in two groups
        kept = some_kept(5, (shape[0], 3, shape[2]), 0.4).repeat_interleave(shape[1] // 3 + 1, 1)[:, : shape[1]]
        kept[-1, :2] = kept[0, :2]
    return kept & (support != "nothing")


SUPPORTS = [0.05, 0.3, 0.55, 0.8, 0.95, 1.0, "nothing", "empty and full", "shared"]
SIZES = [(1, 12, 30), (3, 9, 5), (2, 10, 12)]
tables = pytest.mark.parametrize(
    ("groups", "inputs", "outputs", "support"),
    [(*size, support) for size in SIZES for support in SUPPORTS]
    + [(*size, support) for size in ((16, 4, 1), (2, 1, 6)) for support in SUPPORTS[:6]],
)


def error_of(x, y, matrix) -> float:
    return float((x @ matrix.mT - y).square().sum((0, 2)).mean())


@tables
@pytest.mark.parametrize("damping", [0.0, 1e-8, 1e-6, 1e-3, 0.3, 10.0])
def test_a_solution_is_that_of_numpy(solver, groups, inputs, outputs, support, damping):
    x, y, start = problem(0, groups, 80, inputs, outputs)
    kept = kept_of(support, start.shape)
    found = solver(damping).init(sums_of(x, y)).solve(kept, start)
    assert found.dtype == torch.float64
    assert torch.allclose(found, exact_fit(x, y, start, kept, damping), rtol=1e-8, atol=1e-8)
    assert not found[~kept].any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    groups=st.integers(1, 3),
    inputs=st.integers(1, 14),
    outputs=st.integers(1, 6),
    density=st.floats(0, 1),
    damping=st.sampled_from([0.0, 1e-5, 1e-2, 1.0]),
)
def test_any_solution_is_that_of_numpy(solver, seed, groups, inputs, outputs, density, damping):
    x, y, start = problem(seed, groups, 40, inputs, outputs)
    kept = some_kept(seed, start.shape, density)
    found = solver(damping).init(sums_of(x, y)).solve(kept, start)
    exact = exact_fit(x, y, start, kept, damping)
    if damping == 0:  # an ill-conditioned draw may have many solutions that are as good
        assert error_of(x, y, found) <= error_of(x, y, exact) * (1 + 1e-8)
    else:
        assert torch.allclose(found, exact, atol=1e-8 * max(1.0, float(exact.abs().max())))
    assert not found[~kept].any()


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("density", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_undamped_inputs_that_depend_on_one_another_leave_no_more_error_than_numpy(solver, seed, density, rows):
    x, y, start = degenerate(seed, rows)
    kept = some_kept(seed, start.shape, density)
    found = solver(0.0).init(sums_of(x, y)).solve(kept, start)
    assert found.isfinite().all()
    assert not found[~kept].any()
    assert error_of(x, y, found) <= error_of(x, y, exact_fit(x, y, start, kept, 0.0)) + 1e-8
    assert torch.allclose(found[..., [6, 8]], start.where(kept, 0)[..., [6, 8]])


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("damping", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("density", [0.5, 0.9, 1.0])
def test_damped_solutions_keep_the_start_where_the_rows_determine_nothing(solver, density, damping, rows):
    x, y, start = degenerate(3, rows)
    kept = some_kept(4, start.shape, density)
    found = solver(damping).init(sums_of(x, y)).solve(kept, start)
    assert torch.allclose(found[..., [6, 8]], start.where(kept, 0)[..., [6, 8]], rtol=1e-8)
    assert torch.allclose(found, exact_fit(x, y, start, kept, damping), atol=1e-8 / damping**0.5)
    both = kept[..., 2] & kept[..., 3]
    assert both.any()
    apart = (found - start)[..., 2] - (found - start)[..., 3]
    assert torch.allclose(apart[both], torch.zeros_like(apart[both]), atol=1e-7)


def test_a_group_of_zeros_keeps_its_start(solver):
    x, y, start = problem(5, 2)
    x[1], y[1] = 0, 0
    kept = torch.ones(start.shape, dtype=torch.bool)
    assert torch.allclose(solver(1e-3).init(sums_of(x, y)).solve(kept, start)[1], start[1])


@pytest.mark.parametrize("damping", [0.0, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("density", [0.3, 0.9])
def test_a_solution_never_adds_error_on_its_own_rows(solver, density, damping):
    for seed in range(10):
        x, y, start = problem(seed)
        kept, sums = some_kept(seed, start.shape, density), sums_of(x, y)
        assert sums.error(solver(damping).init(sums).solve(kept, start)) <= sums.error(start.where(kept, 0))


def test_a_strong_damping_keeps_the_start_and_no_damping_forgets_it(solver):
    x, y, start = problem(1)
    kept, sums = torch.ones(start.shape, dtype=torch.bool), sums_of(x, y)
    assert torch.allclose(solver(1e12).init(sums).solve(kept, start), start, atol=1e-9)
    undamped = solver(0.0).init(sums)
    assert torch.allclose(undamped.solve(kept, start), undamped.solve(kept, start * 100), atol=1e-8)


def test_a_matrix_that_explains_all_is_found(solver):
    x, _, matrix = problem(1)
    kept = some_kept(1, matrix.shape, 0.5)
    matrix = matrix.where(kept, 0)
    sums = sums_of(x, x @ matrix.mT)
    assert torch.allclose(solver(0.0).init(sums).solve(kept, torch.zeros_like(matrix)), matrix, atol=1e-8)
    assert torch.allclose(solver(1.0).init(sums).solve(kept, matrix), matrix, atol=1e-8)


def test_the_meaning_of_damping_does_not_depend_on_the_scale_of_inputs(solver):
    x, y, start = problem(1)
    kept = some_kept(1, start.shape, 0.7)
    small, large = (solver(1e-2).init(sums_of(x * by, y)).solve(kept, start / by) * by for by in (1e-4, 1e4))
    assert torch.allclose(small, large, rtol=1e-8)


def test_prepared_sums_are_solved_for_one_mask_after_another_and_change_nothing(solver):
    x, y, start = problem(1)
    sums, kept = sums_of(x, y), [some_kept(seed, start.shape, 0.7) for seed in range(2)]
    inputs = (start, *kept, sums.gram, sums.cross, sums.power)
    before, prepared = [tensor.clone() for tensor in inputs], solver(1e-3).init(sums)
    for one in kept:
        assert torch.equal(prepared.solve(one, start), solver(1e-3).init(sums).solve(one, start))
    inverse_diagonals(sums.gram, kept[0], 1e-3)
    assert all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True))


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_small_blocks_change_nothing(damping, monkeypatch):
    x, y, start = problem(6, 2, 70, 11, 20)
    kept, sums = some_kept(7, start.shape, 0.5), sums_of(x, y)
    whole, diagonals = Cholesky(damping).init(sums).solve(kept, start), inverse_diagonals(sums.gram, kept, damping)
    set_limits(monkeypatch, system_bytes=1)
    assert torch.allclose(Cholesky(damping).init(sums).solve(kept, start), whole, rtol=1e-10, atol=1e-10)
    assert torch.allclose(inverse_diagonals(sums.gram, kept, damping), diagonals, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("few", [False, True])
def test_solving_directly_and_correcting_the_inverse_agree(few, monkeypatch):
    x, y, start = problem(8, 2, 70, 11, 20)
    kept, sums = some_kept(9, start.shape, 0.6), sums_of(x, y)
    monkeypatch.setattr(cholesky, "worth_correcting", lambda kept: torch.full(kept.shape[:2], few))
    exact = exact_fit(x, y, start, kept, 1e-3)
    assert torch.allclose(Cholesky(1e-3).init(sums).solve(kept, start), exact, atol=1e-8)
    exact = exact_diagonals(sums.gram, kept, 1e-3)
    assert torch.allclose(inverse_diagonals(sums.gram, kept, 1e-3), exact, rtol=1e-8)


@tables
@pytest.mark.parametrize("damping", [0.0, 1e-8, 1e-6, 1e-3, 1.0])
def test_inverse_diagonals_are_those_of_explicit_inverses(groups, inputs, outputs, support, damping):
    x, y, start = problem(0, groups, 80, inputs, outputs)
    kept, gram = kept_of(support, start.shape), sums_of(x, y).gram
    found = inverse_diagonals(gram, kept, damping)
    assert torch.allclose(found, exact_diagonals(gram, kept, damping), rtol=1e-7)
    assert torch.equal(found.isinf(), ~kept)


@pytest.mark.parametrize("damping", [0.0, 1e-6])
@pytest.mark.parametrize("density", [0.4, 0.9, 1.0])
def test_removing_an_input_costs_its_square_over_the_diagonal(density, damping):
    x, y, start = problem(3, 2, 80, 8, 4)
    kept, sums, zeros = some_kept(2, start.shape, density), sums_of(x, y), torch.zeros_like(start)
    prepared, ridges = Cholesky(damping).init(sums), damping * x.square().sum(1).mean(1)
    best = prepared.solve(kept, zeros)
    costs = best.square() / inverse_diagonals(sums.gram, kept, damping)

    def total(matrix):
        return sums.error(matrix) * sums.rows + float((ridges * matrix.square().sum((1, 2))).sum())

    for place in kept.nonzero().tolist():
        fewer = kept.clone()
        fewer[tuple(place)] = False
        grown = total(prepared.solve(fewer, zeros)) - total(best)
        assert grown == pytest.approx(float(costs[tuple(place)]), rel=1e-6, abs=1e-8)
    assert not costs[~kept].any()
