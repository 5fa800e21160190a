"""Rounding of a layer: exact against optimal brain quantisation, never worse after a sweep, on the grid at the end."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette.refit.solvers import rounding
from lightning_roulette.refit.solvers.grid import Grid, rounded_to
from lightning_roulette.refit.solvers.grid_fit import (
    fitted,
    int8_grid,
    levels_of,
    listed_grid,
    resized,
    spread_levels,
)
from lightning_roulette.refit.solvers.rounding import Problem, one_after_another, swept
from lightning_roulette.refit.solvers.rounds import rounded
from lightning_roulette.slim.files.narrowing import nearest
from lightning_roulette.values import Codebook, scale_digits
from tests.support.grids import codes_of, significant_bits
from tests.support.networks import numbers

KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def problem(seed=0, groups=2, outputs=3, inputs=7, biased=True, price=0.0, density=0.7) -> Problem:
    """A layer with inputs that depend on one another; the last one is a bias if `biased`."""
    x = numbers(groups, 40, inputs, seed=seed) @ numbers(groups, inputs, inputs, seed=seed + 1000)
    if biased:
        x[..., -1] = 1
    kept = torch.rand(groups, outputs, inputs, generator=torch.Generator().manual_seed(seed)) < density
    free = torch.zeros_like(kept)
    if biased:
        free[..., -1], kept[..., -1] = True, False
    target = torch.where(kept | free, numbers(groups, outputs, inputs, seed=seed + 2000), 0.0)
    return Problem(x.mT @ x, target, kept, free, torch.full((groups, outputs), price, dtype=torch.float64))


def grid(problem: Problem, levels=(-1.5, -0.5, 0.25, 1.0), biased=True, bits=None) -> Grid:
    levels = torch.tensor(levels, dtype=torch.float64)
    columns = slice(0, problem.target.shape[2] - biased)
    bits = torch.zeros_like(levels) if bits is None else torch.tensor(bits, dtype=torch.float64)
    return replace(listed_grid(problem, columns, levels, torch.float64, fixed=False), bits=bits)


def cost(problem: Problem, grids: list[Grid], matrix: torch.Tensor) -> float:
    """The error of a matrix, with the price of the bits of its codes."""
    bits = sum(
        (problem.prices.unsqueeze(2) * grid.bits[grid.codes_in(matrix)])[problem.rounded[..., grid.columns]].sum()
        for grid in grids
    )
    return float(problem.errors(matrix).sum() + bits)


def one_by_one(problem: Problem, grid: Grid) -> torch.Tensor:
    """Optimal brain quantisation as it is defined: with the inverse of what is left after each step."""
    found = problem.target.clone()
    for group, output in product(*map(range, found.shape[:2])):
        order = problem.gram[group].diagonal().argsort(descending=True).tolist()
        row = found[group, output]
        left = (problem.rounded | problem.free)[group, output].nonzero().flatten().tolist()
        for place in [one for one in order if problem.rounded[group, output, one]]:
            inverse = torch.linalg.inv(problem.gram[group][left][:, left])
            at = left.index(place)
            one = Grid(slice(0, 1), grid.levels, torch.ones(1, 1), grid.bits, grid.kind)
            scale = grid.scales[group, output]
            value = one.chosen(row[place], scale, 1 / inverse[at, at], problem.prices[group, output])
            row[left] -= (row[place] - value) / inverse[at, at] * inverse[:, at]
            row[place] = value
            left.remove(place)
    return found


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("price", [0.0, 3.0])
def test_rounding_one_after_another_is_optimal_brain_quantisation(biased, price):
    for seed in range(5):
        layer = problem(seed, biased=biased, price=price)
        values = grid(layer, biased=biased, bits=(0.5, 3.0, 2.0, 4.0))
        assert torch.allclose(one_after_another(layer, [values]), one_by_one(layer, values), atol=1e-9)


def test_outputs_with_equal_survivors_are_rounded_as_alone():
    layer = problem(3, groups=1, outputs=4)
    layer = replace(layer, rounded=layer.rounded[:, :1].expand_as(layer.rounded).clone())
    layer = replace(layer, target=torch.where(layer.rounded | layer.free, numbers(*layer.target.shape, seed=9), 0.0))
    values = grid(layer)
    found = one_after_another(layer, [values])
    for output in range(4):
        some = torch.tensor([output])
        alone = one_after_another(layer.of_outputs(some), [values.of_outputs(some)])
        assert torch.allclose(found[:, some], alone)


def test_inputs_may_have_several_grids():
    layer = problem(4, inputs=9)
    one, other = replace(grid(layer), columns=slice(0, 3)), replace(grid(layer, (-2.0, 2.0)), columns=slice(3, 8))
    for found in (one_after_another(layer, [one, other]), rounded(layer, [one, other])):
        both = torch.cat([found[..., :3][layer.rounded[..., :3]], torch.tensor([math.nan])])
        assert len(both.unique()) <= 5
        assert len(found[..., 3:8][layer.rounded[..., 3:8]].unique()) <= 2
    wide = replace(grid(layer), columns=slice(0, 8))
    assert torch.allclose(
        one_after_another(layer, [replace(wide, columns=slice(0, 3)), replace(wide, columns=slice(3, 8))]),
        one_after_another(layer, [wide]),
    )


def test_what_takes_too_much_work_is_rounded_to_the_nearest(monkeypatch):
    layer = problem(5)
    values = grid(layer)
    monkeypatch.setattr(rounding, "worth_rounding_exactly", lambda kept: torch.zeros_like(kept[..., 0]))
    near = rounded_to([values], layer.target, layer.rounded)
    assert torch.equal(one_after_another(layer, [values]), near)


def test_a_gram_matrix_without_a_factor_is_no_obstacle():
    layer = problem(6, groups=1)
    layer = replace(layer, gram=torch.ones_like(layer.gram))
    found = rounded(layer, [grid(layer)])
    assert bool(found.isfinite().all())
    assert bool((found[~(layer.rounded | layer.free)] == 0).all())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    price=st.sampled_from([0.0, 0.1, 10.0]),
    inputs=st.integers(1, 9),
    block=st.sampled_from([1, 3, 64]),
)
def test_no_sweep_raises_the_error_with_its_price(seed, price, inputs, block):
    before, rounding._BLOCK = rounding._BLOCK, block
    try:
        layer = problem(seed, inputs=inputs, biased=inputs > 1, price=price)
        values = grid(layer, biased=inputs > 1, bits=(1.0, 2.0, 3.0, 3.0))
        matrix = rounded_to([values], layer.target, layer.rounded)
        for _ in range(3):
            after = swept(layer, [values], matrix)
            assert cost(layer, [values], after) <= cost(layer, [values], matrix) + 1e-9
            matrix = after
    finally:
        rounding._BLOCK = before


def test_sweeps_end_where_no_single_change_helps():
    layer = problem(8, groups=1, outputs=2, price=0.5)
    values = grid(layer, bits=(1.0, 2.0, 3.0, 3.0))
    found = rounded_to([values], layer.target, layer.rounded)
    for _ in range(20):
        found = swept(layer, [values], found)
    least = cost(layer, [values], found)
    for output, place in layer.rounded[0].nonzero().tolist():
        for level in values.levels:
            other = found.clone()
            other[0, output, place] = level
            assert cost(layer, [values], other) >= least - 1e-9


def test_rounding_is_close_to_the_best_of_all_choices():
    ratios = []
    for seed in range(10):
        layer = problem(seed, groups=1, outputs=1, inputs=6, biased=False, density=1.0)
        values = replace(grid(layer, biased=False), fixed=True)
        every = torch.tensor(list(product(values.levels.tolist(), repeat=6)), dtype=torch.float64)
        rest = layer.target[0] - every
        best = float(((rest @ layer.gram[0]) * rest).sum(1).min())
        near = rounded_to([values], layer.target, layer.rounded)
        ours = float(layer.errors(rounded(layer, [values])).sum())
        assert ours >= best - 1e-9
        ratios.append((ours / best, float(layer.errors(near).sum()) / best))
    ours, near = (sum(one) / 10 for one in zip(*ratios, strict=True))
    assert ours < 2
    assert near > 1.4 * ours


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("price", [0.0, 0.5])
def test_int8_is_exact_multiples_of_a_short_scale(kind, price):
    layer = problem(9, groups=1, outputs=4, inputs=30, price=price)
    values = int8_grid(layer, slice(0, 29), kind)
    found = rounded(layer, [values])[0]
    assert torch.equal(found[:, :29].to(kind).double(), found[:, :29])
    for row in found[:, :29]:
        codes, scale = codes_of(row)
        assert int(codes.abs().max()) <= 127
        assert significant_bits(scale) <= scale_digits(kind)
    assert bool((found[:, :29] != 0).eq(layer.rounded[0, :, :29]).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [3, 5])
def test_a_list_has_no_more_values_than_its_bits_allow(kind, bits):
    layer = problem(10, groups=1, outputs=8, inputs=40, price=0.01)
    levels = spread_levels(layer, slice(0, 39), 2**bits, kind)
    found = rounded(layer, [listed_grid(layer, slice(0, 39), levels, kind, fixed=False)])[..., :39]
    assert torch.equal(found.to(kind).double(), found)
    assert len(found[layer.rounded[..., :39]].unique()) <= 2**bits
    assert bool((found != 0).eq(layer.rounded[..., :39]).all())


def test_a_higher_price_takes_fewer_bits():
    layer = problem(11, groups=1, outputs=8, inputs=40)
    for begin in (
        lambda priced: int8_grid(priced, slice(0, 39), torch.float32),
        lambda priced: listed_grid(
            priced, slice(0, 39), spread_levels(priced, slice(0, 39), 64, torch.float32), torch.float32, fixed=False
        ),
    ):
        bits, errors = [], []
        for price in (1e-2, 1.0, 100.0):
            priced = replace(layer, prices=torch.full_like(layer.prices, price))
            found = rounded(priced, [begin(priced)])
            rows = found[0, :, :39]
            codes = [codes_of(row)[0] for row in rows] if begin(priced).scaled else [rows[rows != 0]]
            counts = torch.cat(codes).unique(return_counts=True)[1].double()
            bits.append(float((counts * (counts.sum() / counts).log2()).sum()))
            errors.append(float(layer.errors(found).sum()))
        assert bits == sorted(bits, reverse=True)
        assert errors == sorted(errors)


def test_scales_follow_from_the_price():
    """One bit more or less costs about as much as it saves."""
    layer = problem(12, groups=1, outputs=1, inputs=400, biased=False, density=1.0)
    layer = replace(layer, gram=torch.eye(400, dtype=torch.float64)[None], prices=torch.full((1, 1), 1e-3).double())
    values = int8_grid(layer, slice(0, 400), torch.float64)

    def total(scale: float) -> float:
        one = replace(values, scales=torch.full_like(values.scales, scale))
        near = rounded_to([one], layer.target, layer.rounded)
        return cost(layer, [one := one.counted(near, layer.rounded)], near)

    scale = float(values.scales)
    assert total(scale) < total(scale / 2)
    assert total(scale) < total(scale * 2)
    near = rounded_to([values], layer.target, layer.rounded)
    assert resized(layer, values, near).scales.item() == pytest.approx(scale, rel=0.1)
    half = near + (layer.target - near) / 2  # a quarter of the error: the scale may be twice as large
    assert resized(layer, values, half).scales.item() == pytest.approx(2 * scale, rel=0.1)


def test_a_list_is_a_fixed_point_of_lloyds_algorithm():
    values, weights = numbers(3000, seed=1), numbers(3000, seed=2).square()
    levels = levels_of(values, weights, torch.zeros_like(values), 8, torch.float64)
    codes = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
    for code, level in enumerate(levels.tolist()):
        mine = codes == code
        assert level == pytest.approx(float((values * weights)[mine].sum() / weights[mine].sum()), abs=0.03)


def test_fitting_a_grid_lowers_the_error_of_its_codes():
    layer = problem(13, groups=1, outputs=8, inputs=40)
    columns = slice(0, 39)
    listed = listed_grid(layer, columns, torch.linspace(-2, 2, 8).double(), torch.float64, fixed=False)
    scaled = replace(int8_grid(layer, columns, torch.float64), scales=torch.full((1, 8), 0.75).double())
    for begin in (listed, scaled):
        near = rounded_to([begin], layer.target, layer.rounded)
        moved = near.clone()
        moved[..., columns] = fitted(layer, begin, near).values(begin.codes_in(near))
        moved = torch.where(layer.rounded, moved, near)
        assert float(layer.errors(moved).sum()) < 0.9 * float(layer.errors(near).sum())
        assert fitted(layer, replace(begin, fixed=True), near).levels is begin.levels


@pytest.mark.parametrize("values", ["float16", "int8", Codebook(3)])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_the_nearest_values_keep_zeros_and_only_zeros(values, kind):
    matrix = numbers(4, 30, seed=14)
    matrix[matrix.abs() < 0.3] = 0
    matrix[0, :3], matrix[1] = torch.tensor([1e-30, -1e-30, 1e6]), 0.0
    found = nearest(matrix, values, kind)
    assert bool((found == 0).eq(matrix == 0).all())
    assert bool((found.sign() == matrix.sign()).all()) or isinstance(values, Codebook)
    if values == "float16":
        assert torch.equal(found.half().double(), found)
        assert found[0, 2] == torch.finfo(torch.float16).max
    if values == "int8":
        assert all(int(codes_of(row)[0].abs().max()) <= 127 for row in found if bool(row.any()))
    if isinstance(values, Codebook):
        assert len(found[found != 0].unique()) <= 8
        own = torch.tensor([-1.0, 2.0], dtype=torch.float64)
        assert {*nearest(matrix, values, kind, own).unique().tolist()} == {-1.0, 0.0, 2.0}


def test_numbers_that_are_not_finite_stay():
    matrix = numbers(2, 20, seed=15)
    matrix[0, 0], matrix[1, 3] = math.inf, math.nan
    for values in ("float16", "int8", Codebook(3)):
        found = nearest(matrix, values, torch.float32)
        assert found[0, 0] == math.inf
        assert bool(found[1, 3].isnan())
        assert int(found.isfinite().sum()) == 38
    assert nearest(matrix, "float32", torch.float32) is matrix
