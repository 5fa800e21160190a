"""Validation data in folds: each sample is in exactly one, the seed deals, and memory is limited."""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map

from lightning_roulette.judge.race import rungs
from lightning_roulette.network.samples import bytes_of, tensors_of
from lightning_roulette.trainer.data.dealing import FOLDS, folds_of
from lightning_roulette.trainer.data.folded_data import FoldedData, KeptData
from lightning_roulette.trainer.data.streamed_data import StreamedData, dealt

PLENTY = 2**40
EVERY = range(FOLDS)

Pair = namedtuple("Pair", ["image", "label"])


@dataclass(frozen=True)
class Record:
    image: torch.Tensor
    label: torch.Tensor


def numbered(*sizes: int, first: int = 0, widths: Sequence[int] = ()) -> list[dict[str, torch.Tensor]]:
    """Batches of these sizes. Samples are numbered, and every tensor holds the number of its sample.

    Args:
        widths: The width of the images of each batch. By default 3.
    """
    batches = []
    for place, size in enumerate(sizes):
        tags = torch.arange(first, first + size)
        batches.append({"image": tags.float().view(-1, 1).repeat(1, widths[place] if widths else 3), "label": tags})
        first += size
    return batches


class Loaders:
    """Loaders that count their readings, and give new tensors each time."""

    def __init__(self, *loaders: Sequence[Any], known: bool = True) -> None:
        self.loaders, self.count, self.given, self.most_alive = loaders, 0, [], 0
        self.lengths = [float(len(found)) if known else math.inf for found in loaders]

    def read(self) -> Iterator[tuple[Any, int]]:
        self.count += 1
        for number, loader in enumerate(self.loaders):
            for batch in loader:
                fresh = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, batch)
                self.given += [weakref.ref(leaf) for leaf in tree_leaves(fresh) if isinstance(leaf, torch.Tensor)]
                self.most_alive = max(self.most_alive, self.alive)
                yield fresh, number
                del fresh

    @property
    def alive(self) -> int:
        """The bytes of all tensors ever given that are still held."""
        return sum(tensor.nbytes for one in self.given if (tensor := one()) is not None)

    @property
    def bytes(self) -> int:
        return sum(bytes_of(batch) for loader in self.loaders for batch in loader)

    def dealt(self, seed: int = 0, cache_bytes: int = PLENTY, copies: bool = False) -> FoldedData:
        return dealt(self.read, self.lengths, seed, cache_bytes, copies)


def labels(data, *folds: int) -> list[list[int]]:
    """The samples of each batch of some folds. Images and labels are still together."""
    found = []
    for batch, _ in data.of(folds):
        assert batch["image"][:, 0].tolist() == batch["label"].tolist()
        found.append(batch["label"].tolist())
    return found


def samples(data, *folds: int) -> list[int]:
    return [sample for batch in labels(data, *folds) for sample in batch]


def numbers(data, *folds: int) -> list[int]:
    """The loader of each batch."""
    return [loader for _, loader in data.of(folds)]


def nearly_equal(counts: Sequence[int]) -> bool:
    return max(counts) - min(counts) <= 1


def in_order(data) -> bool:
    return (data.folds, data.undivided_because, data.at_once) == (FOLDS, "", FOLDS)


# ------------------------------------------------------------------------------------------------ whole batches


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(16, 60), min_size=1, max_size=3), st.integers(-(2**63), 2**63 - 1))
def test_many_batches_are_dealt_whole_and_evenly(counts, seed):
    loaders = Loaders(*(numbered(*[2] * (count - 1), 1, first=1000 * n) for n, count in enumerate(counts)))
    data = loaders.dealt(seed)
    assert in_order(data)
    by_fold = [labels(data, fold) for fold in EVERY]
    original = [batch["label"].tolist() for loader in loaders.loaders for batch in loader]
    assert sorted(batch for fold in by_fold for batch in fold) == sorted(original)
    for loader in range(len(counts)):
        assert nearly_equal([numbers(data, fold).count(loader) for fold in EVERY])
    # within a fold as in the loaders
    assert all(fold == sorted(fold) for fold in by_fold)
    assert all(numbers(data, fold) == sorted(numbers(data, fold)) for fold in EVERY)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 100), st.integers(1, 16), st.booleans(), st.integers(0, 1000), st.integers(0, 3))
def test_folds_hold_equally_many_batches(count, folds, known, seed, loader):
    found = folds_of(count, folds, count if known else math.inf, seed, loader)
    sizes = [found.count(fold) for fold in range(folds)]
    assert sum(sizes) == len(found) == count
    assert nearly_equal(sizes)


@pytest.mark.parametrize("length", [math.inf, 0])
@pytest.mark.parametrize("count", [16, 17, 31, 33, 40, 100])
def test_the_two_halves_of_the_folds_are_equal_and_the_first_fold_is_a_small_one(count, length):
    found = folds_of(count, FOLDS, length, 0, 0)
    assert found.count(0) == count // FOLDS
    assert nearly_equal([sum(fold < 8 for fold in found), sum(fold >= 8 for fold in found)])


@pytest.mark.parametrize("sizes", [[1] * 64, [40, 40]], ids=["batches", "samples"])
def test_equal_seeds_deal_equally_and_other_seeds_do_not(sizes):
    loaders = Loaders(numbered(*sizes))
    first, again, other = (
        [sorted(samples(data, fold)) for fold in EVERY]
        for data in (loaders.dealt(3), loaders.dealt(3), loaders.dealt(4))
    )
    assert first == again
    assert sum(one == another for one, another in zip(first, other, strict=True)) <= 1
    # at random: neither in turn nor in ranges
    share = sum(sizes) // FOLDS
    for ordered in (lambda fold: range(fold, sum(sizes), FOLDS), lambda fold: range(share * fold, share * (fold + 1))):
        assert sum(one == list(ordered(fold)) for fold, one in enumerate(first)) <= 1


def test_loaders_are_dealt_independently():
    data = Loaders(numbered(*[1] * 64), numbered(*[1] * 64, first=64)).dealt()
    both = [samples(data, fold) for fold in EVERY]
    assert sum([x for x in one if x < 64] == [x - 64 for x in one if x >= 64] for one in both) <= 1


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("cache_bytes", [PLENTY, 0])
def test_a_loader_of_unknown_length_is_dealt_in_turn(seed, cache_bytes):
    data = Loaders(numbered(*[1] * 37), known=False).dealt(seed, cache_bytes)
    fold_of = {sample: fold for fold in EVERY for sample in samples(data, fold)}
    assert sorted(fold_of) == list(range(37))
    # sixteen in a row are in sixteen folds, alternately in the first half and in the second
    assert {fold_of[sample] for sample in EVERY} == set(EVERY)
    assert all(fold_of[sample] == fold_of[sample + FOLDS] for sample in range(37 - FOLDS))
    assert [fold_of[sample] < 8 for sample in range(37)] == [sample % 2 == 1 for sample in range(37)]


def test_several_folds_are_given_as_one_in_the_order_of_the_loaders():
    data = Loaders(numbered(*[2] * 20), numbered(*[1] * 16, first=100)).dealt()
    assert samples(data, *EVERY) == [*range(40), *range(100, 116)]
    assert samples(data, 3, 9) == sorted(samples(data, 3) + samples(data, 9))
    assert numbers(data, *EVERY) == [0] * 20 + [1] * 16


# ------------------------------------------------------------------------------------------------ samples


few_batches = st.lists(st.integers(1, 40), min_size=1, max_size=15).filter(lambda sizes: sum(sizes) >= FOLDS)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(few_batches, st.booleans(), st.integers(-(2**63), 2**63 - 1))
def test_few_batches_are_dealt_sample_by_sample_whatever_their_shapes(sizes, equal, seed):
    # unequal widths are those of sentences, padded to the longest of each batch
    widths = [3] * len(sizes) if equal else range(5, 5 + len(sizes))
    data = Loaders(numbered(*sizes, widths=widths)).dealt(seed)
    assert in_order(data)
    by_fold = [samples(data, fold) for fold in EVERY]
    assert sorted(sample for fold in by_fold for sample in fold) == list(range(sum(sizes)))
    assert nearly_equal([len(fold) for fold in by_fold])
    assert all(1 <= len(batch) <= max(sizes) for fold in EVERY for batch in labels(data, fold))
    width_of = [width for size, width in zip(sizes, widths, strict=True) for _ in range(size)]
    for batch, _ in data.of(EVERY):
        assert {width_of[sample] for sample in batch["label"].tolist()} == {batch["image"].shape[1]}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(few_batches, st.booleans(), st.sets(st.integers(0, FOLDS - 1), min_size=1))
def test_a_union_of_folds_has_their_samples_in_batches_of_the_usual_size(sizes, equal, folds):
    data = Loaders(numbered(*sizes, widths=[3] * len(sizes) if equal else range(5, 5 + len(sizes)))).dealt()
    union = labels(data, *sorted(folds))
    each = [sample for fold in folds for sample in samples(data, fold)]
    assert sorted(sample for batch in union for sample in batch) == sorted(each)
    assert all(1 <= len(batch) <= max(sizes) for batch in union)


def test_all_folds_of_few_batches_take_no_more_batches_than_there_were():
    data = Loaders(numbered(40, 40, 40, 7)).dealt()
    assert [len(batch) for batch in labels(data, *EVERY)] == [31, 32, 32, 32]


def test_parts_of_every_kind_stay_with_their_samples():
    def batch(first: int) -> tuple[Any, ...]:
        tags = torch.arange(first, first + 10)
        return Pair({"x": tags.view(-1, 1)}, tags), [f"{tag}" for tag in tags.tolist()], "the same"

    data = Loaders([batch(0), batch(10), batch(20)]).dealt()
    found = []
    for (pair, names, constant), _ in data.of(EVERY):
        assert type(pair) is Pair
        assert pair.image["x"].flatten().tolist() == pair.label.tolist() == [int(name) for name in names]
        assert constant == "the same"
        found += pair.label.tolist()
    assert sorted(found) == list(range(30))


def test_each_loader_is_dealt_in_its_own_way():
    data = Loaders(numbered(*[2] * 20), numbered(30, 20, first=100)).dealt()
    assert in_order(data)
    assert sorted(samples(data, *EVERY)) == [*range(40), *range(100, 150)]
    for fold in EVERY:
        found = list(data.of([fold]))
        assert [loader for _, loader in found] == sorted(loader for _, loader in found)
        assert {loader for _, loader in found} == {0, 1}
        assert all((batch["label"] >= 100).all() == bool(loader) for batch, loader in found)
        assert all(len(batch["label"]) == 2 for batch, loader in found if loader == 0)


@pytest.mark.parametrize(
    ("batch", "count", "fold"), [(64, 400, 2), (400, 400, 16), (20, 400, 1), (25, 400, 1), (50, 400, 2)]
)
def test_folds_that_fit_into_one_batch_cost_no_more_than_one(batch, count, fold):
    batches = list(torch.arange(count).split(batch))
    data = KeptData({0: batches}, [math.inf], seed=0)
    assert data.at_least == (1 if len(batches) >= 16 else fold)
    assert len(list(data.of(range(data.at_least)))) == 1 or len(batches) >= 16


# ------------------------------------------------------------------------------------------------ one fold


def ragged(count: int) -> list[Any]:
    return [[torch.arange(4), torch.tensor(place)] for place in range(count)]


@pytest.mark.parametrize(
    ("loaders", "why"),
    [
        ([ragged(3)], "loader 0 gives 3 batches, fewer than 16, and their tensors do not share a first dimension"),
        ([numbered(5, 5, 5)], "loader 0 gives 15 samples, fewer than 16"),
        ([numbered(*[2] * 20), ragged(15)], "loader 1 gives 15 batches, fewer than 16, and their tensors do not share"),
        ([numbered(1), numbered(*[2] * 20)], "loader 0 gives 1 sample, fewer than 16"),
        ([numbered(20), numbered(8, 7)], "loader 1 gives 15 samples, fewer than 16"),
    ],
)
def test_data_that_cannot_be_dealt_is_one_fold_and_says_why(loaders, why):
    data = Loaders(*loaders).dealt()
    assert (data.folds, data.at_once) == (1, 1)
    assert why in data.undivided_because
    found = list(data.of([0]))
    expected = [(batch, number) for number, loader in enumerate(loaders) for batch in loader]
    assert [number for _, number in found] == [number for _, number in expected]
    for (batch, _), (original, _) in zip(found, expected, strict=True):
        assert type(batch) is type(original)
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(batch), tree_leaves(original), strict=True))


def test_sixteen_batches_need_not_be_split_and_sixteen_samples_make_a_fold_each():
    batches, rows = Loaders(ragged(16)).dealt(), Loaders(numbered(9, 7)).dealt()
    assert in_order(batches)
    assert [len(list(batches.of([fold]))) for fold in EVERY] == [1] * FOLDS
    assert sorted(labels(rows, fold) for fold in EVERY) == [[[sample]] for sample in range(16)]


# ------------------------------------------------------------------------------------------------ memory


shares = st.floats(0, 1, exclude_max=True)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(1, 5), min_size=16, max_size=25), min_size=1, max_size=2),
    st.integers(0, 1000),
    shares,
    st.lists(st.sets(st.integers(0, FOLDS - 1), min_size=1), max_size=4),
)
def test_data_that_is_read_again_is_dealt_like_data_that_is_kept(sizes, seed, share, asked):
    loaders = Loaders(*(numbered(*found, first=1000 * n) for n, found in enumerate(sizes)))
    kept, streamed = loaders.dealt(seed), loaders.dealt(seed, int(share * loaders.bytes))
    assert isinstance(streamed, StreamedData)
    assert (streamed.folds, streamed.undivided_because) == (FOLDS, "")
    for fold in EVERY:
        assert labels(streamed, fold) == labels(kept, fold)
        assert numbers(streamed, fold) == numbers(kept, fold)
    for folds in asked:
        assert sorted(labels(streamed, *folds)) == sorted(labels(kept, *folds))
        assert numbers(streamed, *folds) == numbers(kept, *folds)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 5), min_size=16, max_size=25),
    shares,
    st.lists(st.sets(st.integers(0, FOLDS - 1), min_size=1), min_size=1, max_size=6),
)
def test_no_more_is_kept_than_allowed(sizes, share, asked):
    loaders = Loaders(numbered(*sizes))
    allowed, largest = int(share * loaders.bytes), max(bytes_of(batch) for batch in loaders.loaders[0])
    data = loaders.dealt(cache_bytes=allowed)
    assert loaders.alive == 0
    loaders.most_alive = 0
    for folds in asked:
        for batch, _ in data.of(sorted(folds)):
            del batch
        assert loaders.alive <= allowed
    # while reading, also the batch just read, the one before it and the last one given
    assert loaders.most_alive <= allowed + 3 * largest


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 5), min_size=16, max_size=40), shares, st.integers(0, FOLDS - 1))
def test_folds_that_fit_are_read_once_however_often_they_are_asked_for(sizes, share, first):
    loaders = Loaders(numbered(*sizes))
    data = loaders.dealt(cache_bytes=int(share * loaders.bytes))
    assert 1 <= data.at_once <= FOLDS
    part = range(first, min(FOLDS, first + data.at_once))
    fits = sum(len(samples(data, fold)) for fold in part) * bytes_of(numbered(1)[0]) <= int(share * loaders.bytes)
    assert fits or data.at_once == 1
    before = loaders.count
    asked = [labels(data, *part) for _ in range(5)]
    assert asked == [asked[0]] * 5
    readings = loaders.count - before
    assert readings <= 1 if fits else readings == 5


@pytest.mark.parametrize("share", [0.07, 0.15, 0.3, 0.6])
def test_a_race_reads_the_loaders_at_most_once_a_part(share):
    loaders = Loaders(numbered(*[4] * 64))
    data = loaders.dealt(cache_bytes=int(share * loaders.bytes))
    stages = rungs(20, 8, data.at_once)
    before = loaders.count
    for rung in stages:
        for part in rung.parts:
            for _ in range(rung.entrants):
                samples(data, *part)
    parts = sum(len(rung.parts) for rung in stages)
    # the next folds are read along if they fit
    assert loaders.count - before <= min(parts, math.ceil(8 / data.at_once))


def test_all_data_that_fits_is_read_once_and_a_byte_less_is_streamed():
    loaders = Loaders(numbered(*[2] * 20), numbered(30, first=100))
    data = loaders.dealt(cache_bytes=loaders.bytes)
    for fold in EVERY:
        samples(data, fold)
    assert sum(bytes_of(batch) for batch, _ in data.of(EVERY)) == loaders.bytes
    assert loaders.count == 1
    assert isinstance(data, KeptData)
    assert isinstance(loaders.dealt(cache_bytes=loaders.bytes - 1), StreamedData)


@pytest.mark.parametrize("counts", [(1,), (2,), (5,), (15,), (40, 3), (16, 2)])
def test_few_batches_that_are_too_large_to_keep_make_fewer_folds(counts):
    loaders = Loaders(*(numbered(*[10] * count, first=1000 * n) for n, count in enumerate(counts)))
    data = loaders.dealt(cache_bytes=10)
    alone = "a loader gives a single batch, and cache_bytes does not hold the data"
    assert (data.folds, data.at_once, data.undivided_because) == (min(counts), 1, "" if min(counts) > 1 else alone)
    found = [labels(data, fold) for fold in range(data.folds)]
    assert sorted(batch for fold in found for batch in fold) == [
        batch["label"].tolist() for loader in loaders.loaders for batch in loader
    ]
    assert all(set(numbers(data, fold)) == set(range(len(counts))) for fold in range(data.folds))


# ------------------------------------------------------------------------------------------------ what a step may do


X = torch.zeros(4)
KINDS = {
    "list": lambda: [{"image": X, "label": X}, X],
    "dict": lambda: {"inner": [X, X], "label": X},
    "tuple": lambda: ({"image": X, "label": X}, X),
    "namedtuple": lambda: Pair([X, X], X),
    "UserDict": lambda: [UserDict({"image": X, "label": X}), X],
    "OrderedDict": lambda: [OrderedDict({"image": X, "label": X}), X],
    "defaultdict": lambda: [defaultdict(list, {"image": X, "label": X}), X],
    "frozen dataclass": lambda: [Record(X, X), X],
}


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_a_step_takes_out_of_a_batch_or_writes_into_copies_is_undone_the_next_time(kind, copies):
    data = Loaders([kind() for _ in range(20)]).dealt(copies=copies)

    def found() -> list[Any]:
        return [batch for batch, _ in data.of([0])]

    for batch in found():
        inner = batch["inner"] if isinstance(batch, Mapping) else batch[0]
        if copies:
            for tensor in tensors_of(batch):
                tensor.fill_(5)
        if isinstance(inner, Record):
            object.__setattr__(inner, "image", None)
        else:
            inner.pop("image") if isinstance(inner, Mapping) else inner.pop()
    assert found()
    assert [bytes_of(batch) for batch in found()] == [3 * X.nbytes] * len(found())
    assert {type(batch) for batch in found()} == {type(kind())}
    assert not any(tensor.any() for tensor in tensors_of(found()))
    assert not data.altered()


def ways_of_keeping(copies: bool) -> list[FoldedData]:
    """Whole batches, single samples of equal and of unequal shape, and a part of all batches."""
    many, few = Loaders(numbered(*[4] * 32)), numbered(20, 20)
    unequal = Loaders(numbered(20, 20, widths=(3, 4)))
    every = many.dealt(copies=copies), Loaders(few).dealt(copies=copies), unequal.dealt(copies=copies)
    return [*every, many.dealt(cache_bytes=many.bytes // 2, copies=copies)]


@pytest.mark.parametrize("copies", [False, True])
def test_a_validation_that_writes_into_what_is_kept_is_noticed_and_copies_prevent_it(copies):
    for data in ways_of_keeping(copies):
        before = samples(data, 2)
        for batch, _ in data.of([2]):
            batch.pop("image")
        assert samples(data, 2) == before
        assert not data.altered()
        for batch, _ in data.of([2]):
            batch["label"] += 1000
        assert data.altered() is not copies
        after = [int(label) for batch, _ in data.of([2]) for label in batch["label"]]
        assert after == [one + 1000 * (not copies) for one in before]


def test_the_bytes_of_a_batch_are_those_of_its_tensors():
    x = torch.zeros(3, 5)
    assert bytes_of(UserDict(x=x, y=[x.double()])) == 60 + 120
    assert bytes_of([x, {"y": (x.double(), None)}, Pair(x.bool(), x.half())]) == 60 + 120 + 15 + 30
    assert bytes_of("text") >= 4
    assert bytes_of([{"a": np.zeros((2, 3))}, bytearray(100)]) >= 48 + 100
