"""A refit within a Trainer: what the module becomes, where calibration inputs come from, and what nobody notices."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from lightning_roulette import (
    LeastSquares,
    Mask,
    RouletteWheelPruning,
    SearchReport,
    StopReason,
    Tree,
    Validation,
    Wheel,
    prunable_parameters,
)
from lightning_roulette.settings import Refit
from lightning_roulette.trainer import callback as callback_module
from tests.support.modules import Blobs, blobs, train_loader, val_loader
from tests.trainer.test_isolation import changed, content, counting_class
from tests.trainer.test_transparency import CASES, Case, trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled.*"),
]
ROOT = Path(__file__).parents[2]
WEIGHTS = {"net.0.weight", "net.3.weight"}
BIASES = {"net.0.bias", "net.3.bias"}
STATISTICS = {"net.1.running_mean", "net.1.running_var"}
QUICK = LeastSquares(batches=4, finalists=1)
ON_ALL = Validation(confirm=0, race=False)


class Normed(Blobs):
    """With a batch normalisation, and a layer that takes no part in anything that is pruned."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        chance = torch.Generator().manual_seed(5)
        self.net = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=chance))
            self.net[1].weight.fill_(1.0)
        self.aside = nn.Embedding(3, 2, _weight=torch.randn(3, 2, generator=chance))
        self.register_buffer("counter", torch.tensor(3))


class Record(list):
    """A list that a calibration does not put back."""


def pruner(refit="least_squares", **options) -> RouletteWheelPruning:
    defaults = {"branches": 2, "tolerance": 0.5, "tree": Tree(0.2, max_levels=2)}
    return RouletteWheelPruning(refit=refit, **defaults | options)


def fitted(make_trainer, *callbacks, module=None, train=None, val=None, ckpt_path=None, **options):
    module = module or Normed()
    torch.manual_seed(0)
    trainer = make_trainer(**{"callbacks": list(callbacks), "max_epochs": 1, "enable_checkpointing": True} | options)
    train = train_loader() if train is None else train
    trainer.fit(module, train, val or val_loader(), ckpt_path=ckpt_path)
    return module


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def equal(one, other) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(content(one[name]) == content(other[name]) for name in one)


def copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def found_by(pruning) -> list[dict[str, torch.Tensor]]:
    """The weights of all accepted levels."""
    return [pruning.weights_at(level) for level in range(len(pruning.report.accepted) + 1)]


def same(one: RouletteWheelPruning, other: RouletteWheelPruning) -> bool:
    """Whether two searches found the same, bit for bit."""
    return one.report.levels == other.report.levels and all(map(equal, found_by(one), found_by(other)))


# ------------------------------------------------------------------------------------------------ what is loaded


HOWS = {
    "least_squares": WEIGHTS | BIASES | STATISTICS,
    "batch_norm": WEIGHTS | STATISTICS,
    LeastSquares(batches=3, finalists=2, damping=0.01): WEIGHTS | BIASES | STATISTICS,
    LeastSquares(each_level=False): WEIGHTS | BIASES | STATISTICS,
    Refit(each_level=False): WEIGHTS | STATISTICS,
}


class Identities(Callback):
    """The parameters and buffers of the network when training begins."""

    def on_train_start(self, trainer, pl_module):
        self.seen = {name: id(one) for name, one in [*pl_module.named_parameters(), *pl_module.named_buffers()]}


@pytest.mark.parametrize(
    ("how", "keeps_dense"), [("least_squares", True), *((how, False) for how in HOWS)], ids=lambda one: str(one)[:40]
)
def test_the_module_is_the_winner_and_all_else_is_untouched(make_trainer, tmp_path, how, keeps_dense):
    pruning, identities = pruner(how), Identities()
    checkpoints = [ModelCheckpoint(filename="mine")] if keeps_dense else [ModelCheckpoint(save_top_k=0)]
    module = fitted(make_trainer, pruning, identities, *checkpoints)
    level, found = pruning.report.winner.level, module.state_dict()
    winner = pruning.weights_at(level)
    assert winner.keys() == HOWS[how]
    dense = load(tmp_path / "checkpoints" / ("mine.ckpt" if keeps_dense else "dense.ckpt"))["state_dict"]
    assert (tmp_path / "checkpoints" / "dense.ckpt").exists() != keeps_dense
    assert equal({name: found[name] for name in winner}, winner)
    assert equal(
        {name: found[name] for name in found.keys() - winner.keys()},
        {name: dense[name] for name in dense.keys() - winner.keys()},
    )
    assert all(not torch.equal(winner[name], dense[name]) for name in winner)
    assert equal(pruning.weights_at(0), {name: dense[name] for name in winner})
    for name, kept in pruning.mask.items():
        assert not found[name][~kept].any()
        assert torch.equal(found[name] != 0, kept)
    now = {name: id(one) for name, one in [*module.named_parameters(), *module.named_buffers()]}
    assert now == identities.seen


@pytest.mark.parametrize("how", ["least_squares", "batch_norm", LeastSquares(each_level=False)], ids=str)
def test_the_winners_file_loads_into_the_plain_class_and_gives_the_logged_score(make_trainer, how):
    pruning = pruner(how)
    module = fitted(make_trainer, pruning)
    loaded = Normed.load_from_checkpoint(pruning.best_model_path, strict=True, weights_only=True)
    assert equal(loaded.state_dict(), module.state_dict())
    (logged,) = make_trainer().validate(loaded, val_loader(), verbose=False)
    assert logged["val_acc"] == pytest.approx(pruning.report.score, abs=1e-6)
    assert Mask.load(pruning.best_model_path) == pruning.mask
    stored = load(pruning.best_model_path)["callbacks"]["RouletteWheelPruning"]["report"]
    assert SearchReport.from_dict(stored) == pruning.report
    assert stored["refit"]


def test_every_level_can_be_loaded_and_gives_the_score_of_its_level(make_trainer):
    pruning = pruner(validation=ON_ALL, tree=Tree(0.2, max_levels=3))
    fitted(make_trainer, pruning)
    for level in (0, 1, 2, 3):
        fresh = Normed()
        fresh.load_state_dict(load(pruning.best_model_path)["state_dict"])
        assert not fresh.load_state_dict(pruning.weights_at(level), strict=False).unexpected_keys
        (logged,) = make_trainer().validate(fresh, val_loader(), verbose=False)
        report = pruning.report
        score = report.levels[level - 1].score if level else report.dense_score
        assert logged["val_acc"] == pytest.approx(score, abs=1e-6)


def test_a_refit_prunes_further_than_none(make_trainer):
    options = {"tolerance": 0.02, "tree": Tree(smallest_rate=0.1), "branches": 3, "validation": ON_ALL}
    plain, refitted = pruner(None, **options), pruner(**options)
    for pruning in (plain, refitted):
        fitted(make_trainer, pruning, max_epochs=2, enable_checkpointing=False)
    assert refitted.report.sparsity > plain.report.sparsity


def test_weights_can_be_had_only_after_a_search_and_of_its_levels(make_trainer):
    pruning = pruner()
    with pytest.raises(RuntimeError, match="no search has ended"):
        pruning.weights_at(0)
    fitted(make_trainer, pruning)
    with pytest.raises(ValueError, match="level is 3, but must lie between 0"):
        pruning.weights_at(3)


def test_fast_dev_run_refits_once(make_trainer, tmp_path):
    pruning = pruner()
    module = fitted(make_trainer, pruning, fast_dev_run=True)
    assert len(pruning.report.levels) == 1
    assert any(one.refitted for one in pruning.report.levels[0].candidates)
    winner = pruning.weights_at(pruning.report.winner.level)
    assert equal({name: module.state_dict()[name] for name in winner}, winner)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_confidence_works_with_a_refit(make_trainer):
    pruning = pruner(tolerance=0.3, confidence=0.9)
    module = fitted(make_trainer, pruning, max_epochs=2)
    assert pruning.report.winner.p_value <= 0.1
    winner = pruning.weights_at(pruning.report.winner.level)
    assert equal({name: module.state_dict()[name] for name in winner}, winner)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_network_of_less_precision_is_refitted(make_trainer, precision):
    pruning = pruner()
    module = fitted(make_trainer, pruning, precision=precision)
    winner, wanted = pruning.weights_at(2), torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {value.dtype for value in winner.values()} == {wanted}
    assert all(bool(value.isfinite().all()) for value in winner.values())
    assert equal({name: module.state_dict()[name] for name in winner}, winner)
    assert pruning.report.levels[0].undone == {}


@pytest.mark.parametrize(
    ("importance", "refit"), [("sensitivity", None), ("activation", None), ("obs", None), ("obs", "least_squares")]
)
def test_an_importance_of_inputs_works_in_a_fit(make_trainer, importance, refit):
    pruning, plain = (pruner(refit, wheel=Wheel(importance=kind)) for kind in (importance, "magnitude"))
    for one in (pruning, plain):
        module = fitted(make_trainer, one, enable_checkpointing=False)
    assert pruning.mask != plain.mask
    assert pruning.weights_at(1).keys() == (HOWS["least_squares"] if refit else WEIGHTS)
    assert plain.mask == Mask.of_nonzeros(prunable_parameters(module, exclude=["aside*"]))


class WithoutDerivatives(Normed):
    """Leaves torch half way."""

    def forward(self, x):
        x = torch.from_numpy(self.net[:3](x).numpy()) if not self.training else self.net[:3](x)
        return self.net[3](x)


def test_a_refit_is_drawn_by_sensitivity(make_trainer):
    default, named, plain = (pruner(wheel=Wheel(importance=kind)) for kind in (None, "sensitivity", "magnitude"))
    for one in (default, named, plain):
        fitted(make_trainer, one, enable_checkpointing=False)
    assert default.report.importance == named.report.importance == "sensitivity"
    assert "Importance: sensitivity. Refit: " in str(default.report)
    assert same(default, named)
    assert plain.mask != default.mask


def test_a_module_without_derivatives_is_drawn_by_magnitude(make_trainer):
    default, plain = (pruner(wheel=Wheel(importance=kind)) for kind in (None, "magnitude"))
    for one in (default, plain):
        fitted(make_trainer, one, module=WithoutDerivatives(), enable_checkpointing=False)
    assert default.report.importance.startswith("magnitude, as the network fails where derivatives are asked for: ")
    assert found_by(default)[2].keys() == HOWS["least_squares"]
    assert same(default, plain)


def test_derivatives_take_a_few_samples_at_a_time(make_trainer):
    sizes = []

    class Counting(Normed):
        def forward(self, x):
            hidden = self.net[:3](x)
            if hidden.requires_grad and not self.training:
                sizes.append(len(x))
            return self.net[3](hidden)

    many = DataLoader(blobs(700, 1), batch_size=700)
    fitted(make_trainer, pruner(), module=Counting(), train=many, enable_checkpointing=False)
    assert sizes == [256, 256, 188] * 2


# ------------------------------------------------------------------------------------------------ buffers


class Sees(Normed):
    """Notes at the first batch of each validation which weights and statistics there are."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.seen = []

    def on_validation_epoch_start(self):
        self.seen.append(copied(self.net))


@pytest.mark.parametrize("how", ["least_squares", "batch_norm", LeastSquares(each_level=False)], ids=str)
def test_networks_are_validated_with_their_own_statistics(make_trainer, how):
    pruning, module = pruner(how, tree=Tree(0.2, max_levels=1), validation=ON_ALL), Sees()
    fitted(make_trainer, pruning, module=module)
    dense, winner, kinds = pruning.weights_at(0), pruning.weights_at(1), Counter()
    for seen in module.seen:
        now = {f"net.{name}": value for name, value in seen.items()}
        parameters = dense.keys() - STATISTICS
        if equal({name: now[name] for name in winner}, winner):
            kinds["winner"] += 1
        elif equal({name: now[name] for name in parameters}, {name: dense[name] for name in parameters}):
            kinds["dense"] += 1
            assert all(torch.equal(now[name], dense[name]) for name in STATISTICS)
        elif all(torch.equal(now[name], dense[name] * (now[name] != 0)) for name in parameters) and how != "batch_norm":
            kinds["drawn"] += 1  # and not refitted, so that all else is dense
            assert all(torch.equal(now[name], dense[name]) for name in STATISTICS)
    assert kinds["winner"] > 0
    assert kinds["dense"] > 0
    assert kinds["drawn"] > 0 or how == "batch_norm"


def test_children_of_a_refitted_parent_are_validated_pruned(make_trainer):
    pruning, module = pruner(QUICK, branches=3, validation=ON_ALL), Sees()
    fitted(make_trainer, pruning, module=module)
    counts = Counter(sum(int(seen[name[4:]].count_nonzero()) for name in WEIGHTS) for seen in module.seen)
    first, second = (level.survivors for level in pruning.report.levels)
    # three as they were drawn, one refitted, and that once more as the best; the winner of all when it was loaded
    assert (counts[first], counts[second]) == (5, 6)
    parent, child = pruning.weights_at(1), pruning.mask_at(2)
    drawn = [
        seen
        for seen in module.seen
        if all(torch.equal(seen[name[4:]], parent[name] * (seen[name[4:]] != 0)) for name in WEIGHTS)
        and sum(int(seen[name[4:]].count_nonzero()) for name in WEIGHTS) == child.survivors
    ]
    assert len(drawn) == 3
    for seen in drawn:
        assert all(torch.equal(seen[name[4:]], parent[name]) for name in BIASES | STATISTICS)


def test_statistics_of_the_winner_are_those_of_its_inputs(make_trainer):
    """Of all training data: eight batches of fifty."""
    pruning = pruner()
    module = fitted(make_trainer, pruning)
    x = blobs(400, 1).tensors[0]
    with torch.no_grad():
        given = module.net[0](x)
    assert torch.allclose(module.net[1].running_mean, given.mean(0), atol=1e-5)
    assert torch.allclose(module.net[1].running_var, given.var(0), rtol=1e-4)


# ------------------------------------------------------------------------------------------------ calibration data


class Calibrated(Normed):
    """Keeps the inputs of its calibration steps."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.calibrated = Record()

    def calibration_step(self, batch):
        self.calibrated.append(batch[0].clone())
        self(batch[0])


def rows(data: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in data}


def test_calibration_inputs_are_training_samples(make_trainer):
    module = Calibrated()
    fitted(make_trainer, pruner(), module=module)
    assert rows(torch.cat(module.calibrated)) == rows(blobs(400, 1).tensors[0])


@pytest.mark.parametrize(("batches", "samples"), [(1, 50), (3, 150), (100, 400)])
def test_so_many_batches_calibrate(make_trainer, batches, samples):
    module = Calibrated()
    fitted(make_trainer, pruner(LeastSquares(batches=batches)), module=module)
    # the first is a try before training
    seen = rows(torch.cat(module.calibrated[1:]))
    assert len(seen) == samples
    assert seen <= rows(blobs(400, 1).tensors[0])


def test_the_seed_chooses_the_batches(make_trainer):
    seen = []
    for seed in (0, 0, 1):
        module = Calibrated()
        fitted(make_trainer, pruner(LeastSquares(batches=2), seed=seed), module=module)
        seen.append(rows(torch.cat(module.calibrated[1:])))
    assert seen[0] == seen[1] != seen[2]


class Reads(Dataset):
    """Counts what is read of it."""

    def __init__(self, data: TensorDataset) -> None:
        self.data, self.read = data, 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.read += 1
        return self.data[index]


def test_validation_data_is_read_no_more_often_for_a_refit(make_trainer):
    reads = []
    for refit in (None, "least_squares"):
        data = Reads(blobs(200, 2))
        fitted(make_trainer, pruner(refit), val=DataLoader(data, 64))
        reads.append(data.read)
    assert reads[0] == reads[1]


class Unlabelled(Normed):
    """Learns nothing from labels."""

    def __init__(self):
        super().__init__(lr=0.0)


def test_labels_of_the_training_data_do_not_matter(make_trainer):
    found = []
    for turn in (0, 1):
        x, y = blobs(400, 1).tensors
        pruning = pruner()
        module = Unlabelled()
        module.net[1].momentum = 0.0
        fitted(make_trainer, pruning, module=module, train=DataLoader(TensorDataset(x, y.roll(turn)), 50))
        found.append(pruning)
    assert same(*found)


class Augmented(Dataset):
    """Draws noise from every global generator."""

    def __init__(self) -> None:
        self.data = blobs(400, 1)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + 0.1 * torch.randn(16) + 0.1 * random.random() + 0.1 * float(np.random.rand()), y  # noqa: NPY002


def test_chance_of_transforms_is_the_same_in_a_second_run(make_trainer):
    seen, found = [], []
    for turn in range(2):
        # whatever chance there is outside
        random.seed(turn)
        np.random.seed(turn)  # noqa: NPY002
        module, pruning = Calibrated(lr=0.0), pruner()
        module.net[1].momentum = 0.0
        fitted(make_trainer, pruning, module=module, train=DataLoader(Augmented(), 50, shuffle=bool(turn)))
        seen.append(torch.cat(module.calibrated[1:]))
        found.append(pruning)
    assert torch.equal(*seen)
    assert len(rows(seen[0])) == 400
    assert same(*found)


# ------------------------------------------------------------------------------------------------ loaders


class Stream(IterableDataset):
    def __iter__(self):
        return iter(blobs(400, 1))


class WholeBatches(Dataset):
    """Is asked for a list of indices."""

    def __init__(self) -> None:
        self.data = blobs(400, 1)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[torch.tensor(index)]


class Iterates:
    """No loader, but something to iterate over again and again."""

    def __init__(self) -> None:
        self.batches = list(DataLoader(blobs(400, 1), 50))

    def __iter__(self):
        return iter(self.batches)


class Buckets:
    """A batch sampler of batches of no one size, as those of sequences of like length are."""

    def __iter__(self):
        start, size = 0, 10
        while start < 400:
            yield list(range(start, min(400, start + size)))
            start, size = start + size, 30 if size == 10 else 10

    def __len__(self):
        return 20


class Pairs(Calibrated):
    """Takes two loaders at once."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx)

    def calibration_step(self, batch):
        assert batch.keys() == {"a", "b"}
        super().calibration_step(batch["a"])


def pairs():
    return {"a": train_loader(), "b": DataLoader(blobs(90, 3), 20)}


def batched(data) -> BatchSampler:
    return BatchSampler(RandomSampler(data, generator=torch.Generator().manual_seed(3)), 50, drop_last=True)


LOADERS = {
    "DataLoader": (Calibrated, train_loader),
    "own generator": (Calibrated, lambda: train_loader(generator=torch.Generator().manual_seed(2))),
    "batch_sampler": (Calibrated, lambda: DataLoader(blobs(400, 1), batch_sampler=batched(blobs(400, 1)))),
    "buckets": (Calibrated, lambda: DataLoader(blobs(400, 1), batch_sampler=Buckets())),
    "whole batches": (
        Calibrated,
        lambda: DataLoader(WholeBatches(), batch_size=None, sampler=batched(WholeBatches())),
    ),
    "data set of batches": (
        Calibrated,
        lambda: DataLoader([blobs(400, 1)[place : place + 50] for place in range(0, 400, 50)], batch_size=None),
    ),
    "stream": (Calibrated, lambda: DataLoader(Stream(), 50)),
    "two loaders": (Pairs, pairs),
    "CombinedLoader": (Pairs, lambda: CombinedLoader(pairs(), "min_size")),
    "iterable": (Calibrated, Iterates),
}


@pytest.mark.parametrize("name", LOADERS)
def test_training_data_is_read_in_whatever_form_it_comes(make_trainer, name):
    kind, loader = LOADERS[name]
    module, pruning = kind(), pruner()
    fitted(make_trainer, pruning, module=module, train=loader())
    few = name in ("two loaders", "CombinedLoader")
    seen = rows(torch.cat(module.calibrated[1:]))
    assert seen <= rows(blobs(400, 1).tensors[0])
    assert len(seen) == 400 or (few and len(seen) >= 200)
    assert pruning.report.winner.undone == {}
    winner = pruning.weights_at(pruning.report.winner.level)
    assert equal({one: module.state_dict()[one] for one in winner}, winner)


class OwnIterator(DataLoader):
    """Gives something else than its data set."""

    def __iter__(self):
        return ([x + 0.0, y] for x, y in super().__iter__() if len(y) == 50)


class Quarters(BatchSampler):
    """Has a size, and more to its batches than that."""

    def __iter__(self):
        return (batch for batch in super().__iter__() if max(batch) < 100)


def chosen(**more):
    return SubsetRandomSampler(range(100), **more)


PARTS = {
    "subset": lambda data: DataLoader(data, 50, sampler=chosen()),
    "subset, own generator": lambda data: DataLoader(data, 50, sampler=chosen(generator=torch.Generator())),
    "weights": lambda data: DataLoader(data, 50, sampler=WeightedRandomSampler([1.0] * 100 + [0.0] * 300, 400)),
    "indices": lambda data: DataLoader(data, 50, sampler=range(100)),
    "plain, over a part": lambda data: DataLoader(data, 50, sampler=RandomSampler(range(100))),
    "dropped rest": lambda data: DataLoader(data, 99, sampler=range(100), drop_last=True),
    "batches of indices": lambda data: DataLoader(data, batch_sampler=BatchSampler(chosen(), 50, False)),
    "own batches": lambda data: DataLoader(data, batch_sampler=Quarters(range(400), 50, False)),
    "own iterator": lambda data: OwnIterator(data, 50, sampler=range(100), num_workers=0),
}


@pytest.mark.parametrize("name", PARTS)
def test_only_what_the_sampler_gives_is_calibrated_on(make_trainer, name):
    data = blobs(400, 1)
    module, pruning = Calibrated(), pruner()
    fitted(make_trainer, pruning, module=module, train=PARTS[name](data))
    seen = rows(torch.cat(module.calibrated[1:]))
    assert seen <= rows(data.tensors[0][:100])
    assert len(seen) == {"weights": len(seen), "dropped rest": 99}.get(name, 100)
    assert len(seen) > 90


def test_the_rows_of_the_calibration_do_not_depend_on_the_state_of_chance(make_trainer):
    seen = []
    for turn in range(2):
        torch.manual_seed(turn)
        module = Calibrated()
        loader = DataLoader(blobs(400, 1), 50, sampler=WeightedRandomSampler([1.0] * 400, 200))
        make_trainer(callbacks=[pruner()], max_epochs=1).fit(module, loader, val_loader())
        seen.append(rows(torch.cat(module.calibrated[1:])))
    assert seen[0] == seen[1]
    assert len(seen[0]) < 200


class Locked(Dataset):
    """Holds what cannot be copied, as an open file cannot."""

    def __init__(self) -> None:
        self.data, self.lock = blobs(400, 1), threading.Lock()

    def __len__(self):
        return 400

    def __getitem__(self, index):
        return self.data[index]


class ByLength(Buckets):
    """Looks at the data set, as one that sorts by length does."""

    def __init__(self, data: Dataset) -> None:
        self.data = data


def test_a_batch_sampler_may_hold_a_data_set_that_cannot_be_copied(make_trainer):
    data, pruning = Locked(), pruner()
    fitted(make_trainer, pruning, train=DataLoader(data, batch_sampler=ByLength(data)))
    assert pruning.report.winner is not None


class Seen(Callback):
    """The batches of training, and the states of all chance when each comes."""

    def __init__(self) -> None:
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        chance = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))  # noqa: NPY002
        self.batches.append(content([*batch.values()] if isinstance(batch, dict) else [*batch, *chance]))


HOPELESS = Tree(pruning_rate=0.99, patience=1)


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=[pytest.mark.slow] * (name not in ("DataLoader", "stream"))) for name in LOADERS),
        "augmented",
        pytest.param("workers", marks=pytest.mark.slow),
    ],
)
def test_the_batches_that_training_sees_after_a_refit_are_those_without(make_trainer, name):
    more = {
        "augmented": (Calibrated, lambda: DataLoader(Augmented(), 50, shuffle=True)),
        "workers": (Calibrated, lambda: train_loader(num_workers=2, persistent_workers=True)),
    }
    kind, loader = (LOADERS | more)[name]
    runs, modules = [], []
    for searching in ([], [pruner(at_epoch=1, tree=HOPELESS, tolerance=0.0)]):
        seen, module = Seen(), kind()
        random.seed(4)
        np.random.seed(4)  # noqa: NPY002
        fitted(make_trainer, *searching, seen, module=module, train=loader(), max_epochs=3)
        runs.append(seen.batches)
        modules.append(copied(module))
    assert searching[0].report.winner is None
    assert any(one.refitted for one in searching[0].report.levels[0].candidates)
    assert len(runs[0]) >= 15
    assert runs[0] == runs[1]
    assert equal(*modules)


class Once(IterableDataset):
    """Its own iterator."""

    def __init__(self):
        self.left = iter(blobs(400, 1))

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.left)


def test_a_data_set_that_is_its_own_iterator_is_refused_before_training(make_trainer):
    seen, data = Seen(), Once()
    with pytest.raises(RuntimeError, match="training data is a data set that is its own iterator.*or refit=None"):
        fitted(make_trainer, pruner(), seen, train=DataLoader(data, 50))
    assert seen.batches == []


@pytest.mark.parametrize("kind", ["alone", "in a dict"])
def test_an_iterator_is_refused_before_training(make_trainer, kind):
    batches = iter(list(train_loader()))
    seen = Seen()
    with pytest.raises(RuntimeError, match="training data is an iterator.*Pass a DataLoader.*or refit=None"):
        fitted(make_trainer, pruner(), seen, train=batches if kind == "alone" else {"a": batches}, module=Calibrated())
    assert seen.batches == []


def test_an_iterator_is_welcome_without_a_refit(make_trainer):
    pruning = pruner(None)
    fitted(make_trainer, pruning, train=iter(list(train_loader())))
    assert pruning.report.winner is not None


class Data(LightningDataModule):
    def train_dataloader(self):
        return train_loader()

    def val_dataloader(self):
        return val_loader()


def test_a_data_module_is_read(make_trainer):
    found = []
    for data in ({"datamodule": Data()}, {"train_dataloaders": train_loader(), "val_dataloaders": val_loader()}):
        module, pruning = Calibrated(), pruner()
        torch.manual_seed(0)
        make_trainer(callbacks=[pruning], max_epochs=1).fit(module, **data)
        found.append(pruning)
    assert same(*found)


# ------------------------------------------------------------------------------------------------ the step


class Pictures(Normed):
    """Training batches are dicts, which `validation_step` does not take."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


class WithStep(Pictures):
    def __init__(self):
        super().__init__()
        self.steps = Record()

    def calibration_step(self, batch):
        self.steps.append((self.training, torch.is_grad_enabled(), batch["x"].shape[0]))
        return self(batch["x"])


def dicts() -> DataLoader:
    x, y = blobs(400, 1).tensors
    return DataLoader([{"x": one, "y": label} for one, label in zip(x, y, strict=True)], 50)


class OnlyInWorkers(Dataset):
    """Opens its file when a worker begins, and so cannot be read here."""

    def __len__(self):
        return 100

    def __getitem__(self, index):
        if get_worker_info() is None:
            raise OSError("no file is open")
        return torch.zeros(16), 0


def test_training_data_that_only_workers_can_read_is_refused_with_advice(make_trainer):
    trainer = make_trainer(callbacks=[RouletteWheelPruning()])
    with pytest.raises(RuntimeError, match=r"cannot be read in this process.*OSError: no file is open.*refit=None"):
        trainer.fit(Blobs(), DataLoader(OnlyInWorkers(), batch_size=20, num_workers=1), val_loader())


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("at_epoch", [None, 1])
def test_a_module_that_cannot_validate_training_batches_is_refused_with_advice(make_trainer, sanity, at_epoch):
    seen = Seen()
    with pytest.raises(RuntimeError, match=r"fails on a batch of the training data.*Define calibration_step\("):
        fitted(
            make_trainer,
            pruner(at_epoch=at_epoch),
            seen,
            module=Pictures(),
            train=dicts(),
            num_sanity_val_steps=sanity,
            max_epochs=2,
        )
    assert len(seen.batches) == (8 if sanity == 0 else 0)  # without a sanity check, at the first validation


def test_a_module_that_cannot_validate_training_batches_is_fine_without_a_refit(make_trainer):
    pruning = pruner(None)
    fitted(make_trainer, pruning, module=Pictures(), train=dicts())
    assert pruning.report.winner is not None


def test_calibration_step_runs_the_network(make_trainer):
    module, pruning = WithStep(), pruner()
    fitted(make_trainer, pruning, module=module, train=dicts())
    assert {one[:2] for one in module.steps} == {(False, False)}
    assert pruning.report.winner is not None
    assert pruning.report.winner.undone == {}
    assert all(part.training for part in module.modules())


def test_calibration_step_and_validation_step_find_the_same(make_trainer):
    found = []
    for module in (Normed(), Calibrated()):
        pruning = pruner()
        fitted(make_trainer, pruning, module=module)
        found.append(pruning)
    assert same(*found)


class Sizes(Calibrated):
    """Of which a forward may go wrong."""

    most = 400
    mixes = False

    def forward(self, x):
        assert len(x) <= self.most
        return super().forward(x - x.mean(0) if self.mixes else x)


@pytest.mark.parametrize(
    ("most", "mixes", "sizes"), [(400, False, {400, 50}), (399, False, {50}), (64, False, {50}), (400, True, {50})]
)
def test_batches_are_joined_where_the_network_takes_them_so(make_trainer, most, mixes, sizes):
    module, pruning = Sizes(), pruner()
    module.most, module.mixes = most, mixes
    fitted(make_trainer, pruning, module=module, train=train_loader(batch_size=50))
    trial = 8 + (most == 400)
    assert {len(x) for x in module.calibrated[1 + trial + 1 :]} == sizes
    assert pruning.report.winner.undone == {}
    assert pruning.report.importance == "sensitivity"


def test_nothing_is_joined_where_no_layer_is_asked_what_it_is_given(make_trainer):
    module, pruning = Calibrated(), pruner(None, at_epoch=[1], branches=None)
    fitted(make_trainer, pruning, module=module, max_epochs=2)
    assert pruning.report.importance == "sensitivity"
    assert {len(x) for x in module.calibrated} == {50}


def test_no_more_samples_are_derived_at_a_time_than_training_takes(make_trainer):
    class Derived(Calibrated):
        sizes = Record()

        def given(self, part, arguments):
            if arguments[0].requires_grad and not self.training:
                self.sizes.append(len(arguments[0]))

    module = Derived()
    module.net[-1].register_forward_pre_hook(module.given)
    fitted(make_trainer, pruner(), module=module, train=train_loader(batch_size=40))
    assert set(module.sizes) == {40}


@pytest.mark.parametrize("size", [300, 400])
def test_a_large_batch_is_cut_for_derivatives_unless_the_network_needs_it_whole(make_trainer, size):
    class Fixed(Calibrated):
        def forward(self, x):
            assert size == 300 or len(x) == size or not self.calibrates
            return super().forward(x)

        calibrates = False

        def calibration_step(self, batch):
            self.calibrates = True
            super().calibration_step(batch)

    module, pruning = Fixed(), pruner()
    fitted(make_trainer, pruning, module=module, train=train_loader(batch_size=size, drop_last=True))
    assert (Counter(len(x) for x in module.calibrated)[256] == 1) == (size == 400)  # seen to fail once
    assert pruning.report.importance == "sensitivity"


@pytest.mark.parametrize("options", [{}, {"refit": None, "at_epoch": [1], "branches": None}])
def test_biases_that_are_included_are_pruned(make_trainer, options):
    pruning = pruner(**{"include": ["net.*.weight", "net.*.bias"], "tolerance": 1.0} | options)
    module = fitted(make_trainer, pruning, module=Blobs(), max_epochs=2)
    assert pruning.report.importance == "sensitivity"
    parameters = dict(module.named_parameters())
    assert {name for name in pruning.mask if name.endswith("bias")} == {"net.0.bias", "net.2.bias"}
    assert all(torch.equal(parameters[name] != 0, kept) for name, kept in pruning.mask.items())
    assert pruning.report.left_alone == {}


@pytest.mark.parametrize("at_epoch", [None, np.int64(1), [np.int64(1)]])
def test_numbers_of_numpy_are_as_good_as_any(make_trainer, at_epoch):
    found = []
    for number, count in ((np.float64, np.int64), (float, int)):
        pruning = pruner(branches=count(2), tolerance=number(0.5), seed=count(3), at_epoch=at_epoch, refit=None)
        fitted(make_trainer, pruning, max_epochs=2)
        assert load(pruning.best_model_path)
        assert SearchReport.from_dict(json.loads(json.dumps(pruning.report.to_dict()))) == pruning.report
        found.append(pruning)
    assert all(torch.equal(kept, found[1].mask[name]) for name, kept in found[0].mask.items())


class Buffered(Blobs):
    """Holds a buffer that cannot be written to as a plain tensor can."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        eye = torch.eye(16)
        made = {"coo": eye.to_sparse(), "csr": eye.to_sparse_csr(), "expanded": torch.ones(1, 16).expand(4, 16)}
        self.kind = kind
        self.register_buffer("held", made[kind], persistent=kind != "expanded")  # torch itself could not load that

    def forward(self, x):
        return super().forward(x * self.held[0] if self.kind == "expanded" else (self.held @ x.T).T)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("options", [{}, {"at_epoch": 1}, {"at_epoch": [1], "branches": None}])
@pytest.mark.parametrize("kind", ["coo", "csr", "expanded"])
def test_buffers_of_other_layouts_are_given_back(make_trainer, kind, options):
    pruning, module = pruner(**{"tolerance": 1.0} | options), Buffered(kind)
    held, before = module.held, module.held.to_dense().clone()
    fitted(make_trainer, pruning, module=module, max_epochs=2)
    assert module.held is held
    assert torch.equal(module.held.to_dense(), before)
    assert pruning.report.winner is not None
    assert torch.equal(Buffered.load_from_checkpoint(pruning.best_model_path, kind=kind).held.to_dense(), before)


def test_what_is_calibrated_on_does_not_depend_on_the_epoch_of_the_sampler(make_trainer):
    class ByEpoch(SubsetRandomSampler):
        def __init__(self, epoch):
            super().__init__(range(100))
            self.epoch = epoch

        def __iter__(self):
            order = torch.Generator().manual_seed(self.epoch)
            return iter(torch.randperm(100, generator=order).tolist())

    seen = []
    for epoch in range(2):
        module = Calibrated()
        loader = DataLoader(blobs(400, 1), 50, sampler=ByEpoch(epoch))
        fitted(make_trainer, pruner(), module=module, train=loader)
        seen.append(max(module.calibrated, key=len))
    assert torch.equal(*seen)


class Delegates(Pictures):
    """The shortest way to write a calibration step."""

    def calibration_step(self, batch):
        self.validation_step((batch["x"], batch["y"]), 0)


@pytest.mark.parametrize("at_epoch", [None, 1])
def test_calibration_step_may_call_validation_step(make_trainer, at_epoch):
    pruning = pruner(at_epoch=at_epoch)
    fitted(make_trainer, pruning, module=Delegates(), train=dicts(), max_epochs=2)
    assert pruning.report.winner.undone == {}


class Dropped(Normed):
    """With dropout, which calibration must not see."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.9)

    def forward(self, x):
        return super().forward(self.dropout(x))


def test_the_network_is_seen_in_evaluation_mode(make_trainer):
    pruning, module = pruner(), Dropped()
    fitted(make_trainer, pruning, module=module)
    with torch.no_grad():
        given = module.net[0](blobs(400, 1).tensors[0])
    assert torch.allclose(module.net[1].running_mean, given.mean(0), atol=1e-5)


class Shifts(Normed):
    """Shifts its inputs, as many do; in place or not."""

    in_place = True

    def validation_step(self, batch, batch_idx):
        x, y = batch
        x = x.mul_(0.5) if self.in_place else x * 0.5
        super().validation_step((x, y), batch_idx)


class ShiftsACopy(Shifts):
    in_place = False


def test_a_step_that_writes_into_its_batch_is_refitted_on_the_same_inputs(make_trainer):
    found = []
    for module in (ShiftsACopy(), Shifts()):
        pruning = pruner(validation=ON_ALL)
        fitted(make_trainer, pruning, module=module)
        found.append(pruning)
    assert same(*found)


class Pops(Normed):
    """Takes the labels out of its batch, as modules around networks of Hugging Face do."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)

    def validation_step(self, batch, batch_idx):
        y = batch.pop("y")
        super().validation_step((batch["x"], y), batch_idx)


def test_a_step_that_takes_labels_out_of_its_batch_can_be_taken_again(make_trainer):
    x, y = blobs(200, 2).tensors
    val = DataLoader([{"x": one, "y": label} for one, label in zip(x, y, strict=True)], 64)
    plain = pruner(None)
    fitted(make_trainer, plain, module=Pops(), train=dicts(), val=val)
    assert plain.report.winner is not None
    pruning = pruner()
    fitted(make_trainer, pruning, module=Pops(), train=dicts(), val=val)
    assert pruning.report.winner.undone == {}


class Iterating(Normed):
    """Fetches its validation batches itself."""

    def validation_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        super().validation_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`.*")
def test_a_step_that_takes_an_iterator_is_refused_with_advice(make_trainer):
    seen = Seen()
    with pytest.raises(RuntimeError, match=r"Define calibration_step\(self, batch\)"):
        fitted(make_trainer, pruner(), seen, module=Iterating())
    assert seen.batches == []


class IteratingCalibrated(Iterating):
    def calibration_step(self, batch):
        self(batch[0])


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`.*")
def test_a_step_that_takes_an_iterator_works_with_a_calibration_step(make_trainer):
    pruning = pruner()
    module = fitted(make_trainer, pruning, module=IteratingCalibrated())
    winner = pruning.weights_at(2)
    assert equal({name: module.state_dict()[name] for name in winner}, winner)


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1, np.int64(3)])
def test_any_seed_that_is_allowed_will_do(make_trainer, seed):
    pruning = pruner(seed=seed)
    fitted(make_trainer, pruning)
    assert pruning.report.winner is not None


# ------------------------------------------------------------------------------------------------ training on


class States(Callback):
    """The optimizer's state when an epoch ends, and at the first batch of the next; zeros at each batch."""

    def __init__(self) -> None:
        self.ended, self.begun, self.zeros, self.parameters = None, None, [], []

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            self.ended = copy.deepcopy(trainer.optimizers[0].state_dict())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch > 0:
            self.begun = self.begun or copy.deepcopy(trainer.optimizers[0].state_dict())
            self.zeros.append(Mask.of_nonzeros(prunable_parameters(pl_module)))
        self.parameters.append([id(one) for one in trainer.optimizers[0].param_groups[0]["params"]])


@pytest.mark.parametrize("how", ["least_squares", "batch_norm"])
def test_training_goes_on_from_the_refitted_weights_with_zeros_held(make_trainer, how):
    pruning, states = pruner(how, at_epoch=1), States()
    module = fitted(make_trainer, pruning, states, max_epochs=3)
    # that of pruned weights alone is forgotten
    assert states.ended["param_groups"] == states.begun["param_groups"]
    for place, (name, _) in enumerate(module.named_parameters()):
        for key, value in states.ended["state"].get(place, {}).items():
            whole = value.masked_fill(~pruning.mask[name], 0) if name in pruning.mask and value.dim() else value
            assert torch.equal(states.begun["state"][place][key], whole)
    assert all(one == states.parameters[0] == [id(p) for p in module.parameters()] for one in states.parameters)
    for zeros in [*states.zeros, Mask.of_nonzeros(prunable_parameters(module))]:
        assert all(not bool((zeros[name] & ~kept).any()) for name, kept in pruning.mask.items())
    assert pruning.report.trained_score is not None
    # the weights of the levels are those of the search, not what training made of them
    winner = pruning.weights_at(pruning.report.winner.level)
    assert not torch.equal(winner["net.0.weight"], module.state_dict()["net.0.weight"])
    stored = load(pruning.best_model_path)["state_dict"]
    assert equal(stored, module.state_dict())


def test_a_resume_after_the_search_has_the_mask_and_the_weights_of_the_winner_alone(make_trainer, tmp_path):
    first = pruner(at_epoch=1)
    fitted(make_trainer, first, ModelCheckpoint(save_top_k=-1), max_epochs=2)
    path = tmp_path / "checkpoints" / "epoch=1-step=16.ckpt"
    start, resumed = {}, pruner(at_epoch=1)

    class Start(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            start.update(start or copied(pl_module))

    module = fitted(make_trainer, resumed, Start(), max_epochs=3, ckpt_path=path)
    assert equal(start, load(path)["state_dict"])
    assert resumed.mask == first.mask
    assert resumed.report.levels == first.report.levels
    assert resumed.report.refit == first.report.refit
    assert not any(module.state_dict()[name][~kept].any() for name, kept in first.mask.items())
    assert resumed.mask_at(1) == first.mask_at(1)
    for level in (0, 1, 2):
        with pytest.raises(RuntimeError, match="the weights of the winner alone"):
            resumed.weights_at(level)


def test_a_callback_that_takes_up_another_search_forgets_the_weights_of_its_own(make_trainer, tmp_path):
    first, second = pruner(dirpath=tmp_path / "one"), pruner(dirpath=tmp_path / "two", seed=3)
    for pruning in (first, second):
        fitted(make_trainer, pruning)
    fitted(make_trainer, second, max_epochs=2, ckpt_path=first.best_model_path)
    assert second.mask == first.mask
    with pytest.raises(RuntimeError, match="the weights of the winner alone"):
        second.weights_at(1)


def test_the_dense_file_searches_and_refits_as_the_run_did(make_trainer, tmp_path):
    first, again = pruner(at_epoch=1, dirpath=tmp_path / "one"), pruner(at_epoch=1, dirpath=tmp_path / "two")
    options = {"max_epochs": 2, "enable_checkpointing": False}
    one = fitted(make_trainer, first, **options)
    two = fitted(make_trainer, again, ckpt_path=tmp_path / "one" / "dense.ckpt", **options)
    assert first.mask == again.mask
    assert all(map(equal, found_by(first), found_by(again)))
    assert one.state_dict().keys() == two.state_dict().keys()


# ------------------------------------------------------------------------------------------------ interrupted


class Interrupted(Normed):
    """Ctrl-C, or an error, at the nth step on a batch after the first epoch, of validation or calibration."""

    def __init__(self, at: int | None = None, error: type[BaseException] = MemoryError) -> None:
        super().__init__()
        self.at, self.error, self.steps = at, error, Record()

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self._note("validation")

    def calibration_step(self, batch):
        self(batch[0])
        self._note("calibration")

    def _note(self, kind):
        if self.trainer.current_epoch == 1:
            if len(self.steps) == self.at:
                raise self.error("enough")
            self.steps.append(kind)


class InterruptedWithin(Interrupted):
    """At the nth calling of the network by a calibration, most of which end before the step does."""

    def calibration_step(self, batch):
        self._note("calibration")
        self(batch[0])


SHORT = {"branches": 2, "tree": Tree(0.2, max_levels=2), "validation": ON_ALL}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:RouletteWheelPruning. the search did not end")
@pytest.mark.parametrize(
    ("at_epoch", "raised", "met", "reason"),
    [
        (None, KeyboardInterrupt, SystemExit, StopReason.INTERRUPTED),
        (1, MemoryError, MemoryError, StopReason.FAILED),
    ],
)
def test_an_interrupted_search_gives_the_dense_network_back(make_trainer, tmp_path, at_epoch, raised, met, reason):
    options = {"max_epochs": 1 if at_epoch is None else 2, "enable_checkpointing": False}
    dense = copied(fitted(make_trainer, enable_checkpointing=False))
    whole, counting = pruner(at_epoch=at_epoch, **SHORT), InterruptedWithin()
    fitted(make_trainer, whole, module=counting, **options)
    calibrating, validating = (
        [place for place, kind in enumerate(counting.steps) if kind == which] for which in ("calibration", "validation")
    )
    last, levels = calibrating[-1], set()
    for at in [*calibrating, *(place for place in validating[::4] if place < last)]:
        pruning = pruner(at_epoch=at_epoch, dirpath=tmp_path / f"{at}", **SHORT)
        module = InterruptedWithin(at, raised)
        with pytest.raises(met):
            fitted(make_trainer, pruning, module=module, **options)
        assert pruning.mask is None
        assert equal(copied(module), dense), at
        assert not any(part._forward_pre_hooks for part in module.modules())
        path = tmp_path / f"{at}" / "interrupted.pt"
        accepted = 0 if pruning.report is None else len(pruning.report.accepted)
        levels.add(accepted)
        assert path.exists() == (accepted > 0)
        if accepted:
            stored = load(path)
            assert pruning.report.stop_reason is reason
            assert equal(stored["weights"], whole.weights_at(accepted))
            assert Mask.load(path) == whole.mask_at(accepted)
    assert levels >= {0, 1}


@pytest.mark.filterwarnings("ignore:RouletteWheelPruning. the search did not end")
@pytest.mark.parametrize("place", [-1, -2])
def test_a_search_interrupted_in_a_calibration_keeps_the_refitted_level(make_trainer, tmp_path, place):
    dense = copied(fitted(make_trainer, enable_checkpointing=False))
    whole, counting = pruner(**SHORT), InterruptedWithin()
    fitted(make_trainer, whole, module=counting, enable_checkpointing=False)
    at = [number for number, kind in enumerate(counting.steps) if kind == "calibration"][place]
    module = InterruptedWithin(at, KeyboardInterrupt)
    with pytest.raises(SystemExit):
        fitted(make_trainer, pruner(**SHORT), module=module)
    assert equal(copied(module), dense)
    stored = load(tmp_path / "checkpoints" / "interrupted.pt")
    assert stored["level"] == 1
    assert equal(stored["weights"], whole.weights_at(1))
    module.load_state_dict(stored["weights"], strict=False)
    assert Mask.of_nonzeros(prunable_parameters(module, exclude=["aside*"])) == whole.mask_at(1)


def test_a_search_that_ended_early_without_a_refit_saves_no_weights(make_trainer, tmp_path):
    options = {"branches": 3, "tree": Tree(0.2, max_levels=4), "validation": ON_ALL}
    with pytest.raises(MemoryError), pytest.warns(UserWarning, match="levels accepted so far"):
        fitted(make_trainer, pruner(None, **options), module=Interrupted(50))
    assert load(tmp_path / "checkpoints" / "interrupted.pt")["weights"] == {}


# ------------------------------------------------------------------------------------------------ unseen


TRANSPARENT = ["default", "two loaders at once", "no sanity check", "bf16-mixed", "accumulated gradients"]
TRANSPARENT += [
    "weight averaging",
    "manual optimization",
    "overfitted batches",
    "reloaded loaders",
    "limited validation",
]
TO_SEE = {"default"}


@pytest.mark.filterwarnings("ignore:.*requested to overfit but enabled.*")
@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`.*")
@pytest.mark.parametrize("at_epoch", [None, 1])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in TO_SEE)) for name in TRANSPARENT]
)
def test_a_search_that_accepts_no_refit_leaves_no_trace(make_trainer, tmp_path, name, at_epoch):
    case = CASES[name]
    if name == "two loaders at once":
        kind = type("Both", (case.module,), {"calibration_step": lambda self, batch: self(batch[0])})
        case = Case(case.options, case.loaders, kind, case.folds, case.callbacks)
    how = LeastSquares(batches=4)
    pruning = RouletteWheelPruning(3, monitor=case.module.monitor, at_epoch=at_epoch, tree=HOPELESS, refit=how)
    plain = trained(make_trainer, tmp_path / "plain", case)
    assert not changed(plain, trained(make_trainer, tmp_path / "searched", case, [pruning]))
    assert pruning.report.winner is None
    assert any(one.refitted for level in pruning.report.levels for one in level.candidates)


def test_a_refit_at_the_end_changes_the_network_and_nothing_else(make_trainer, tmp_path):
    pruning = RouletteWheelPruning(3, monitor="val_acc", tolerance=1.0, target_sparsity=0.5, refit=QUICK)
    plain = trained(make_trainer, tmp_path / "plain", Case())
    searched = trained(make_trainer, tmp_path / "searched", Case(), [pruning])
    assert changed(plain, searched) == {"weights", "files", "hooks"}
    assert searched["hooks"] == [*plain["hooks"][:-1], "on_save_checkpoint", plain["hooks"][-1]]
    changed_names = changed(plain["weights"], searched["weights"])
    assert changed_names == {name for name, one in pruning.weights_at(0).items() if name in searched["weights"]}


def test_no_callback_hears_of_a_calibration(make_trainer):
    called, during = [], []

    class Listens(Normed):
        def calibration_step(self, batch):
            during.append(len(called))
            self(batch[0])
            self.trainer.lightning_module
            during.append(len(called))

    fitted(make_trainer, pruner(), counting_class(called.append), module=Listens())
    assert len(during) >= 8
    # the first two are of the try before training
    assert len(set(during[2:])) == 1
    assert called.count("on_validation_start") == 2  # sanity check, and the end of the epoch


class Listing(Normed):
    """Gathers what its steps find and empties the list when an epoch ends, as is usual."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.counts = [], []

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.found.append(batch[0].shape[0])

    def on_validation_epoch_end(self):
        self.counts.append(sum(self.found))
        self.log("listed", float(sum(self.found)))
        self.found.clear()


@pytest.mark.parametrize("at_epoch", [None, 1])
def test_what_a_module_gathers_in_validation_steps_is_of_validation_alone(make_trainer, at_epoch):
    plain, module = Listing(), Listing()
    fitted(make_trainer, module=plain, max_epochs=2)
    fitted(make_trainer, pruner(at_epoch=at_epoch, validation=ON_ALL), module=module, max_epochs=2)
    assert plain.counts == [128, 200, 200]  # a sanity check of two batches, and two epochs
    assert max(module.counts) == 200
    assert module.found == plain.found == []


class Gathering(Normed):
    """Gathers in containers of containers, by loader or by name, and empties them when an epoch ends."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.counts = kind, []
        self.found = {"lists": [[], []], "dict": {"a": []}, "defaultdict": defaultdict(list)}[kind]

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.found[0 if self.kind == "lists" else "a"].append(len(batch[0]))

    def on_validation_epoch_end(self):
        gathered = self.found[0 if self.kind == "lists" else "a"]
        self.counts.append(sum(gathered))
        gathered.clear()


@pytest.mark.parametrize("kind", ["lists", "dict", "defaultdict"])
def test_what_a_module_gathers_by_name_is_of_validation_alone(make_trainer, kind):
    module = Gathering(kind)
    fitted(make_trainer, pruner(validation=ON_ALL), module=module)
    assert max(module.counts) == 200


class Remembers(Normed):
    """Keeps the last outputs, in a container that it had before."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.history = {}, [None]

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.last["x"] = self.history[0] = batch[0]


def test_what_a_module_remembers_of_validation_is_put_back(make_trainer):
    module = Remembers()
    pruning = pruner(validation=ON_ALL)
    fitted(make_trainer, pruning, module=module)
    assert pruning.report.winner is not None
    assert rows(module.last["x"]) <= rows(blobs(200, 2).tensors[0])
    assert module.history[0] is module.last["x"]


def test_metrics_are_untouched(make_trainer):
    class Watches(Callback):
        """What the metric and the Trainer know at the start of training, after it, and at the end of the fit."""

        def __init__(self) -> None:
            self.seen = []

        def _see(self, trainer, pl_module):
            known = {name: one for name, one in vars(pl_module.val_acc).items() if name not in ("update", "compute")}
            self.seen.append((content(known), content(trainer.callback_metrics), content(trainer.logged_metrics)))

        on_train_epoch_start = on_train_end = on_fit_end = _see

    found = []
    for searching in ([], [pruner(at_epoch=1, tree=HOPELESS, tolerance=0.0)]):
        watches = Watches()
        fitted(make_trainer, *searching, watches, enable_checkpointing=False, max_epochs=2)
        found.append(watches.seen)
    assert len(found[0]) == 4
    assert found[0] == found[1]


class Counts(Normed):
    """Counts in a buffer whatever it validates."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("validated", torch.tensor(0))

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.validated += len(batch[0])


def test_a_buffer_that_steps_count_in_counts_no_calibration(make_trainer):
    plain, module = Counts(), Counts()
    fitted(make_trainer, module=plain)
    fitted(make_trainer, pruner(), module=module)
    assert plain.validated == module.validated


def test_a_calibration_reads_its_batches_within_the_search_and_keeps_none(make_trainer, monkeypatch):
    known, inner = [], callback_module.calibration_batches

    def remembered(*arguments):
        known.append(inner(*arguments))
        return known[-1]

    monkeypatch.setattr(callback_module, "calibration_batches", remembered)
    fitted(make_trainer, pruner())
    assert len(known) == 1
    assert sum(len(x) for x, _ in known[0]) == 400


# ------------------------------------------------------------------------------------------------ two processes


def spread(folder: Path) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    found = {}
    for name, options in {"end": {}, "at epoch": {"at_epoch": 1}}.items():
        pruning, module = pruner(dirpath=folder / name, **options), Normed()
        module.aside.requires_grad_(False)  # which takes no part in the loss
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        devices = {"accelerator": "cpu", "strategy": "ddp", "devices": 2, "max_epochs": 2}
        trainer = Trainer(default_root_dir=folder, callbacks=[pruning], **devices, **quiet)
        trainer.fit(module, train_loader(), val_loader(batch_size=25))
        report = pruning.report.to_dict() | {"seconds": None}
        found[name] = {"weights": module.state_dict(), "levels": found_by(pruning), "report": report}
        found["rank"] = trainer.global_rank
    torch.save(found, folder / f"rank{found['rank']}.pt")


@pytest.mark.slow
def test_two_processes_refit_alike(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for name in ("end", "at epoch"):
        one, two = first[name], second[name]
        parameters = [key for key in one["weights"] if "running" not in key and "tracked" not in key]
        if name == "end":
            parameters += STATISTICS
        assert equal({key: one["weights"][key] for key in parameters}, {key: two["weights"][key] for key in parameters})
        assert all(map(equal, one["levels"][1:], two["levels"][1:]))
        assert one["report"] == two["report"]
        level = one["report"]["levels"][-1]["level"]
        assert level == 2
        if name == "end":
            assert equal({key: one["weights"][key] for key in one["levels"][level]}, one["levels"][level])


if __name__ == "__main__":
    spread(Path(sys.argv[1]))
