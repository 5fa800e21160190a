"""Validation data in folds: every sample in exactly one, dealt by the seed, kept as far as that is allowed."""

from __future__ import annotations

import math
import weakref
from collections import Counter, OrderedDict, UserDict, namedtuple
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils._pytree import tree_leaves, tree_map

from lightning_roulette.judge.race import rungs
from lightning_roulette.trainer.data import FOLDS, KeptData, StreamedData, bytes_of, dealt, folds_of

PLENTY = 2**40

Pair = namedtuple("Pair", ["image", "label"])


def numbered(*sizes: int, first: int = 0, widths: Sequence[int] = ()) -> list[dict[str, torch.Tensor]]:
    """Batches of these sizes; samples are numbered, and every tensor tells the number of its sample.

    Args:
        widths: Of the images of each batch, else 3.
    """
    batches = []
    for place, size in enumerate(sizes):
        tags = torch.arange(first, first + size)
        width = widths[place] if widths else 3
        batches.append({"image": tags.float().view(-1, 1).repeat(1, width), "label": tags})
        first += size
    return batches


@dataclass
class Record:
    image: torch.Tensor


class Loaders:
    """Loaders of which every reading is counted, and which give new tensors each time, as true ones do."""

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
        """The bytes of all tensors ever given that somebody still holds."""
        return sum(tensor.nbytes for one in self.given if (tensor := one()) is not None)

    @property
    def bytes(self) -> int:
        return sum(bytes_of(batch) for loader in self.loaders for batch in loader)

    def dealt(self, seed: int = 0, cache_bytes: int = PLENTY, copies: bool = False) -> KeptData | StreamedData:
        return dealt(self.read, self.lengths, seed, cache_bytes, copies)


def labels(data, *folds: int) -> list[list[int]]:
    """The samples of each batch of some folds; images and labels are still together."""
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


# ------------------------------------------------------------------------------------------------ whole batches


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(16, 60), min_size=1, max_size=3), st.integers(-(2**63), 2**63 - 1))
def test_many_batches_are_dealt_whole_and_evenly(counts, seed):
    loaders = Loaders(*(numbered(*[2] * (count - 1), 1, first=1000 * n) for n, count in enumerate(counts)))
    data = loaders.dealt(seed)
    assert (data.folds, data.whole, data.at_once) == (FOLDS, "", FOLDS)
    by_fold = [labels(data, fold) for fold in range(FOLDS)]
    original = [batch["label"].tolist() for loader in loaders.loaders for batch in loader]
    assert sorted(batch for fold in by_fold for batch in fold) == sorted(original)
    for loader in range(len(counts)):
        sizes = [numbers(data, fold).count(loader) for fold in range(FOLDS)]
        assert max(sizes) - min(sizes) <= 1
    # within a fold as in the loaders
    assert all(fold == sorted(fold) for fold in by_fold)
    assert all(numbers(data, fold) == sorted(numbers(data, fold)) for fold in range(FOLDS))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 100), st.integers(1, 16), st.integers(0, 1000), st.integers(0, 3))
def test_batches_are_dealt_to_equal_folds_by_a_permutation(count, folds, seed, loader):
    found = folds_of(count, folds, count, seed, loader)
    sizes = Counter(found)
    assert len(found) == count
    assert set(found) <= set(range(folds))
    assert max(sizes.values(), default=0) - min((sizes[fold] for fold in range(folds)), default=0) <= 1


def test_equal_seeds_deal_equally_and_others_do_not():
    loaders = Loaders(numbered(*[1] * 64))
    first, again, other = (
        [samples(data, fold) for fold in range(FOLDS)]
        for data in (loaders.dealt(3), loaders.dealt(3), loaders.dealt(4))
    )
    assert first == again
    assert sum(one == another for one, another in zip(first, other, strict=True)) <= 1
    # at random, and not in turn
    assert sum(one == list(range(fold, 64, FOLDS)) for fold, one in enumerate(first)) <= 1


def test_loaders_are_dealt_independently():
    data = Loaders(numbered(*[1] * 64), numbered(*[1] * 64, first=64)).dealt()
    alike = [
        [one for one in samples(data, fold) if one < 64] == [one - 64 for one in samples(data, fold) if one >= 64]
        for fold in range(FOLDS)
    ]
    assert sum(alike) <= 1


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("cache_bytes", [PLENTY, 0])
def test_batches_of_a_loader_that_tells_no_length_are_dealt_in_turn(seed, cache_bytes):
    data = Loaders(numbered(*[1] * 37), known=False).dealt(seed, cache_bytes)
    fold_of = {sample: fold for fold in range(FOLDS) for sample in samples(data, fold)}
    assert sorted(fold_of) == list(range(37))
    # sixteen in a row are in sixteen folds, by turns of the first half and the second, and so on from the beginning
    assert {fold_of[sample] for sample in range(FOLDS)} == set(range(FOLDS))
    assert all(fold_of[sample] == fold_of[sample + FOLDS] for sample in range(37 - FOLDS))
    assert [fold_of[sample] < 8 for sample in range(37)] == [sample % 2 == 1 for sample in range(37)]


@pytest.mark.parametrize("length", [math.inf, 0])
@pytest.mark.parametrize("count", [16, 17, 31, 33, 40, 100])
def test_the_two_halves_of_the_folds_hold_as_many_batches(count, length):
    found = folds_of(count, FOLDS, length, 0, 0)
    sizes = [found.count(fold) for fold in range(FOLDS)]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    assert abs(sum(sizes[:8]) - sum(sizes[8:])) <= 1
    assert sizes[0] == min(sizes)


def test_several_folds_are_given_as_one_in_the_order_of_the_loaders():
    loaders = Loaders(numbered(*[2] * 20), numbered(*[1] * 16, first=100))
    data = loaders.dealt()
    assert samples(data, *range(FOLDS)) == [*range(40), *range(100, 116)]
    assert samples(data, 3, 9) == sorted(samples(data, 3) + samples(data, 9))
    assert numbers(data, *range(FOLDS)) == [0] * 20 + [1] * 16


def test_what_a_validation_step_takes_from_a_batch_is_there_the_next_time():
    def damage(batch: Any) -> None:
        inner = batch[0] if isinstance(batch, list | tuple) else batch["inner"]
        inner.pop("image") if isinstance(inner, Mapping) else inner.pop()

    x = torch.zeros(4)
    for kind in (
        lambda: [{"image": x, "label": x}, x],
        lambda: {"inner": [x, x], "label": x},
        lambda: ({"image": x, "label": x}, x),
        lambda: Pair([x, x], x),
        lambda: [UserDict({"image": x, "label": x}), x],
        lambda: [OrderedDict({"image": x, "label": x}), x],
    ):
        data = Loaders([kind() for _ in range(20)]).dealt()
        before = [bytes_of(batch) for batch, _ in data.of([0])]
        for batch, _ in data.of([0]):
            damage(batch)
        assert [bytes_of(batch) for batch, _ in data.of([0])] == before == [3 * x.nbytes] * len(before)
        assert [type(batch) for batch, _ in data.of([0])] == [type(kind())] * len(before)


# ------------------------------------------------------------------------------------------------ samples


few_batches = st.lists(st.integers(1, 40), min_size=1, max_size=15).filter(lambda sizes: sum(sizes) >= FOLDS)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(few_batches, st.integers(-(2**63), 2**63 - 1))
def test_few_batches_are_dealt_sample_by_sample(sizes, seed):
    data = Loaders(numbered(*sizes)).dealt(seed)
    assert (data.folds, data.whole, data.at_once) == (FOLDS, "", FOLDS)
    by_fold = [samples(data, fold) for fold in range(FOLDS)]
    assert sorted(sample for fold in by_fold for sample in fold) == list(range(sum(sizes)))
    counts = [len(fold) for fold in by_fold]
    assert max(counts) - min(counts) <= 1
    assert all(1 <= len(batch) <= max(sizes) for fold in range(FOLDS) for batch in labels(data, fold))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(few_batches, st.integers(0, 1000))
def test_few_batches_of_unequal_shapes_are_dealt_evenly(sizes, seed):
    # as of sentences, padded to the longest of each batch
    data = Loaders(numbered(*sizes, widths=range(5, 5 + len(sizes)))).dealt(seed)
    assert (data.folds, data.whole) == (FOLDS, "")
    by_fold = [samples(data, fold) for fold in range(FOLDS)]
    assert sorted(sample for fold in by_fold for sample in fold) == list(range(sum(sizes)))
    counts = [len(fold) for fold in by_fold]
    assert max(counts) - min(counts) <= 1
    widths = {
        sample: 5 + place
        for place, size in enumerate(sizes)
        for sample in range(sum(sizes[:place]), sum(sizes[:place]) + size)
    }
    for batch, _ in data.of(range(FOLDS)):
        assert {widths[sample] for sample in batch["label"].tolist()} == {batch["image"].shape[1]}


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
    assert [len(batch) for batch in labels(data, *range(FOLDS))] == [31, 32, 32, 32]


def test_equal_seeds_deal_samples_equally_and_others_do_not():
    loaders = Loaders(numbered(40, 40))
    first, again, other = (
        [sorted(samples(data, fold)) for fold in range(FOLDS)]
        for data in (loaders.dealt(3), loaders.dealt(3), loaders.dealt(4))
    )
    assert first == again
    assert not any(one == another for one, another in zip(first, other, strict=True))
    assert not any(one == list(range(5 * fold, 5 * fold + 5)) for fold, one in enumerate(first))


def test_parts_of_every_kind_stay_with_their_samples():
    def batch(first: int) -> tuple[Any, ...]:
        tags = torch.arange(first, first + 10)
        return Pair({"x": tags.view(-1, 1)}, tags), [f"{tag}" for tag in tags.tolist()], "the same"

    data = Loaders([batch(0), batch(10), batch(20)]).dealt()
    found = []
    for (pair, names, constant), _ in data.of(range(FOLDS)):
        assert type(pair) is Pair
        assert pair.image["x"].flatten().tolist() == pair.label.tolist() == [int(name) for name in names]
        assert constant == "the same"
        found += pair.label.tolist()
    assert sorted(found) == list(range(30))


def test_each_loader_is_dealt_in_its_own_way():
    loaders = Loaders(numbered(*[2] * 20), numbered(30, 20, first=100))
    data = loaders.dealt()
    assert (data.folds, data.whole) == (FOLDS, "")
    assert sorted(samples(data, *range(FOLDS))) == [*range(40), *range(100, 150)]
    for fold in range(FOLDS):
        found = list(data.of([fold]))
        assert [loader for _, loader in found] == sorted(loader for _, loader in found)
        assert {loader for _, loader in found} == {0, 1}
        assert all((batch["label"] >= 100).all() == bool(loader) for batch, loader in found)
        assert all(len(batch["label"]) == 2 for batch, loader in found if loader == 0)


def test_one_reading_is_enough_for_what_may_be_kept():
    loaders = Loaders(numbered(*[2] * 20), numbered(30, first=100))
    data = loaders.dealt(cache_bytes=loaders.bytes)
    for fold in range(FOLDS):
        samples(data, fold)
    samples(data, *range(FOLDS))
    assert loaders.count == 1
    assert isinstance(data, KeptData)
    assert sum(bytes_of(batch) for batch, _ in data.of(range(FOLDS))) == loaders.bytes


# ------------------------------------------------------------------------------------------------ one fold


def ragged(count: int) -> list[Any]:
    return [[torch.arange(4), torch.tensor(place)] for place in range(count)]


@pytest.mark.parametrize(
    ("loaders", "why"),
    [
        ([ragged(3)], "loader 0 gives 3 batches, fewer than 16, and their tensors do not share a first dimension"),
        ([numbered(5, 5, 5)], "loader 0 gives 15 samples, fewer than 16"),
        ([numbered(*[2] * 20), ragged(15)], "loader 1 gives 15 batches, fewer than 16, and their tensors do not share"),
        ([numbered(1), numbered(*[2] * 20)], "loader 0 gives 1 samples, fewer than 16"),
        ([numbered(20), numbered(8, 7)], "loader 1 gives 15 samples, fewer than 16"),
    ],
)
def test_data_that_cannot_be_dealt_is_one_fold_and_says_why(loaders, why):
    data = Loaders(*loaders).dealt()
    assert (data.folds, data.at_once) == (1, 1)
    assert why in data.whole
    found = list(data.of([0]))
    expected = [(batch, number) for number, loader in enumerate(loaders) for batch in loader]
    assert [number for _, number in found] == [number for _, number in expected]
    for (batch, _), (original, _) in zip(found, expected, strict=True):
        assert type(batch) is type(original)
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(batch), tree_leaves(original), strict=True))


def test_sixteen_batches_need_not_be_split():
    data = Loaders(ragged(16)).dealt()
    assert (data.folds, data.whole) == (FOLDS, "")
    assert [len(list(data.of([fold]))) for fold in range(FOLDS)] == [1] * FOLDS


def test_sixteen_samples_make_a_fold_each():
    data = Loaders(numbered(9, 7)).dealt()
    assert sorted(labels(data, fold) for fold in range(FOLDS)) == [[[sample]] for sample in range(16)]


# ------------------------------------------------------------------------------------------------ streamed


shares = st.floats(0, 1, exclude_max=True)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(1, 5), min_size=16, max_size=25), min_size=1, max_size=2),
    st.integers(0, 1000),
    shares,
    st.lists(st.sets(st.integers(0, FOLDS - 1), min_size=1), max_size=4),
)
def test_data_that_is_read_again_is_dealt_as_data_that_is_kept(sizes, seed, share, asked):
    loaders = Loaders(*(numbered(*found, first=1000 * n) for n, found in enumerate(sizes)))
    kept, streamed = loaders.dealt(seed), loaders.dealt(seed, int(share * loaders.bytes))
    assert isinstance(streamed, StreamedData)
    assert (streamed.folds, streamed.whole) == (FOLDS, "")
    for fold in range(FOLDS):
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
    # while reading, besides these the batch just read, the one before it and the last one given
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
    assert loaders.count - before <= (1 if fits else 5)
    if not fits:
        assert loaders.count - before == 5


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
    assert loaders.count - before <= parts
    # what fits besides is read along
    assert loaders.count - before <= math.ceil(8 / data.at_once)


def test_with_no_cache_every_question_reads_the_loaders():
    loaders = Loaders(numbered(*[4] * 32))
    data = loaders.dealt(cache_bytes=0)
    assert (data.folds, data.at_once, loaders.count) == (FOLDS, 1, 1)
    found = [samples(data, fold) for fold in range(FOLDS)]
    assert sorted(sample for fold in found for sample in fold) == list(range(128))
    assert loaders.count == 1 + FOLDS
    assert samples(data, *range(FOLDS)) == list(range(128))
    assert loaders.count == 2 + FOLDS


def test_a_byte_less_than_all_is_streamed():
    loaders = Loaders(numbered(*[4] * 32))
    assert isinstance(loaders.dealt(cache_bytes=loaders.bytes), KeptData)
    assert isinstance(loaders.dealt(cache_bytes=loaders.bytes - 1), StreamedData)


@pytest.mark.parametrize("counts", [(2,), (5,), (15,), (40, 3), (16, 2)])
def test_few_batches_that_are_too_large_to_keep_make_fewer_folds(counts):
    loaders = Loaders(*(numbered(*[10] * count, first=1000 * n) for n, count in enumerate(counts)))
    data = loaders.dealt(cache_bytes=10)
    assert (data.folds, data.whole) == (min(counts), "")
    found = [labels(data, fold) for fold in range(data.folds)]
    assert sorted(batch for fold in found for batch in fold) == [
        batch["label"].tolist() for loader in loaders.loaders for batch in loader
    ]
    assert all(set(numbers(data, fold)) == set(range(len(counts))) for fold in range(data.folds))


def test_a_single_batch_too_large_to_keep_is_one_fold_and_says_why():
    loaders = Loaders(numbered(50))
    data = loaders.dealt(cache_bytes=10)
    assert data.folds == data.at_once == 1
    assert "a loader gives a single batch" in data.whole
    assert samples(data, 0) == list(range(50))


def test_what_a_validation_step_takes_from_a_cached_batch_is_there_the_next_time():
    loaders = Loaders(numbered(*[4] * 32))
    data = loaders.dealt(cache_bytes=loaders.bytes // 2)
    for batch, _ in data.of([0]):
        batch.pop("image")
    before = loaders.count
    assert len(samples(data, 0)) == 8
    assert loaders.count == before


def ways_of_keeping(copies: bool) -> list[KeptData | StreamedData]:
    """Whole batches, single samples of equal and of unequal shape, and a part of all batches."""
    many, few = Loaders(numbered(*[4] * 32)), numbered(20, 20)
    unequal = Loaders(numbered(20, 20, widths=(3, 4)))
    every = many.dealt(copies=copies), Loaders(few).dealt(copies=copies), unequal.dealt(copies=copies)
    return [*every, many.dealt(cache_bytes=many.bytes // 2, copies=copies)]


def test_a_validation_that_writes_into_what_is_kept_is_found_out():
    for data in ways_of_keeping(copies=False):
        before = samples(data, 2)
        for batch, _ in data.of([2]):
            batch.pop("image")
        assert not data.altered()
        for batch, _ in data.of([2]):
            batch["label"] += 1000
        assert data.altered()
        assert [int(label) for batch, _ in data.of([2]) for label in batch["label"]] == [one + 1000 for one in before]


def test_a_validation_may_write_into_copies():
    for data in ways_of_keeping(copies=True):
        before = samples(data, 2)
        for batch, _ in data.of([2]):
            batch["label"] += 1000
            batch["image"].zero_()
        assert not data.altered()
        assert samples(data, 2) == before


def test_copies_are_made_in_containers_of_every_kind():
    x = torch.zeros(4)
    for kind in (
        lambda: [{"image": x}, (x, [x])],
        lambda: Pair({"image": x}, x),
        lambda: UserDict({"image": x, "more": OrderedDict(x=x)}),
        lambda: Record(x),
        lambda: x,
    ):
        data = Loaders([kind() for _ in range(20)]).dealt(copies=True)
        for batch, _ in data.of([0]):
            assert type(batch) is type(kind())
            apply_to_collection(batch, torch.Tensor, torch.Tensor.fill_, 5)
        found: list[torch.Tensor] = []
        apply_to_collection([batch for batch, _ in data.of([0])], torch.Tensor, found.append)
        assert found
        assert not any(tensor.any() for tensor in found)
        assert not data.altered()


def test_the_bytes_of_a_batch_are_those_of_its_tensors():
    x = torch.zeros(3, 5)
    assert bytes_of(UserDict(x=x, y=[x.double()])) == 60 + 120
    assert bytes_of([x, {"y": (x.double(), "text", 3, None)}, Pair(x.bool(), x.half())]) == 60 + 120 + 15 + 30
    assert bytes_of("text") == 0


@pytest.mark.parametrize(
    ("batch", "count", "fold"), [(64, 400, 2), (400, 400, 16), (20, 400, 1), (25, 400, 1), (50, 400, 2)]
)
def test_folds_that_fit_into_one_batch_are_no_dearer_than_one(batch, count, fold):
    batches = list(torch.arange(count).split(batch))
    data = KeptData({0: batches}, [math.inf], seed=0)
    expected = 1 if len(batches) >= 16 else fold
    assert data.at_least == expected
    assert len(list(data.of(range(data.at_least)))) == 1 or len(batches) >= 16
