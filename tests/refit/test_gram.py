"""Gram sums against the rows that they are sums of."""

from __future__ import annotations

import pytest
import torch

from lightning_roulette.refit import gram
from lightning_roulette.refit.gram import GramSums, LayerSums, MeanAndVariance
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


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_sums_are_as_exact_under_autocast_and_low_precision(precision):
    (x, y, matrix), plain, lowered = rows_of(), GramSums(), GramSums()
    plain.add(x, y)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lowered.add(x, y)
            error = lowered.error(matrix)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(lowered.gram, plain.gram)
    assert torch.equal(lowered.cross, plain.cross)
    assert error == plain.error(matrix)


def test_rows_held_out_are_summed_apart():
    (x, y, _), sums, parts = rows_of(), LayerSums(), (GramSums(), GramSums())
    sums.add(x, y, held_out=7)
    parts[0].add(x[:, :-7], y[:, :-7])
    parts[1].add(x[:, -7:], y[:, -7:])
    assert [sums.fit.rows, sums.held_out.rows] == [53, 7]
    assert all(torch.equal(one.gram, part.gram) for one, part in zip((sums.fit, sums.held_out), parts, strict=True))


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
        inputs.add(part)
    mean, variance = inputs.result()
    assert torch.allclose(mean, x.mean(0), rtol=1e-12, atol=1e-12)
    assert torch.allclose(variance, x.var(0), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("rows", [None, 0, 1])
def test_mean_and_variance_of_fewer_than_two_rows_are_nan(rows):
    inputs = MeanAndVariance()
    if rows is not None:
        inputs.add(torch.ones(rows, 3, dtype=torch.float64))
    assert all(one.isnan().all() for one in inputs.result())
