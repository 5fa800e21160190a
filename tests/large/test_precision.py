"""Full precision inside a block, and all settings as before after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from lightning_roulette.large.precision import full_precision

BACKENDS = [one for one in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(one, "matmul")]
new_settings = pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch < 2.9 has no fp32_precision"
)


def precisions() -> list[str]:
    return [getattr(one.matmul, "fp32_precision", "none") for one in BACKENDS]


@pytest.fixture(autouse=True)
def settings_as_before() -> Iterator[None]:
    before = precisions()
    yield
    torch.set_float32_matmul_precision("highest")
    for one, precision in zip(BACKENDS, before, strict=True):
        if hasattr(one.matmul, "fp32_precision"):
            one.matmul.fp32_precision = precision


def assert_full_inside_and_as_before_after() -> None:
    before = precisions()
    with full_precision(torch.device("cpu")):
        assert set(precisions()) <= {"none", "ieee"}
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
    assert precisions() == before
    with contextlib.suppress(KeyError), full_precision(torch.device("cpu")):
        raise KeyError
    assert precisions() == before


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_what_set_float32_matmul_precision_allows_is_off_inside(precision):
    torch.set_float32_matmul_precision(precision)
    assert_full_inside_and_as_before_after()
    assert torch.get_float32_matmul_precision() == precision


def test_what_allow_tf32_allows_is_off_inside():
    torch.backends.cuda.matmul.allow_tf32 = True
    assert_full_inside_and_as_before_after()
    assert torch.backends.cuda.matmul.allow_tf32


@new_settings
@pytest.mark.parametrize("place", range(len(BACKENDS)))
def test_what_fp32_precision_allows_is_off_inside(place):
    BACKENDS[place].matmul.fp32_precision = "tf32"
    assert_full_inside_and_as_before_after()


def test_nothing_is_set_where_products_are_full_already(monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", None)
    assert_full_inside_and_as_before_after()


def test_autocast_is_off_inside_only():
    one = torch.ones(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision(torch.device("cpu")):
            assert (one @ one).dtype == torch.float32
        assert (one @ one).dtype == torch.bfloat16
