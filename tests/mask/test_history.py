"""A history returns the mask of every level, also after it was stored."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette import Mask
from lightning_roulette.large.copies import OnDisk
from lightning_roulette.large.limits import limited
from lightning_roulette.mask.history import History
from tests.support.limits import set_limits


@pytest.fixture(params=[1 << 20, 0], ids=["small", "packed"])
def stored(request, monkeypatch, tmp_path):
    """A function that returns a history as it is read from a file. Parameters are small, or large and packed."""
    set_limits(monkeypatch, unpacked_entries=request.param, packed_entries=64)

    def through_a_file(history: History) -> History:
        torch.save(history.state(), tmp_path / "history.pt")
        assert Mask.load(tmp_path / "history.pt") == history.mask
        return History.from_state(torch.load(tmp_path / "history.pt", weights_only=True))

    return through_a_file


def nested_masks(levels: int, size: int = 700) -> list[Mask]:
    """Masks of levels 0 to `levels`, each two weights thinner than the one before, in two layers."""
    order = np.random.default_rng(3).permutation(2 * size)
    masks = []
    for level in range(levels + 1):
        kept = torch.ones(2 * size, dtype=torch.bool)
        kept[torch.from_numpy(order[: 2 * level])] = False
        masks.append(Mask({"a": kept[:size].view(-1, 7), "b": kept[size:]}))
    return masks


def history_of(masks: list[Mask]) -> History:
    history = History.of_dense(masks[0])
    for mask in masks[1:]:
        history = history.pruned(mask)
    return history


@pytest.mark.parametrize(
    ("deepest", "winner"), [(0, 0), (1, 1), (5, 0), (5, 3), (5, 5), (255, 255), (256, 256), (300, 2), (300, 260)]
)
def test_every_level_is_read_back_whichever_won(stored, deepest, winner):
    masks = nested_masks(deepest)
    for history in (history_of(masks).won_by(winner), stored(history_of(masks).won_by(winner))):
        assert (history.level, history.deepest) == (history.cpu().level, history.cpu().deepest) == (winner, deepest)
        assert history.mask == history.cpu().mask == masks[winner]
        assert [history.mask_at(level) for level in range(deepest + 1)] == masks
        for level in (-1, deepest + 1):
            message = rf"level is {level}, but must lie between 0 \(dense\) and {deepest}"
            with pytest.raises(ValueError, match=message):
                history.mask_at(level)


@pytest.mark.parametrize(("read_at", "deepest"), [(3, 4), (254, 260)])
def test_a_history_grows_after_its_last_level_whichever_won(stored, read_at, deepest):
    masks = nested_masks(deepest)
    history = stored(history_of(masks[: read_at + 1]).won_by(1))
    for mask in masks[read_at + 1 :]:
        history = history.pruned(mask)
    assert (history.level, history.deepest) == (deepest, deepest)
    assert [history.mask_at(level) for level in range(deepest + 1)] == masks


def test_another_winner_changes_no_other_history():
    history = history_of(nested_masks(4))
    assert history.won_by(1).won_by(4).mask == history.mask == nested_masks(4)[4]
    assert (history.level, history.deepest) == (4, 4)


@pytest.mark.parametrize(("levels", "dtype"), [(255, torch.uint8), (256, torch.int16)])
def test_a_small_parameter_is_stored_as_one_number_a_weight(levels, dtype):
    state = history_of(nested_masks(levels)).state()
    assert {name: (at.shape, at.dtype) for name, at in state["pruned_at"].items()} == {
        "a": ((100, 7), dtype),
        "b": ((700,), dtype),
    }
    assert state["packed"] == {}


@pytest.mark.parametrize("levels", [0, 1, 4, 6, 300])
def test_a_large_parameter_is_stored_as_bits(monkeypatch, levels):
    set_limits(monkeypatch, unpacked_entries=0)
    state = history_of(nested_masks(levels)).state()
    assert state["pruned_at"]["a"].shape == (levels.bit_length(), 88)
    assert state["packed"] == {"a": [100, 7], "b": [700]}


def test_a_file_from_before_large_parameters_were_packed_is_read(monkeypatch, tmp_path):
    at = torch.from_numpy(np.random.default_rng(2).integers(0, 7, (21, 9)))
    torch.save({"pruned_at": {"a": at.to(torch.uint8)}, "level": 4, "deepest": 6}, tmp_path / "old.pt")
    set_limits(monkeypatch, unpacked_entries=0)
    assert torch.equal(Mask.load(tmp_path / "old.pt")["a"], (at == 0) | (at > 4))


LAYERS = {"a": (3, 7), "b": (0,), "c": (11,)}
SIZE = 21 + 11


def mask_of(number: int) -> Mask:
    """The mask whose bits are those of a number, layer by layer."""
    bits, kept = torch.tensor([bool(number >> place & 1) for place in range(SIZE)]), {}
    for name, part in zip(LAYERS, bits.split([21, 0, 11]), strict=True):
        kept[name] = part.view(LAYERS[name])
    return Mask(kept)


def through_torch(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copies(history: History) -> list[History]:
    """A history as it is, on the CPU, pickled, copied, and read from a file."""
    read = History.from_state(through_torch(history.state()))
    return [history, history.cpu(), pickle.loads(pickle.dumps(history)), copy.deepcopy(history), read]


any_levels = st.lists(st.tuples(st.booleans(), st.integers(0, 2**SIZE - 1)), max_size=12)


@pytest.mark.parametrize("small", [1 << 20, 0, 15], ids=["small", "packed", "some packed"])
@pytest.mark.parametrize("in_memory", [1 << 30, 0, 9], ids=["in memory", "on disk", "some on disk"])
@given(steps=any_levels, data=st.data())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_masks_are_read_back_whether_they_nest_or_not(small, in_memory, steps, data):
    with limited(unpacked_entries=small, packed_entries=8, copied_bytes=in_memory):
        masks = [2**SIZE - 1]
        for nests, number in steps:
            masks.append(number & masks[-1] if nests else number)
        winner = data.draw(st.integers(0, len(steps)))
        read_at = data.draw(st.integers(0, len(steps)))
        history = History.of_dense(mask_of(masks[0]))
        for place, number in enumerate(masks[1:]):
            history = History.from_state(through_torch(history.state())) if place == read_at else history
            history = history.pruned(mask_of(number))
        for one in copies(history.won_by(winner)):
            assert (one.level, one.deepest) == (winner, len(steps))
            assert [one.mask_at(level) for level in range(len(masks))] == [mask_of(number) for number in masks]
            assert one.mask == mask_of(masks[winner])
        all_nest = all(child & parent == child for parent, child in pairwise(masks))
        assert ("level_bits" not in history.state()) == all_nest


@pytest.mark.parametrize("small", [1 << 20, 0, 15], ids=["small", "packed", "some packed"])
@given(steps=any_levels, first=st.integers(0, 2**SIZE - 1), data=st.data())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_a_history_may_begin_with_zeros(small, steps, first, data):
    with limited(unpacked_entries=small, packed_entries=8):
        masks = [first]
        for nests, number in steps:
            masks.append(number & masks[-1] if nests else number & first)
        read_at = data.draw(st.integers(0, len(steps)))
        history = History.of_dense(mask_of(2**SIZE - 1), mask_of(first))
        for place, number in enumerate(masks[1:]):
            history = History.from_state(through_torch(history.state())) if place == read_at else history
            history = history.pruned(mask_of(number))
        for one in copies(history):
            assert [one.mask_at(level) for level in range(len(masks))] == [mask_of(number) for number in masks]
        all_nest = all(child & parent == child for parent, child in pairwise(masks))
        assert ("level_bits" not in history.state()) == all_nest


def test_versions_that_know_nothing_of_zeros_before_the_search_read_the_masks_of_all_levels():
    masks = nested_masks(3)
    history = History.of_dense(masks[0], masks[1]).pruned(masks[2]).pruned(masks[3])
    state = history.state()
    del state["level_0"]
    earlier = History.from_state(state)
    assert [earlier.mask_at(level) for level in range(3)] == [masks[0], masks[2], masks[3]]


@pytest.mark.parametrize("nested", [True, False])
def test_the_mask_of_a_level_may_be_replaced(nested):
    masks = nested_masks(4)
    if not nested:
        masks[2] = Mask({name: ~kept for name, kept in masks[2].items()})
    before, other = history_of(masks).won_by(3), nested_masks(9)[9]
    for level in range(1, 5):
        after = before.replaced(level, other)
        assert [after.mask_at(one) for one in range(5)] == [*masks[:level], other, *masks[level + 1 :]]
        assert (after.level, after.deepest) == (3, 4)
        assert [before.mask_at(one) for one in range(5)] == masks
    for level in (0, 5):
        with pytest.raises(ValueError, match=rf"level is {level}, but must lie between 1 and 4 \(the last accepted\)"):
            before.replaced(level, other)


def not_nested(levels: int = 3) -> History:
    masks = nested_masks(levels)
    return history_of([masks[0], *reversed(masks[1:])])


def test_bits_take_one_bit_for_each_weight_and_level(stored):
    history = not_nested(3)
    state = history.state()
    assert [(row.shape, row.dtype) for row in state["level_bits"]] == [((88 + 88,), torch.uint8)] * 3
    assert state["shapes"] == {"a": [100, 7], "b": [700]}
    assert stored(history.won_by(2)).mask == history.mask_at(2)


def test_bits_beyond_the_memory_limit_are_on_disk(monkeypatch):
    set_limits(monkeypatch, copied_bytes=2 * 176)
    levels = not_nested(5)._levels.packed
    assert [isinstance(one, OnDisk) for one in levels] == [False, False, True, True, True]


def test_versions_that_know_only_masks_that_nest_fail_with_a_sentence():
    """They take the names in `pruned_at` for parameters, and `level` for a number."""
    state = not_nested().state()
    assert list(state["pruned_at"]) == [state["level"]]
    with pytest.raises(ValueError, match="the masks of these levels do not nest: read this file with a later version"):
        int(state["level"])
