"""A history returns the mask of every level, also after it was stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_roulette import Mask
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
