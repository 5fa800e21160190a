"""How values are stored is checked."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from lightning_roulette import Codebook
from lightning_roulette.values import STORED, values_of


def test_a_codebook_is_frozen_and_has_the_documented_default():
    one = Codebook()
    assert vars(one) == {"bits": 4}
    with pytest.raises(FrozenInstanceError):
        one.bits = 5
    assert hash(one) == hash(Codebook(4))


@pytest.mark.parametrize("bits", range(3, 9))
def test_bits_in_range_are_kept(bits):
    assert Codebook(bits).bits == bits


@pytest.mark.parametrize(
    ("bits", "error", "message"),
    [
        (2, ValueError, "bits is 2, but must be at least 3"),
        (9, ValueError, "bits is 9, but must be at most 8. Use 'float16' for more values"),
        (4.0, TypeError, "bits is 4.0, but must be a whole number"),
    ],
)
def test_bits_out_of_range_are_named(bits, error, message):
    with pytest.raises(error, match=message):
        Codebook(bits)


def test_values_are_named_by_a_word_or_given():
    assert [values_of(word) for word in STORED] == ["float32", "float16", "int8"]
    assert values_of(Codebook(5)) == Codebook(5)
    assert values_of({"bits": 5}) == Codebook(5)
    with pytest.raises(ValueError, match="values is 'int4', but must be one of 'float32', 'float16', 'int8'. Or pass"):
        values_of("int4")
    with pytest.raises(TypeError, match="values is 8, but must be one of float32, float16, int8, or a Codebook"):
        values_of(8)
    with pytest.raises(TypeError, match="values has the field 'bit', but a Codebook has bits. Did you mean 'bits'"):
        values_of({"bit": 4})
