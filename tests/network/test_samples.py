"""Samples of a batch are counted, taken and joined in every structure that a collate function builds."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_roulette.network.samples import joined, rows_of, taken

Pair = namedtuple("Pair", ["image", "label"])


@dataclass
class Plain:
    x: torch.Tensor


class Tagged(torch.Tensor):
    pass


def same(one: Any, other: Any) -> bool:
    """Equal in types, structure, dtypes, shapes and values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def batch_of(*ids: int) -> dict[str, Any]:
    """A batch with every kind of part. The values tell the samples."""
    tags = torch.tensor(ids, dtype=torch.int64)
    return {
        "image": tags.float().view(-1, 1, 1).expand(-1, 2, 3).clone(),
        "pair": Pair(tags.double().view(-1, 1), [f"sample {tag}" for tag in ids]),
        "nested": [(tags, {"half": tags.half()}), tags.bool()],
        "names": tuple(f"name {tag}" for tag in ids),
        "boxes": [(tag, tag + 1) for tag in ids],
        "scale": 0.5,
        "split": "validation",
        "mixup": None,
        "training": False,
    }


def test_samples_are_counted_in_every_structure():
    x, y = torch.zeros(5, 3), torch.zeros(5, dtype=torch.long)
    for batch in (
        *(x, y, [x, y], (x, y), {"x": x, "y": y}, Pair(x, y)),
        {"x": [x, (y, x)], "deep": {"er": {"est": y}}},
        [x, ["a", "b", "c", "d", "e"]],
        {"x": x, "name": ("a", "b", "c", "d", "e"), "ids": [1, 2, 3, 4, 5]},
        [x, None, 3, 0.5, "same for all", True],
        batch_of(1, 2, 3, 4, 5),
    ):
        assert rows_of(batch) == 5
    assert rows_of(torch.zeros(0, 3)) == 0
    assert rows_of(torch.zeros(1)) == 1


@pytest.mark.parametrize(
    "batch",
    [
        torch.tensor(3.0),
        [torch.zeros(5), torch.tensor(3.0)],
        [torch.zeros(5), torch.zeros(4)],
        {"x": torch.zeros(5, 2), "y": {"z": torch.zeros(2, 5)}},
        [torch.tensor(1.0), torch.tensor(2.0)],
        *([], {}, None, 3, "text", ["a", "b"], {"text": ["a", "b"]}),
    ],
)
def test_a_batch_whose_tensors_share_no_first_dimension_has_no_samples(batch):
    assert rows_of(batch) is None


@pytest.mark.parametrize(
    "part",
    [
        *(["a", "b"], ("a", "b", "c", "d"), [], [[1, 2], [3, 4]], b"bytes", {1, 2, 3}, object()),
        nn.Parameter(torch.zeros(3)),
        torch.zeros(3).as_subclass(Tagged),
        torch.zeros(3, 3).to_sparse(),
        {"deeper": [object()]},
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_batch_with_an_unknown_part_has_no_samples(part):
    assert rows_of([torch.zeros(3, 2), torch.zeros(3)]) == 3
    assert rows_of([torch.zeros(3, 2), part]) is None
    assert rows_of({"x": torch.zeros(3, 2), "part": part}) is None


def test_a_nested_tensor_has_no_samples():
    ragged = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)
    assert rows_of([torch.zeros(2), ragged]) is None


def test_a_named_tuple_without_tensors_is_no_list_of_samples():
    batch = {"x": torch.arange(2), "names": Pair("first", "second")}
    count = rows_of(batch)
    # it has no samples, or it belongs to all samples
    if count is not None:
        assert same(taken(batch, slice(0, 1)), {"x": torch.tensor([0]), "names": Pair("first", "second")})
        assert same(taken(batch, torch.tensor([1])), {"x": torch.tensor([1]), "names": Pair("first", "second")})


@pytest.mark.parametrize(
    ("rows", "taken_ids"),
    [
        (slice(1, 3), (11, 12)),
        (torch.tensor([1, 2]), (11, 12)),
        (torch.tensor([2, 0, 2, 1]), (12, 10, 12, 11)),
        (slice(2, 2), ()),
        (torch.tensor([], dtype=torch.int64), ()),
    ],
)
def test_samples_are_taken_from_every_part_in_any_order(rows, taken_ids):
    found = taken(batch_of(10, 11, 12, 13), rows)
    assert rows_of(found) == len(taken_ids)
    assert same(found, batch_of(*taken_ids))


def test_a_slice_gives_views_and_an_index_copies():
    batch = {"x": torch.arange(6)}
    taken(batch, slice(2, 4))["x"][0] = 99
    assert batch["x"].tolist() == [0, 1, 99, 3, 4, 5]
    taken(batch, torch.tensor([0, 1]))["x"][0] = 77
    assert batch["x"][0] == 0


def test_taken_samples_are_in_new_containers():
    batch = batch_of(10, 11)
    part = taken(batch, slice(0, 2))
    for container in (part["nested"][0][1], part["nested"], part["boxes"], part):
        container.clear()
    assert same(batch, batch_of(10, 11))


def test_batches_are_joined_in_order_and_stay_as_they_were():
    batches = [batch_of(3, 1), batch_of(2), batch_of(5, 4, 0)]
    whole = joined(batches)
    assert same(whole, batch_of(3, 1, 2, 5, 4, 0))
    whole["boxes"].clear()
    assert same(batches, [batch_of(3, 1), batch_of(2), batch_of(5, 4, 0)])


TWO, WIDE = torch.zeros(2), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (WIDE, torch.zeros(2, 4)),
        (TWO, torch.zeros(2, 1)),
        (TWO, torch.zeros(2, dtype=torch.float64)),
        (TWO, [TWO]),
        ([TWO], (TWO,)),
        ((TWO, TWO), Pair(TWO, TWO)),
        ([TWO], [TWO, TWO]),
        ({"x": TWO}, {"y": TWO}),
        ({"x": TWO}, {"x": TWO, "y": TWO}),
        *(([TWO, one], [TWO, other]) for one, other in [(2, 3), (None, 3), ("a", "b"), (["a", "b"], ("a", "b"))]),
        ({"deep": [(WIDE,)]}, {"deep": [(torch.zeros(2, 4),)]}),
    ],
)
def test_batches_that_differ_in_more_than_their_samples_are_not_joined(one, other):
    assert rows_of(one) == rows_of(other) == 2
    assert same(joined([one, one]), joined([one, one]))
    assert joined([one, one]) is not None
    assert joined([one, other]) is None
    assert joined([other, one]) is None
    assert joined([one, one, other]) is None


def test_an_empty_batch_of_another_shape_is_not_joined():
    assert joined([torch.zeros(0), torch.zeros(2, 3)]) is None
    assert joined([torch.zeros(0, 3), torch.zeros(2, 3)]).shape == (2, 3)


def structures(depth: int = 2) -> st.SearchStrategy:
    """Functions from sample numbers to a batch. Every list in it has a tensor or one entry a sample."""
    leaves = st.sampled_from(
        [
            torch.tensor,
            lambda ids: torch.tensor(ids, dtype=torch.float32).view(-1, 1).repeat(1, 3),
            lambda ids: [str(one) for one in ids],
            tuple,
            lambda ids: "constant",
            lambda ids: None,
        ]
    )
    if depth == 0:
        return leaves
    inner = structures(depth - 1)
    parts = st.lists(inner, max_size=2).map(lambda parts: [torch.tensor, *parts])
    return st.one_of(
        leaves,
        parts.map(lambda parts: lambda ids: [part(ids) for part in parts]),
        parts.map(lambda parts: lambda ids: tuple(part(ids) for part in parts)),
        inner.map(lambda part: lambda ids: Pair(torch.tensor(ids), part(ids))),
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1).map(
            lambda parts: lambda ids: {key: part(ids) for key, part in parts.items()}
        ),
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(structures(), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_joined_batches_can_be_taken_apart(structure, sizes, chance):
    ids = [100 + n for n in range(sum(sizes))]
    stretches = [slice(sum(sizes[:n]), sum(sizes[: n + 1])) for n in range(len(sizes))]

    def batch(numbers: list[int]) -> Any:
        return [torch.tensor(numbers), structure(numbers)]

    batches = [batch(ids[stretch]) for stretch in stretches]
    assert [rows_of(one) for one in batches] == sizes
    whole = joined(batches)
    assert same(whole, batch(ids))
    assert all(same(taken(whole, stretch), one) for stretch, one in zip(stretches, batches, strict=True))
    order = chance.sample(range(len(ids)), len(ids))
    assert same(taken(whole, torch.tensor(order)), batch([ids[place] for place in order]))
