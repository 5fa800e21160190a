"""Chance: uniform bits, independent over all five inputs, equal to the documented formula.

Seeds are fixed, so no test is flaky. FALSE_ALARM is the probability that a statistical test would fail on true random
bits if its seeds were not fixed.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_roulette.wheel.chance import log_clocks, moved, normal, random_bits, stream, uniforms

FALSE_ALARM = 1e-6
ORIGIN = (0, 1, 0, "net.0.weight")
INPUTS = ("seed", "level", "candidate", "name", "index")
MASK = 2**64 - 1
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

int64 = st.integers(-(2**63), 2**63 - 1)


def reference_stream(seed: int, level: int, candidate: int, name: str) -> int:
    payload = b"".join((number & MASK).to_bytes(8, "little") for number in (seed, level, candidate))
    digest = hashlib.blake2b(payload + name.encode("utf-8"), digest_size=8, person=b"roulette").digest()
    return int.from_bytes(digest, "little")


def reference_bits(key: int, index: int) -> int:
    bits = (key + (index + 1) * GOLDEN) & MASK
    bits = ((bits ^ (bits >> 30)) * MIX_1) & MASK
    bits = ((bits ^ (bits >> 27)) * MIX_2) & MASK
    return bits ^ (bits >> 31)


def stream_that_gives(bits: int) -> int:
    """The stream in which index 0 has these bits: every step of the mixing, inverted."""

    def undo_shift(value: int, shift: int) -> int:
        found = value
        for _ in range(64 // shift + 1):
            found = value ^ (found >> shift)
        return found

    bits = undo_shift(bits, 31) * pow(MIX_2, -1, 2**64) & MASK
    bits = undo_shift(bits, 27) * pow(MIX_1, -1, 2**64) & MASK
    return signed((undo_shift(bits, 30) - GOLDEN) & MASK)


def signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


def as_uint64(bits: torch.Tensor) -> np.ndarray:
    return bits.numpy().view(np.uint64)


def along(which: str, made=random_bits, count: int = 2000) -> torch.Tensor:
    """What is made for 40 weights, shape `(count, 40)`; one input counts up along the rows."""
    if which == "index":
        return made(stream(*ORIGIN), torch.arange(count * 40).view(40, count).T)
    places = [list(ORIGIN) for _ in range(count)]
    for step, place in enumerate(places):
        place[INPUTS.index(which)] = f"net.{step}.weight" if which == "name" else step
    return torch.stack([made(stream(*place), torch.arange(40)) for place in places])


def assert_balanced(bits: np.ndarray) -> None:
    """Each of the 64 bits is True half of the time: chi-square test at FALSE_ALARM."""
    ones = np.array([int(((bits >> np.uint64(place)) & np.uint64(1)).sum()) for place in range(64)])
    chi = float(((ones - bits.size / 2) ** 2 / (bits.size / 4)).sum())
    assert chi < stats.chi2.isf(FALSE_ALARM, 64)


@pytest.mark.parametrize(
    ("key", "index", "bits"),
    [
        (0, 0, 0xE220A8397B1DCDAF),  # those published for SplitMix64
        (0, 2, 0x06C45D188009454F),
        (1234567, 1, 3203168211198807973),
        (stream(0, 0, 0, ""), 0, 0x385123156E2FED59),
        (stream(42, 3, 19, "net.0.weight"), 123_456_789, 0x18DE3A5C21A0218F),
        (stream(2**63 - 1, 1, 0, "layer"), 1, 0x7654496EC71B6551),
        (stream(-(2**63), 2**40, 2**50, "größe"), 2**40, 0x39D8F30B878BF724),
    ],
)
def test_bits_never_change_between_releases(key, index, bits):
    assert int(random_bits(key, torch.tensor(index))) == signed(bits)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=int64,
    level=st.integers(0, 2**31),
    candidate=st.integers(0, 2**31),
    name=st.text(max_size=20),
    index=st.integers(0, 2**62),
    start=st.integers(0, 2**40),
)
def test_streams_bits_and_clocks_follow_the_documented_formula(seed, level, candidate, name, index, start):
    key = stream(seed, level, candidate, name)
    assert key == signed(reference_stream(seed, level, candidate, name))
    bits = reference_bits(key & MASK, index)
    assert int(random_bits(key, torch.tensor(index))) == signed(bits)
    assert int(random_bits(moved(key, start), torch.tensor(index))) == signed(reference_bits(key & MASK, index + start))
    midpoint = Fraction((bits >> 12) * 2 + 1, 2**53)
    assert Fraction(float(midpoint)) == midpoint
    uniform = torch.tensor([float(midpoint)], dtype=torch.float64)
    assert torch.equal(log_clocks(key, torch.tensor([index])), uniform.log().neg().log())


@pytest.mark.parametrize(
    ("bits", "log_clock"),
    [
        (0, math.log(53 * math.log(2))),
        (MASK, -53 * math.log(2)),
        (1 << 63, math.log(math.log(2))),  # a shift that repeats the sign would give NaN
    ],
)
def test_log_clocks_are_finite_at_the_extremes(bits, log_clock):
    key, first = stream_that_gives(bits), torch.tensor([0])
    assert int(random_bits(key, first)) == signed(bits)
    assert float(log_clocks(key, first)) == pytest.approx(log_clock, abs=1e-6)


def test_a_clock_depends_on_its_own_index_only():
    key, index = stream(*ORIGIN), torch.arange(200_000)
    together = log_clocks(key, index)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(index)))
    assert torch.equal(log_clocks(key, index[order]), together[order])
    assert torch.equal(torch.cat([log_clocks(key, part) for part in index.split(7919)]), together)
    assert torch.equal(log_clocks(torch.full((500, 400), key), index.view(400, 500).T), together.view(400, 500).T)


def test_no_global_generator_is_read_or_advanced():
    with torch.random.fork_rng():
        found = []
        for seed in (1, 2):
            before = torch.manual_seed(seed).get_state()
            found.append(log_clocks(stream(*ORIGIN), torch.arange(100)))
            assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(*found)


@pytest.mark.parametrize("which", INPUTS)
def test_bits_along_an_input_are_uniform_and_neighbours_independent(which):
    bits = as_uint64(along(which))
    assert_balanced(bits)
    # pairs of bits of one weight at neighbouring inputs, at three places: 16 by 16 cells
    for shift in (60, 30, 0):
        nibbles = ((bits >> np.uint64(shift)) & np.uint64(15)).astype(int)
        cells = np.bincount((nibbles[:-1] * 16 + nibbles[1:]).ravel(), minlength=256)
        assert stats.chisquare(cells).pvalue > FALSE_ALARM


@pytest.mark.parametrize("which", INPUTS)
def test_clocks_along_an_input_are_exponential_and_neighbours_uncorrelated(which):
    clocks = along(which, log_clocks)
    assert stats.kstest(clocks.exp().flatten().numpy(), "expon").pvalue > FALSE_ALARM
    standard = (clocks - clocks.mean()) / clocks.std()
    for lag in (1, 2, 7):
        pairs = standard[lag:] * standard[:-lag]
        assert abs(float(pairs.mean())) * math.sqrt(pairs.numel()) < stats.norm.isf(FALSE_ALARM / 2)


def test_one_changed_bit_of_the_index_flips_half_of_all_bits():
    key, chance = stream(*ORIGIN), np.random.default_rng(5)
    for bit in range(0, 62, 3):
        index = torch.from_numpy(chance.integers(2**62, size=2000))
        assert_balanced(as_uint64(random_bits(key, index) ^ random_bits(key, index ^ (1 << bit))))


def test_streams_of_different_inputs_differ():
    numbers, names = (-1, 0, 1, 2, 256, 2**32), ("", "0", "1", "11", "a.weight", "b.weight", "a.weight ", "\0")
    places = list(itertools.product(numbers, numbers, numbers, names))
    assert len({stream(*place) for place in places}) == len(places)


def test_normal_numbers_are_normal():
    numbers = [normal(stream(0, 1, candidate, "layer")) for candidate in range(5000)]
    assert stats.kstest(numbers, "norm").pvalue > FALSE_ALARM


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bits_are_the_same_on_cuda():
    index = torch.arange(100_000)
    assert torch.equal(random_bits(stream(*ORIGIN), index.cuda()).cpu(), random_bits(stream(*ORIGIN), index))


def test_normal_numbers_are_independent_of_the_uniforms_of_the_weights():
    keys = [stream(0, 1, place, "layer") for place in range(2000)]
    index = torch.arange(20)
    both = torch.stack([torch.cat([torch.tensor([normal(key)]).double(), uniforms(key, index)]) for key in keys])
    found = torch.corrcoef(both.T)[0, 1:]
    assert float(found.abs().max()) < 5 / math.sqrt(len(keys))
    squares = torch.corrcoef(torch.cat([both[:, :1] ** 2, both[:, 1:]], 1).T)[0, 1:]
    assert float(squares.abs().max()) < 5 / math.sqrt(len(keys))


def test_normal_numbers_follow_box_and_muller_on_counters_that_no_weight_has():
    key = stream(3, 1, 4, "layer")
    radius, angle = uniforms(key, torch.tensor([-1, -2])).tolist()
    assert normal(key) == math.sqrt(-2 * math.log(radius)) * math.cos(2 * math.pi * angle)
    assert normal(key) == normal(key)
    assert normal(key) != normal(stream(3, 1, 4, "other"))
