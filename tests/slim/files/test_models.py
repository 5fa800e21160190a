"""The models of positions, numbers, multiples and symbols: what is read is what was written, in few bits."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lightning_roulette.slim.files import floats
from lightning_roulette.slim.files.coder import Reader, Writer
from lightning_roulette.slim.files.common_scales import in_multiples
from lightning_roulette.slim.files.floats import LAYOUTS, Numbers
from lightning_roulette.slim.files.multiples import LARGEST, Multiples
from lightning_roulette.slim.files.positions import Positions
from lightning_roulette.slim.files.symbols import Frequencies
from lightning_roulette.slim.files.tensors import bits_of

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.sampled_from(
    [(1, 1), (7, 5), (40, 33), (3, 0), (0, 4), (5, 4, 3), (2, 3, 200), (9, 1, 3, 3), (16, 8, 2, 2)]
)


def there_and_back(write, read):
    """What `read` gives of what `write` has written."""
    write(writer := Writer())
    found = read(reader := Reader(writer.sections()))
    assert reader.is_at_end
    assert reader.spent == pytest.approx(writer.spent)
    return found


def entropy(share: float) -> float:
    return 0.0 if share in (0, 1) else -share * math.log2(share) - (1 - share) * math.log2(1 - share)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.lists(SHAPES, min_size=1, max_size=3), st.sampled_from([0, 1e-3, 0.1, 0.5, 0.9, 1]))
def test_positions_come_back(seed, shapes, density):
    chance = np.random.default_rng(seed)
    masks = [chance.random(shape) < density for shape in shapes]

    def write(coder):
        positions = Positions()
        for one in masks:
            positions.code(coder, one, one.shape)

    def read(coder):
        positions = Positions()
        return [positions.code(coder, None, shape) for shape in shapes]

    for one, found in zip(masks, there_and_back(write, read), strict=True):
        assert np.array_equal(one, found)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5])
def test_positions_without_structure_take_their_entropy(density):
    kept = np.random.default_rng(0).random((300, 400)) < density
    Positions().code(writer := Writer(), kept, kept.shape)
    assert writer.spent <= 1.02 * kept.size * entropy(kept.mean())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_positions_take_less_where_outputs_inputs_or_places_differ(axis):
    chance = np.random.default_rng(0)
    shape = [64, 64, 9]
    shares = chance.choice([0.02, 0.4], [size if at == axis else 1 for at, size in enumerate(shape)])
    kept = chance.random(shape) < shares
    Positions().code(writer := Writer(), kept, kept.shape)
    best = sum(entropy(float(one)) * kept.size / shares.size for one in shares.flat)
    assert writer.spent <= 1.05 * best < 0.9 * kept.size * entropy(kept.mean())


def test_positions_learn_from_the_layer_before():
    chance = np.random.default_rng(0)
    shares = chance.choice([0.01, 0.5], 100)
    first, second = chance.random((100, 200)) < shares[:, None], chance.random((30, 100)) < shares
    spent = []
    for masks in ([first, second], [second]):
        positions = Positions()
        for one in masks:
            before = (writer := Writer()).spent
            positions.code(writer, one, one.shape)
        spent.append(writer.spent - before)
    assert spent[0] < spent[1]


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.sampled_from(list(LAYOUTS)), st.lists(st.integers(0, 300), min_size=1, max_size=3))
def test_numbers_come_back_whatever_their_bits(seed, dtype, sizes):
    chance, layout = np.random.default_rng(seed), LAYOUTS[dtype]
    top = 2**layout.width - 1
    vectors = [chance.integers(0, top, size, np.uint64, endpoint=True) for size in sizes]

    def write(coder):
        numbers = Numbers(layout)
        for one in vectors:
            numbers.code(coder, one, len(one))

    def read(coder):
        numbers = Numbers(layout)
        return [numbers.code(coder, None, size) for size in sizes]

    for one, found in zip(vectors, there_and_back(write, read), strict=True):
        assert np.array_equal(one, found)


def bits(values) -> np.ndarray:
    return np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)


@pytest.mark.parametrize("values", [[0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1.5], [3.25] * 100, np.arange(9) / 7])
def test_numbers_of_every_kind_come_back(values):
    given = bits(values)
    found = there_and_back(
        lambda coder: Numbers(LAYOUTS["float32"]).code(coder, given, len(given)),
        lambda coder: Numbers(LAYOUTS["float32"]).code(coder, None, len(given)),
    )
    assert np.array_equal(found, given)


def spent_on(values) -> float:
    """The bits for each number."""
    given = bits(values)
    Numbers(LAYOUTS["float32"]).code(writer := Writer(), given, len(given))
    return writer.spent / len(given)


def test_numbers_take_the_entropy_of_their_exponents_and_raw_digits():
    values = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    _, counts = np.unique(bits(values) >> np.uint64(23) & np.uint64(255), return_counts=True)
    bound = 24 - (counts / len(values) * np.log2(counts / len(values))).sum()
    assert spent_on(values) <= 1.005 * bound


def test_last_digits_that_are_zero_take_no_bits():
    values = np.random.default_rng(0).normal(size=5000)
    assert spent_on(values.astype(np.float16)) < spent_on(values) - 12.9


def test_values_that_repeat_take_the_entropy_of_their_places():
    values = np.random.default_rng(0).normal(size=8)[np.random.default_rng(1).integers(0, 8, 5000)]
    assert spent_on(values) < 3.1


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(0, 200), st.sampled_from([1, 7, 127, LARGEST]))
def test_multiples_come_back(seed, count, largest):
    multiples = np.random.default_rng(seed).integers(-largest, largest, count, endpoint=True)
    found = there_and_back(
        lambda coder: Multiples().code(coder, multiples, count), lambda coder: Multiples().code(coder, None, count)
    )
    assert np.array_equal(found, multiples)


@settings(deadline=None, max_examples=100)
@given(SEEDS, st.integers(1, 20), st.sampled_from([1, 5, 127, LARGEST]), st.integers(-100, 80))
def test_multiples_of_one_number_in_each_row_are_found(seed, rows, largest, exponent):
    chance = np.random.default_rng(seed)
    in_rows = chance.integers(1, 9, rows)
    multiples = chance.integers(-largest, largest, in_rows.sum(), endpoint=True)
    scales = np.ldexp(chance.integers(1, 256, rows).astype(np.float64), chance.integers(exponent, exponent + 20, rows))
    weights = multiples * np.repeat(scales, in_rows)
    found = in_multiples(weights, in_rows)
    assert np.array_equal(found[0] * np.repeat(found[1], in_rows).astype(np.float64), weights)
    assert np.abs(found[0]).max() <= largest


@pytest.mark.parametrize("weights", [[1.0, 1 / 3], [1e30, 1e-30], [1.0, 2.0**-15], [0.1, np.pi, 7.0]])
def test_numbers_without_a_common_divisor_are_no_multiples(weights):
    assert in_multiples(np.array(weights), np.array([len(weights)])) is None


def test_symbols_take_their_entropy_once_they_are_known():
    chance = np.random.default_rng(0)
    shares = chance.dirichlet(np.ones(30))
    symbols = chance.choice(30, 20_000, p=shares)
    Frequencies(64).code(writer := Writer(), symbols, len(symbols))
    assert writer.spent < 1.01 * len(symbols) * -(shares * np.log2(shares)).sum()


def test_symbols_learn_from_the_vector_before():
    symbols = np.random.default_rng(0).choice([3, 4, 40], 60, p=[0.8, 0.15, 0.05])
    frequencies, writer = Frequencies(64), Writer()
    frequencies.code(writer, symbols, len(symbols))
    first = writer.spent
    frequencies.code(writer, symbols, len(symbols))
    assert writer.spent - first < first - 10


def test_the_bits_that_are_counted_are_those_of_the_file():
    chance, writer = np.random.default_rng(0), Writer()
    Positions().code(writer, chance.random((200, 300)) < 0.1, (200, 300))
    Numbers(LAYOUTS["float32"]).code(writer, bits(chance.normal(size=6000)), 6000)
    size = sum(map(len, writer.sections()))
    assert size - 12 <= writer.spent / 8 <= size


def vector(kind: str, different: int, count: int) -> np.ndarray:
    """Bits of numbers of which only some are different."""
    values = torch.randn(different, generator=torch.Generator().manual_seed(different)).to(getattr(torch, kind))
    places = torch.randint(different, (count,), generator=torch.Generator().manual_seed(1))
    return bits_of(values[places]).astype(np.uint64)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("different", "count"), [(2, 40), (30, 70), (300, 700), (900, 3000), (300, 20_000)])
@pytest.mark.parametrize("learnt", [0, 5000])
def test_numbers_take_no_more_bits_than_plain_ones_or_than_a_list(kind, different, count, learnt, monkeypatch):
    given, before = vector(kind, different, count), vector(kind, 4000, learnt)

    def spent() -> float:
        numbers, writer = Numbers(LAYOUTS[kind]), Writer()
        numbers.code(writer, before, len(before))
        first = writer.spent
        numbers.code(writer, given, len(given))
        return writer.spent - first

    found, forms = spent(), {}
    for form, different_ones in (("plain", lambda *_: None), ("list", lambda self, values: floats.few(values))):
        monkeypatch.setattr(Numbers, "_list_of", different_ones)
        forms[form] = spent()
    assert found == min(forms.values())
