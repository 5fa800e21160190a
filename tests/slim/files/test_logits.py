"""Integer logarithms and probabilities, which no machine computes otherwise."""

import math

import numpy as np
import pytest

from lightning_roulette.slim.files.logits import LARGEST, ONE, RAREST, UNIT, logarithm, logit_of, probability


def exact_entries():
    """The numbers that the tables round."""
    yield from (UNIT * math.log(0.5 + (step + 0.5) / 512) for step in range(256))
    yield from (UNIT * math.log(2) * exponent for exponent in range(64))
    yield from (ONE / (1 + math.exp(-x / UNIT)) for x in range(-LARGEST, LARGEST + 1))


def test_no_entry_of_the_tables_depends_on_the_last_bits_of_a_function():
    distances = [abs(one - math.floor(one) - 0.5) for one in exact_entries() if one != 0.5 * ONE]
    assert min(distances) > 1e-8


def test_logarithms_are_right_to_a_unit():
    numbers = np.array([1, 2, 3, 7, 100, 65_535, 10**9, 2**53])
    assert np.abs(logarithm(numbers) - UNIT * np.log(numbers)).max() <= 1.5


def test_probabilities_rise_and_stay_within_their_bounds():
    found = probability(np.arange(-5000, 5001))
    assert (np.diff(found) >= 0).all()
    assert (found.min(), found[5000], found.max()) == (RAREST, ONE // 2, ONE - RAREST)
    assert (found + found[::-1] == ONE).all()


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.01, 0.3, 0.5, 0.99, 1.0])
def test_the_logit_of_a_share_is_a_multiple_of_the_step_near_it(share):
    found = logit_of(share, 16)
    assert found % 16 == 0
    assert abs(int(probability(np.int64(found))) / ONE - share) < 0.01
