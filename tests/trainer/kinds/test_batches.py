"""Batches of every kind: cut into samples in their own class, and written to in every way."""

from __future__ import annotations

from collections import UserDict, defaultdict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import register_pytree_node
from torch.utils.data import DataLoader

from lightning_roulette.network.samples import joined, rows_of, taken
from tests.support.fits import fit, pruner
from tests.support.modules import Blobs, blobs

Pair = namedtuple("Pair", ["x", "y"])


class Encoding(UserDict):
    """As BatchEncoding of transformers: a mapping with attributes of its own."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(data)
        self.note, self.encodings = "note", None

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    y: torch.Tensor


class Dense:
    """As a tensordict: a pytree node with a `batch_size`, that is sliced and joined as a whole."""

    def __init__(self, values: dict[str, torch.Tensor], batch_size: tuple[int, ...]) -> None:
        self.values, self.batch_size, self.device = values, torch.Size(batch_size), torch.device("cpu")

    def __getitem__(self, rows: Any) -> Dense:
        values = {name: one[rows] for name, one in self.values.items()}
        return Dense(values, (len(values["x"]),))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.cat
        values = {name: torch.cat([one.values[name] for one in args[0]]) for name in args[0][0].values}
        return cls(values, (len(values["x"]),))


register_pytree_node(
    Dense,
    lambda one: ([*one.values.values()], [*one.values]),
    lambda parts, names: Dense(dict(zip(names, parts, strict=True)), ()),
)

MAKE = {
    "dict": lambda x, y: {"x": x, "y": y},
    "default": lambda x, y: defaultdict(list, x=x, y=y),
    "UserDict": lambda x, y: UserDict(x=x, y=y),
    "encoding": lambda x, y: Encoding({"x": x, "y": y}),
    "record": Record,
    "pair": Pair,
    "tensordict": lambda x, y: Dense({"x": x, "y": y}, (len(x),)),
    "array": lambda x, y: {"x": x.numpy(), "y": y},
    "lists": lambda x, y: {"x": list(x), "y": y},
}


def both(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch = batch.values if isinstance(batch, Dense) else batch
    x, y = (batch["x"], batch["y"]) if hasattr(batch, "keys") else (batch.x, batch.y)
    return torch.stack(x) if isinstance(x, list) else torch.as_tensor(x), y


class Taking(Blobs):
    """Takes batches of any kind, and remembers their classes."""

    def __init__(self) -> None:
        super().__init__()
        self.met: set[tuple[type, Any]] = set()

    def validation_step(self, batch, i):
        self.met.add((type(batch), getattr(batch, "note", None)))
        x, y = both(batch)
        self.log("val_acc", (self(x).argmax(1) == y).float().mean(), batch_size=len(y))

    def training_step(self, batch, i):
        x, y = both(batch)
        return torch.nn.functional.cross_entropy(self(x), y)

    def transfer_batch_to_device(self, batch, *_):
        return batch


def loader(kind: str, seed: int) -> DataLoader:
    def collate(rows: list[Any]) -> Any:
        return MAKE[kind](torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]))

    return DataLoader(blobs(200, seed), 20, collate_fn=collate)


@pytest.mark.parametrize("kind", MAKE)
def test_samples_are_dealt_and_the_class_is_kept(make_trainer, kind):
    pruning, plain = pruner(), pruner()
    module = fit(make_trainer, pruning, module=Taking(), train=loader(kind, 0), val=loader(kind, 1), max_epochs=1)
    assert module.met == {(type(batch), getattr(batch, "note", None)) for batch in [next(iter(loader(kind, 1)))]}
    fit(make_trainer, plain, module=Taking(), train=loader("dict", 0), val=loader("dict", 1), max_epochs=1)
    assert pruning.report.folds == plain.report.folds
    assert pruning.report.score == plain.report.score


def halved_numpy(batch):
    x = batch[0].numpy()
    x /= 2


def halved_data(batch):
    batch[0].data.mul_(0.5)


def halved_dlpack(batch):
    torch.from_dlpack(batch[0].detach().numpy()).mul_(0.5)


@pytest.mark.parametrize("halve", [halved_numpy, halved_data, halved_dlpack])
def test_a_step_that_writes_into_its_batch_unseen_is_judged_rightly(make_trainer, halve):
    class Halving(Blobs):
        def training_step(self, batch, i):
            return super().training_step([batch[0] / 2, batch[1]], i)

        def validation_step(self, batch, i):
            halve(batch)
            super().validation_step(batch, i)

    pruning = pruner()
    val = DataLoader(blobs(400, 2), 20)
    module = fit(make_trainer, pruning, module=Halving(), val=val, max_epochs=1).eval()
    x, y = val.dataset.tensors
    true = float((module(x / 2).argmax(1) == y).float().mean())
    assert pruning.report.score == pytest.approx(true, abs=1e-6)


def test_a_late_write_ends_the_search_and_the_network_is_dense(make_trainer):
    class Late(Blobs):
        steps = 0

        def validation_step(self, batch, i):
            self.steps += not self.trainer.sanity_checking
            super().validation_step(batch, i)
            if self.steps > 60:
                batch[0].numpy()[:] = 0

    module = Late()
    with pytest.raises(RuntimeError, match=r"loader 0.*was written to between.*x\.clone\(\)"):
        fit(make_trainer, pruner(branches=12), module=module, val=DataLoader(blobs(400, 2), 20), max_epochs=1)
    assert all(int((one == 0).sum()) == 0 for one in module.parameters() if one.dim() > 1)


@pytest.mark.parametrize("kind", MAKE)
def test_pieces_join_to_the_whole(kind):
    batch = MAKE[kind](torch.randn(5, 3), torch.arange(5))
    assert rows_of(batch) == 5
    a, b = torch.tensor([3, 1]), torch.tensor([0])
    whole = joined([taken(batch, a), taken(batch, b)])
    wanted = taken(batch, torch.cat([a, b]))
    assert type(whole) is type(batch)
    assert rows_of(whole) == 3
    for one, other in zip(both(whole), both(wanted), strict=True):
        assert torch.equal(one, other)


def test_images_of_several_sizes_and_their_targets_are_cut_as_lists():
    images = [torch.zeros(3, 4, size) for size in (4, 5, 6)]
    targets = [{"boxes": torch.zeros(n, 4)} for n in (1, 2, 2)]
    assert rows_of((images, targets)) == 3
    cut = taken((images, targets), slice(1, 3))
    assert [one.shape[2] for one in cut[0]] == [5, 6]
    assert [len(one["boxes"]) for one in cut[1]] == [2, 2]


def test_what_is_ambiguous_is_not_cut():
    three = torch.zeros(3, 4)
    assert rows_of((three, [{"boxes": torch.zeros(3, 4)} for _ in range(3)])) is None
    assert rows_of(torch.nn.utils.rnn.pack_sequence([torch.zeros(3, 4)])) is None
    assert rows_of({"x": three, "n": np.zeros(())}) is None
