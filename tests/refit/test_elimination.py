"""Which units of a set stay: numbers and kinds, the error against every possible set, and the first choice."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import mean

import pytest
import torch

from lightning_roulette.refit.solvers import elimination
from lightning_roulette.refit.solvers.elimination import Reader, staying
from tests.support.networks import numbers

UNITS = 6
ONE_KIND = torch.zeros(UNITS, dtype=torch.int64)
ALL = torch.ones(UNITS, dtype=torch.bool)


def reader(seed: int, inputs: int, groups=1) -> Reader:
    """A layer that reads so many inputs of each unit, and one more that always stays."""
    size = UNITS * inputs + 1
    x = numbers(groups, 80, size, seed=seed) @ numbers(groups, size, size, seed=seed + 1000)
    dense = numbers(groups, 4, size, seed=seed + 2000)
    damped = x.mT @ x + 0.1 * torch.eye(size)
    right = dense @ damped
    columns = torch.arange(UNITS * inputs).view(inputs, UNITS).mT
    return Reader(damped, right / (right * dense).sum().sqrt(), columns)


def error(readers: list[Reader], kept: torch.Tensor) -> float:
    """The sum of what is left of the wanted outputs' squares when the inputs of these units are solved for."""
    found = 0.0
    for one in readers:
        stays = torch.ones(one.damped.shape[1], dtype=torch.bool)
        stays[one.columns[~kept].flatten()] = False
        part, right = one.damped[:, stays][:, :, stays], one.right[:, :, stays]
        found += 1 - float((torch.linalg.solve(part, right.mT).mT * right).sum())
    return found


def set_of(places) -> torch.Tensor:
    return torch.zeros(UNITS, dtype=torch.bool).index_fill(0, torch.tensor(places), True)


def every(count: int) -> list[torch.Tensor]:
    return [set_of(places) for places in combinations(range(UNITS), count)]


@pytest.mark.parametrize("inputs", [(1,), (3,), (1, 2)])
def test_the_set_is_that_of_all_sets_with_the_smallest_error_or_close_to_it(inputs):
    best, excess = 0, []
    for seed in range(6):
        readers = [reader(10 * seed + place, size) for place, size in enumerate(inputs)]
        for count in range(1, UNITS):
            errors = torch.tensor([error(readers, one) for one in every(count)], dtype=torch.float64)
            found = staying(readers, ALL, every(count)[0], ONE_KIND)
            assert int(found.sum()) == count
            ours = error(readers, found)
            assert ours >= float(errors.min()) * (1 - 1e-9)
            best += ours <= float(errors.min()) * (1 + 1e-9)
            excess.append(math.log(ours / float(errors.min())))
    assert best >= 24
    assert mean(excess) < 0.02


def test_no_other_first_choice_has_a_smaller_error():
    readers = [reader(seed, 1 + seed % 2) for seed in range(3)]
    for given in every(3):
        assert error(readers, staying(readers, ALL, given, ONE_KIND)) <= error(readers, given)


def test_what_is_given_stays_if_another_set_is_no_better(monkeypatch):
    readers = [reader(1, 2)]
    best = staying(readers, ALL, every(3)[0], ONE_KIND)
    assert staying(readers, ALL, best, ONE_KIND) is best
    worst = max(every(3), key=lambda one: error(readers, one))
    growth = elimination._Solution.growth
    monkeypatch.setattr(elimination._Solution, "growth", lambda self, units: -growth(self, units))
    assert staying(readers, ALL, worst, ONE_KIND) is worst
    assert staying(readers, ALL, best, ONE_KIND) is best


def test_exchanges_lower_the_error(monkeypatch):
    def found() -> float:
        return mean(
            error([reader(seed, 2)], staying([reader(seed, 2)], ALL, every(3)[0], ONE_KIND)) for seed in range(30)
        )

    exchanged = found()
    monkeypatch.setattr(elimination, "_SWEEPS", 0)
    assert exchanged < found()


def test_units_that_may_not_stay_do_not_and_each_kind_keeps_its_number():
    readers = [reader(2, 1), reader(3, 2)]
    alive, kinds = set_of([0, 1, 2, 4, 5]), torch.tensor([0, 1, 1, 1, 0, 1])
    for given in (set_of([0, 1]), set_of([1, 2, 4]), set_of([4, 5])):
        found = staying(readers, alive, given, kinds)
        assert bool((found <= alive).all())
        assert torch.equal(kinds[found].bincount(minlength=2), kinds[given].bincount(minlength=2))


def test_in_a_large_set_several_units_leave_at_a_time_and_the_set_is_about_as_good(monkeypatch):
    readers = [reader(seed, 1) for seed in range(2)]
    one_by_one = [error(readers, staying(readers, ALL, one, ONE_KIND)) for one in (every(2)[0], every(3)[0])]
    calls, growth = [], elimination._Solution.growth
    monkeypatch.setattr(elimination, "_TURNS", 2)
    monkeypatch.setattr(elimination, "_SWEEPS", 0)
    monkeypatch.setattr(
        elimination._Solution, "growth", lambda self, units: calls.append(len(units)) or growth(self, units)
    )
    found = staying(readers, ALL, every(2)[0], ONE_KIND)
    assert calls == [6, 6, 4, 4]
    assert error(readers, found) < 2 * one_by_one[0]


def test_units_may_have_unequal_numbers_of_inputs_and_inputs_may_be_equal_or_zero():
    one = reader(4, 2)
    columns = one.columns.clone()
    columns[0, 1] = -1
    damped = one.damped.clone()
    damped[:, 3], damped[:, :, 3] = damped[:, 4], damped[:, :, 4]
    damped.diagonal(dim1=1, dim2=2).add_(1e-6)
    kinds = torch.tensor([1, 0, 0, 0, 0, 0])
    found = staying([Reader(damped, one.right, columns)], ALL, set_of([0, 1, 2]), kinds)
    assert bool(found[0])
    assert int(found.sum()) == 3


def test_sums_that_are_not_finite_change_nothing():
    one = reader(5, 1)
    broken = Reader(torch.full_like(one.damped, math.nan), one.right, one.columns)
    given = set_of([2, 3])
    assert staying([broken], ALL, given, ONE_KIND) is given
