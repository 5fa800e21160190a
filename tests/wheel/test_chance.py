"""Chance: uniform bits, independent over all five inputs, equal to the documented formula.

Seeds are fixed, so nothing here is flaky. FALSE_ALARM is the chance that a statistical test would fail on true random
bits, had its seeds not been fixed.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_roulette.wheel.chance import log_clocks, random_bits, stream

FALSE_ALARM = 1e-6
ORIGIN = (0, 1, 0, "net.0.weight")
INPUTS = ("seed", "level", "candidate", "name")
MASK = 2**64 - 1
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def reference_stream(seed: int, level: int, candidate: int, name: str) -> int:
    payload = b"".join((number & MASK).to_bytes(8, "little") for number in (seed, level, candidate))
    digest = hashlib.blake2b(payload + name.encode("utf-8"), digest_size=8, person=b"roulette").digest()
    return int.from_bytes(digest, "little")


def reference_bits(key: int, index: int) -> int:
    bits = (key + (index + 1) * GOLDEN) & MASK
    bits = ((bits ^ (bits >> 30)) * MIX_1) & MASK
    bits = ((bits ^ (bits >> 27)) * MIX_2) & MASK
    return bits ^ (bits >> 31)


def key_that_gives(bits: int) -> int:
    """The stream whose weight 0 has these bits: every step of the mixing, undone."""

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


def neighbours(which: str, count: int) -> list[tuple[int, int, int, str]]:
    """`count` inputs of a stream in which one counts up from the origin."""
    places = [list(ORIGIN) for _ in range(count)]
    for step, place in enumerate(places):
        place[INPUTS.index(which)] = f"net.{step}.weight" if which == "name" else step
    return [tuple(place) for place in places]


def table(which: str, count: int) -> torch.Tensor:
    """Bits of 40 weights each, shape `(count, 40)`: one input counts up along the rows."""
    index = torch.arange(40)
    if which == "index":  # neighbours lie below one another, so that rows count the index up
        return random_bits(stream(*ORIGIN), torch.arange(count * 40).view(40, count).T)
    return torch.stack([random_bits(stream(*place), index) for place in neighbours(which, count)])


def assert_balanced(ones: np.ndarray, trials: int) -> None:
    """Counts of fair coins, each of `trials` throws: chi-square at FALSE_ALARM."""
    chi = float(((ones - trials / 2) ** 2 / (trials / 4)).sum())
    assert chi < stats.chi2.isf(FALSE_ALARM, ones.size)


def count_of_each_bit(bits: np.ndarray) -> np.ndarray:
    return np.array([int(((bits >> np.uint64(place)) & np.uint64(1)).sum()) for place in range(64)])


@pytest.mark.parametrize(
    ("seed", "first"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]),
    ],
)
def test_bits_of_a_stream_are_those_published_for_splitmix64(seed, first):
    assert as_uint64(random_bits(seed, torch.arange(3))).tolist() == first


@pytest.mark.parametrize(
    ("place", "index", "bits"),
    [
        ((0, 0, 0, ""), 0, 0x385123156E2FED59),
        ((42, 3, 19, "net.0.weight"), 123_456_789, 0x18DE3A5C21A0218F),
        ((-1, 1, 0, "layer"), 0, 0x18A95CEC900A7765),
        ((2**63 - 1, 1, 0, "layer"), 1, 0x7654496EC71B6551),
        ((-(2**63), 2**40, 2**50, "größe"), 2**40, 0x39D8F30B878BF724),
    ],
)
def test_bits_never_change_between_releases(place, index, bits):
    found = int(as_uint64(random_bits(stream(*place), torch.tensor([index])))[0])
    assert found == bits
    assert found == reference_bits(reference_stream(*place), index)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    level=st.integers(0, 2**31),
    candidate=st.integers(0, 2**31),
    name=st.text(max_size=20),
    index=st.integers(0, 2**62),
)
def test_bits_follow_the_documented_formula(seed, level, candidate, name, index):
    key = stream(seed, level, candidate, name)
    assert key == signed(reference_stream(seed, level, candidate, name))
    assert int(random_bits(key, torch.tensor(index))) == signed(reference_bits(key & MASK, index))


def test_each_byte_of_the_bits_is_uniform():
    count = 200_000
    octets = as_uint64(random_bits(stream(*ORIGIN), torch.arange(count))).view(np.uint8).reshape(count, 8)
    for place in range(8):
        found = np.bincount(octets[:, place], minlength=256)
        assert stats.chisquare(found).pvalue > FALSE_ALARM, f"byte {place}"


@pytest.mark.parametrize("which", INPUTS)
def test_bits_are_uniform_along_every_input(which):
    bits = as_uint64(table(which, 2000))
    assert_balanced(count_of_each_bit(bits), bits.size)


@pytest.mark.parametrize("which", [*INPUTS, "index"])
def test_neighbours_are_independent(which):
    # pairs of one weight's bits at neighbouring inputs, leading and trailing byte: 16 by 16 cells
    bits = as_uint64(table(which, 2000))
    for shift in (60, 30, 0):
        nibbles = ((bits >> np.uint64(shift)) & np.uint64(15)).astype(int)
        cells = np.bincount((nibbles[:-1] * 16 + nibbles[1:]).ravel(), minlength=256)
        assert stats.chisquare(cells).pvalue > FALSE_ALARM


@pytest.mark.parametrize("which", [*INPUTS, "index"])
def test_clocks_of_neighbours_are_uncorrelated(which):
    index, count = torch.arange(40), 2000
    if which == "index":
        clocks = log_clocks(stream(*ORIGIN), torch.arange(count * 40).view(40, count).T)
    else:
        clocks = torch.stack([log_clocks(stream(*place), index) for place in neighbours(which, count)])
    standard = (clocks - clocks.mean()) / clocks.std()
    for lag in (1, 2, 7):
        pairs = standard[lag:] * standard[:-lag]
        assert abs(float(pairs.mean())) * math.sqrt(pairs.numel()) < stats.norm.isf(FALSE_ALARM / 2)


@pytest.mark.parametrize("which", INPUTS[:3])
def test_one_changed_bit_of_a_number_flips_half_of_all_bits(which):
    place, chance, index = INPUTS.index(which), random.Random(5), torch.arange(32)
    flipped = []
    for bit in range(64):
        for _ in range(4):
            before = [chance.randrange(-(2**63), 2**63), chance.randrange(2**20), chance.randrange(2**20), "w"]
            after = list(before)
            after[place] = signed((before[place] & MASK) ^ (1 << bit))
            flipped.append(random_bits(stream(*before), index) ^ random_bits(stream(*after), index))
    bits = as_uint64(torch.stack(flipped))
    assert_balanced(count_of_each_bit(bits), bits.size)
    by_changed_bit = np.array([count_of_each_bit(part).sum() for part in bits.reshape(64, 4 * 32)])
    assert_balanced(by_changed_bit, 4 * 32 * 64)


def test_one_changed_letter_of_a_name_flips_half_of_all_bits():
    index, flipped = torch.arange(32), []
    for number, letter in itertools.product(range(100), "abc"):
        before, after = f"net.{number}.weight", f"net.{number}.weigh{letter}"
        flipped.append(random_bits(stream(0, 1, 0, before), index) ^ random_bits(stream(0, 1, 0, after), index))
    bits = as_uint64(torch.stack(flipped))
    assert_balanced(count_of_each_bit(bits), bits.size)


def test_one_changed_bit_of_the_index_flips_half_of_all_bits():
    key, chance = stream(*ORIGIN), np.random.default_rng(5)
    for bit in range(0, 62, 3):
        index = torch.from_numpy(chance.integers(2**62, size=2000))
        flipped = as_uint64(random_bits(key, index) ^ random_bits(key, index ^ (1 << bit)))
        assert_balanced(count_of_each_bit(flipped), flipped.size)


def test_streams_of_different_inputs_differ():
    numbers, names = (-1, 0, 1, 2, 256, 2**32), ("", "0", "1", "11", "a.weight", "b.weight", "a.weight ", "\0")
    places = list(itertools.product(numbers, numbers, numbers, names))
    assert len({stream(*place) for place in places}) == len(places)


def test_a_clock_depends_on_its_own_index_only():
    key, index = stream(*ORIGIN), torch.arange(200_000)
    together = log_clocks(key, index)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(index)))
    assert torch.equal(log_clocks(key, index[order]), together[order])
    assert torch.equal(log_clocks(key, index[65_530:65_550]), together[65_530:65_550])
    assert torch.equal(torch.cat([log_clocks(key, part) for part in index.split(7919)]), together)
    assert torch.equal(log_clocks(key, index.view(400, 500).T), together.view(400, 500).T)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(key=st.integers(-(2**63), 2**63 - 1), index=st.integers(0, 2**62))
def test_clocks_follow_the_documented_formula(key, index):
    midpoint = Fraction((reference_bits(key & MASK, index) >> 12) * 2 + 1, 2**53)
    assert Fraction(float(midpoint)) == midpoint
    uniform = torch.tensor([float(midpoint)], dtype=torch.float64)
    assert torch.equal(log_clocks(key, torch.tensor([index])), uniform.log().neg().log())


def test_log_clocks_are_finite_at_the_extremes():
    slowest, fastest = key_that_gives(0), key_that_gives(MASK)
    first = torch.tensor([0])
    assert int(random_bits(slowest, first)) == 0
    assert int(random_bits(fastest, first)) == -1
    assert float(log_clocks(slowest, first)) == pytest.approx(math.log(53 * math.log(2)))
    assert float(log_clocks(fastest, first)) == pytest.approx(-53 * math.log(2), abs=1e-6)


def test_the_sign_bit_is_the_leading_bit_of_the_uniform():
    # a shift that repeats the sign would make U negative and its logarithm NaN
    first = torch.tensor([0])
    uniform = torch.exp(-torch.exp(log_clocks(key_that_gives(1 << 63), first)))
    assert float(uniform) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("place", [ORIGIN, (-7, 12, 19, "head.weight")])
def test_clocks_are_exponential(place):
    clocks = log_clocks(stream(*place), torch.arange(200_000)).exp().numpy()
    assert stats.kstest(clocks, "expon").pvalue > FALSE_ALARM


def test_exponentials_over_candidates_are_exponential():
    # what decides which of 20 candidates prunes one given weight
    clocks = torch.cat([log_clocks(stream(0, 1, candidate, "w"), torch.tensor([17])) for candidate in range(5000)])
    assert stats.kstest(clocks.exp().numpy(), "expon").pvalue > FALSE_ALARM


def test_no_global_generator_is_read_or_advanced():
    before = torch.random.get_rng_state()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = log_clocks(stream(*ORIGIN), torch.arange(100))
        torch.manual_seed(2)
        assert torch.equal(log_clocks(stream(*ORIGIN), torch.arange(100)), first)
    log_clocks(stream(*ORIGIN), torch.arange(100))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bits_are_the_same_on_cuda():
    index = torch.arange(100_000)
    assert torch.equal(random_bits(stream(*ORIGIN), index.cuda()).cpu(), random_bits(stream(*ORIGIN), index))
