"""Validation on data that is read once: it tells what the Trainer's loop tells, on folds, in a race, with outcomes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from lightning_roulette import (
    Mask,
    RouletteWheelPruning,
    Tree,
    Validation,
    Wheel,
    apply_mask,
    prunable_parameters,
    sparsity,
)
from lightning_roulette.judge.certificate import samples_needed
from lightning_roulette.judge.outcomes import Batches, Resamples, Singles
from lightning_roulette.judge.race import rungs
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.report.records import Method
from lightning_roulette.trainer.validation.isolation import IsolatedValidation
from tests.support.modules import Blobs, blobs, train_loader, val_loader
from tests.trainer.test_isolation import (
    BY_DEFAULT,
    ON_ALL,
    a_mask,
    changed,
    evaluator_of,
    judged_by,
    one_level,
    shuffled_loader,
    state_of,
    within,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled.*"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`.*"),
    pytest.mark.filterwarnings("ignore:No positive samples in targets"),
]


def fit(make_trainer, action, module=None, loaders=None, callbacks=(), **options):
    """Train, and do `action(trainer, module)` at the end of it."""
    module = module or Blobs()
    torch.manual_seed(0)
    trainer = make_trainer(callbacks=[*callbacks, within("on_train_end", action)], **{"max_epochs": 1} | options)
    trainer.fit(module, train_loader(), val_loader() if loaders is None else loaders)
    return module


# ---- what is logged


class Collected(Blobs):
    """A collection with shared states, of which one is logged alone."""

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


class Together(Blobs):
    """Gets the batches of two loaders in one, or none of the shorter."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch["a"], batch_idx)
        self.log("other", cross_entropy(self(batch["b"][0]), batch["b"][1]), batch_size=len(batch["b"][0]))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(blobs(200, 2))


def two_loaders():
    return [val_loader(), DataLoader(blobs(90, 3), 20)]


CASES = {
    "one loader": (Blobs, val_loader, {}),
    "two loaders": (Blobs, two_loaders, {}),
    "two loaders with hooks": (Hooked, two_loaders, {}),
    "two named loaders": (Blobs, lambda: CombinedLoader(dict(zip("ab", two_loaders(), strict=True)), "sequential"), {}),
    "one batch": (Blobs, lambda: val_loader(200), {}),
    "collection": (Collected, val_loader, {}),
    "on step and on epoch": (Forked, val_loader, {}),
    "at the end": (AtTheEnd, val_loader, {}),
    "no batch_idx": (Short, val_loader, {}),
    "hooks": (Hooked, val_loader, {}),
    "bf16-mixed": (Blobs, val_loader, {"precision": "bf16-mixed"}),
    "bf16-true": (Blobs, val_loader, {"precision": "bf16-true"}),
    "64-true": (Forked, val_loader, {"precision": "64-true"}),
    "limit_val_batches": (Forked, two_loaders, {"limit_val_batches": 2}),
    "no length": (Forked, lambda: DataLoader(Stream(), 64), {}),
    "no length, limited": (Forked, lambda: DataLoader(Stream(), 64), {"limit_val_batches": 2}),
    "shuffled": (Forked, lambda: val_loader(shuffle=True), {}),
    "shuffled and limited": (Forked, shuffled_loader, {"limit_val_batches": 2}),
    "two workers": (Blobs, lambda: val_loader(num_workers=2), {}),
    "max_size_cycle": (
        Together,
        lambda: CombinedLoader(dict(zip("ab", two_loaders(), strict=True)), "max_size_cycle"),
        {},
    ),
    "min_size": (Together, lambda: CombinedLoader(dict(zip("ab", two_loaders(), strict=True)), "min_size"), {}),
}


@pytest.mark.parametrize(("kind", "loaders", "options"), CASES.values(), ids=CASES)
def test_our_loop_logs_what_the_trainers_loop_logs(make_trainer, kind, loaders, options):
    found, noted, unequal = [], [], []

    def compare(trainer, module):
        before = state_of(trainer, module) if kind is not Hooked else {}
        with IsolatedValidation(trainer, module) as validation:
            read = list(validation.read())
            ways = [validation.run, lambda: validation.run_on(read), lambda: validation.run_on(read)]
            for way in [*ways, lambda: validation.run_on(validation.read()), validation.run]:
                module.noted = ()
                found.append(way())
                noted.append(module.noted)
        if before:
            del module.noted
            unequal.append(changed(before, state_of(trainer, module)))

    fit(make_trainer, compare, kind(), loaders(), **options)
    expected, *others = found
    assert expected.values
    for logged in others:
        assert logged.values.keys() == expected.values.keys()
        for name, value in expected.values.items():
            assert value.dtype == logged.values[name].dtype
            assert torch.equal(value, logged.values[name]), name
        assert logged.higher_is_better == expected.higher_is_better
        assert logged.metrics.keys() == expected.metrics.keys()
        assert all(logged.metrics[name] is metric for name, metric in expected.metrics.items())
    assert noted == [noted[0]] * 5
    assert bool(noted[0]) == (kind is Hooked)
    assert not set().union(*unequal)


def test_values_of_two_loaders_are_told_apart_by_name(make_trainer):
    found = []

    def look(trainer, module):
        with IsolatedValidation(trainer, module) as validation:
            found.append(validation.run_on(validation.read()).values)

    fit(make_trainer, look, loaders=two_loaders())
    assert found[0].keys() == {f"{name}/dataloader_idx_{i}" for name in ("val_acc", "val_loss") for i in (0, 1)}
    assert len({float(value) for value in found[0].values()}) == 4


def test_every_validation_on_the_same_data_draws_the_same_chance(make_trainer):
    class Noisy(Blobs):
        def validation_step(self, batch, batch_idx):
            self.log("noise", torch.rand(()))
            super().validation_step(batch, batch_idx)

    found = []

    def look(trainer, module):
        with IsolatedValidation(trainer, module) as validation:
            read = list(validation.read())
            for draws in range(3):
                torch.rand(draws)
                found.append(float(validation.run_on(read).values["noise"]))

    fit(make_trainer, look, Noisy())
    assert len(found) == 3
    assert len(set(found)) == 1


def test_a_kept_callback_sees_every_batch_and_logs(make_trainer):
    class Keeps(Callback):
        noted = ()

        def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
            self.noted += (("start", batch[1].tolist(), batch_idx),)

        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            self.noted += (("end", batch[1].tolist(), batch_idx),)
            self.log("kept", batch[1].float().mean())

    found, kept = [], Keeps()

    def look(trainer, module):
        with IsolatedValidation(trainer, module, ["Keeps"]) as validation:
            for way in (validation.run, lambda: validation.run_on(validation.read())):
                kept.noted = ()
                found.append((float(way().values["kept"]), kept.noted))

    fit(make_trainer, look, callbacks=[kept])
    assert found[0] == found[1]
    assert [(kind, index) for kind, _, index in found[0][1]] == [(x, i) for i in range(4) for x in ("start", "end")]


# ---- batches on their way to the device


class Transfers(Blobs):
    """Augments batches of training on their way, and those of validation by a factor."""

    noted = ()

    def note(self, hook, batch, loader):
        self.noted += ((hook, self.training, self.trainer.state.stage.value, loader),)
        return [batch[0] * 2, batch[1]] if hook == "after" else batch

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return self.note("before", batch, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return self.note("after", batch, dataloader_idx)


def test_each_batch_is_transferred_once_in_a_search_and_in_eval_mode(make_trainer):
    module, found = Transfers(), []

    def search(trainer, module):
        module.noted = ()
        one_level(trainer, module, monitor="val_acc/dataloader_idx_1")
        found.append(module.noted)

    fit(make_trainer, search, module, two_loaders())
    expected = [(hook, False, "validate", loader) for loader in [0] * 4 + [1] * 5 for hook in ("before", "after")]
    assert found == [tuple(expected)]


def test_transferred_batches_are_what_validation_gets(make_trainer):
    found = []

    def compare(trainer, module):
        with IsolatedValidation(trainer, module) as validation:
            once = validation.run_on(list(validation.read())).values
            found.extend((once, validation.run().values))

    fit(make_trainer, compare, Transfers())
    assert torch.equal(found[0]["val_loss"], found[1]["val_loss"])


# ---- data is read once


class Counted(TensorDataset):
    """Counts the samples that were taken."""

    def __init__(self, count):
        super().__init__(*blobs(count, 2).tensors)
        self.taken = 0

    def __getitem__(self, index):
        self.taken += 1
        return super().__getitem__(index)


def searched(make_trainer, loader, module=None, callbacks=(), **options):
    pruning = RouletteWheelPruning(
        **{"branches": 4, "tolerance": 0.1, "refit": None, "tree": Tree(0.2, max_levels=2)} | options
    )
    module = module or Blobs()
    torch.manual_seed(0)
    make_trainer(callbacks=[*callbacks, pruning], max_epochs=1).fit(module, train_loader(), loader)
    return pruning


@pytest.mark.parametrize("validation", [BY_DEFAULT, ON_ALL], ids=["halves", "all"])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_a_search_takes_each_sample_once(make_trainer, batch_size, validation):
    data, before = Counted(200), []
    mark = within("on_train_end", lambda *_: before.append(data.taken))
    pruning = searched(make_trainer, DataLoader(data, batch_size), callbacks=[mark], validation=validation)
    assert len(pruning.report.levels) == 2
    assert data.taken - before[0] == 200


def test_the_rehearsal_takes_a_few_batches(make_trainer):
    data = Counted(200)
    plain, ours = [within("on_train_batch_start", lambda *_: taken.append(data.taken), times=1) for _ in range(2)]
    taken = []
    make_trainer(callbacks=[plain], max_epochs=1).fit(Blobs(), train_loader(), DataLoader(data, 10))
    sanity, data.taken = taken[0], 0
    searched(make_trainer, DataLoader(data, 10), callbacks=[ours])
    assert sanity < taken[1] <= 2 * sanity


@pytest.mark.parametrize("race", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_without_room_to_keep_them_batches_are_read_again_to_the_same_end(make_trainer, share, race):
    size = 192 * (16 * 4 + 8)
    kept, again = (
        searched(
            make_trainer,
            DataLoader(TensorDataset(*blobs(192, 2).tensors), 6),
            validation=Validation(race=race, cache_bytes=cache_bytes),
        )
        for cache_bytes in (size, int(share * size))
    )
    assert len(kept.report.levels) == 2
    assert [kept.mask_at(i) for i in range(3)] == [again.mask_at(i) for i in range(3)]
    assert again.mask == kept.mask
    ours, theirs = (one.report for one in (again, kept))
    for name in ("folds", "validations", "samples", "undivided_because", "monitor", "rank_by", "stop_reason"):
        assert getattr(ours, name) == getattr(theirs, name), name
    numbers = [
        [
            x.dense_score,
            x.held_out_dense,
            x.score,
            *(y for one in x.levels for y in (one.score, one.error, one.held_out_score)),
        ]
        for x in (ours, theirs)
    ]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-6)
    assert [[one.folds for one in level.candidates] for level in ours.levels] == [
        [one.folds for one in level.candidates] for level in theirs.levels
    ]


def test_with_little_room_the_loader_is_read_once_for_each_part_of_a_race(make_trainer):
    data, before = Counted(192), []
    size = 192 * (16 * 4 + 8)
    mark = within("on_train_end", lambda *_: before.append(data.taken))
    three_folds = Validation(cache_bytes=3 * size // 16, confirm=0.25)
    options = {"branches": 12, "tree": Tree(0.2, max_levels=1), "callbacks": [mark], "validation": three_folds}
    pruning = searched(make_trainer, DataLoader(data, 6), **options)
    stages = rungs(12, 12, at_once=3)
    parts = sum(len(rung.parts) for rung in stages)
    judged = sum(rung.entrants * len(rung.parts) for rung in stages)
    assert pruning.report.folds == (12, 4)
    # to deal, and to see what judges; the dense network on the data that ranks, and that confirms; twice each part; the
    # winner on both data, and on all
    most = 2 + 2 + 2 * parts + 2 + 1
    assert (data.taken - before[0]) / 192 <= most < judged


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_are_started_once_for_a_search(make_trainer, tmp_path, persistent):
    def start(worker):
        (tmp_path / f"{worker} {os.getpid()}").touch()

    def search(trainer, module):
        before = len(list(tmp_path.iterdir()))
        one_level(trainer, module, branches=3)
        started.append(len(list(tmp_path.iterdir())) - before)

    started = []
    options = {"num_workers": 2, "worker_init_fn": start, "persistent_workers": persistent}
    fit(make_trainer, search, loaders=val_loader(**options), default_root_dir=None)
    assert started == [0 if persistent else 2]


# ---- validation steps that take from their batch


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
    x, y = torch.utils.data.default_collate(samples)
    return {"x": x, "y": y}


def as_list(samples):
    return torch.utils.data.default_collate(samples)


@pytest.mark.parametrize("collate", [as_dict, as_list])
@pytest.mark.parametrize(("batch_size", "cache_bytes"), [(5, 2**31), (64, 2**31), (5, 4000)])
def test_what_a_validation_step_takes_out_of_a_batch_is_there_for_the_next(
    make_trainer, batch_size, cache_bytes, collate
):
    validation = Validation(cache_bytes=cache_bytes)
    plain = searched(make_trainer, val_loader(batch_size), validation=validation)

    popping = searched(make_trainer, val_loader(batch_size, collate_fn=collate), Pops(), validation=validation)
    assert popping.mask == plain.mask
    assert popping.report.levels == plain.report.levels


@pytest.mark.parametrize(("batch_size", "cache_bytes"), [(5, 2**31), (64, 2**31), (5, 4000), (5, 0)])
def test_what_a_validation_step_writes_into_a_batch_is_not_there_for_the_next(make_trainer, batch_size, cache_bytes):
    validation = Validation(cache_bytes=cache_bytes)
    plain, writing = (
        searched(make_trainer, val_loader(batch_size), module, validation=validation)
        for module in (WritesNot(), Writes())
    )
    assert writing.mask == plain.mask
    assert writing.report.levels == plain.report.levels
    assert writing.report.score == plain.report.score


# ---- outcomes


def recorded(make_trainer, module, monitor, loaders=None, folds=range(16), share=0.6):
    """The scores and outcomes of one candidate."""
    found = []

    def look(trainer, module):
        candidate = PrunedWeights(a_mask(module, share), prunable_parameters(module))
        with IsolatedValidation(trainer, module) as validation:
            evaluate = evaluator_of(trainer, module, validation, judged_by(monitor))
            found.append((evaluate(candidate, folds), *evaluate.recorded(candidate, folds)))

    fit(make_trainer, look, module, loaders)
    return found[0]


class Judged(Blobs):
    """Logs as `judged` what it is given."""

    def __init__(self, metric):
        super().__init__()
        self.metric = metric

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.metric.update(self(batch[0]), batch[1])
        self.log("judged", self.metric)


@pytest.mark.parametrize(("folds", "samples"), [(range(16), 200), (range(8), 100), ([3], 13)])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_an_accuracy_is_known_sample_by_sample(make_trainer, folds, samples, batch_size):
    plain, scores, outcomes = recorded(make_trainer, Blobs(), "val_acc", val_loader(batch_size), folds)
    assert isinstance(outcomes, Singles)
    assert set(outcomes.values.tolist()) <= {0.0, 1.0}
    assert float(outcomes.values.mean()) == pytest.approx(scores.score, abs=1e-6)
    assert scores.score == pytest.approx(plain.score, abs=1e-6)
    assert abs(len(outcomes.values) - samples) <= 3 * (batch_size == 5) * len(folds)
    assert 0 < scores.score <= 1


def test_an_accuracy_in_a_collection_is_known_sample_by_sample(make_trainer):
    class Micro(Collected):
        def __init__(self):
            super().__init__()
            kinds = {"a": MulticlassPrecision(10, average="micro"), "b": MulticlassAccuracy(10, average="micro")}
            self.several = MetricCollection(kinds, prefix="all_")

        def validation_step(self, batch, batch_idx):
            self.several.update(self(batch[0]), batch[1])
            self.log_dict(self.several)

    for name in ("all_a", "all_b"):
        _, scores, outcomes = recorded(make_trainer, Micro(), name)
        assert isinstance(outcomes, Singles)
        assert len(outcomes.values) == 200
        assert float(outcomes.values.mean()) == pytest.approx(scores.score, abs=1e-6)


class Apart(Blobs):
    """A metric for each loader, as Lightning wants it."""

    def __init__(self):
        super().__init__()
        self.each = torch.nn.ModuleList([MulticlassAccuracy(10, average="micro") for _ in range(2)])

    def validation_step(self, batch, batch_idx, dataloader_idx):
        self.each[dataloader_idx](self(batch[0]), batch[1])
        self.log("acc", self.each[dataloader_idx])
        self.log("loss", cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.parametrize("index", [0, 1])
def test_the_samples_are_those_of_the_loader_that_judges(make_trainer, index):
    _, scores, outcomes = recorded(make_trainer, Apart(), f"acc/dataloader_idx_{index}", two_loaders())
    assert len(outcomes.values) == (200, 90)[index]
    assert float(outcomes.values.mean()) == pytest.approx(scores.score, abs=1e-6)
    _, scores, outcomes = recorded(make_trainer, Apart(), f"loss/dataloader_idx_{index}", two_loaders())
    assert int(outcomes.weights.sum()) == (200, 90)[index]
    mean = float((outcomes.values * outcomes.weights).sum() / outcomes.weights.sum())
    assert mean == pytest.approx(scores.score, rel=1e-6)


def test_of_a_metric_that_goes_on_from_loader_to_loader_only_the_first_is_known(make_trainer):
    _, scores, outcomes = recorded(make_trainer, Blobs(), "val_acc/dataloader_idx_0", two_loaders())
    assert len(outcomes.values) == 200
    assert float(outcomes.values.mean()) == pytest.approx(scores.score, abs=1e-6)
    _, scores, outcomes = recorded(make_trainer, Blobs(), "val_acc/dataloader_idx_1", two_loaders())
    assert math.isfinite(scores.score)
    assert outcomes is None


@pytest.mark.parametrize(
    "metric",
    [MulticlassAccuracy(10, average="macro"), MulticlassF1Score(10, average="macro"), MulticlassAUROC(10)],
    ids=["accuracy", "f1", "auroc"],
)
def test_a_metric_that_is_no_mean_is_known_on_resamples(make_trainer, metric):
    _, scores, outcomes = recorded(make_trainer, Judged(metric), "judged")
    assert isinstance(outcomes, Resamples)
    assert outcomes.size == 200
    assert outcomes.score(torch.arange(200)) == pytest.approx(scores.score, abs=1e-6)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_a_number_that_is_logged_is_known_batch_by_batch_and_each_batch_is_of_one_fold(make_trainer, batch_size):
    plain, scores, outcomes = recorded(make_trainer, Blobs(), "val_loss", val_loader(batch_size))
    assert isinstance(outcomes, Batches)
    assert len(outcomes.values) == (40 if batch_size == 5 else 16)
    assert int(outcomes.weights.sum()) == 200
    assert outcomes.weights.max() <= 13
    mean = float((outcomes.values * outcomes.weights).sum() / 200)
    assert mean == pytest.approx(scores.score, rel=1e-6) == pytest.approx(plain.score, rel=1e-6)


def test_a_mean_that_the_module_keeps_is_known_batch_by_batch(make_trainer):
    class Means(Blobs):
        def __init__(self):
            super().__init__()
            self.mean = MeanMetric()

        def validation_step(self, batch, batch_idx):
            self.mean.update(cross_entropy(self(batch[0]), batch[1]), len(batch[1]))
            self.log("mean", self.mean)

    _, scores, outcomes = recorded(make_trainer, Means(), "mean", val_loader(10))
    assert isinstance(outcomes, Batches)
    assert outcomes.weights.tolist() == [10.0] * 20
    assert float(outcomes.values.mean()) == pytest.approx(scores.score, rel=1e-6)


@pytest.mark.parametrize(("kind", "monitor"), [(Forked, "most"), (Forked, "sum")])
def test_of_a_number_that_is_no_mean_over_batches_nothing_more_is_known(make_trainer, kind, monitor):
    _, scores, outcomes = recorded(make_trainer, kind(), monitor)
    assert math.isfinite(scores.score)
    assert outcomes is None


def test_nothing_listens_to_a_metric_after_a_candidate_that_failed(make_trainer):
    class Fails(Blobs):
        armed = False

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if self.armed and batch_idx == 2:
                raise RuntimeError("in a candidate")

    found = []

    def look(trainer, module):
        candidate = PrunedWeights(a_mask(module, 0.5), prunable_parameters(module))
        before, state = dict(vars(module.val_acc)), state_of(trainer, module)
        with pytest.raises(RuntimeError), IsolatedValidation(trainer, module) as validation:  # noqa: PT012
            evaluate = evaluator_of(trainer, module, validation, judged_by("val_acc"))
            evaluate.recorded(candidate, [0])
            module.armed = True
            evaluate.recorded(candidate, range(16))
        module.armed = False
        found.append([name for name in before if vars(module.val_acc)[name] is not before[name]])
        found.append(changed(state, state_of(trainer, module)) - {"module.armed"})
        assert "forward" not in vars(module.val_acc)

    fit(make_trainer, look, Fails())
    assert "update" not in found[0]
    assert found[1] == set()


# ---- a certificate


def certified(make_trainer, samples=400, callbacks=(), module=None, loader=None, **options):
    settings = {"branches": 3, "tolerance": 0.2, "confidence": 0.9, "refit": None, "tree": Tree(0.2, max_levels=3)}
    pruning = RouletteWheelPruning(**settings | options)
    module = module or Blobs()
    torch.manual_seed(0)
    trainer = make_trainer(callbacks=[*callbacks, pruning])
    trainer.fit(module, train_loader(), DataLoader(blobs(samples, 2), 64) if loader is None else loader)
    return pruning, module


def test_a_confidence_gives_a_report_with_a_method_and_p_values(make_trainer):
    pruning, module = certified(make_trainer)
    report = pruning.report
    assert (report.confidence, report.method, report.samples) == (0.9, Method.BETTING, 200)
    judged = [level for level in report.accepted if level.held is not None]
    assert judged
    assert all(0 < level.p_value <= 1 for level in judged)
    assert all(level.held == (level.p_value <= 1 - report.confidence) for level in judged)
    assert report.winner is judged[-1] if judged[-1].held else len(judged) > 1
    assert "With confidence 0.9 the pruned network's true decline is at most 0.2. Exact" in str(report)
    assert pruning.mask == pruning.mask_at(report.winner.level) == Mask.of_nonzeros(prunable_parameters(module))


def test_a_level_that_keeps_the_floor_is_certified_only_where_the_samples_suffice(make_trainer):
    """With so much tolerance all levels hold; with so little the first does not, and no other is asked."""
    held = {
        tolerance: [
            level.held
            for level in certified(make_trainer, tolerance=tolerance, wheel=Wheel(sharpness=4.0))[0].report.accepted
        ]
        for tolerance in (0.9, 0.012)
    }
    assert held[0.9] == [True, True, True]
    assert held[0.012] == [False, None, None]


@pytest.mark.parametrize(("monitor", "method"), [("val_loss", Method.STUDENT), ("judged", Method.BOOTSTRAP)])
def test_other_metrics_have_other_methods(make_trainer, monitor, method):
    class Both(Judged):
        def validation_step(self, batch, batch_idx):
            Blobs.validation_step(self, batch, batch_idx)
            super().validation_step(batch, batch_idx)

    module = Both(MulticlassF1Score(10, average="macro"))
    pruning, _ = certified(make_trainer, module=module, monitor=monitor, tolerance=1.0, tree=Tree(0.2, max_levels=1))
    assert pruning.report.method is method
    assert pruning.report.samples == (200 if method is Method.BOOTSTRAP else 8)
    assert pruning.report.levels[0].p_value is not None
    assert method.value.partition(":")[0] in str(pruning.report)


def test_a_confidence_without_tolerance_is_refused_where_it_is_written():
    with pytest.raises(ValueError, match=r"tolerance is 0.*confidence 0\.9.*no finite sample can certify"):
        RouletteWheelPruning(confidence=0.9)
    with pytest.raises(ValueError, match=r"confirm is 0 and confidence 0\.9"):
        RouletteWheelPruning(confidence=0.9, tolerance=0.1, validation=Validation(confirm=0))
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="confidence is"):
            RouletteWheelPruning(confidence=confidence, tolerance=0.1)


class CountsSteps(Callback):
    steps = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps += 1


@pytest.mark.parametrize(("confirm", "samples"), [(0.5, 200), (0.25, 400), (0.25, 100)])
def test_too_few_samples_are_refused_before_training_with_the_number_needed(make_trainer, confirm, samples):
    steps, needed = CountsSteps(), samples_needed(0.95, 0.02)
    kept, needed_in_all = int(samples * confirm), math.ceil(needed / confirm)
    message = (
        rf"but {kept} held-out samples can certify.*At least {needed}\b.*\b{needed_in_all} validation samples"
    )
    with pytest.raises(RuntimeError, match=message):
        certified(
            make_trainer,
            samples,
            callbacks=[steps],
            tolerance=0.02,
            confidence=0.95,
            validation=Validation(confirm=confirm),
        )
    assert steps.steps == 0


def test_as_many_samples_as_are_needed_are_let_train(make_trainer):
    steps, needed = CountsSteps(), samples_needed(0.95, 0.1)
    options = {"callbacks": [steps], "tolerance": 0.1, "confidence": 0.95, "tree": Tree(0.2, max_levels=1)}
    pruning, _ = certified(make_trainer, 2 * needed, **options)
    assert steps.steps == 16
    assert pruning.report.samples == needed
    with pytest.raises(RuntimeError, match=rf"which {needed - 1} confirmation.*at least {needed}\b"):
        certified(make_trainer, 2 * needed - 2, **options)
    assert steps.steps == 16


def test_samples_that_cannot_be_counted_before_are_counted_by_the_search(make_trainer):
    class Stream60(IterableDataset):
        def __iter__(self):
            return iter(blobs(60, 2))

    with pytest.raises(ValueError, match=r"30 held-out samples can certify no network.*At least 149"):
        certified(make_trainer, loader=DataLoader(Stream60(), 10), tolerance=0.02, confidence=0.95)


class Uneven(Judged):
    """Takes a number for the whole batch beside the samples."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch[:2], batch_idx)


def test_data_that_cannot_be_divided_certifies_nothing_and_the_reason_is_told(make_trainer):
    def with_a_number(samples):
        return [*torch.utils.data.default_collate(samples), torch.tensor(0.5)]

    loader = DataLoader(blobs(400, 2), 100, collate_fn=with_a_number)
    module = Uneven(MulticlassAccuracy(10, average="micro"))
    with pytest.raises(ValueError, match=r"loader 0 gives 4 batches, fewer than 16.*or leave confidence out"):
        certified(make_trainer, loader=loader, module=module)
    pruning, _ = certified(make_trainer, loader=loader, module=module, confidence=None)
    assert pruning.report.folds == (1, 0)
    assert "loader 0 gives 4 batches" in str(pruning.report)
    assert pruning.report.sparsity > 0


# ---- the winner and the levels beyond it


def test_a_file_restores_the_winner_and_the_levels_beyond_it(make_trainer, tmp_path):
    """A tolerance of two in a hundred: some level keeps it on the data that ranks, and not on the other."""
    pruning = beyond = None
    for seed in range(8):
        pruning = RouletteWheelPruning(
            3, tolerance=0.01, tree=Tree(pruning_rate=0.3, max_levels=6), seed=seed, dirpath=tmp_path / str(seed)
        )
        module = Blobs()
        torch.manual_seed(0)
        make_trainer(callbacks=[pruning]).fit(module, train_loader(), val_loader())
        report = pruning.report
        if report.winner and report.winner.level < len(report.accepted):
            beyond = report.accepted[-1].level
            break
    assert beyond is not None
    assert pruning.mask == pruning.mask_at(report.winner.level) == Mask.of_nonzeros(prunable_parameters(module))
    assert sparsity(prunable_parameters(module)) == report.sparsity < report.accepted[-1].sparsity

    again = RouletteWheelPruning(3, tolerance=0.01)
    trainer = make_trainer(callbacks=[again], max_epochs=3)
    trainer.fit(Blobs(), train_loader(), val_loader(), ckpt_path=pruning.best_model_path)
    assert again.report.levels == report.levels
    assert again.mask == pruning.mask
    for level in range(beyond + 1):
        assert again.mask_at(level) == pruning.mask_at(level)
    assert again.mask_at(beyond).survivors == report.accepted[-1].survivors < again.mask.survivors
    with pytest.raises(ValueError, match=f"level is {beyond + 1}"):
        again.mask_at(beyond + 1)
    other = Blobs()
    apply_mask(other, pruning.best_model_path)
    assert Mask.of_nonzeros(prunable_parameters(other)) == pruning.mask


class TimeFirst(Blobs):
    """Its batches have time before samples: rows of theirs mean nothing."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        trend = torch.linspace(0, 1, len(x)).view(-1, 1, 1)
        scores = self((trend * x).sum(0))
        self.log("val_loss", cross_entropy(scores, y[0]))
        self.val_acc(scores, y[0])
        self.log("val_acc", self.val_acc)


def test_batches_that_tell_something_else_when_cut_are_not_cut(make_trainer):
    x, y = val_loader().dataset.tensors
    batches = [(x[part].expand(20, -1, -1), y[part].expand(20, -1)) for part in torch.arange(200).split(25)]
    pruning = RouletteWheelPruning(2, monitor="val_acc", tolerance=1.0, refit=None, tree=Tree(0.2, max_levels=1))
    trainer = make_trainer(callbacks=[pruning], max_epochs=1)
    module = TimeFirst()
    trainer.fit(module, train_loader(), DataLoader(batches, batch_size=None))
    assert pruning.report.folds == (1, 0)
    assert pruning.report.undivided_because == "the module logs other values on regrouped samples"
    said = trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)[0]["val_acc"]
    assert pruning.report.score == pytest.approx(said, abs=1e-6)


def test_loaders_that_are_read_side_by_side_are_dealt_as_one(make_trainer):
    pruning = RouletteWheelPruning(2, monitor="val_loss", tolerance=9.0, refit=None, tree=Tree(0.2, max_levels=1))
    trainer = make_trainer(callbacks=[pruning], max_epochs=1)
    loaders = CombinedLoader({"a": val_loader(10), "b": DataLoader(blobs(90, 3), 5)}, "max_size_cycle")
    trainer.fit(Together(), train_loader(), loaders)
    assert pruning.report.folds == (8, 8)


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


@pytest.mark.parametrize(("size", "cache_bytes"), [(64, 2**31), (10, 2**31), (10, 5000), (10, 0)])
def test_a_step_is_told_which_batch_is_the_last(make_trainer, size, cache_bytes):
    validation = Validation(cache_bytes=cache_bytes)
    pruning = RouletteWheelPruning(2, tolerance=1.0, refit=None, tree=Tree(0.2, max_levels=1), validation=validation)
    trainer, module = make_trainer(callbacks=[pruning], max_epochs=1), Last()
    trainer.fit(module, train_loader(), val_loader(size))
    assert pruning.report.folds == (8, 8)
    assert pruning.report.score == pytest.approx(
        trainer.validate(module, val_loader(size), verbose=False)[0]["val_acc"]
    )
    assert not module.right


class Fixed(Blobs):
    """Takes batches of 25 only."""

    def forward(self, x):
        return super().forward(x + torch.zeros(25, 16))


def test_a_module_that_needs_its_batch_size_is_judged_on_its_batches(make_trainer):
    pruning = RouletteWheelPruning(2, tolerance=1.0, tree=Tree(0.2, max_levels=2))
    trainer = make_trainer(callbacks=[pruning], max_epochs=1)
    trainer.fit(Fixed(), train_loader(batch_size=25), val_loader(batch_size=25))
    assert pruning.report.folds == (1, 0)
    assert pruning.report.undivided_because.startswith(
        "validation fails on regrouped samples (RuntimeError: The size of"
    )
    assert pruning.report.winner.undone == {}
    assert pruning.report.left_alone == {}


class Squeezes(Blobs):
    """Takes any number of samples but one."""

    def forward(self, x):
        scores = super().forward(x)
        assert scores.squeeze().dim() == 2
        return scores


@pytest.mark.parametrize("count", [130, 131])
def test_no_fold_leaves_a_batch_of_one_sample(make_trainer, count):
    pruning = RouletteWheelPruning(2, tolerance=1.0, refit=None, tree=Tree(0.2, max_levels=1))
    loader = DataLoader(blobs(count, 2), 32)
    make_trainer(callbacks=[pruning], max_epochs=1).fit(Squeezes(), train_loader(), loader)
    assert pruning.report.folds == (8, 8)


@dataclass
class Held:
    x: torch.Tensor
    y: torch.Tensor


@dataclass(slots=True)
class Slotted:
    x: torch.Tensor
    y: torch.Tensor


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("kind", [Held, Slotted, Frozen])
def test_batches_may_be_data_classes_of_any_kind(make_trainer, kind, writes):
    class Takes(Blobs):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return batch

        def training_step(self, batch, batch_idx):
            return super().training_step((batch.x, batch.y), batch_idx)

        def validation_step(self, batch, batch_idx):
            super().validation_step((batch.x, batch.y), batch_idx)
            if writes:
                batch.x.zero_()

    def held(rows):
        return kind(*(torch.stack(parts) for parts in zip(*rows, strict=True)))

    pruning = RouletteWheelPruning(2, tolerance=1.0, tree=Tree(0.2, max_levels=1))
    trainer, module = make_trainer(callbacks=[pruning], max_epochs=1), Takes()
    trainer.fit(module, train_loader(collate_fn=held), val_loader(10, collate_fn=held))
    assert pruning.report.folds == (8, 8)
    said = trainer.validate(module, val_loader(10, collate_fn=held), verbose=False)[0]["val_acc"]
    assert pruning.report.score == pytest.approx(said, abs=1e-6)


def test_what_a_validation_step_binds_in_a_batch_object_is_forgotten(make_trainer):
    class Binding(Blobs):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return batch

        def validation_step(self, batch, batch_idx):
            batch.x = batch.x * 0.5
            super().validation_step((batch.x, batch.y), batch_idx)

    def held(rows):
        return Held(*(torch.stack(parts) for parts in zip(*rows, strict=True)))

    x, y = val_loader().dataset.tensors
    pruning = RouletteWheelPruning(3, monitor="val_acc", tolerance=1.0, refit=None, tree=Tree(0.2, max_levels=2))
    trainer, module = make_trainer(callbacks=[pruning], max_epochs=1), Binding()
    trainer.fit(module, train_loader(), val_loader(10, collate_fn=held))
    with torch.no_grad():
        right = (module(0.5 * x).argmax(1) == y).float().mean()
    assert pruning.report.score == pytest.approx(float(right), abs=1e-6)


def test_a_network_that_cannot_be_compared_with_the_dense_one_is_not_an_error(make_trainer):
    class Macro(Blobs):
        def __init__(self):
            super().__init__()
            self.val_acc = MulticlassAccuracy(10)

    pruning = RouletteWheelPruning(3, monitor="val_acc", tolerance=1.0, tree=Tree(0.5, max_levels=3))
    make_trainer(callbacks=[pruning], max_epochs=3).fit(Macro(), train_loader(), val_loader())
    assert len(pruning.report.accepted) == 3
    assert all(level.error >= 0 for level in pruning.report.accepted)
