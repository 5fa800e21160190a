"""Conjugate gradients on the inverse: exactness, outputs that are given up, and when they are used."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_roulette.refit.gram import GramSums
from lightning_roulette.refit.solvers import fastest
from lightning_roulette.refit.solvers.cholesky import Cholesky, DampedGram
from lightning_roulette.refit.solvers.conjugate_gradient import Equations
from lightning_roulette.refit.solvers.cost import most_steps_on_inverse
from lightning_roulette.refit.solvers.fastest import Fastest
from lightning_roulette.refit.solvers.multipliers import solved_by_multipliers
from tests.support.limits import set_limits
from tests.support.networks import numbers


def some_kept(outputs: int, inputs: int, density: float) -> torch.Tensor:
    return torch.rand(1, outputs, inputs, generator=torch.Generator().manual_seed(3)) < density


def problem(density: float, outputs: int = 20, inputs: int = 50) -> tuple[Equations, torch.Tensor, torch.Tensor]:
    """Equations of one group, the inverse of their matrix, and their exact solutions."""
    x, dense = torch.relu(numbers(1, 300, inputs) + 0.3), numbers(1, outputs, inputs, seed=1)
    sums, kept = GramSums(), some_kept(outputs, inputs, density)
    sums.add(x, x @ dense.mT)
    matrix = DampedGram(sums.gram, 1e-3)
    assert matrix.inverse is not None
    solution = Cholesky(1e-3).init(sums).solve(kept, torch.zeros(1, outputs, inputs, dtype=torch.float64))[0]
    power = sums.power[0]
    right, ridge = sums.cross[0].mT.contiguous(), float(matrix.ridges[0])
    return (
        Equations(sums.gram[0], ridge, right, kept[0], power, power, 1e-9, sums.rows),
        matrix.inverse[0],
        solution,
    )


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_solutions_are_close_to_the_exact_ones_and_zero_where_pruned(density):
    equations, inverse, exact = problem(density)
    found, solved = solved_by_multipliers(equations, inverse, torch.full((20,), 100))
    assert solved.all()
    assert not found[~equations.kept].any()
    assert torch.allclose(found, exact, atol=0.02 * float(exact.abs().max()))


def test_many_steps_reach_the_exact_solution(monkeypatch):
    equations, inverse, exact = problem(0.6)
    monkeypatch.setattr("lightning_roulette.refit.solvers.multipliers.allowed_share", lambda kept, rows: 1e-14)
    found, _ = solved_by_multipliers(equations, inverse, torch.full((20,), 100))
    assert torch.allclose(found, exact, rtol=1e-9, atol=1e-12)


def test_fewer_steps_are_taken_where_most_inputs_are_kept():
    few, many = torch.full((20,), 2), torch.full((20,), 100)
    for density, in_two in ((0.95, True), (0.2, False)):
        equations, inverse, _ = problem(density)
        assert bool(solved_by_multipliers(equations, inverse, few)[1].all()) is in_two
        assert solved_by_multipliers(equations, inverse, many)[1].all()


def test_outputs_are_solved_alone_as_together_and_given_up_one_by_one(monkeypatch):
    equations, inverse, _ = problem(0.3)
    together, _ = solved_by_multipliers(equations, inverse, torch.full((20,), 100))
    steps = torch.where(torch.arange(20) % 2 == 0, 1, 100)
    found, solved = solved_by_multipliers(equations, inverse, steps)
    assert torch.equal(solved, torch.arange(20) % 2 == 1)
    assert torch.allclose(found[solved], together[solved], rtol=1e-9, atol=1e-12)
    set_limits(monkeypatch, system_bytes=1)
    alone, _ = solved_by_multipliers(equations, inverse, torch.full((20,), 100))
    assert torch.allclose(alone, together, rtol=1e-9, atol=1e-12)


def test_outputs_that_are_not_finite_end_the_iteration():
    equations, inverse, _ = problem(0.5)
    equations.right[3] = math.nan
    found, solved = solved_by_multipliers(equations, inverse, torch.full((20,), 10**6))
    assert solved.all()
    assert torch.equal(found.isnan().any(1), torch.arange(20) == 3)


@pytest.mark.parametrize(
    ("outputs", "inputs", "density", "rows", "taken"),
    [
        (256, 2304, 0.8, 10**4, True),
        (768, 3072, 0.5, 10**6, True),
        (512, 4608, 0.2, 10**6, False),  # many steps are left, which do not pay for the inverse
        (512, 4608, 0.8, 1792, False),  # few rows: a few steps on the matrix are exact enough
        (256, 2304, 0.05, 10**4, False),  # small factors
        (1, 3072, 0.8, 10**6, False),  # one output does not pay for an inverse
        (30, 50, 0.8, 10**4, False),  # little work either way
    ],
)
def test_the_inverse_is_used_where_it_takes_less_work(outputs, inputs, density, rows, taken):
    assert bool((most_steps_on_inverse(some_kept(outputs, inputs, density), rows) > 0).any()) is taken


def test_without_an_exact_inverse_a_factor_solves(monkeypatch):
    x, start = numbers(1, 200, 40), numbers(1, 8, 40, seed=1)
    sums, kept = GramSums(), some_kept(8, 40, 0.7)
    sums.add(x, x @ start.mT)
    monkeypatch.setattr(fastest, "most_steps_on_inverse", lambda kept, rows: torch.full(kept.shape[:2], 9.0))
    monkeypatch.setattr(DampedGram, "inverse", None)
    exact = Cholesky(1e-3).init(sums).solve(kept, start)
    assert torch.allclose(Fastest(1e-3).init(sums).solve(kept, start), exact, rtol=1e-10, atol=1e-12)
