"""Least squares: every fit against numpy, the moments against the rows, the inverse against what a removal costs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette.refit.gram import GramSums, MeanAndVariance
from lightning_roulette.refit.solvers import cholesky
from lightning_roulette.refit.solvers.cholesky import Cholesky, inverse_diagonals
from tests.support.limits import set_limits


def rows_of(seed: int, groups=2, rows=60, inputs=9, outputs=5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs that depend on one another, wanted outputs, and maps to start from."""
    chance = np.random.default_rng(seed)
    mixed = chance.standard_normal((groups, rows, inputs)) @ chance.standard_normal((groups, inputs, inputs))
    x, y = mixed / math.sqrt(inputs), chance.standard_normal((groups, rows, outputs))
    start = chance.standard_normal((groups, outputs, inputs))
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(start)


def fitted(sums, start, kept, damping):
    return Cholesky(damping).init(sums).solve(kept, start)


def moments_of(x: torch.Tensor, y: torch.Tensor) -> GramSums:
    moments = GramSums()
    moments.add(x, y)
    return moments


def some_kept(seed: int, shape, density: float) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(shape) < density)


def ridge_of(x: np.ndarray, damping: float) -> float:
    return damping * float((x**2).sum(0).mean())


def by_numpy(x, y, start, kept, damping: float) -> torch.Tensor:
    """Each output alone: the ridge as further rows, which want `start`."""
    found = np.zeros(start.shape)
    for group, output in np.ndindex(start.shape[:2]):
        on, wanted = kept[group, output].numpy(), start[group, output].numpy()
        root = math.sqrt(ridge_of(x[group].numpy(), damping))
        if on.any():
            tall = np.concatenate([x[group].numpy(), root * np.eye(len(on))])[:, on]
            right = np.concatenate([y[group, :, output].numpy(), root * np.where(on, wanted, 0)])
            found[group, output, on] = np.linalg.lstsq(tall, right, rcond=1e-10)[0]
    return torch.from_numpy(found)


def error_of(x, y, maps) -> float:
    return float((x @ maps.mT - y).square().sum((0, 2)).mean())


@pytest.mark.parametrize("damping", [0.0, 1e-8, 1e-6, 1e-3, 0.3, 10.0])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.55, 0.8, 0.95, 1.0])
@pytest.mark.parametrize(("groups", "inputs", "outputs"), [(1, 12, 30), (3, 9, 5), (16, 4, 1), (2, 1, 6)])
def test_a_fit_is_that_of_numpy(groups, inputs, outputs, density, damping):
    x, y, start = rows_of(0, groups, 80, inputs, outputs)
    kept = some_kept(1, start.shape, density)
    found = fitted(moments_of(x, y), start, kept, damping)
    assert found.dtype == torch.float64
    assert torch.allclose(found, by_numpy(x, y, start, kept, damping), rtol=1e-8, atol=1e-8)
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
def test_any_fit_is_that_of_numpy(seed, groups, inputs, outputs, density, damping):
    x, y, start = rows_of(seed, groups, 40, inputs, outputs)
    kept = some_kept(seed, start.shape, density)
    found = fitted(moments_of(x, y), start, kept, damping)
    exact = by_numpy(x, y, start, kept, damping)
    if damping == 0:  # an ill-conditioned draw may have many maps that are as good
        assert error_of(x, y, found) <= error_of(x, y, exact) * (1 + 1e-8)
    else:
        assert torch.allclose(found, exact, atol=1e-8 * max(1.0, float(exact.abs().max())))
    assert not found[~kept].any()


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_empty_and_full_supports_stand_beside_others(damping):
    x, y, start = rows_of(2, 2, 50, 8, 6)
    kept = some_kept(3, start.shape, 0.5)
    kept[0, 0], kept[1, 2], kept[0, 3], kept[1, 5] = False, False, True, True
    found = fitted(moments_of(x, y), start, kept, damping)
    assert torch.allclose(found, by_numpy(x, y, start, kept, damping), atol=1e-8)
    assert not found[0, 0].any()
    assert not found[1, 2].any()


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_nothing_kept_gives_zeros(damping):
    x, y, start = rows_of(2)
    assert not fitted(moments_of(x, y), start, torch.zeros(start.shape, dtype=torch.bool), damping).any()


@pytest.mark.parametrize("damping", [0.0, 1e-3])
@pytest.mark.parametrize("density", [0.3, 0.9])
def test_outputs_that_share_a_support_are_each_their_own(density, damping):
    x, y, start = rows_of(4, 3, 70, 10, 12)
    kept = some_kept(5, (3, 3, 10), density).repeat_interleave(4, 1)  # three supports a group
    kept[1, :4] = kept[0, :4]  # the same one in two groups
    found = fitted(moments_of(x, y), start, kept, damping)
    assert torch.allclose(found, by_numpy(x, y, start, kept, damping), atol=1e-8)


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_small_blocks_change_nothing(damping, monkeypatch):
    x, y, start = rows_of(6, 2, 70, 11, 20)
    kept = some_kept(7, start.shape, 0.5)
    moments = moments_of(x, y)
    whole = fitted(moments, start, kept, damping), inverse_diagonals(moments.gram, kept, damping)
    set_limits(monkeypatch, system_bytes=1)
    alone = fitted(moments, start, kept, damping), inverse_diagonals(moments.gram, kept, damping)
    assert all(torch.allclose(one, other, rtol=1e-10, atol=1e-10) for one, other in zip(whole, alone, strict=True))


@pytest.mark.parametrize("few", [0.0, math.inf])
def test_the_direct_way_and_that_through_the_inverse_agree(few, monkeypatch):
    x, y, start = rows_of(8, 2, 70, 11, 20)
    kept = some_kept(9, start.shape, 0.6)
    monkeypatch.setattr(cholesky, "_FEW_PRUNED", few)
    moments = moments_of(x, y)
    assert torch.allclose(fitted(moments, start, kept, 1e-3), by_numpy(x, y, start, kept, 1e-3), atol=1e-8)
    exact = explicit_diagonals(moments.gram, kept, 1e-3)
    assert torch.allclose(inverse_diagonals(moments.gram, kept, 1e-3), exact, rtol=1e-8)


def degenerate(seed: int, rows: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two equal columns, one that is a sum of others, and two of zeros."""
    x, y, start = rows_of(seed, 2, rows, 9, 6)
    x[..., 3] = x[..., 2]
    x[..., 4] = x[..., 0] + x[..., 1]
    x[..., 6] = x[..., 8] = 0
    return x, y, start


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("density", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_inputs_that_depend_on_one_another_leave_no_more_error_than_numpy(seed, density, rows):
    x, y, start = degenerate(seed, rows)
    kept = some_kept(seed, start.shape, density)
    found = fitted(moments_of(x, y), start, kept, 0.0)
    assert found.isfinite().all()
    assert not found[~kept].any()
    assert error_of(x, y, found) <= error_of(x, y, by_numpy(x, y, start, kept, 0.0)) + 1e-8


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("damping", [1e-6, 1e-3])
@pytest.mark.parametrize("density", [0.5, 0.9, 1.0])
def test_damped_zeros_keep_their_start(density, damping, rows):
    x, y, start = degenerate(3, rows)
    kept = some_kept(4, start.shape, density)
    found = fitted(moments_of(x, y), start, kept, damping)
    dead = torch.zeros(9, dtype=torch.bool)
    dead[[6, 8]] = True
    assert torch.allclose(found[kept & dead], start[kept & dead], rtol=1e-8)
    assert torch.allclose(found, by_numpy(x, y, start, kept, damping), atol=1e-8 / damping**0.5)


@pytest.mark.parametrize("damping", [1e-6, 1e-3, 1.0])
def test_a_damped_fit_of_equal_inputs_keeps_their_difference(damping):
    x, y, start = degenerate(5)
    kept = torch.ones(start.shape, dtype=torch.bool)
    found = fitted(moments_of(x, y), start, kept, damping)
    assert torch.allclose(found[..., 2] - found[..., 3], start[..., 2] - start[..., 3], rtol=1e-7)


def test_a_group_of_zeros_keeps_its_start():
    x, y, start = rows_of(5, 2)
    x[1], y[1] = 0, 0
    kept = torch.ones(start.shape, dtype=torch.bool)
    assert torch.allclose(fitted(moments_of(x, y), start, kept, 1e-3)[1], start[1])


def test_undamped_zeros_keep_their_start():
    x, y, start = degenerate(5)
    kept = torch.ones(start.shape, dtype=torch.bool)
    assert torch.allclose(fitted(moments_of(x, y), start, kept, 0.0)[..., [6, 8]], start[..., [6, 8]])


@pytest.mark.parametrize("damping", [0.0, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("density", [0.3, 0.9])
def test_a_fit_never_adds_error_on_its_own_rows(density, damping):
    for seed in range(10):
        x, y, start = rows_of(seed)
        kept = some_kept(seed, start.shape, density)
        moments = moments_of(x, y)
        before, after = start.where(kept, 0), fitted(moments, start, kept, damping)
        assert moments.error(after) <= moments.error(before)


def test_a_strong_damping_keeps_the_start_and_none_forgets_it():
    x, y, start = rows_of(1)
    kept, moments = torch.ones(start.shape, dtype=torch.bool), moments_of(x, y)
    assert torch.allclose(fitted(moments, start, kept, 1e12), start, atol=1e-9)
    assert torch.allclose(fitted(moments, start, kept, 0.0), fitted(moments, start * 100, kept, 0.0), atol=1e-8)


def test_a_map_that_explains_all_is_found():
    x, _, maps = rows_of(1)
    kept = some_kept(1, maps.shape, 0.5)
    maps = maps.where(kept, 0)
    moments = moments_of(x, x @ maps.mT)
    assert torch.allclose(fitted(moments, torch.zeros_like(maps), kept, 0.0), maps, atol=1e-8)
    assert torch.allclose(fitted(moments, maps, kept, 1.0), maps, atol=1e-8)


def test_a_scale_of_inputs_does_not_change_what_damping_means():
    x, y, start = rows_of(1)
    kept = some_kept(1, start.shape, 0.7)
    small, large = (fitted(moments_of(x * by, y), start / by, kept, 1e-2) * by for by in (1e-4, 1e4))
    assert torch.allclose(small, large, rtol=1e-8)


def test_a_fit_changes_nothing_it_is_given():
    x, y, start = rows_of(1)
    kept, moments = some_kept(1, start.shape, 0.7), moments_of(x, y)
    given = (start, kept, moments.gram, moments.cross, moments.power)
    before = [tensor.clone() for tensor in given]
    fitted(moments, start, kept, 1e-3)
    inverse_diagonals(moments.gram, kept, 1e-3)
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


@pytest.mark.parametrize("groups", [1, 3])
def test_moments_are_sums_over_rows(groups):
    x, y, maps = rows_of(0, groups)
    moments = moments_of(x, y)
    assert moments.rows == 60
    assert torch.allclose(moments.gram, torch.einsum("gri,grj->gij", x, x))
    assert torch.allclose(moments.cross, torch.einsum("gri,gro->gio", x, y))
    assert torch.allclose(moments.power, torch.einsum("gro,gro->go", y, y))
    assert moments.error(maps) == pytest.approx(error_of(x, y, maps), rel=1e-10)
    assert moments.error(torch.zeros_like(maps)) == pytest.approx(float(y.square().sum((0, 2)).mean()))


@pytest.mark.parametrize("block", [1, 7, 60, 4096])
@pytest.mark.parametrize("cuts", [[60], [1, 59], [10, 0, 50], [20, 20, 20], [0, 60]])
def test_rows_may_be_added_in_pieces(cuts, block, monkeypatch):
    x, y, maps = rows_of(0)
    whole, pieces = moments_of(x, y), GramSums()
    set_limits(monkeypatch, gram_rows=block)
    for xs, ys in zip(x.split(cuts, 1), y.split(cuts, 1), strict=True):
        pieces.add(xs, ys)
    assert pieces.rows == whole.rows == 60
    for own in ("gram", "cross", "power"):
        assert torch.allclose(getattr(pieces, own), getattr(whole, own), rtol=1e-12, atol=1e-12)
    assert pieces.error(maps) == pytest.approx(whole.error(maps), rel=1e-12)


def test_spread_of_moments_is_the_variance_of_the_outputs():
    x, y, _ = rows_of(0)
    y = y + 3
    assert float(moments_of(x, y).output_variance(False)) == pytest.approx(float(y.square().mean(1).sum()))
    ones = torch.cat([x, torch.ones(2, 60, 1, dtype=torch.float64)], 2)
    assert float(moments_of(ones, y).output_variance(True)) == pytest.approx(float(y.var(1, unbiased=False).sum()))


def test_spread_of_constant_outputs_is_more_than_zero():
    ones = torch.ones(1, 10, 1, dtype=torch.float64)
    assert float(moments_of(ones, 0 * ones).output_variance(False)) > 0
    assert float(moments_of(ones, 3 * ones).output_variance(True)) > 0


@pytest.mark.parametrize("shift", [0.0, -3.0, 1e6, 1e9])
@pytest.mark.parametrize("cuts", [[50], [1, 49], [17, 0, 33]])
def test_spread_is_mean_and_variance_as_torch_has_them(cuts, shift):
    x = (
        torch.from_numpy(np.random.default_rng(0).standard_normal((50, 4))) * torch.tensor([1.0, 0.1, 10.0, 0.0])
        + shift
    )
    spread = MeanAndVariance()
    for part in x.split(cuts):
        spread.add(part)
    mean, variance = spread.result()
    assert torch.allclose(mean, x.mean(0), rtol=1e-12, atol=1e-12)
    assert torch.allclose(variance, x.var(0), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("rows", [0, 1])
def test_spread_of_no_or_one_row_is_nan(rows):
    spread = MeanAndVariance()
    spread.add(torch.ones(rows, 3, dtype=torch.float64))
    assert all(one.isnan().all() for one in spread.result())
    assert all(one.isnan().all() for one in MeanAndVariance().result())


def explicit_diagonals(gram, kept, damping: float) -> torch.Tensor:
    found = np.full(kept.shape, math.inf)
    for group, output in np.ndindex(kept.shape[:2]):
        on, one = kept[group, output].numpy(), gram[group].numpy()
        damped = one + damping * np.diag(one).mean() * np.eye(len(one))
        found[group, output, on] = np.diag(np.linalg.inv(damped[np.ix_(on, on)]))
    return torch.from_numpy(found)


@pytest.mark.parametrize("damping", [0.0, 1e-8, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize(("groups", "inputs", "outputs"), [(1, 12, 20), (3, 9, 5), (8, 4, 1)])
def test_inverse_diagonals_are_those_of_explicit_inverses(groups, inputs, outputs, density, damping):
    x, y, start = rows_of(0, groups, 80, inputs, outputs)
    kept = some_kept(1, start.shape, density)
    if outputs > 3:
        kept[:, 1], kept[:, 2] = kept[:, 0], True
    found = inverse_diagonals(moments_of(x, y).gram, kept, damping)
    assert torch.allclose(found, explicit_diagonals(moments_of(x, y).gram, kept, damping), rtol=1e-7)
    assert torch.equal(found.isinf(), ~kept)


@pytest.mark.parametrize("damping", [0.0, 1e-6])
@pytest.mark.parametrize("density", [0.4, 0.9, 1.0])
def test_leaving_an_input_out_costs_its_square_over_the_diagonal(density, damping):
    x, y, start = rows_of(3, 2, 80, 8, 4)
    kept, moments = some_kept(2, start.shape, density), moments_of(x, y)
    best = fitted(moments, torch.zeros_like(start), kept, damping)
    costs = best.square() / inverse_diagonals(moments.gram, kept, damping)
    ridges = torch.tensor([ridge_of(one.numpy(), damping) for one in x])

    def total(maps):
        return moments.error(maps) * moments.rows + float((ridges * maps.square().sum((1, 2))).sum())

    for place in kept.nonzero().tolist():
        fewer = kept.clone()
        fewer[tuple(place)] = False
        grown = total(fitted(moments, torch.zeros_like(start), fewer, damping)) - total(best)
        assert grown == pytest.approx(float(costs[tuple(place)]), rel=1e-6, abs=1e-8)
    assert not costs[~kept].any()
