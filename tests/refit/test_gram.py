"""Gram sums against the rows that they are sums of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_roulette.refit import gram
from lightning_roulette.refit.gram import GramSums, LayerSums
from lightning_roulette.refit.matrices import Rows
from lightning_roulette.refit.moments import MeanAndVariance
from tests.support.limits import set_limits
from tests.support.networks import numbers


def rows_of(groups: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """60 rows of 9 inputs and 5 wanted outputs, and a matrix."""
    return numbers(groups, 60, 9), numbers(groups, 60, 5, seed=1) + 3, numbers(groups, 5, 9, seed=2)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("columns", [1, 4, 256])
@pytest.mark.parametrize("block", [1, 7, 60, 4096])
@pytest.mark.parametrize("cuts", [[60], [1, 59], [10, 0, 50], [20, 20, 20], [0, 60]])
def test_gram_sums_are_sums_over_rows_added_in_any_pieces(cuts, block, columns, groups, monkeypatch):
    set_limits(monkeypatch, gram_rows=block)
    monkeypatch.setattr(gram, "_COLUMNS", columns)
    (x, y, matrix), sums = rows_of(groups), GramSums()
    for xs, ys in zip(x.split(cuts, 1), y.split(cuts, 1), strict=True):
        sums.add(xs, ys)
    assert sums.rows == 60
    assert torch.allclose(sums.gram, torch.einsum("gri,grj->gij", x, x), rtol=1e-12, atol=1e-12)
    assert torch.allclose(sums.cross, torch.einsum("gri,gro->gio", x, y), rtol=1e-12, atol=1e-12)
    assert torch.allclose(sums.power, torch.einsum("gro,gro->go", y, y), rtol=1e-12, atol=1e-12)
    assert sums.error(matrix) == pytest.approx(float((x @ matrix.mT - y).square().sum((0, 2)).mean()), rel=1e-10)
    assert sums.error(0 * matrix) == pytest.approx(sums.mean_square)
    assert sums.mean_square == pytest.approx(float(y.square().sum((0, 2)).mean()))


def test_a_gram_matrix_may_be_read_between_two_parts(monkeypatch):
    monkeypatch.setattr(gram, "_COLUMNS", 4)
    (x, y, _), sums = rows_of(), GramSums()
    for xs, ys in zip(x.split(30, 1), y.split(30, 1), strict=True):
        sums.add(xs, ys)
        assert torch.allclose(sums.gram, sums.gram.mT, rtol=1e-12, atol=1e-12)
    assert torch.allclose(sums.gram, x.mT @ x, rtol=1e-12, atol=1e-12)


def far_from(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Largest difference of Gram matrices, as a share of the root of the product of the diagonal entries."""
    size = exact.diagonal(dim1=1, dim2=2).sqrt()
    return float(((found - exact) / (size.unsqueeze(1) * size.unsqueeze(2)).clamp(min=1e-300)).abs().max())


@pytest.mark.parametrize("rows", [3, 700, 5000])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_float32_rows_lose_no_more_than_single_products_round(scale, rows):
    x, y = (scale * numbers(2, rows, 40)).float(), numbers(2, rows, 4, seed=1).float()
    sums, exact = GramSums(), GramSums()
    for xs, ys in zip(x.split(333, 1), y.split(333, 1), strict=True):
        sums.add(xs, ys)
    exact.add(x.double(), y.double())
    assert {one.dtype for one in (sums.gram, sums.cross, sums.power)} == {torch.float64}
    assert far_from(exact.gram, sums.gram) < 5e-7
    assert torch.allclose(sums.cross, exact.cross, atol=5e-7 * rows * scale)
    assert torch.allclose(sums.power, exact.power, rtol=1e-12)
    assert (exact.rounding, sums.rounding) == (1e-9, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mean_and_columns_of_other_sizes_cost_no_digits(dtype):
    size = torch.tensor([1e4, 1e-4, 1.0, 1e-2])
    x = (numbers(1, 3000, 4) * size + torch.tensor([0.0, 1e-1, 1e3, 0.0])).to(dtype)
    y = (numbers(1, 3000, 2, seed=1) + 100).to(dtype)
    sums, exact = GramSums(), GramSums()
    for xs, ys in zip(x.split(500, 1), y.split(500, 1), strict=True):
        sums.add(xs, ys)
        assert sums.gram.isfinite().all()  # what is read between two parts changes nothing
    exact.add(x.double(), y.double())
    means = x.double().mean(1, keepdim=True), y.double().mean(1, keepdim=True)

    def centred(of):
        return of.gram - 3000 * means[0].mT * means[0], of.cross - 3000 * means[0].mT * means[1]

    (gram, cross), (exact_gram, exact_cross) = centred(sums), centred(exact)
    deviation = x.double().std(1), y.double().std(1)
    assert ((gram - exact_gram).abs() <= 1e-6 * 3000 * deviation[0].unsqueeze(2) * deviation[0].unsqueeze(1)).all()
    assert ((cross - exact_cross).abs() <= 1e-6 * 3000 * deviation[0].unsqueeze(2) * deviation[1].unsqueeze(1)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_sums_of_rows_that_are_not_finite_are_not_finite(bad):
    for row in (0, 50):
        (x, y, _), sums = rows_of(), GramSums()
        x[0, row, 2] = bad
        sums.add(x.float(), y.float())
        assert not sums.finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_sums_are_as_exact_under_autocast_and_low_precision(precision, dtype):
    x, y, matrix = (one.to(dtype) for one in rows_of())
    plain, lowered = LayerSums(), LayerSums()
    plain.add(x, y, held_out=20)
    wanted = plain.fit.error(matrix.double()), plain.held_out.error(matrix.double())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lowered.add(x, y, held_out=20)
            assert (lowered.fit.error(matrix.double()), lowered.held_out.error(matrix.double())) == wanted
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(lowered.fit.gram, plain.fit.gram)
    assert torch.equal(lowered.fit.cross, plain.fit.cross)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_held_out_are_kept_apart(dtype):
    (x, y, matrix), sums, fit = rows_of(), LayerSums(), GramSums()
    sums.add(x.to(dtype), y.to(dtype), held_out=7)
    sums.add(x.to(dtype), y.to(dtype), held_out=0)
    fit.add(torch.cat([x[:, :-7], x], 1).to(dtype), torch.cat([y[:, :-7], y], 1).to(dtype))
    assert [sums.fit.rows, sums.held_out.rows] == [113, 7]
    assert torch.equal(sums.fit.gram, fit.gram)
    lost = (x @ matrix.mT - y)[:, -7:].square().sum((0, 2)).mean()
    assert sums.held_out.error(matrix) == pytest.approx(float(lost), rel=1e-12 if dtype == torch.float64 else 1e-6)
    assert sums.held_out.mean_square == pytest.approx(float(y[:, -7:].square().sum((0, 2)).mean()), rel=1e-6)
    assert sums.finite
    sums.add(x * torch.nan, y, held_out=60)
    assert sums.fit.finite
    assert not sums.finite


def test_sums_of_some_outputs_are_those_of_their_rows():
    (x, y, _), whole, part = rows_of(), GramSums(), GramSums()
    whole.add(x, y)
    part.add(x, y[..., 1:3])
    for some in (torch.tensor([1, 2]), torch.tensor([False, True, True, False, False])):
        found = whole.of_outputs(some)
        assert (found.rows, found.rounding) == (part.rows, part.rounding)
        assert torch.allclose(found.cross, part.cross, rtol=1e-12)
        assert torch.equal(found.power, part.power)
        assert found.gram is whole.gram


def test_output_variance_is_that_of_the_outputs():
    x, y, _ = rows_of()
    sums, with_ones = GramSums(), GramSums()
    sums.add(x, y)
    with_ones.add(torch.cat([x, torch.ones_like(x[..., :1])], 2), y)
    assert float(sums.output_variance(False)) == pytest.approx(float(y.square().mean(1).sum()))
    assert float(with_ones.output_variance(True)) == pytest.approx(float(y.var(1, unbiased=False).sum()))


@pytest.mark.parametrize(("value", "centred"), [(0.0, False), (3.0, True)])
def test_output_variance_of_constant_outputs_is_more_than_zero(value, centred):
    sums, ones = GramSums(), torch.ones(1, 10, 1, dtype=torch.float64)
    sums.add(ones, value * ones)
    assert float(sums.output_variance(centred)) > 0


@pytest.mark.parametrize("shift", [0.0, -3.0, 1e6, 1e9])
@pytest.mark.parametrize("cuts", [[50], [1, 49], [17, 0, 33]])
def test_mean_and_variance_are_those_of_torch(cuts, shift):
    x = numbers(50, 4) * torch.tensor([1.0, 0.1, 10.0, 0.0]) + shift
    inputs = MeanAndVariance()
    for part in x.split(cuts):
        inputs.add(part.unsqueeze(2))
    mean, variance = inputs.result()
    assert torch.allclose(mean, x.mean(0), rtol=1e-12, atol=1e-12)
    assert torch.allclose(variance, x.var(0), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, -3.0, 1e4])
def test_mean_and_variance_of_float32_values_are_exact(shift):
    x = (numbers(40, 4, 900) * torch.tensor([1.0, 0.1, 10.0, 0.0]).unsqueeze(1) + shift).float()
    inputs = MeanAndVariance()
    for part in x.split([7, 33]):
        inputs.add(part)
    mean, variance = inputs.result()
    rows = x.double().movedim(1, -1).flatten(0, 1)
    assert torch.allclose(mean, rows.mean(0), rtol=1e-7, atol=1e-6)
    assert torch.allclose(variance, rows.var(0), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("rows", [None, 0, 1])
def test_mean_and_variance_of_fewer_than_two_rows_are_nan(rows):
    inputs = MeanAndVariance()
    if rows is not None:
        inputs.add(torch.ones(rows, 3, 1, dtype=torch.float64))
    assert all(one.isnan().all() for one in inputs.result())


@pytest.mark.parametrize(("count", "few"), [(19, True), (20, False)])
def test_rows_are_few_as_long_as_they_are_fewer_than_half_of_the_inputs(count, few, monkeypatch):
    set_limits(monkeypatch, gram_rows=4)
    x, y, sums = numbers(2, count, 40).float(), numbers(2, count, 3, seed=1).float(), GramSums()
    for some in (slice(0, 7), slice(7, count)):
        sums.add(x[:, some], y[:, some])
    assert (sums.few is not None) is few
    if few:
        assert all(torch.equal(found, rows) for found, rows in zip(sums.few, (x, y), strict=True))
    assert sums.finite
    assert torch.allclose(sums.gram, (x.mT @ x).double(), atol=1e-4)
    assert torch.allclose(sums.cross, (x.mT @ y).double(), atol=1e-4)
    assert torch.allclose(sums.power, y.double().square().sum(1))
    assert sums.few is None  # they are summed now
    sums.add(x, y)
    assert sums.few is None
    assert torch.allclose(sums.gram, 2 * (x.mT @ x).double(), atol=1e-4)


def test_rows_that_float32_does_not_hold_are_summed():
    for scale, dtype in [(1.0, torch.float64), (1e20, torch.float32), (1e-20, torch.float32)]:
        sums = GramSums()
        sums.add((scale * numbers(1, 4, 40)).to(dtype), numbers(1, 4, 3, seed=1).to(dtype))
        assert sums.few is None
        assert bool(sums.gram.isfinite().all())


def test_few_rows_that_are_not_finite_are_not_finite():
    x, sums = numbers(1, 4, 40).float(), GramSums()
    x[0, 2, 3] = torch.nan
    sums.add(x, numbers(1, 4, 3, seed=1).float())
    assert not sums.finite


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_an_eighth_of_the_rows_judges_whatever_the_sizes_of_the_calls(sizes):
    sums = LayerSums()
    for size in sizes:
        x, y = numbers(1, size, 2), numbers(1, size, 1)
        sums.add_call(Rows(x, size, size // 8), y)
    of_small, of_large = sum(one for one in sizes if one < 8), sum(one // 8 for one in sizes)
    assert sums.held_out.rows == of_large + (of_small + 6) // 8
    assert sums.fit.rows == sum(sizes) - sums.held_out.rows
