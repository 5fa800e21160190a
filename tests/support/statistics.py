"""Exact distributions, and whether counts follow them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

FALSE_ALARM = 1e-5


def plackett_luce(odds: Sequence[float]) -> dict[tuple[int, ...], float]:
    """The probability of every order, by definition: each draw in proportion to the odds that are left."""

    def probability(order: tuple[int, ...]) -> float:
        left, product = sum(odds), 1.0
        for weight in order:
            product *= odds[weight] / left
            left -= odds[weight]
        return product

    return {order: probability(order) for order in permutations(range(len(odds)))}


def assert_distributed(found: Mapping[Hashable, int], exact: Mapping[Hashable, float], trials: int) -> None:
    """Chi-square test at FALSE_ALARM; outcomes expected fewer than 5 times are counted together."""
    assert sum(exact.values()) == pytest.approx(1)
    rare = {outcome for outcome, share in exact.items() if share * trials < 5}
    cells = [(found.get(outcome, 0), share * trials) for outcome, share in exact.items() if outcome not in rare]
    if rare:
        cells.append((sum(found.get(outcome, 0) for outcome in rare), sum(exact[one] for one in rare) * trials))
    seen, expected = np.array(cells).T
    assert seen.sum() == trials
    chi = float(((seen - expected) ** 2 / expected).sum())
    assert chi < stats.chi2.isf(FALSE_ALARM, len(cells) - 1)
