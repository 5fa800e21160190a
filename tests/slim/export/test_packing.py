"""Forms of weights: what is stored can be read back, and the smallest is taken."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette.slim.export.c.packing import dense, in_bitmap, in_gaps, packed


class Bits:
    """A reader of bits, most significant first."""

    def __init__(self, stored):
        self.bits, self.at = np.unpackbits(stored), 0

    def bit(self):
        self.at += 1
        return int(self.bits[self.at - 1])

    def rice(self, low):
        number = 0
        while self.bit():
            number += 1
        for _ in range(low):
            number = 2 * number + self.bit()
        return number


def unpacked(one, shape):
    """The weights that a form stands for."""
    rows, values, bits = np.zeros(shape, one.values.dtype), iter(one.values), Bits(one.positions)
    for row in rows:
        if one.form == "gaps":
            place = 0
            for _ in range(bits.rice(one.count_bits)):
                place += bits.rice(one.gap_bits)
                row[place] = next(values)
                place += 1
        elif one.form == "constant":
            row[:] = one.values[0]
        else:
            for column in range(shape[1]):
                if one.form == "dense" or bits.bit():
                    row[column] = next(values)
    assert one.form == "constant" or not list(values)
    return rows


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([0.0, 0.02, 0.2, 0.6, 1.0]), st.integers(0, 2**32 - 1))
def test_every_form_can_be_read_back(rows, columns, kept, seed):
    chance = np.random.default_rng(seed)
    weight = chance.integers(1, 127, (rows, columns)).astype(np.int8) * (chance.random((rows, columns)) < kept)
    for form in (dense, in_bitmap, in_gaps, packed):
        assert np.array_equal(unpacked(form(weight), weight.shape), weight)


def test_equal_weights_are_stored_once():
    one = packed(np.full((4, 1, 3, 3), 127, np.int8))
    assert (one.form, one.size) == ("constant", 1)


def test_gaps_as_literals():
    # two rows: counts 1 and 2, gaps 5 and 0, 1; counts have no low bits, gaps have one
    one = in_gaps(np.array([[0, 0, 0, 0, 0, 7], [3, 0, -2, 0, 0, 0]], np.int8))
    assert (one.count_bits, one.gap_bits) == (0, 1)
    assert "".join(map(str, np.unpackbits(one.positions))) == "1011011100001000"  # 10 1101, 110 00 01
    assert one.values.tolist() == [7, 3, -2]


@pytest.mark.parametrize(("kept", "form"), [(1.0, "dense"), (0.95, "dense"), (0.5, "bitmap"), (0.04, "gaps")])
def test_the_smallest_form_is_taken(kept, form):
    chance = np.random.default_rng(0)
    weight = np.where(chance.random((50, 200)) < kept, chance.integers(1, 9, (50, 200)), 0).astype(np.int8)
    found = packed(weight)
    assert found.form == form
    assert found.size == min(one(weight).size for one in (dense, in_bitmap, in_gaps))


@pytest.mark.parametrize("kept", [0.02, 0.1, 0.2])
def test_gaps_take_at_most_a_twentieth_more_than_the_entropy(kept):
    chance = np.random.default_rng(0)
    weight = (chance.random((300, 784)) < kept).astype(np.int8)
    share = weight.mean()
    entropy = -weight.size * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
    assert entropy < in_gaps(weight).positions.nbytes < 1.05 * entropy + 300 / 2
