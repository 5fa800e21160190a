"""Validation data that goes on where it stopped: put back, or said."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_roulette.trainer.data.streamed_data import dealt
from tests.support.fits import fit, pruner
from tests.support.modules import blobs

X, Y = blobs(400, 2).tensors
COUNT = 20  # batches of a validation


def batch(number: int) -> list[torch.Tensor]:
    rows = slice(number % 20 * 20, number % 20 * 20 + 20)
    return [X[rows], Y[rows]]


class Counting(IterableDataset):
    """Remembers its position in an attribute."""

    at = 0

    def __init__(self):
        self.at, self.log = 0, []

    def __iter__(self):
        while True:
            self.at += 1
            self.log.append(self.at)
            yield batch(self.at - 1)

    def place(self):
        return self.at


class Iterating(IterableDataset):
    """Remembers its position in an iterator."""

    def __init__(self):
        self.numbers = iter(range(10_000))

    def __iter__(self):
        return (batch(number) for number in self.numbers)

    def place(self):
        return self.numbers.__reduce__()[2] or 0 if len(self.numbers.__reduce__()) > 2 else 0


class Hidden(IterableDataset):
    """Remembers its position in a generator, and gives it out by `state_dict`."""

    def __init__(self):
        self.load_state_dict({"at": 0})

    def __iter__(self):
        for number in self.numbers:
            self.box[0] = number + 1
            yield batch(number)

    def state_dict(self):
        return {"at": self.box[0]}

    def load_state_dict(self, state):
        self.box, self.numbers = [state["at"]], (one for one in itertools.count(state["at"]))

    def place(self):
        return self.box[0]


class Itself:
    """A loader that is its own iterator."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return batch(self.at - 1)

    def place(self):
        return self.at


@pytest.mark.parametrize("kind", [Counting, Iterating, Hidden, Itself])
def test_a_stream_goes_back_to_its_position(make_trainer, kind):
    def places(*callbacks):
        data = kind()
        val = data if kind is Itself else DataLoader(data, batch_size=None)
        fit(make_trainer, *callbacks, val=val, max_epochs=1, limit_val_batches=COUNT)
        return data.place()

    assert places(pruner()) == places()


def test_a_generator_is_refused(make_trainer):
    stream = (batch(number) for number in itertools.count())
    with pytest.raises(RuntimeError, match="not a function of the weights"):
        fit(make_trainer, pruner(), val=stream, max_epochs=1, limit_val_batches=COUNT)


def test_batches_that_differ_when_they_are_read_again_are_refused():
    passes = itertools.count()

    def read():
        shift = next(passes)
        return (([batch(number)[0] + shift, batch(number)[1]], 0) for number in range(COUNT))

    data = dealt(read, [COUNT], seed=0, cache_bytes=3000)
    with pytest.raises(RuntimeError, match=r"another batch .* than when it was first read"):
        list(data.of([0]))
