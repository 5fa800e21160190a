"""Products of large matrices in float32."""

from __future__ import annotations

import pytest
import torch

from lightning_roulette.large.precision import full_precision
from lightning_roulette.large.products import products_with
from tests.support.networks import numbers

SHAPES = [(300, 400), (1, 256), (40, 30), (3, 500), (1, 300, 400), (1, 40, 30), (2, 300, 400), (1, 0, 300)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("others", [0, 1, 7])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_products_are_exact_in_their_type(shape, others, kind):
    matrix, more = numbers(*shape, seed=1), numbers(*shape[:-2], others, shape[-1], seed=2)
    found = products_with(matrix.to(kind))(more.to(kind))
    assert found.dtype == kind
    assert torch.allclose(found.double(), more @ matrix.mT, atol=1e-3 if kind == torch.float32 else 1e-10)


def test_matrices_that_are_not_contiguous_are_multiplied():
    matrix, more = numbers(400, 300, seed=1).float().mT, numbers(400, 8, seed=2).float().mT
    assert torch.allclose(products_with(matrix)(more), more @ matrix.mT, atol=1e-3)


def test_full_precision_holds_for_large_products():
    matrix, more = numbers(300, 400, seed=1).float(), numbers(20, 400, seed=2).float()
    before, exact = torch.get_float32_matmul_precision(), more.double() @ matrix.double().mT
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(matrix.device):
            found = products_with(matrix)(more)
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) < 1e-4


def test_infinite_and_missing_numbers_stay_in_their_rows():
    matrix, more = numbers(300, 400, seed=1).float(), numbers(3, 400, seed=2).float()
    more[1, 5] = float("nan")
    found = products_with(matrix)(more)
    assert torch.equal(found.isnan().all(1), torch.tensor([False, True, False]))


def test_torch_multiplies_where_onednn_is_off(monkeypatch):
    matrix, more = numbers(300, 400, seed=1).float(), numbers(3, 400, seed=2).float()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", None)
    assert torch.equal(products_with(matrix)(more), more @ matrix.mT)
