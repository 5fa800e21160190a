"""Copies of tensors on disk are what was copied, for as long as the object lives."""

from __future__ import annotations

import copy
import math
import pickle
import tempfile

import pytest
import torch

from lightning_roulette.large.copies import OnDisk, TensorFile, copies_of
from tests.support.limits import set_limits
from tests.support.weights import bits_of, odd_weights


@pytest.mark.parametrize("copied", [lambda one: one, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_on_disk_are_what_was_copied(monkeypatch, copied):
    set_limits(monkeypatch, written_entries=16)
    weights = odd_weights(3) | {"nan": torch.tensor([math.nan, -0.0]), "none": torch.empty(0, 3)}
    before, stored = bits_of(weights), OnDisk(weights)
    for weight in weights.values():
        weight.zero_()
    found = copied(stored)
    assert list(found) == list(weights)
    assert len(found) == 7
    assert "other" not in found
    assert bits_of(found) == before
    found["turned"].fill_(7)
    assert bits_of(found) == before


@pytest.mark.parametrize(("most", "kind"), [(0, OnDisk), (1 << 30, dict)])
def test_copies_go_to_disk_if_they_are_large(monkeypatch, most, kind):
    set_limits(monkeypatch, copied_bytes=most)
    weights = odd_weights()
    before, copies = bits_of(weights), copies_of(weights)
    for weight in weights.values():
        weight.zero_()
    assert type(copies) is kind
    assert bits_of(copies) == before


def test_copies_stay_in_memory_if_the_disk_is_full(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    set_limits(monkeypatch, copied_bytes=0)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    copies = copies_of(odd_weights())
    assert type(copies) is dict
    assert bits_of(copies) == bits_of(odd_weights())


def test_a_file_that_was_cut_short_is_named():
    stored = OnDisk(odd_weights())
    stored._file._file.truncate(3)
    with pytest.raises(OSError, match="the temporary file with the weights of 'double' is too short"):
        stored["double"]


def test_tensors_are_read_back_from_a_file_in_any_order(monkeypatch):
    set_limits(monkeypatch, written_entries=3)
    tensors = odd_weights() | {"turned": torch.arange(12.0).view(3, 4).mT, "none": torch.zeros(0, 3)}
    written, before, places = TensorFile(), bits_of(tensors), {}
    for name, tensor in tensors.items():
        places[name] = written.add(tensor)
        assert bits_of({name: written.read(places[name], "numbers")})[name] == before[name]
    assert bits_of({name: written.read(places[name], "numbers") for name in reversed(places)}) == before
