"""A packed bool tensor has the same entries, for every shape, size and memory format."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette.large.bits import Bits, flat_part
from lightning_roulette.large.limits import limited

bools = st.lists(st.booleans(), max_size=150)
each = settings(max_examples=100, deadline=None, derandomize=True)


def some(size: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(size) < 0.4)


@each
@given(values=bools, block=st.sampled_from([8, 64, 1 << 20]))
def test_entries_are_bits_from_the_lowest_and_the_rest_of_the_last_byte_is_zero(values, block):
    tensor = torch.tensor(values, dtype=torch.bool)
    with limited(packed_entries=block):
        packed = Bits.of(tensor)
        assert packed.packed.tolist() == np.packbits(np.array(values, dtype=bool), bitorder="little").tolist()
        assert torch.equal(packed.unpacked(), tensor)
        assert packed.count() == sum(values)
    assert packed.numel() == len(values)


@each
@given(values=bools, cut=st.floats(0, 1), length=st.integers(0, 40))
def test_any_part_can_be_read(values, cut, length):
    tensor, start = torch.tensor(values, dtype=torch.bool), int(cut * len(values))
    stop = min(start + length, len(values))
    assert torch.equal(Bits.of(tensor).part(start, stop), tensor[start:stop])
    assert Bits.of(tensor).count(start - start % 8, stop - stop % 8) == sum(values[start - start % 8 : stop - stop % 8])


@each
@given(values=bools, every=st.integers(1, 9))
def test_entries_can_be_cleared(values, every):
    tensor = torch.tensor(values, dtype=torch.bool)
    packed, places = Bits.of(tensor), tensor.nonzero().flatten()[::every]
    packed.clear(places)
    tensor[places] = False
    assert packed.equals(Bits.of(tensor))


@each
@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_bits_combine_as_bools_do(pairs):
    one, other = (torch.tensor([pair[i] for pair in pairs], dtype=torch.bool) for i in (0, 1))
    assert (Bits.of(one) & Bits.of(other)).equals(Bits.of(one & other))
    assert (Bits.of(one) | Bits.of(other)).equals(Bits.of(one | other))
    assert Bits.of(one).but(Bits.of(other)).equals(Bits.of(one & ~other))
    assert Bits.of(one).equals(Bits.of(other)) == torch.equal(one, other)


@pytest.mark.parametrize("shape", [(), (0,), (8,), (13,), (3, 5, 2)])
@pytest.mark.parametrize("value", [True, False])
def test_bits_of_one_value_equal_packed_ones(shape, value):
    filled = Bits.filled(value, torch.Size(shape), torch.device("cpu"))
    assert filled.equals(Bits.of(torch.full(shape, value)))
    assert filled.unpacked().shape == shape


def test_bits_of_one_value_take_one_byte():
    filled = Bits.filled(True, torch.Size([1024, 1024]), torch.device("cpu"))
    assert filled.packed.untyped_storage().nbytes() == 1
    assert filled.part(2**20 - 3, 2**20).tolist() == [True] * 3  # all in one byte
    assert filled.count() == 2**20


def test_equal_bits_of_another_shape_are_not_equal():
    assert not Bits.of(some(12)).equals(Bits.of(some(12).view(3, 4)))


def test_memory_format_and_offset_do_not_matter():
    last = some(2 * 3 * 4 * 5).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    turned, behind = some(60).view(6, 10).T, some(61)[1:]
    with limited(packed_entries=8):
        for tensor in (last, turned, behind):
            assert torch.equal(Bits.of(tensor).unpacked(), tensor)


@pytest.mark.parametrize("shape", [(7,), (5, 6), (2, 3, 4, 5)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_flat_part_is_that_of_the_flattened_tensor(shape, turned):
    tensor = torch.arange(math.prod(shape)).view(shape)
    tensor = tensor.transpose(0, -1) if turned else tensor
    for start in range(0, tensor.numel(), 3):
        for stop in range(start + 1, tensor.numel() + 1, 5):
            assert torch.equal(flat_part(tensor, start, stop), tensor.flatten()[start:stop])
