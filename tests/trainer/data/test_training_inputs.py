"""A refit within a fit: what the module becomes, which training data it reads, and what it leaves as it was."""

from __future__ import annotations

import copy
import json
import math
import random
import sys
import threading
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
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
    Wheel,
    prunable_parameters,
)
from lightning_roulette.refit import fitting, layerwise
from lightning_roulette.refit.solvers import choice
from lightning_roulette.refit.turns import Turns, turns_of
from lightning_roulette.refit_settings import Refit
from tests.support import fits
from tests.support.callbacks import within
from tests.support.isolated import ON_ALL
from tests.support.modules import QUIET, Blobs, BlobsData, Fetches, Stream, blobs, train_loader, val_loader
from tests.support.results import copied, equal, load
from tests.support.state import content
from tests.support.together import two_processes

pytestmark = [
    pytest.mark.usefixtures("any_calibration_fits"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled.*"),
    pytest.mark.filterwarnings("ignore:.*`dataloader_iter`.*"),
]
WEIGHTS = {"net.0.weight", "net.3.weight"}
BIASES = {"net.0.bias", "net.3.bias"}
STATISTICS = {"net.1.running_mean", "net.1.running_var"}
EVERYTHING = WEIGHTS | BIASES | STATISTICS
HOPELESS = Tree(pruning_rate=0.99, patience=1)
TRAINED_ON = blobs(400, 1).tensors[0]


class Normed(Blobs):
    """Has a batch normalisation, and a layer that takes no part in anything that is pruned."""

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


class Calibrated(Normed):
    """Keeps the inputs of its calibration steps. The first step is a try before training."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.calibrated = Record()

    def calibration_step(self, batch):
        self.calibrated.append(batch[0].clone())
        self(batch[0])

    @property
    def inputs(self) -> torch.Tensor:
        return torch.cat(self.calibrated[1:])


def pruner(refit="least_squares", **options) -> RouletteWheelPruning:
    return fits.pruner(**{"refit": refit, "tolerance": math.inf, "tree": Tree(0.2, max_levels=2)} | options)


@pytest.fixture
def fit(fit):
    """As `fit`, by default with `Normed`, for one epoch, and with checkpoints."""

    def normed(*callbacks, module=None, **options):
        module = Normed() if module is None else module
        return fit(*callbacks, module=module, **{"max_epochs": 1, "enable_checkpointing": True} | options)

    return normed


FITTING = {"train", "val", "datamodule", "ckpt_path", "max_epochs", "enable_checkpointing", "precision"}
FITTING |= {"fast_dev_run", "num_sanity_val_steps"}


@pytest.fixture
def searched(fit):
    """A function that fits a module with a search and returns the search; it takes the options of both."""

    def search(module=None, *callbacks, **options):
        fitting = {name: options.pop(name) for name in FITTING & options.keys()}
        pruning = pruner(**options)
        fit(pruning, *callbacks, module=module, **fitting)
        return pruning

    return search


def found_by(pruning) -> list[dict[str, torch.Tensor]]:
    """The weights of the dense network and of all accepted levels."""
    return [pruning.weights_at(level) for level in range(len(pruning.report.accepted) + 1)]


def same(one: RouletteWheelPruning, other: RouletteWheelPruning) -> bool:
    """Whether two searches found the same, bit for bit."""
    return one.report.levels == other.report.levels and all(map(equal, found_by(one), found_by(other)))


def is_winner(module, pruning) -> bool:
    """Whether the module holds the weights of the winner."""
    winner, state = pruning.weights_at(pruning.report.winner.level), module.state_dict()
    return equal({name: state[name] for name in winner}, winner)


def rows(data: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in data}


# ---- what the module becomes


HOWS = {
    "least_squares": EVERYTHING,
    "batch_norm": WEIGHTS | STATISTICS,
    LeastSquares(batches=3, finalists=2, damping=0.01): EVERYTHING,
    LeastSquares(each_level=False): EVERYTHING,
    LeastSquares(distill=20): EVERYTHING | {"net.1.weight", "net.1.bias"},
    Refit(each_level=False): WEIGHTS | STATISTICS,
}
FOUR_HOWS = pytest.mark.parametrize(
    "how", ["least_squares", "batch_norm", LeastSquares(each_level=False), LeastSquares(distill=20)], ids=str
)


def identities(module):
    return {name: id(one) for name, one in [*module.named_parameters(), *module.named_buffers()]}


@pytest.mark.parametrize(
    ("how", "keeps_dense"), [("least_squares", True), *((how, False) for how in HOWS)], ids=lambda one: str(one)[:40]
)
def test_the_module_is_the_winner_and_all_else_is_untouched(fit, tmp_path, how, keeps_dense):
    pruning, before = pruner(how), []
    checkpoints = ModelCheckpoint(filename="mine") if keeps_dense else ModelCheckpoint(save_top_k=0)
    noting = within("on_train_start", lambda _, module: before.append(identities(module)))
    module = fit(pruning, noting, checkpoints)
    found, winner = module.state_dict(), pruning.weights_at(pruning.report.winner.level)
    dense = load(tmp_path / "checkpoints" / ("mine.ckpt" if keeps_dense else "dense.ckpt"))["state_dict"]
    assert winner.keys() == HOWS[how]
    assert (tmp_path / "checkpoints" / "dense.ckpt").exists() != keeps_dense
    assert equal(found, dense | winner)
    assert all(not torch.equal(winner[name], dense[name]) for name in winner.keys() & EVERYTHING)
    assert equal(pruning.weights_at(0), {name: dense[name] for name in winner})
    assert all(torch.equal(found[name] != 0, kept) for name, kept in pruning.mask.items())
    assert [identities(module)] == before


@FOUR_HOWS
def test_the_winners_file_loads_into_the_plain_class_and_gives_the_logged_score(fit, make_trainer, how):
    pruning = pruner(how)
    module = fit(pruning)
    loaded = Normed.load_from_checkpoint(pruning.best_model_path, strict=True, weights_only=True)
    assert equal(loaded.state_dict(), module.state_dict())
    (logged,) = make_trainer().validate(loaded, val_loader(), verbose=False)
    assert logged["val_acc"] == pytest.approx(pruning.report.score, abs=1e-6)
    assert Mask.load(pruning.best_model_path) == pruning.mask
    stored = load(pruning.best_model_path)["callbacks"]["RouletteWheelPruning"]["report"]
    assert SearchReport.from_dict(stored) == pruning.report
    assert stored["refit"]


def test_every_level_can_be_loaded_and_gives_the_score_of_its_level(searched, make_trainer):
    pruning = searched(validation=ON_ALL, tree=Tree(0.2, max_levels=3))
    scores = [pruning.report.dense_score, *(level.score for level in pruning.report.levels)]
    for level, score in enumerate(scores):
        fresh = Normed()
        fresh.load_state_dict(load(pruning.best_model_path)["state_dict"])
        assert not fresh.load_state_dict(pruning.weights_at(level), strict=False).unexpected_keys
        (logged,) = make_trainer().validate(fresh, val_loader(), verbose=False)
        assert logged["val_acc"] == pytest.approx(score, abs=1e-6)
    assert len(scores) == 4


def test_weights_can_be_had_only_after_a_search_and_of_its_levels(fit):
    pruning = pruner()
    with pytest.raises(RuntimeError, match="no search has ended"):
        pruning.weights_at(0)
    fit(pruning)
    with pytest.raises(ValueError, match="level is 3, but must lie between 0"):
        pruning.weights_at(3)


@pytest.mark.parametrize(
    ("importance", "refit"), [("sensitivity", None), ("activation", None), ("obs", None), ("obs", "least_squares")]
)
def test_an_importance_of_inputs_works_in_a_fit(fit, importance, refit):
    pruning, plain = (pruner(refit, wheel=Wheel(importance=kind)) for kind in (importance, "magnitude"))
    for one in (pruning, plain):
        module = fit(one, enable_checkpointing=False)
    assert pruning.mask != plain.mask
    assert pruning.weights_at(1).keys() == (EVERYTHING if refit else WEIGHTS)
    assert plain.mask == Mask.of_nonzeros(prunable_parameters(module, exclude=["aside*"]))


def test_a_refit_is_drawn_by_sensitivity(searched):
    default, plain = (searched(wheel=Wheel(importance=kind)) for kind in (None, "magnitude"))
    assert default.report.importance == "sensitivity"
    assert default.report.refit.startswith("survivors by least squares")
    assert plain.mask != default.mask


@pytest.mark.parametrize("options", [{}, {"refit": None, "at_epoch": [1], "branches": None}])
def test_biases_that_are_included_are_pruned(fit, options):
    pruning = pruner(**{"include": ["net.*.weight", "net.*.bias"], "tolerance": math.inf} | options)
    module = fit(pruning, module=Blobs(), max_epochs=2)
    assert pruning.report.importance == "sensitivity"
    parameters = dict(module.named_parameters())
    assert {name for name in pruning.mask if name.endswith("bias")} == {"net.0.bias", "net.2.bias"}
    assert all(torch.equal(parameters[name] != 0, kept) for name, kept in pruning.mask.items())
    assert pruning.report.left_alone == {}


@pytest.mark.parametrize("at_epoch", [None, np.int64(1), [np.int64(1)]])
def test_numbers_of_numpy_are_as_good_as_any(searched, at_epoch):
    found = []
    for number, count in ((np.float64, np.int64), (float, int)):
        options = {"branches": count(2), "tolerance": number(0.2), "seed": count(3), "at_epoch": at_epoch}
        found.append(searched(refit=None, max_epochs=2, **options))
        assert load(found[-1].best_model_path)
        report = found[-1].report
        assert SearchReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert found[0].mask == found[1].mask


class Buffered(Blobs):
    """Holds a buffer that cannot be written to as a plain tensor can."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        eye = torch.eye(16)
        made = {"coo": eye.to_sparse(), "csr": eye.to_sparse_csr(), "expanded": torch.ones(1, 16).expand(4, 16)}
        self.kind = kind
        self.register_buffer("held", made[kind], persistent=kind != "expanded")  # Torch itself could not load that.

    def forward(self, x):
        return super().forward(x * self.held[0] if self.kind == "expanded" else (self.held @ x.T).T)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("options", [{}, {"at_epoch": 1}, {"at_epoch": [1], "branches": None}])
@pytest.mark.parametrize("kind", ["coo", "csr", "expanded"])
def test_buffers_of_other_layouts_are_given_back(searched, kind, options):
    module = Buffered(kind)
    held, before = module.held, module.held.to_dense().clone()
    pruning = searched(module, tolerance=math.inf, max_epochs=2, **options)
    assert module.held is held
    assert torch.equal(module.held.to_dense(), before)
    assert pruning.report.winner is not None
    assert torch.equal(Buffered.load_from_checkpoint(pruning.best_model_path, kind=kind).held.to_dense(), before)


# ---- batch statistics


class Sees(Normed):
    """Notes at the start of each validation which weights and statistics there are."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.seen = []

    def on_validation_epoch_start(self):
        self.seen.append({f"net.{name}": value for name, value in copied(self.net).items()})


def among(seen, weights) -> bool:
    """Whether these weights are among what was seen, bit for bit."""
    return equal({name: seen[name] for name in weights}, weights)


def parts(weights, names):
    return {name: weights[name] for name in names}


@FOUR_HOWS
def test_networks_are_validated_with_their_own_statistics(searched, how):
    module, kinds = Sees(), Counter()
    pruning = searched(module, refit=how, tree=Tree(0.2, max_levels=1), validation=ON_ALL)
    dense, winner = pruning.weights_at(0), pruning.weights_at(1)
    parameters = dense.keys() - STATISTICS
    for seen in module.seen:
        if among(seen, winner):
            kinds["winner"] += 1
        elif among(seen, parts(dense, parameters)):
            kinds["dense"] += among(seen, parts(dense, STATISTICS))
            kinds["wrong"] += not among(seen, parts(dense, STATISTICS))
        elif all(torch.equal(seen[name], dense[name] * (seen[name] != 0)) for name in parameters):
            # Drawn and not refitted, so that all else is dense. Refitted statistics alone look like that, too.
            kinds["drawn"] += among(seen, parts(dense, STATISTICS))
            kinds["wrong"] += how != "batch_norm" and not among(seen, parts(dense, STATISTICS))
    assert kinds["wrong"] == 0
    assert kinds["winner"] > 0
    assert kinds["dense"] > 0
    assert kinds["drawn"] > 0 or how == "batch_norm"


class Dropped(Normed):
    """With dropout, which calibration must not see."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.9)

    def forward(self, x):
        return super().forward(self.dropout(x))


@pytest.mark.parametrize("kind", [Normed, Dropped])
def test_statistics_of_the_winner_are_those_of_all_training_data_in_evaluation_mode(searched, kind):
    module = kind()
    searched(module)
    with torch.no_grad():
        given = module.net[0](TRAINED_ON)
    assert torch.allclose(module.net[1].running_mean, given.mean(0), atol=1e-5)
    assert torch.allclose(module.net[1].running_var, given.var(0), rtol=1e-4)


# ---- which training data is read


class Reads(Dataset):
    """Counts what is read of it; `of` picks the samples of an index."""

    def __init__(self, data=None, of=lambda data, index: data[index]) -> None:
        self.data, self.of, self.read = data or blobs(400, 1), of, 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.read += 1
        return self.of(self.data, index)


class Iterates:
    """No loader, but something to iterate over again and again."""

    def __iter__(self):
        return iter(DataLoader(blobs(400, 1), 50))


class Buckets:
    """A batch sampler of batches of no one size, as those of sequences of like length are."""

    def __init__(self, data=None) -> None:
        self.data = data  # One that sorts by length looks at the data set.

    def __iter__(self):
        start, size = 0, 10
        while start < 400:
            yield list(range(start, min(400, start + size)))
            start, size = start + size, 30 if size == 10 else 10

    def __len__(self):
        return 20


class OwnIterator(DataLoader):
    """Gives something else than its data set."""

    def __iter__(self):
        return ([x + 0.0, y] for x, y in super().__iter__() if len(y) == 50)


class Quarters(BatchSampler):
    """Has a size, and more to its batches than that."""

    def __iter__(self):
        return (batch for batch in super().__iter__() if max(batch) < 100)


class Pairs(Calibrated):
    """Takes two loaders at once."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx)

    def calibration_step(self, batch):
        assert batch.keys() == {"a", "b"}
        super().calibration_step(batch["a"])


def module_for(name):
    """The module that takes the batches of one of `LOADERS`."""
    return Pairs() if name in ("two loaders", "CombinedLoader") else Calibrated()


def pairs():
    return {"a": train_loader(), "b": DataLoader(blobs(90, 3), 20)}


def fifties() -> BatchSampler:
    return BatchSampler(RandomSampler(range(400), generator=torch.Generator().manual_seed(3)), 50, drop_last=True)


def loader(*arguments, **options):
    """A function that makes a loader of the training data."""
    return lambda: DataLoader(blobs(400, 1), *arguments, **options)


def by_tensor(data, index):
    return data[torch.tensor(index)]


def chosen(**more):
    return SubsetRandomSampler(range(100), **more)


LOADERS = {
    "DataLoader": train_loader,
    "own generator": lambda: train_loader(generator=torch.Generator().manual_seed(2)),
    "batch_sampler": lambda: loader(batch_sampler=fifties())(),
    "buckets": loader(batch_sampler=Buckets()),
    "whole batches": lambda: DataLoader(Reads(of=by_tensor), batch_size=None, sampler=fifties()),
    "data set of batches": lambda: DataLoader([blobs(400, 1)[i : i + 50] for i in range(0, 400, 50)], batch_size=None),
    "stream": lambda: DataLoader(Stream(400, 1), 50),
    "two loaders": pairs,
    "CombinedLoader": lambda: CombinedLoader(pairs(), "min_size"),
    "iterable": Iterates,
}
PARTS = {
    "subset": loader(50, sampler=chosen()),
    "subset, own generator": loader(50, sampler=chosen(generator=torch.Generator())),
    "weights": loader(50, sampler=WeightedRandomSampler([1.0] * 100 + [0.0] * 300, 400)),
    "indices": loader(50, sampler=range(100)),
    "plain, over a part": loader(50, sampler=RandomSampler(range(100))),
    "dropped rest": loader(99, sampler=range(100), drop_last=True),
    "batches of indices": loader(batch_sampler=BatchSampler(chosen(), 50, False)),
    "own batches": loader(batch_sampler=Quarters(range(400), 50, False)),
    "own iterator": lambda: OwnIterator(blobs(400, 1), 50, sampler=range(100), num_workers=0),
}
SEEN = {"two loaders": range(200, 401), "CombinedLoader": range(200, 401), "weights": range(91, 101)}
SEEN |= {"dropped rest": [99]}


@pytest.mark.parametrize("name", [*LOADERS, *PARTS])
def test_training_data_is_read_in_whatever_form_it_comes_and_only_what_the_sampler_gives(searched, name):
    module = module_for(name)
    pruning = searched(module, train=(LOADERS | PARTS)[name]())
    of = 400 if name in LOADERS else 100
    assert rows(module.inputs) <= rows(TRAINED_ON[:of])
    assert len(rows(module.inputs)) in SEEN.get(name, [of])
    assert pruning.report.winner.undone == {}
    assert is_winner(module, pruning)


@pytest.mark.parametrize(("batches", "samples"), [(1, 50), (3, 150), (100, 400)])
def test_so_many_batches_calibrate(searched, batches, samples):
    module = Calibrated()
    searched(module, refit=LeastSquares(batches=batches))
    assert len(rows(module.inputs)) == samples


class ByEpoch(SubsetRandomSampler):
    """Gives an order for each epoch."""

    def __init__(self, epoch):
        super().__init__(range(100))
        self.epoch = epoch

    def __iter__(self):
        return iter(torch.randperm(100, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def test_the_seed_of_the_search_chooses_the_batches_and_neither_chance_nor_the_epoch_does(fit):
    def seen(loader, seed=0, chance=0, **options):
        module = Calibrated()
        fit(pruner(seed=seed, **options), module=module, train=loader(), seed=chance)
        return module

    few = {"refit": LeastSquares(batches=2)}
    first, again, other = (
        rows(seen(train_loader, seed, chance, **few).inputs) for seed, chance in ((0, 0), (0, 1), (1, 0))
    )
    assert first == again != other
    drawn = [rows(seen(loader(50, sampler=WeightedRandomSampler([1.0] * 400, 200)), chance=i).inputs) for i in (0, 1)]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) < 200
    longest = [max(seen(loader(50, sampler=ByEpoch(epoch))).calibrated, key=len) for epoch in (0, 1)]
    assert torch.equal(*longest)


def augmented(data, index):
    """A sample with noise from every global generator."""
    x, y = data[index]
    return x + 0.1 * torch.randn(16) + 0.1 * random.random() + 0.1 * float(np.random.rand()), y  # noqa: NPY002


def unlabelled(kind=Calibrated):
    """A module that training does not change."""
    module = kind(lr=0.0)
    module.net[1].momentum = 0.0
    return module


def test_chance_of_transforms_is_the_same_in_a_second_run(searched):
    modules, found = [unlabelled(), unlabelled()], []
    for turn, module in enumerate(modules):
        random.seed(turn)  # Whatever chance there is outside.
        np.random.seed(turn)  # noqa: NPY002
        found.append(searched(module, train=DataLoader(Reads(of=augmented), 50, shuffle=bool(turn))))
    assert torch.equal(*(module.inputs for module in modules))
    assert len(rows(modules[0].inputs)) == 400
    assert same(*found)


class Seen(Callback):
    """The batches of training, and the random states when each comes."""

    def __init__(self) -> None:
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        chance = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))  # noqa: NPY002
        self.batches.append(content([*batch.values()] if isinstance(batch, dict) else [*batch, *chance]))


TRAINED = LOADERS | {
    "augmented": lambda: DataLoader(Reads(of=augmented), 50, shuffle=True),
    "workers": lambda: train_loader(num_workers=2, persistent_workers=True),
}


QUICK = ["DataLoader", "stream", "augmented"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in TRAINED])
def test_the_batches_that_training_sees_after_a_refit_are_those_without(fit, name):
    runs, modules, pruning = [], [], pruner(at_epoch=1, tree=HOPELESS, tolerance=0.0)
    for searching in ([], [pruning]):
        runs.append(Seen())
        random.seed(4)
        np.random.seed(4)  # noqa: NPY002
        module = fit(*searching, runs[-1], module=module_for(name), train=TRAINED[name](), max_epochs=3)
        modules.append(copied(module))
    assert pruning.report.winner is None
    assert any(one.refitted for one in pruning.report.levels[0].candidates)
    assert len(runs[0].batches) >= 15
    assert runs[0].batches == runs[1].batches
    assert equal(*modules)


# ---- which modules and data work, and which are refused


class Pictures(Normed):
    """Training batches are dicts, which `validation_step` does not take."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


class WithStep(Pictures):
    """Has a calibration step, and notes how it is called."""

    def __init__(self):
        super().__init__()
        self.steps = Record()

    def calibration_step(self, batch):
        self.steps.append((self.training, torch.is_grad_enabled(), batch["x"].shape[0]))
        return self(batch["x"])


class Delegates(Pictures):
    """The shortest way to write a calibration step."""

    def calibration_step(self, batch):
        self.validation_step((batch["x"], batch["y"]), 0)


class Pops(Pictures):
    """Takes the labels out of its batch, as modules around networks of Hugging Face do."""

    def validation_step(self, batch, batch_idx):
        super().validation_step((batch["x"], batch.pop("y")), batch_idx)


class Iterating(Fetches, Normed):
    pass


class IteratingCalibrated(Fetches, Calibrated):
    pass


def dicts(count=400, seed=1, size=50) -> DataLoader:
    x, y = blobs(count, seed).tensors
    return DataLoader([{"x": one, "y": label} for one, label in zip(x, y, strict=True)], size)


def locked():
    """A batch sampler that holds what cannot be copied, as an open file cannot."""
    data = Reads()
    data.lock = threading.Lock()
    return DataLoader(data, batch_sampler=Buckets(data))


WORKS = {
    "calibration step": (WithStep, {"train": dicts}),
    "calibration step that calls validation_step": (Delegates, {"train": dicts}),
    "the same between epochs": (Delegates, {"train": dicts, "at_epoch": 1, "max_epochs": 2}),
    "no refit on batches that cannot be validated": (Pictures, {"train": dicts, "refit": None}),
    "step that pops labels": (Pops, {"train": dicts, "val": lambda: dicts(200, 2, 64)}),
    "step that pops labels, no refit": (Pops, {"train": dicts, "val": lambda: dicts(200, 2, 64), "refit": None}),
    "iterator with a calibration step": (IteratingCalibrated, {}),
    "no refit on an iterator": (Normed, {"train": lambda: iter(list(train_loader())), "refit": None}),
    "batch sampler that cannot be copied": (Normed, {"train": locked}),
    "lowest seed": (Normed, {"seed": -(2**63)}),
    "highest seed": (Normed, {"seed": 2**63 - 1}),
    "fast_dev_run": (Normed, {"fast_dev_run": True}),
    "bf16-mixed": (Normed, {"precision": "bf16-mixed"}),
    "bf16-true": (Normed, {"precision": "bf16-true"}),
    "confidence": (Normed, {"tolerance": 0.3, "confidence": 0.9, "max_epochs": 2}),
}


@pytest.mark.parametrize("name", WORKS)
def test_a_search_works_with(searched, tmp_path, name):
    kind, options = WORKS[name]
    module = kind()
    data = {one: options[one]() for one in ("train", "val") if one in options}
    pruning = searched(module, **options | data)
    report, winner = pruning.report, found_by(pruning)[-1]
    assert report.winner.undone == {}
    assert all(bool(value.isfinite().all()) for value in winner.values())
    assert {value.dtype for value in winner.values()} == {torch.bfloat16 if "true" in name else torch.float32}
    assert all(part.training for part in module.modules())
    if "at_epoch" not in options:
        assert is_winner(module, pruning)
    if "refit" not in options:
        assert any(one.refitted for one in report.levels[0].candidates)
    if kind is WithStep:
        assert {one[:2] for one in module.steps} == {(False, False)}
    if name == "confidence":
        assert report.winner.p_value <= 0.1
    assert (len(report.levels) == 1) == (not list(tmp_path.rglob("*.ckpt"))) == (name == "fast_dev_run")


class Once(IterableDataset):
    """Its own iterator."""

    def __init__(self):
        self.left = iter(blobs(400, 1))

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.left)


def only_in_workers(data, index):
    """A file is opened when a worker begins, and so cannot be read here."""
    if get_worker_info() is None:
        raise OSError("no file is open")
    return data[index]


def batches():
    return iter(list(train_loader()))


IS_ITERATOR = "training data is an iterator.*Pass a DataLoader.*or refit=None"
FAILS = r"fails on a batch of the training data.*Define calibration_step\("
UNREADABLE = r"cannot be read in this process.*OSError: no file is open.*refit=None"
REFUSED = {
    "own iterator": (Normed, lambda: DataLoader(Once(), 50), "data set that is its own iterator.*or refit=None", {}),
    "iterator": (Normed, batches, IS_ITERATOR, {}),
    "iterator in a dict": (Calibrated, lambda: {"a": batches()}, IS_ITERATOR, {}),
    "step on an iterator": (Iterating, train_loader, r"Define calibration_step\(self, batch\)", {}),
    "workers alone": (Blobs, lambda: DataLoader(Reads(of=only_in_workers), 20, num_workers=1), UNREADABLE, {}),
    "other batches": (Pictures, dicts, FAILS, {}),
    "other batches, between epochs": (Pictures, dicts, FAILS, {"at_epoch": 1, "max_epochs": 2}),
    "other batches, no sanity check": (Pictures, dicts, FAILS, {"num_sanity_val_steps": 0}),
    "other batches, neither": (Pictures, dicts, FAILS, {"num_sanity_val_steps": 0, "at_epoch": 1, "max_epochs": 2}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_calibrated_on_is_refused_before_training_with_advice(searched, name):
    kind, train, message, options = REFUSED[name]
    seen = Seen()
    with pytest.raises(RuntimeError, match=message):
        searched(kind(), seen, train=train(), **options)
    assert len(seen.batches) == (8 if "num_sanity_val_steps" in options else 0)  # Then, at the first validation.


class WithoutDerivatives(Normed):
    """Leaves torch half way."""

    def forward(self, x):
        x = torch.from_numpy(self.net[:3](x).numpy()) if not self.training else self.net[:3](x)
        return self.net[3](x)


class Shifts(Normed):
    """Scales its inputs in place, as many do."""

    def validation_step(self, batch, batch_idx):
        super().validation_step((batch[0].mul_(0.5), batch[1]), batch_idx)


class ShiftsACopy(Shifts):
    def validation_step(self, batch, batch_idx):
        super().validation_step((batch[0].clone(), batch[1]), batch_idx)


def rolled(turn):
    """Training data with labels of other samples."""
    x, y = blobs(400, 1).tensors
    return DataLoader(TensorDataset(x, y.roll(turn)), 50)


MAGNITUDE, SENSITIVITY = ({"wheel": Wheel(importance=kind)} for kind in ("magnitude", "sensitivity"))
ALIKE = {
    "labels of the training data": [(partial(unlabelled, Normed), lambda i=i: {"train": rolled(i)}) for i in (0, 1)],
    "loaders and a data module": [(Calibrated, dict), (Calibrated, lambda: {"datamodule": BlobsData()})],
    "calibration step and validation step": [(Normed, dict), (Calibrated, dict)],
    "step that writes into its batch": [(kind, lambda: {"validation": ON_ALL}) for kind in (ShiftsACopy, Shifts)],
    "sensitivity by default": [(Normed, dict), (Normed, lambda: SENSITIVITY)],
    "magnitude without derivatives": [(WithoutDerivatives, dict), (WithoutDerivatives, lambda: MAGNITUDE)],
}


@pytest.mark.parametrize("name", ALIKE)
def test_two_searches_find_the_same(searched, name):
    first, second = (searched(kind(), **options()) for kind, options in ALIKE[name])
    assert same(first, second)
    assert found_by(first)[-1].keys() == EVERYTHING
    if name == "magnitude without derivatives":
        reason = "magnitude, as the network fails where derivatives are asked for: "
        assert first.report.importance.startswith(reason)


# ---- how many samples at a time


class Sizes(Calibrated):
    """Its forward may go wrong."""

    most = 40
    mixes = False

    def forward(self, x):
        assert len(x) <= self.most
        return super().forward(x - x.mean(0) if self.mixes else x)


@pytest.mark.parametrize(
    ("most", "mixes", "sizes"), [(40, False, {40, 20}), (39, False, {20}), (20, False, {20}), (40, True, {20})]
)
def test_batches_are_joined_to_eighths_where_the_network_takes_them_so(searched, most, mixes, sizes):
    module = Sizes()
    module.most, module.mixes = most, mixes
    pruning = searched(module, train=train_loader(batch_size=20), val=val_loader(20))
    trial = 2 + (most == 40)
    assert {len(x) for x in module.calibrated[1 + trial + 1 :]} == sizes
    assert pruning.report.winner.undone == {}
    assert pruning.report.importance == "sensitivity"


@pytest.mark.parametrize("mixes", [True, False])
def test_two_batches_are_joined_before_more_are(searched, mixes):
    module = Sizes()
    module.mixes = mixes
    searched(module, train=train_loader(batch_size=5), val=val_loader(20))
    ran = [len(x) for x in module.calibrated]
    assert 10 in ran
    assert (max(ran) > 10) != mixes


def test_nothing_is_joined_where_no_layer_is_asked_what_it_is_given(searched):
    module = Calibrated()
    pruning = searched(module, refit=None, at_epoch=[1], branches=None, max_epochs=2)
    assert pruning.report.importance == "sensitivity"
    assert {len(x) for x in module.calibrated} == {50}


@pytest.mark.parametrize(
    ("train", "sizes"),
    [(lambda: train_loader(batch_size=40), {40}), (lambda: DataLoader(blobs(700, 1), batch_size=700), {256, 188})],
)
def test_derivatives_take_a_few_samples_at_a_time_and_no_more_than_training_takes(searched, train, sizes):
    class Derived(Normed):
        sizes = Record()

        def forward(self, x):
            hidden = self.net[:3](x)
            if hidden.requires_grad and not self.training:
                self.sizes.append(len(x))
            return self.net[3](hidden)

    module = Derived()
    searched(module, train=train(), enable_checkpointing=False)
    assert set(module.sizes) == sizes
    assert sizes == {40} or module.sizes == [256, 256, 188] * 2


@pytest.mark.parametrize("size", [300, 400])
def test_a_large_batch_is_cut_for_derivatives_unless_the_network_needs_it_whole(searched, size):
    class Fixed(Calibrated):
        calibrates = False

        def forward(self, x):
            assert size == 300 or len(x) == size or not self.calibrates
            return super().forward(x)

        def calibration_step(self, batch):
            self.calibrates = True
            super().calibration_step(batch)

    module = Fixed()
    pruning = searched(module, train=train_loader(batch_size=size, drop_last=True))
    sizes = Counter(len(x) for x in module.calibrated)
    assert sizes[64] == 1  # the trial
    assert (sizes[256] == 0) == (size == 400)
    assert pruning.report.importance == "sensitivity"


# ---- training goes on


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
def test_training_goes_on_from_the_refitted_weights_with_zeros_held(fit, how):
    pruning, states = pruner(how, at_epoch=1), States()
    module = fit(pruning, states, max_epochs=3)
    # That of pruned weights alone is forgotten.
    assert states.ended["param_groups"] == states.begun["param_groups"]
    for place, (name, _) in enumerate(module.named_parameters()):
        for key, value in states.ended["state"].get(place, {}).items():
            whole = value.masked_fill(~pruning.mask[name], 0) if name in pruning.mask and value.dim() else value
            assert torch.equal(states.begun["state"][place][key], whole)
    assert all(one == states.parameters[0] == [id(p) for p in module.parameters()] for one in states.parameters)
    for zeros in [*states.zeros, Mask.of_nonzeros(prunable_parameters(module))]:
        assert all(not bool((zeros[name] & ~kept).any()) for name, kept in pruning.mask.items())
    assert pruning.report.trained_score is not None
    # The weights of the levels are those of the search, not what training made of them.
    winner = pruning.weights_at(pruning.report.winner.level)
    assert not torch.equal(winner["net.0.weight"], module.state_dict()["net.0.weight"])
    assert equal(load(pruning.best_model_path)["state_dict"], module.state_dict())


def test_a_resume_after_the_search_has_the_mask_and_the_weights_of_the_winner_alone(fit, tmp_path):
    first, resumed, start = pruner(at_epoch=1), pruner(at_epoch=1), {}
    fit(first, ModelCheckpoint(save_top_k=-1), max_epochs=2)
    path = tmp_path / "checkpoints" / "epoch=1-step=16.ckpt"

    begin = within("on_train_epoch_start", lambda _, module: start.update(copied(module)), times=1)
    module = fit(resumed, begin, max_epochs=3, ckpt_path=path)
    assert equal(start, load(path)["state_dict"])
    assert resumed.mask == first.mask
    assert resumed.report.levels == first.report.levels
    assert resumed.report.refit == first.report.refit
    assert not any(module.state_dict()[name][~kept].any() for name, kept in first.mask.items())
    assert resumed.mask_at(1) == first.mask_at(1)
    for level in (0, 1, 2):
        with pytest.raises(RuntimeError, match="only the weights of the winner"):
            resumed.weights_at(level)


def test_a_callback_that_takes_up_another_search_forgets_the_weights_of_its_own(fit, tmp_path):
    first, second = pruner(dirpath=tmp_path / "one"), pruner(dirpath=tmp_path / "two", seed=3)
    for pruning in (first, second):
        fit(pruning)
    fit(second, max_epochs=2, ckpt_path=first.best_model_path)
    assert second.mask == first.mask
    with pytest.raises(RuntimeError, match="only the weights of the winner"):
        second.weights_at(1)


def test_the_dense_file_searches_and_refits_as_the_run_did(searched, tmp_path):
    options = {"at_epoch": 1, "max_epochs": 2, "enable_checkpointing": False}
    first = searched(dirpath=tmp_path / "one", **options)
    again = searched(dirpath=tmp_path / "two", ckpt_path=tmp_path / "one" / "dense.ckpt", **options)
    assert first.mask == again.mask
    assert all(map(equal, found_by(first), found_by(again)))


# ---- interrupted


class Interrupted(Normed):
    """Ctrl-C, or an error, at the nth step on a batch after the first epoch, of validation or calibration."""

    def __init__(self, at: int | None = None, error: type[BaseException] = MemoryError) -> None:
        super().__init__()
        self.at, self.error, self.steps = at, error, Record()

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self._note("validation")

    def calibration_step(self, batch):
        self._note("calibration")  # Most calls of the network by a calibration end before the step does.
        self(batch[0])

    def _note(self, kind):
        if self.trainer.current_epoch == 1:
            if len(self.steps) == self.at:
                raise self.error("enough")
            self.steps.append(kind)

    def places(self, kind):
        return [place for place, one in enumerate(self.steps) if one == kind]


CTRL_C = (None, KeyboardInterrupt, SystemExit, StopReason.INTERRUPTED)
ERROR = (1, MemoryError, MemoryError, StopReason.FAILED)


@pytest.mark.filterwarnings("ignore:RouletteWheelPruning. the search did not end")
@pytest.mark.parametrize(
    ("at_epoch", "raised", "met", "why", "few"),
    [
        pytest.param(*CTRL_C, True, id="few Ctrl-C"),
        pytest.param(*CTRL_C, False, marks=pytest.mark.slow, id="all Ctrl-C"),
        pytest.param(*ERROR, False, marks=pytest.mark.slow, id="all errors"),
    ],
)
def test_an_interrupted_search_gives_the_dense_network_back(searched, fit, tmp_path, at_epoch, raised, met, why, few):
    options = {"max_epochs": at_epoch + 1 if at_epoch else 1, "at_epoch": at_epoch, "validation": ON_ALL}
    dense, counting = copied(fit(enable_checkpointing=False)), Interrupted()
    whole = searched(counting, enable_checkpointing=False, **options)
    calibrating, levels = counting.places("calibration"), set()
    validating = [place for place in counting.places("validation")[::4] if place < calibrating[-1]]
    for at in calibrating[-2:] if few else [*calibrating, *validating]:
        pruning = pruner(dirpath=tmp_path / f"{at}", at_epoch=at_epoch, validation=ON_ALL)
        module, path = Interrupted(at, raised), tmp_path / f"{at}" / "interrupted.pt"
        with pytest.raises(met):
            fit(pruning, module=module, max_epochs=options["max_epochs"], enable_checkpointing=False)
        assert pruning.mask is None
        assert equal(copied(module), dense), at
        assert not any(part._forward_pre_hooks for part in module.modules())
        accepted = 0 if pruning.report is None else len(pruning.report.accepted)
        levels.add(accepted)
        assert path.exists() == (accepted > 0)
        if accepted:
            stored = load(path)
            assert pruning.report.stop_reason is why
            assert stored["level"] == accepted
            assert equal(stored["weights"], whole.weights_at(accepted))
            assert Mask.load(path) == whole.mask_at(accepted)
            module.load_state_dict(stored["weights"], strict=False)
            assert Mask.of_nonzeros(prunable_parameters(module, exclude=["aside*"])) == whole.mask_at(accepted)
    assert levels >= ({1} if few else {0, 1})


def test_a_search_that_ended_early_without_a_refit_saves_no_weights(searched, tmp_path):
    options = {"branches": 3, "tree": Tree(0.2, max_levels=4), "validation": ON_ALL}
    with pytest.raises(MemoryError), pytest.warns(UserWarning, match="levels accepted so far"):
        searched(Interrupted(50), refit=None, **options)
    assert load(tmp_path / "checkpoints" / "interrupted.pt")["weights"] == {}


# ---- what a module gathers in validation steps is of validation alone


CONTAINERS = {"list": [], "lists": [[], []], "dict": {"a": []}, "defaultdict": defaultdict(list)}


class Gathers(Normed):
    """Gathers what its steps find, and empties the container when an epoch ends, as is usual."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.found, self.counts = kind, copy.deepcopy(CONTAINERS[kind]), []
        self.last, self.history = {}, [None]
        self.register_buffer("validated", torch.tensor(0))

    @property
    def gathered(self):
        return self.found if self.kind == "list" else self.found[0 if self.kind == "lists" else "a"]

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.gathered.append(batch[0].shape[0])
        self.validated += len(batch[0])
        self.last["x"] = self.history[0] = batch[0]

    def on_validation_epoch_end(self):
        self.counts.append(sum(self.gathered))
        self.log("listed", float(sum(self.gathered)))
        self.gathered.clear()


@pytest.mark.parametrize(("kind", "at_epoch"), [("list", 1), *((kind, None) for kind in CONTAINERS)])
def test_what_a_module_gathers_in_validation_steps_is_of_validation_alone(fit, kind, at_epoch):
    plain, module = Gathers(kind), Gathers(kind)
    fit(module=plain, max_epochs=2)
    fit(pruner(at_epoch=at_epoch, validation=ON_ALL), module=module, max_epochs=2)
    assert plain.counts == [128, 200, 200]  # A sanity check of two batches, and two epochs.
    assert max(module.counts) == 200
    assert module.gathered == plain.gathered == []
    assert plain.validated == module.validated == 128 + 2 * 200
    assert rows(module.last["x"]) <= rows(blobs(200, 2).tensors[0])
    assert module.history[0] is module.last["x"]


# ---- two processes


class Still(Calibrated):
    """Training leaves it as it is, so it does not depend on the number of processes."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.net[1].momentum = 0.0


class Communicates(Calibrated):
    """Its steps fail unless all processes run the same batches at the same time."""

    def calibration_step(self, batch):
        super().calibration_step(batch)
        assert torch.equal(self.trainer.strategy.reduce(batch[0].clone()), batch[0])


CHOOSING = LeastSquares(batches=5, choose=True)
SPREAD = {
    "end": (Normed, {}),
    "at epoch": (Normed, {"at_epoch": 1}),
    "chosen": (Normed, {"refit": LeastSquares(batches=4, choose=True)}),
    "communicates": (Communicates, {"refit": CHOOSING}),
    "as one": (Still, {"refit": CHOOSING, "validation": ON_ALL}),
}


def chosen_otherwise(problem, kept):
    """A choice that differs between the processes, as floating point may."""
    return choice.chosen(problem, kept).roll(torch.distributed.get_rank(), 1)


def by_turns_or_not(*arguments):
    """A trial that fails in the second process only, at its end."""
    found = turns_of(*arguments)
    return found if torch.distributed.get_rank() == 0 else Turns(False, note="not here")


def spread_fit(name: str, folder: Path, **devices):
    """One of the runs: the search, the module, and the rank."""
    kind, options = SPREAD[name]
    pruning, module = pruner(dirpath=folder / name, **options), kind()
    module.aside.requires_grad_(False)  # It takes no part in the loss.
    trainer = Trainer(default_root_dir=folder, callbacks=[pruning], accelerator="cpu", max_epochs=2, **devices, **QUIET)
    trainer.fit(module, train_loader(), val_loader(batch_size=25))
    return pruning, module, trainer.global_rank


def spread(folder: Path) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    fitting.chosen, layerwise.turns_of = chosen_otherwise, by_turns_or_not
    found = {}
    for name in SPREAD:
        pruning, module, found["rank"] = spread_fit(name, folder, strategy="ddp", devices=2)
        found[name] = {
            "weights": module.state_dict(),
            "levels": found_by(pruning),
            "masks": [dict(pruning.mask_at(level)) for level in range(len(pruning.report.accepted) + 1)],
            "report": pruning.report.to_dict() | {"seconds": None},
            "calibrated": list(getattr(module, "calibrated", [])),
        }
    torch.save(found, folder / f"rank{found['rank']}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the two processes found."""
    return two_processes(__file__, tmp_path_factory.mktemp("both"), {})


@pytest.mark.slow
@pytest.mark.parametrize("name", SPREAD)
def test_two_processes_refit_alike(both, name):
    one, two = (found[name] for found in both)
    parameters = [key for key in one["weights"] if "running" not in key and "tracked" not in key]
    parameters += () if name == "at epoch" else STATISTICS
    assert equal(parts(one["weights"], parameters), parts(two["weights"], parameters))
    assert all(map(equal, one["levels"][1:], two["levels"][1:]))
    assert one["report"] == two["report"]
    assert one["report"]["levels"][-1]["level"] == 2
    if name != "at epoch":
        assert among(one["weights"], one["levels"][2])
    assert ("chosen" in one["report"]["refit"]) == (name not in ("end", "at epoch"))


@pytest.mark.slow
def test_two_processes_find_the_winner_of_one(both, tmp_path):
    found, (alone, _, _) = both[0]["as one"], spread_fit("as one", tmp_path, devices=1)
    levels = found_by(alone)
    assert len(found["levels"]) == len(levels) == 3
    for level, values in enumerate(levels):
        assert Mask(found["masks"][level]) == alone.mask_at(level)
        for key, value in values.items():
            assert torch.allclose(found["levels"][level][key], value, rtol=1e-3, atol=1e-5)
    assert found["report"]["score"] == pytest.approx(alone.report.score, abs=1e-6)


@pytest.mark.slow
def test_two_processes_share_the_calibration_unless_its_steps_communicate(both):
    # the first steps are rehearsals on the same data; a batch of 50 is run about once in each refit
    ran = [[x.numpy().tobytes() for x in found["as one"]["calibrated"][4:]] for found in both]
    assert len(set(ran[0])) == 3
    assert len(set(ran[1])) == 2
    assert not set(ran[0]) & set(ran[1])
    first, second = (found["communicates"]["calibrated"] for found in both)
    assert all(map(torch.equal, first, second))
    assert len({x.numpy().tobytes() for x in first}) >= 5


if __name__ == "__main__":
    spread(Path(sys.argv[1]))
