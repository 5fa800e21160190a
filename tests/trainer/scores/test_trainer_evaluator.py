"""Validation on data that is read once: it logs what the Trainer's loop logs, on folds, in a race, with outcomes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, make_dataclass
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from lightning_roulette import Mask, RouletteWheelPruning, Tree, Validation, apply_mask, prunable_parameters, sparsity
from lightning_roulette.judge.certificate import samples_needed
from lightning_roulette.judge.outcomes import Batches, Resamples, Singles
from lightning_roulette.judge.race import rungs
from lightning_roulette.report.records import Method
from tests.support import fits
from tests.support.callbacks import within
from tests.support.isolated import ON_ALL, IsolatedValidation, PrunedWeights, a_mask, evaluator_of, judged_by, one_level
from tests.support.modules import Blobs, Stream, blobs, shuffled_loader, train_loader, two_loaders, val_loader
from tests.support.state import changed, state_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled.*"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`.*"),
    pytest.mark.filterwarnings("ignore:No positive samples in targets"),
]
ONE_LEVEL, TWO_LEVELS = Tree(0.2, max_levels=1), Tree(0.2, max_levels=2)


@pytest.fixture
def searched(fit):
    """A function that fits a module for one epoch with a search, and returns the search."""

    def search(val=None, module=None, *callbacks, train=None, **options):
        pruning = fits.pruner(**{"branches": 4, "tolerance": 0.1, "tree": TWO_LEVELS} | options)
        fit(*callbacks, pruning, module=module, train=train, val=val, max_epochs=1)
        return pruning

    return search


# ---- what is logged


class Collected(Blobs):
    """A collection with shared states. One metric of it is logged alone."""

    def __init__(self):
        super().__init__()
        kinds = (MulticlassAccuracy, MulticlassPrecision, MulticlassRecall)
        self.several = MetricCollection([kind(10) for kind in kinds], prefix="all_")

    def validation_step(self, batch, batch_idx):
        self.several.update(self(batch[0]), batch[1])
        self.log_dict(self.several)
        self.log("precision", self.several["MulticlassPrecision"])


class Forked(Blobs):
    """Logs on step and on epoch, with every reduction, and a dict of numbers."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log("step", loss, on_step=True, on_epoch=False)
        self.log("most", loss, reduce_fx="max")
        self.log("sum", loss, reduce_fx="sum")
        self.log("weighted", loss, batch_size=batch_idx + 1)
        self.log_dict({"one": loss, "two": 2.0})
        return loss


class AtTheEnd(Blobs):
    """Logs what it has gathered when all is seen."""

    def on_validation_epoch_start(self):
        self.seen = []

    def validation_step(self, batch, batch_idx):
        self.seen.append(cross_entropy(self(batch[0]), batch[1], reduction="none"))

    def on_validation_epoch_end(self):
        self.log("median", torch.cat(self.seen).median())
        self.log("samples", float(len(torch.cat(self.seen))))
        self.seen.clear()


class Short(Blobs):
    """Takes the batch alone."""

    def validation_step(self, batch):
        super().validation_step(batch, 0)


class Hooked(Blobs):
    """Notes what its hooks get, and logs in one of them."""

    noted = ()

    def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self.noted += (("start", batch[1].tolist(), batch_idx, dataloader_idx),)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)
        self.noted += (("step", batch[1].tolist(), batch_idx, dataloader_idx),)
        return {"answer": batch[1].float().mean()}

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.noted += (("end", float(outputs["answer"]), batch[1].tolist(), batch_idx, dataloader_idx),)
        self.log("answer", outputs["answer"])


class Keeps(Callback):
    """A callback that is kept. Notes what its hooks get, and logs in one of them."""

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        module.noted += (("start", batch[1].tolist(), batch_idx),)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        module.noted += (("end", batch[1].tolist(), batch_idx),)
        self.log("kept", batch[1].float().mean())


class Together(Blobs):
    """Gets the batches of two loaders in one, or none of the shorter."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch["a"], batch_idx)
        self.log("other", cross_entropy(self(batch["b"][0]), batch["b"][1]), batch_size=len(batch["b"][0]))


class Transfers(Blobs):
    """Scales its batches on their way to the device, and notes when."""

    transfers = ()

    def note(self, hook, batch, loader):
        self.transfers += ((hook, self.training, self.trainer.state.stage.value, loader),)
        return [batch[0] * 2, batch[1]] if hook == "after" else batch

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return self.note("before", batch, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return self.note("after", batch, dataloader_idx)


def combined(mode):
    return lambda: CombinedLoader(dict(zip("ab", two_loaders(), strict=True)), mode)


def stream():
    return DataLoader(Stream(200, 2), 64)


TWO_BATCHES = {"limit_val_batches": 2}
CASES = {
    "one loader": (Blobs, val_loader, {}),
    "two loaders": (Blobs, two_loaders, {}),
    "two loaders with hooks": (Hooked, two_loaders, {}),
    "two named loaders": (Blobs, combined("sequential"), {}),
    "max_size_cycle": (Together, combined("max_size_cycle"), {}),
    "min_size": (Together, combined("min_size"), {}),
    "one batch": (Blobs, partial(val_loader, 200), {}),
    "collection": (Collected, val_loader, {}),
    "on step and on epoch": (Forked, val_loader, {}),
    "at the end": (AtTheEnd, val_loader, {}),
    "no batch_idx": (Short, val_loader, {}),
    "hooks": (Hooked, val_loader, {}),
    "kept callback": (Blobs, val_loader, {}),
    "transfer hooks": (Transfers, val_loader, {}),
    "bf16-mixed": (Blobs, val_loader, {"precision": "bf16-mixed"}),
    "bf16-true": (Blobs, val_loader, {"precision": "bf16-true"}),
    "64-true": (Forked, val_loader, {"precision": "64-true"}),
    "limit_val_batches": (Forked, two_loaders, TWO_BATCHES),
    "no length": (Forked, stream, {}),
    "no length, limited": (Forked, stream, TWO_BATCHES),
    "shuffled": (Forked, partial(val_loader, shuffle=True), {}),
    "shuffled and limited": (Forked, shuffled_loader, TWO_BATCHES),
    "two workers": (Blobs, partial(val_loader, num_workers=2), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_our_loop_logs_what_the_trainers_loop_logs_and_leaves_no_trace(at_end, name):
    kind, loaders, options = CASES[name]
    module, kept = kind(), [Keeps()] * (name == "kept callback")
    module.noted = ()

    def compare(trainer, module):
        found, before = [], state_of(trainer, module)
        with IsolatedValidation(trainer, module, ["Keeps"]) as validation:
            read = list(validation.read())
            ways = [validation.run, lambda: validation.run_on(read), lambda: validation.run_on(read)]
            for way in [*ways, lambda: validation.run_on(validation.read()), validation.run]:
                module.noted = ()
                found.append((way(), module.noted))
        return found, changed(before, state_of(trainer, module)) - {"module.noted", "module.transfers"}

    ((expected, noted), *others), unequal = at_end(compare, *kept, module=module, val=loaders(), **options)
    assert expected.values
    for logged, hooks in others:
        assert logged.values.keys() == expected.values.keys()
        for metric, value in expected.values.items():
            assert value.dtype == logged.values[metric].dtype
            assert torch.equal(value, logged.values[metric]), metric
        assert logged.higher_is_better == expected.higher_is_better
        assert logged.metrics.keys() == expected.metrics.keys()
        assert all(logged.metrics[metric] is one for metric, one in expected.metrics.items())
        assert hooks == noted
    assert ("kept" in expected.values) == bool(kept)
    assert bool(noted) == (kind is Hooked or bool(kept))
    assert not unequal
    if name == "two loaders":
        names = {f"{metric}/dataloader_idx_{i}" for metric in ("val_acc", "val_loss") for i in (0, 1)}
        assert expected.values.keys() == names
        assert len({float(value) for value in expected.values.values()}) == 4


# ---- data is read once


def test_each_batch_is_transferred_once_in_a_search_and_in_eval_mode(at_end):
    def search(trainer, module):
        module.transfers = ()
        one_level(trainer, module, monitor="val_acc/dataloader_idx_1")
        return module.transfers

    expected = [(hook, False, "validate", loader) for loader in [0] * 4 + [1] * 5 for hook in ("before", "after")]
    assert at_end(search, module=Transfers(), val=two_loaders()) == tuple(expected)


class Counted(TensorDataset):
    """Counts the samples that were taken; the callback `forgets` starts again from 0 when training ends."""

    def __init__(self, count):
        super().__init__(*blobs(count, 2).tensors)
        self.taken = 0
        self.forgets = within("on_train_end", lambda *_: setattr(self, "taken", 0))

    def __getitem__(self, index):
        self.taken += 1
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("batch_size", "options"),
    [(5, {}), (64, {}), (64, {"refit": "least_squares"}), (5, {"validation": ON_ALL}), (64, {"validation": ON_ALL})],
)
def test_a_search_takes_each_sample_once(searched, batch_size, options):
    data = Counted(200)
    pruning = searched(DataLoader(data, batch_size), None, data.forgets, **options)
    assert len(pruning.report.levels) == 2
    assert data.taken == 200


def test_the_rehearsal_takes_a_few_batches(fit, searched):
    data, taken = Counted(200), []
    plain, ours = [within("on_train_batch_start", lambda *_: taken.append(data.taken), times=1) for _ in range(2)]
    fit(plain, val=DataLoader(data, 10), max_epochs=1)
    data.taken = 0
    searched(DataLoader(data, 10), None, ours)
    assert taken[0] < taken[1] <= 7 * taken[0]


SIZE = 192 * (16 * 4 + 8)  # Bytes of 192 samples.


def leaves(value, key=None):
    """Every number and string of a nested report, apart from times."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, one in items for leaf in leaves(one, key)]
    return [] if key == "seconds" else [value]


@pytest.mark.parametrize("race", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_without_room_to_keep_them_batches_are_read_again_to_the_same_end(searched, share, race):
    kept, again = (
        searched(DataLoader(blobs(192, 2), 6), validation=Validation(race=race, cache_bytes=int(room * SIZE)))
        for room in (1, share)
    )
    assert len(kept.report.levels) == 2
    assert [kept.mask_at(i) for i in range(3)] == [again.mask_at(i) for i in range(3)]
    assert again.mask == kept.mask
    assert leaves(again.report.to_dict()) == pytest.approx(leaves(kept.report.to_dict()), abs=1e-6)


def test_with_little_room_the_loader_is_read_once_for_each_part_of_a_race(searched):
    data, three_folds = Counted(192), Validation(cache_bytes=3 * SIZE // 16, confirm=0.25)
    pruning = searched(DataLoader(data, 6), None, data.forgets, branches=12, tree=ONE_LEVEL, validation=three_folds)
    stages = rungs(12, 12, at_once=3)
    parts = sum(len(rung.parts) for rung in stages)
    judged = sum(rung.entrants * len(rung.parts) for rung in stages)
    assert pruning.report.folds == (12, 4)
    # To deal, and to see what judges; the dense network on the data that ranks, and that confirms; twice each part;
    # the winner on both data, and on all.
    most = 2 + 2 + 2 * parts + 2 + 1
    assert data.taken / 192 <= most < judged


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_are_started_once_for_a_search(at_end, tmp_path, persistent):
    def start(worker):
        (tmp_path / f"{worker} {os.getpid()}").touch()

    def search(trainer, module):
        before = len(list(tmp_path.iterdir()))
        one_level(trainer, module, branches=3)
        return len(list(tmp_path.iterdir())) - before

    loader = val_loader(num_workers=2, worker_init_fn=start, persistent_workers=persistent)
    assert at_end(search, val=loader, default_root_dir=None) == (0 if persistent else 2)


# ---- what a step does to its batch is not there for the next


class Pops(Blobs):
    def validation_step(self, batch, batch_idx):
        x, y = (batch.pop("x"), batch.pop("y")) if isinstance(batch, dict) else (batch.pop(0), batch.pop())
        assert not batch
        self.val_acc(self(x), y)
        self.log("val_loss", cross_entropy(self(x), y), batch_size=len(y))
        self.log("val_acc", self.val_acc, batch_size=len(y))


class Writes(Blobs):
    """Normalises its batches in place."""

    def forward(self, x):
        return self.net(x - 0.5)

    def validation_step(self, batch, batch_idx):
        x = batch[0].sub_(0.5)
        self.val_acc(self.net(x), batch[1])
        self.log("val_loss", cross_entropy(self.net(x), batch[1]))
        self.log("val_acc", self.val_acc)


class WritesNot(Writes):
    def validation_step(self, batch, batch_idx):
        super().validation_step([batch[0].clone(), batch[1]], batch_idx)


def as_dict(samples):
    return dict(zip("xy", default_collate(samples), strict=True))


@pytest.mark.parametrize(("batch_size", "cache_bytes"), [(5, 2**31), (64, 2**31), (5, 4000), (5, 0)])
@pytest.mark.parametrize(
    ("plain", "changing", "collate"),
    [(Blobs, Pops, as_dict), (Blobs, Pops, default_collate), (WritesNot, Writes, default_collate)],
)
def test_what_a_step_takes_out_of_a_batch_or_writes_into_it(
    searched, batch_size, cache_bytes, plain, changing, collate
):
    first, second = (
        searched(val_loader(batch_size, collate_fn=how), module(), validation=Validation(cache_bytes=cache_bytes))
        for module, how in ((plain, None), (changing, collate))
    )
    assert first.mask == second.mask
    assert first.report.levels == second.report.levels
    assert first.report.score == second.report.score


Held, Slotted, Frozen = (
    make_dataclass(name, ["x", "y"], **options)
    for name, options in {"Held": {}, "Slotted": {"slots": True}, "Frozen": {"frozen": True}}.items()
)


def reads(batch):
    return batch.x


def writes(batch):
    return batch.x.mul_(0.5)


def binds(batch):
    batch.x = batch.x * 0.5
    return batch.x


@pytest.mark.parametrize(
    ("kind", "step"),
    [*((kind, step) for kind in (Held, Slotted, Frozen) for step in (reads, writes)), (Held, binds), (Slotted, binds)],
)
def test_batches_may_be_data_classes_of_any_kind_that_a_step_changes(searched, kind, step):
    class Takes(Blobs):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return batch

        def training_step(self, batch, batch_idx):
            return super().training_step((batch.x, batch.y), batch_idx)

        def validation_step(self, batch, batch_idx):
            super().validation_step((step(batch), batch.y), batch_idx)

    def collate(samples):
        return kind(*default_collate(samples))

    module, (x, y) = Takes(), val_loader().dataset.tensors
    loaders = {"val": val_loader(10, collate_fn=collate), "train": train_loader(collate_fn=collate)}
    pruning = searched(
        **loaders, module=module, branches=2, tolerance=math.inf, refit="least_squares", monitor="val_acc"
    )
    with torch.no_grad():
        right = (module(x if step is reads else 0.5 * x).argmax(1) == y).float().mean()
    assert pruning.report.folds == (8, 8)
    assert pruning.report.score == pytest.approx(float(right), abs=1e-6)


# ---- outcomes


class Judged(Blobs):
    """Logs as `judged` what it is given."""

    def __init__(self, metric):
        super().__init__()
        self.metric = metric

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.metric.update(self(batch[0]), batch[1])
        self.log("judged", self.metric)


class Micro(Blobs):
    def __init__(self):
        super().__init__()
        kinds = {"a": MulticlassPrecision(10, average="micro"), "b": MulticlassAccuracy(10, average="micro")}
        self.several = MetricCollection(kinds, prefix="all_")

    def validation_step(self, batch, batch_idx):
        self.several.update(self(batch[0]), batch[1])
        self.log_dict(self.several)


class Apart(Blobs):
    """A metric for each loader, as Lightning wants it."""

    def __init__(self):
        super().__init__()
        self.each = torch.nn.ModuleList([MulticlassAccuracy(10, average="micro") for _ in range(2)])

    def validation_step(self, batch, batch_idx, dataloader_idx):
        self.each[dataloader_idx](self(batch[0]), batch[1])
        self.log("acc", self.each[dataloader_idx])
        self.log("loss", cross_entropy(self(batch[0]), batch[1]))


class Means(Blobs):
    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()

    def validation_step(self, batch, batch_idx):
        self.mean.update(cross_entropy(self(batch[0]), batch[1]), len(batch[1]))
        self.log("mean", self.mean)


def macro(kind):
    return partial(Judged, kind(10, average="macro"))


@dataclass(frozen=True)
class Row:
    """What is known of one candidate's score by one metric."""

    module: type
    monitor: str
    kind: type
    samples: int = 200
    loaders: object = val_loader
    folds: object = range(16)
    batches: int | None = None
    inexact: int = 0  # So many samples a fold, as a batch is of one fold.


SMALL = partial(val_loader, 5)
OUTCOMES = {
    "accuracy": Row(Blobs, "val_acc", Singles),
    "accuracy of a half": Row(Blobs, "val_acc", Singles, 100, folds=range(8)),
    "accuracy of a fold": Row(Blobs, "val_acc", Singles, 13, folds=[3]),
    "accuracy, small batches": Row(Blobs, "val_acc", Singles, 200, SMALL, inexact=3),
    "accuracy, small batches of a half": Row(Blobs, "val_acc", Singles, 100, SMALL, range(8), inexact=3),
    "accuracy, small batches of a fold": Row(Blobs, "val_acc", Singles, 13, SMALL, [3], inexact=3),
    "one of a collection": Row(Micro, "all_a", Singles),
    "another of a collection": Row(Micro, "all_b", Singles),
    "accuracy on loader 0": Row(Apart, "acc/dataloader_idx_0", Singles, 200, two_loaders),
    "accuracy on loader 1": Row(Apart, "acc/dataloader_idx_1", Singles, 90, two_loaders),
    "loss on loader 0": Row(Apart, "loss/dataloader_idx_0", Batches, 200, two_loaders),
    "loss on loader 1": Row(Apart, "loss/dataloader_idx_1", Batches, 90, two_loaders),
    "metric that goes on, loader 0": Row(Blobs, "val_acc/dataloader_idx_0", Singles, 200, two_loaders),
    "metric that goes on, loader 1": Row(Blobs, "val_acc/dataloader_idx_1", type(None), 0, two_loaders),
    "macro accuracy": Row(macro(MulticlassAccuracy), "judged", Resamples),
    "macro F1": Row(macro(MulticlassF1Score), "judged", Resamples),
    "AUROC": Row(macro(MulticlassAUROC), "judged", Resamples),
    "number": Row(Blobs, "val_loss", Batches, batches=16),
    "number, small batches": Row(Blobs, "val_loss", Batches, 200, SMALL, batches=40),
    "mean": Row(Means, "mean", Batches, 200, partial(val_loader, 10), batches=20),
    "largest number": Row(Forked, "most", type(None)),
    "sum": Row(Forked, "sum", type(None)),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_what_is_known_of_a_score_beside_the_score(at_end, name):
    row = OUTCOMES[name]

    def look(trainer, module):
        candidate = PrunedWeights(a_mask(module, 0.6), prunable_parameters(module))
        with IsolatedValidation(trainer, module) as validation:
            evaluate = evaluator_of(trainer, module, validation, judged_by(row.monitor))
            return evaluate(candidate, row.folds), *evaluate.recorded(candidate, row.folds)

    plain, scores, outcomes = at_end(look, module=row.module(), val=row.loaders())
    assert isinstance(outcomes, row.kind)
    assert math.isfinite(scores.score)
    assert outcomes is None or scores.score == pytest.approx(plain.score, rel=1e-5)
    if row.kind is Singles:
        assert set(outcomes.values.tolist()) <= {0.0, 1.0}
        assert abs(len(outcomes.values) - row.samples) <= row.inexact * len(row.folds)
        assert 0 < float(outcomes.values.mean()) == pytest.approx(scores.score, abs=1e-6)
    elif row.kind is Batches:
        assert int(outcomes.weights.sum()) == row.samples
        assert outcomes.weights.max() <= 20
        assert row.batches in (None, len(outcomes.values))
        mean = float((outcomes.values * outcomes.weights).sum() / row.samples)
        assert mean == pytest.approx(scores.score, rel=1e-6)
    elif row.kind is Resamples:
        assert outcomes.size == row.samples
        assert outcomes.score(torch.arange(200)) == pytest.approx(scores.score, abs=1e-6)


# ---- a certificate


@pytest.fixture
def certified(fit):
    """A function that fits a module for two epochs with a search that certifies, and returns both."""

    def search(samples=400, module=None, val=None, **options):
        usual = {"branches": 3, "confidence": 0.9, "tree": Tree(0.2, max_levels=3)}
        pruning = fits.pruner(**usual | options)
        val = DataLoader(blobs(samples, 2), 64) if val is None else val
        return pruning, fit(pruning, module=module, val=val)

    return search


def test_a_confidence_gives_a_report_with_a_method_and_p_values(certified):
    pruning, module = certified()
    report = pruning.report
    assert (report.confidence, report.method, report.samples) == (0.9, Method.BETTING, 200)
    judged = [level for level in report.accepted if level.held is not None]
    assert judged
    assert all(0 < level.p_value <= 1 for level in judged)
    assert all(level.held == (level.p_value <= 1 - report.confidence) for level in judged)
    assert report.winner is judged[-1] if judged[-1].held else len(judged) > 1
    assert "With confidence 0.9 the pruned network's true decline is at most 0.2. Exact" in str(report)
    assert pruning.mask == pruning.mask_at(report.winner.level) == Mask.of_nonzeros(prunable_parameters(module))


@pytest.mark.parametrize(("monitor", "method"), [("val_loss", Method.STUDENT), ("judged", Method.BOOTSTRAP)])
def test_other_metrics_have_other_methods(certified, monitor, method):
    class Both(Judged):
        def validation_step(self, batch, batch_idx):
            Blobs.validation_step(self, batch, batch_idx)
            super().validation_step(batch, batch_idx)

    module = Both(MulticlassF1Score(10, average="macro"))
    pruning, _ = certified(module=module, monitor=monitor, tolerance=0.4, tree=ONE_LEVEL)
    assert pruning.report.method is method
    assert pruning.report.samples == (200 if method is Method.BOOTSTRAP else 8)
    assert pruning.report.levels[0].p_value is not None
    assert method.value.partition(":")[0] in str(pruning.report)


@pytest.mark.parametrize(
    ("confirm", "samples", "tolerance"),
    [(0.5, 200, 0.02), (0.25, 400, 0.02), (0.25, 100, 0.02), (0.5, 2 * samples_needed(0.95, 0.1) - 2, 0.1)],
)
def test_too_few_samples_are_refused_before_training_with_the_number_needed(certified, confirm, samples, tolerance):
    module, needed = Blobs(), samples_needed(0.95, tolerance)
    kept, needed_in_all = int(samples * confirm), math.ceil(needed / confirm)
    message = rf"but {kept} held-out samples can certify.*At least {needed}\b.*\b{needed_in_all} validation"
    options = {"tolerance": tolerance, "confidence": 0.95, "validation": Validation(confirm=confirm)}
    with pytest.raises(RuntimeError, match=message):
        certified(samples, module, **options)
    assert module.trainer.global_step == 0


def test_as_many_samples_as_are_needed_are_let_train(certified):
    needed = samples_needed(0.95, 0.1)
    pruning, module = certified(2 * needed, tolerance=0.1, confidence=0.95, tree=ONE_LEVEL)
    assert module.trainer.global_step == 16
    assert pruning.report.samples == needed


def test_samples_that_cannot_be_counted_before_are_counted_by_the_search(certified):
    with pytest.raises(ValueError, match=r"30 held-out samples can certify no network.*At least 149"):
        certified(val=DataLoader(Stream(60, 2), 10), tolerance=0.02, confidence=0.95)


class Uneven(Judged):
    """Takes a number for the whole batch beside the samples."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch[:2], batch_idx)


def test_data_that_cannot_be_divided_certifies_nothing_and_the_reason_is_told(certified):
    def with_a_number(samples):
        return [*default_collate(samples), torch.tensor(0.5)]

    loader = DataLoader(blobs(400, 2), 100, collate_fn=with_a_number)
    module = Uneven(MulticlassAccuracy(10, average="micro"))
    with pytest.raises(ValueError, match=r"loader 0 gives 4 batches, fewer than 16.*or pass confidence=None"):
        certified(val=loader, module=module)
    pruning, _ = certified(val=loader, module=module, confidence=None)
    assert pruning.report.folds == (1, 0)
    assert "loader 0 gives 4 batches" in str(pruning.report)
    assert pruning.report.sparsity > 0


# ---- the winner and the levels beyond it


def test_a_file_restores_the_winner_and_the_levels_beyond_it(fit, tmp_path):
    """A tolerance of one in a hundred: some level keeps it on the data that ranks, and not on the other."""
    tree, beyond = Tree(pruning_rate=0.3, max_levels=6), None
    for seed in range(8):
        pruning = RouletteWheelPruning(3, tolerance=0.01, tree=tree, seed=seed, dirpath=tmp_path / str(seed))
        module, report = fit(pruning), pruning.report
        if report.winner and report.winner.level < len(report.accepted):
            beyond = report.accepted[-1].level
            break
    assert beyond is not None
    assert pruning.mask == pruning.mask_at(report.winner.level) == Mask.of_nonzeros(prunable_parameters(module))
    assert sparsity(prunable_parameters(module)) == report.sparsity < report.accepted[-1].sparsity

    again = RouletteWheelPruning(3, tolerance=0.01)
    fit(again, max_epochs=3, ckpt_path=pruning.best_model_path)
    assert again.report.levels == report.levels
    assert again.mask == pruning.mask
    assert [again.mask_at(level) for level in range(beyond + 1)] == [pruning.mask_at(i) for i in range(beyond + 1)]
    assert again.mask_at(beyond).survivors == report.accepted[-1].survivors < again.mask.survivors
    with pytest.raises(ValueError, match=f"level is {beyond + 1}"):
        again.mask_at(beyond + 1)
    other = Blobs()
    apply_mask(other, pruning.best_model_path)
    assert Mask.of_nonzeros(prunable_parameters(other)) == pruning.mask


# ---- which data is divided into folds


class TimeFirst(Blobs):
    """Its batches have time before samples: rows of theirs mean nothing."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        trend = torch.linspace(0, 1, len(x)).view(-1, 1, 1)
        super().validation_step(((trend * x).sum(0), y[0]), batch_idx)


def time_first():
    x, y = val_loader().dataset.tensors
    batches = [(x[part].expand(20, -1, -1), y[part].expand(20, -1)) for part in torch.arange(200).split(25)]
    return DataLoader(batches, batch_size=None)


class Last(Blobs):
    """Logs when it sees the last batch."""

    def __init__(self):
        super().__init__()
        self.right = []

    def validation_step(self, batch, batch_idx):
        self.right.append((self(batch[0]).argmax(1) == batch[1]).float())
        if batch_idx == self.trainer.num_val_batches[0] - 1:
            self.log("val_acc", torch.cat(self.right).mean(), batch_size=1)
            self.right.clear()


class Fixed(Blobs):
    """Takes batches of 25 only."""

    def forward(self, x):
        return super().forward(x + torch.zeros(25, 16))


class Squeezes(Blobs):
    """Takes any number of samples but one."""

    def forward(self, x):
        scores = super().forward(x)
        assert scores.squeeze().dim() == 2
        return scores


def side_by_side():
    return CombinedLoader({"a": val_loader(10), "b": DataLoader(blobs(90, 3), 5)}, "max_size_cycle")


WHOLE, HALVES = (1, 0), (8, 8)
MEANINGLESS = "the module logs other values on regrouped samples"
FAILS = "validation fails on regrouped samples (RuntimeError: The size of"
FOLDS = {
    "batches that tell something else when cut": (TimeFirst, time_first, {}, WHOLE, MEANINGLESS),
    "a module that needs its batch size": (
        Fixed,
        partial(val_loader, 25),
        {"refit": "least_squares", "train": train_loader(25)},
        WHOLE,
        FAILS,
    ),
    "loaders side by side": (Together, side_by_side, {"monitor": "val_loss", "tolerance": math.inf}, HALVES, ""),
    "130 samples, never one alone": (Squeezes, lambda: DataLoader(blobs(130, 2), 32), {}, HALVES, ""),
    "131 samples, never one alone": (Squeezes, lambda: DataLoader(blobs(131, 2), 32), {}, HALVES, ""),
    **{
        f"a step that asks for the last batch of {size}, cache {room}": (
            Last,
            partial(val_loader, size),
            {"validation": Validation(cache_bytes=room)},
            HALVES,
            "",
        )
        for size, room in ((64, 2**31), (10, 2**31), (10, 5000), (10, 0))
    },
}


@pytest.mark.parametrize("name", FOLDS)
def test_data_is_divided_into_folds_where_the_module_takes_it_so(searched, name):
    kind, loader, options, folds, shared = FOLDS[name]
    module = kind()
    usual = {"monitor": "val_acc", "branches": 2, "tolerance": math.inf, "tree": ONE_LEVEL}
    pruning = searched(loader(), module, **usual | options)
    report = pruning.report
    assert report.folds == folds
    assert (report.undivided_because or "").startswith(shared)
    said = module.trainer.validate(module, loader(), verbose=False)[0][report.monitor]
    assert report.score == pytest.approx(said, abs=1e-6)
    assert report.winner.undone == report.left_alone == {}
    assert not getattr(module, "right", [])


def test_a_network_that_cannot_be_compared_with_the_dense_one_is_not_an_error(fit):
    class Macro(Blobs):
        def __init__(self):
            super().__init__()
            self.val_acc = MulticlassAccuracy(10)

    pruning = RouletteWheelPruning(3, monitor="val_acc", tolerance=math.inf, tree=Tree(0.5, max_levels=3))
    fit(pruning, module=Macro(), max_epochs=3)
    assert len(pruning.report.accepted) == 3
    assert all(level.error >= 0 for level in pruning.report.accepted)


@pytest.mark.parametrize("cache_bytes", [2**31, 9_000, 0])  # all data, half of it and none of it is kept
def test_samples_are_recorded_however_much_data_is_kept(make_trainer, cache_bytes):
    how = Validation(cache_bytes=cache_bytes)
    pruning = RouletteWheelPruning(3, refit=None, tolerance=math.inf, tree=Tree(0.3, max_levels=1), validation=how)
    make_trainer(callbacks=[pruning], max_epochs=1).fit(Blobs(), train_loader(), val_loader(batch_size=10))
    assert pruning.report.samples == 100
    assert pruning.report.levels[0].held_out_error >= 0
