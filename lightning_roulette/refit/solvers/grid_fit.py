"""Grids that fit the weights of a layer, by the error of the layer and the bits of the codes."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lightning_roulette.refit.solvers.conjugate_gradient import quotient
from lightning_roulette.refit.solvers.grid import Grid
from lightning_roulette.refit.solvers.rounding import Problem
from lightning_roulette.values import INT8_MOST, on_list, scale_digits, shortened

_ROUNDS = 20  # in which a list of values is fitted to the weights alone
_STEPS = 8  # of conjugate gradients for the values of a list
_LEAST_SHARE = 0.01  # of the error of rounding to the nearest value, to which solving the rest again may lower it


def int8_grid(problem: Problem, columns: slice, kind: torch.dtype, alike: bool = False) -> Grid:
    """Return a grid of multiples of a scale of each output, as if all weights were rounded to the nearest.

    Args:
        problem: The layer.
        columns: The inputs of the grid.
        kind: The type of the weights.
        alike: Whether all outputs have the same scale.
    """
    codes = torch.arange(1, INT8_MOST + 1, device=problem.gram.device, dtype=problem.gram.dtype)
    levels = torch.cat([-codes.flip(0), codes])
    grid = Grid(columns, levels, problem.prices, torch.zeros_like(levels), kind, scaled=True, alike=alike)
    return replace(grid, scales=_best_scales(problem, grid, 1.0))


def resized(problem: Problem, grid: Grid, matrix: Tensor) -> Grid:
    """Return a grid with better scales.

    Args:
        problem: The layer.
        grid: A grid with scales.
        matrix: The matrix on this grid, which tells how much smaller errors are than those of the nearest values.
    """
    whole = (_squares(problem, grid.columns) * grid.scales.square()).sum() / 12
    share = float(quotient(problem.errors(matrix).sum(), whole))
    return replace(grid, scales=_best_scales(problem, grid, min(max(share, _LEAST_SHARE), 1.0)))


def listed_grid(problem: Problem, columns: slice, levels: Tensor, kind: torch.dtype, fixed: bool) -> Grid:
    """Return a grid of a list of values for all outputs.

    Args:
        problem: The layer.
        columns: The inputs of the grid.
        levels: The values; see `levels_of`.
        kind: The type of the weights.
        fixed: Whether they must stay.
    """
    return Grid(columns, levels, torch.ones_like(problem.prices), torch.zeros_like(levels), kind, fixed=fixed)


def levels_of(values: Tensor, weights: Tensor, prices: Tensor, most: int, kind: torch.dtype) -> Tensor:
    """Return a list of values that is close to given values, by Lloyd's algorithm with a price for bits.

    It starts at quantiles. Values whose codes are not worth their bits drop out.

    Args:
        values: Float64, shape `(values,)`.
        weights: Weights of their squared distances, the same shape.
        prices: The weighted distance that a bit is worth, the same shape.
        most: Largest number of values in the list.
        kind: The type of the weights.
    """
    if not len(values):
        return values.new_ones(1)
    places = ((torch.arange(most) + 0.5) * len(values) / most).long().unique()
    levels = on_list(values.sort().values[places.to(values.device)], kind).unique()
    grid = Grid(slice(0, 0), levels, values.new_ones(()), torch.zeros_like(levels), kind)
    for _ in range(_ROUNDS):
        grid = _moved(grid, values, weights, prices)
    return grid.levels


def spread_levels(problem: Problem, columns: slice, most: int, kind: torch.dtype) -> Tensor:
    """Return a list of values that is close to a layer's weights, by the mean squares of their inputs.

    For the arguments see `int8_grid` and `levels_of`.
    """
    entries = problem.rounded[..., columns]
    diagonal = problem.gram.diagonal(dim1=1, dim2=2)[:, None, columns]
    found = problem.target[..., columns], diagonal, problem.prices.unsqueeze(2)
    values, weights, prices = (one.expand_as(entries)[entries] for one in found)
    return levels_of(values, weights, prices, most, kind)


def fitted(problem: Problem, grid: Grid, matrix: Tensor) -> Grid:
    """Return a grid with the levels, or scales, that fit best while each entry of a matrix keeps its code.

    The codes of the new grid are those of the given one. For the arguments see `resized`.
    """
    if grid.fixed:
        return grid
    codes, entries = grid.codes_in(matrix), problem.rounded[..., grid.columns]
    residual, gram = problem.residual(matrix)[..., grid.columns], problem.gram[:, grid.columns, grid.columns]
    if grid.scaled:
        units = torch.where(entries, grid.levels[codes], 0.0)
        slopes, curvatures = (units * residual).sum(2), ((units @ gram) * units).sum(2)
        change = quotient(_together(slopes, grid), _together(curvatures, grid))
        scales = shortened(grid.scales + change, scale_digits(grid.kind))
        return replace(grid, scales=torch.where(scales > 0, scales, grid.scales))
    levels = grid.levels + _level_change(codes, entries, residual, gram, len(grid.levels))
    return replace(grid, levels=on_list(levels, grid.kind))


def _squares(problem: Problem, columns: slice) -> Tensor:
    """Return for each output the summed squares of the inputs of its weights, shape `(groups, outputs)`."""
    diagonal = problem.gram.diagonal(dim1=1, dim2=2)[:, None, columns]
    return (problem.rounded[..., columns] * diagonal).sum(2)


def _together(numbers: Tensor, grid: Grid) -> Tensor:
    """Return the sum of the numbers of all outputs for each of them, if they have the same scale."""
    return numbers.sum().expand_as(numbers) if grid.alike else numbers


def _best_scales(problem: Problem, grid: Grid, share: float) -> Tensor:
    """Return scales at which one bit more saves an error of its price; at least those that reach the largest weight.

    A uniform grid has a mean squared error of `scale ** 2 / 12`, of which a share is left after the rest is solved
    again. One bit more halves the scale.
    """
    entries, digits = problem.rounded[..., grid.columns], scale_digits(grid.kind)
    most = torch.where(entries, problem.target[..., grid.columns].abs(), 0.0).amax(2)
    most = most.max().expand_as(most) if grid.alike else most
    worth = _together(problem.prices * entries.sum(2), grid)
    best = quotient(6 * worth, math.log(2) * share * _together(_squares(problem, grid.columns), grid)).sqrt()
    least = shortened(most / INT8_MOST, digits, up=True)
    found = torch.maximum(shortened(torch.minimum(best, most), digits), least)
    return torch.where(most > 0, found, 1.0)


def _moved(grid: Grid, values: Tensor, weights: Tensor, prices: Tensor) -> Grid:
    """Return a list whose levels are the weighted means of the values that choose them."""
    chosen = grid.chosen(values, torch.ones_like(values), weights, prices)
    levels, codes = chosen.unique(return_inverse=True)
    total, sums = (torch.zeros_like(levels).index_add_(0, codes, one) for one in (weights, weights * values))
    means = torch.where(total > 0, quotient(sums, total), levels)
    found, codes = on_list(means, grid.kind)[codes].unique(return_inverse=True)
    bits = (len(values) / codes.bincount(minlength=len(found)).to(found)).log2()
    return replace(grid, levels=found, bits=bits)


def _level_change(codes: Tensor, entries: Tensor, residual: Tensor, gram: Tensor, levels: int) -> Tensor:
    """Return the change of the levels that makes the error smallest, by conjugate gradients."""

    def gathered(values: Tensor) -> Tensor:
        return codes[entries].bincount(values[entries], minlength=levels)

    rest = gathered(residual)
    found, direction = torch.zeros_like(rest), rest
    for _ in range(min(_STEPS, levels)):
        moved = gathered(torch.where(entries, direction[codes], 0.0) @ gram)
        square = rest @ rest
        length = quotient(square, direction @ moved)
        found, rest = found + length * direction, rest - length * moved
        direction = rest + quotient(rest @ rest, square) * direction
    return found
