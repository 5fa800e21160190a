"""The isolated validation: it tells what the Trainer's own would, and leaves no trace."""

from __future__ import annotations

import copy
import itertools
import math
import random
import signal
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, RandomSampler
from torchmetrics import CatMetric, MeanMetric, MetricCollection, MetricTracker
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

from lightning_roulette import Mask, RouletteWheelPruning, Tree, Validation, apply_mask, prunable_parameters
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.trainer import isolation as evaluation
from lightning_roulette.trainer.evaluator import (
    OwnLoop,
    TrainerEvaluator,
    mean_over_processes,
)
from lightning_roulette.trainer.isolation import IsolatedValidation, Logged
from tests.support.callbacks import HOOKS, counting_class, counting_lambdas, within
from tests.support.isolated import ON_ALL, a_mask, evaluator_of, judged_by, one_level, values_of
from tests.support.modules import Blobs, blobs, train_loader, val_loader
from tests.support.state import changed, content, state_of

VAL_BATCHES = 4

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*module.* in eval mode at the start of training.*"),
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled.*"),
]


def by_the_trainers_loop(validation):
    return validation.run


def by_our_loop(validation):
    batches = list(validation.read())
    return lambda: validation.run_on(batches)


both_ways = pytest.mark.parametrize("way", [by_the_trainers_loop, by_our_loop])


def fail_at(module, forward, error):
    """Let the module's network raise at one forward pass, counted from here on."""
    calls = itertools.count(1)

    def count(*_):
        if next(calls) == forward:
            raise error

    module.net.register_forward_pre_hook(count)


# ---- everything is as before


class Restless(Blobs):
    """Its validation changes all that a validation may change."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.still = nn.Dropout(0.5).eval()
        self.register_buffer("counted", torch.zeros(1))
        self.register_buffer("rebound", torch.zeros(1))
        self.losses = CatMetric()
        self.pair = MetricCollection({"precision": MulticlassPrecision(10), "recall": MulticlassRecall(10)})
        self.train_acc = MulticlassAccuracy(10)

    def forward(self, x):
        return self.net(self.still(self.norm(x)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.train_acc(self(x), y)
        self.log("train_acc", self.train_acc, on_step=True, on_epoch=True, prog_bar=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.norm.train()
        super().validation_step(batch, batch_idx)
        x, y = batch
        scores = self(x)
        self.counted += 1
        self.rebound = self.rebound + torch.rand(1) + np.random.rand() + random.random()  # noqa: NPY002
        self.losses.update(cross_entropy(scores, y))
        self.pair.update(scores, y)


def shuffled_loader(**options):
    """A loader with chance of its own."""
    return DataLoader(blobs(200, 2), 64, shuffle=True, generator=torch.Generator().manual_seed(3), **options)


def observers(folder):
    """Callbacks that hold what they saw of validation."""
    return [
        EarlyStopping("val_acc", mode="max", patience=50),
        ModelCheckpoint(folder / "files", monitor="val_acc", mode="max", save_top_k=2),
        LearningRateMonitor(),
    ]


def one_run(trainer, module):
    """One validation by the Trainer's loop."""
    with IsolatedValidation(trainer, module) as validation:
        return validation.run()


@pytest.mark.parametrize("sanity_steps", [0, 1])
@pytest.mark.parametrize("hook", HOOKS)
def test_everything_is_as_before_after_a_search(hook, sanity_steps, make_trainer, tmp_path):
    found = []

    def compare(trainer, module):
        for ours in (one_level, one_run):
            before = state_of(trainer, module)
            ours(trainer, module)
            found.append(changed(before, state_of(trainer, module)))

    make_trainer(
        callbacks=[within(hook, compare), *observers(tmp_path)],
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        enable_checkpointing=True,
        profiler="simple",
        num_sanity_val_steps=sanity_steps,
    ).fit(Restless(), train_loader(), shuffled_loader())
    assert found
    assert not set().union(*found)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("error", [RuntimeError("candidate 7"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_end"])
def test_everything_is_as_before_when_candidate_7_fails(hook, error, workers, make_trainer):
    found = []

    def compare(trainer, module):
        # two passes a batch; first twice one batch that shows what is logged, and the dense network
        fail_at(module, 2 * (2 + 7 * VAL_BATCHES + 2), error)
        before = state_of(trainer, module)
        with pytest.raises(type(error)):
            one_level(trainer, module, branches=10, how=ON_ALL)
        found.append(changed(before, state_of(trainer, module)))

    loader = shuffled_loader(num_workers=workers)
    make_trainer(callbacks=[within(hook, compare)], max_epochs=1).fit(Restless(), train_loader(), loader)
    assert found == [set()]


# the first time at the start of reading, the second at its end, then at the start of each validation, last at the end
@pytest.mark.parametrize("which", [1, 2, 3, -1])
def test_everything_is_as_before_when_ctrl_c_arrives_while_things_are_given_back(which, make_trainer, monkeypatch):
    found, calls, original = [], [], evaluation._set_rng_states

    def interrupted(states, nth):
        calls.append(1)
        if len(calls) == nth:
            raise KeyboardInterrupt
        original(states)

    def compare(trainer, module):
        before = state_of(trainer, module)
        monkeypatch.setattr(evaluation, "_set_rng_states", partial(interrupted, nth=0))
        one_level(trainer, module)
        nth = which % (len(calls) + 1)
        calls.clear()
        monkeypatch.setattr(evaluation, "_set_rng_states", partial(interrupted, nth=nth))
        with pytest.raises(KeyboardInterrupt):
            one_level(trainer, module)
        found.append(changed(before, state_of(trainer, module)))

    make_trainer(callbacks=[within("on_train_end", compare)]).fit(Restless(), train_loader(), val_loader())
    assert len(calls) > 3 or which in (1, 2, 3)
    assert found == [set()]


def test_everything_is_as_before_when_a_session_cannot_begin(make_trainer, monkeypatch):
    found = []

    def compare(trainer, module):
        monkeypatch.setattr(evaluation, "_swapped", broken_after_five(evaluation._swapped))
        before = state_of(trainer, module)
        with pytest.raises(RuntimeError, match="sixth"):
            one_level(trainer, module)
        found.append(changed(before, state_of(trainer, module)))

    def broken_after_five(original):
        calls = itertools.count(1)

        def swapped(*arguments):
            if next(calls) == 6:
                raise RuntimeError("sixth")
            return original(*arguments)

        return swapped

    make_trainer(callbacks=[within("on_train_end", compare)]).fit(Restless(), train_loader(), val_loader())
    assert found == [set()]


def test_everything_is_as_before_when_there_are_no_loaders_to_be_had(make_trainer):
    class Reluctant(LightningDataModule):
        def train_dataloader(self):
            return train_loader()

        def val_dataloader(self):
            if not found:
                raise RuntimeError("not yet")
            return val_loader()

    found = []

    def compare(trainer, module):
        before = state_of(trainer, module)
        with pytest.raises(RuntimeError, match="not yet"):
            one_level(trainer, module)
        found.append(changed(before, state_of(trainer, module)))

    callbacks = [within("on_train_batch_end", compare, times=1)]
    trainer = make_trainer(callbacks=callbacks, check_val_every_n_epoch=2, num_sanity_val_steps=0)
    trainer.fit(Restless(), datamodule=Reluctant())
    assert found == [set()]


@both_ways
@pytest.mark.parametrize("name", ["should_stop", "_last_val_time"])
def test_what_a_candidate_sets_on_the_trainer_is_undone(name, way, make_trainer):
    found = []

    def compare(trainer, module):
        before = getattr(trainer, name, None)
        with IsolatedValidation(trainer, module) as validation:
            way(validation)()
            setattr(trainer, name, True)
        found.append((before, getattr(trainer, name, None)))

    make_trainer(callbacks=[within("on_train_epoch_end", compare)]).fit(Blobs(), train_loader(), val_loader())
    assert len(found) == 2
    assert all(before == after and after is not True for before, after in found)


@pytest.mark.parametrize("hook", HOOKS)
def test_limits_of_the_loader_are_given_back(hook, make_trainer):
    found = []

    def compare(trainer, module):
        combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
        before = combined.limits
        with IsolatedValidation(trainer, module) as validation:
            validation.run(max_batches=1)
        found.append((before, combined.limits, trainer.num_val_batches))

    make_trainer(callbacks=[within(hook, compare)]).fit(Blobs(), train_loader(), val_loader())
    assert found
    assert all(before == after and batches == [VAL_BATCHES] for before, after, batches in found)


def test_a_buffer_that_validation_makes_is_taken_away(make_trainer):
    class Late(Blobs):
        def __init__(self):
            super().__init__()
            self.register_buffer("late", None)

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.late = torch.ones(1)
            self.register_buffer("new", torch.ones(1))

    found = []

    def compare(trainer, module):
        one_level(trainer, module)
        found.append((module.late, "new" in module.state_dict()))

    trainer = make_trainer(callbacks=[within("on_train_start", compare)], num_sanity_val_steps=0)
    trainer.fit(Late(), train_loader(), val_loader())
    assert found == [(None, False)]


def test_a_metric_tracker_counts_no_candidate(make_trainer):
    class Tracking(Blobs):
        def __init__(self):
            super().__init__()
            self.tracker = MetricTracker(MulticlassAccuracy(10))

        def on_validation_epoch_start(self):
            self.tracker.increment()

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.tracker.update(self(batch[0]), batch[1])

    module, searched = Tracking(), []
    search_now = within("on_validation_end", lambda *both: searched.append(one_level(*both)))
    make_trainer(callbacks=[search_now], num_sanity_val_steps=0).fit(module, train_loader(), val_loader())
    assert len(searched) == module.tracker.n_steps == 2


def test_a_sampler_stays_at_its_epoch(make_trainer):
    class Epochs(RandomSampler):
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

    sampler, found = Epochs(blobs(200, 2)), []

    def compare(trainer, module):
        before = sampler.epoch
        one_level(trainer, module)
        found.append((before, sampler.epoch))

    loader = DataLoader(blobs(200, 2), 64, sampler=sampler)
    make_trainer(callbacks=[within("on_train_epoch_end", compare)]).fit(Blobs(), train_loader(), loader)
    assert found == [(0, 0), (1, 1)]


@pytest.mark.parametrize("every", [1, 2])
def test_chance_of_a_loader_not_yet_used_is_given_back(every, make_trainer):
    loader, found = shuffled_loader(), []

    def compare(trainer, module):
        before = loader.generator.get_state()
        one_level(trainer, module)
        found.append(torch.equal(before, loader.generator.get_state()))

    callbacks = [within("on_train_start", compare)]
    trainer = make_trainer(callbacks=callbacks, num_sanity_val_steps=0, check_val_every_n_epoch=every)
    trainer.fit(Blobs(), train_loader(), loader)
    assert found == [True]


@pytest.mark.parametrize("hook", HOOKS)
def test_new_loaders_are_asked_for_by_the_trainers_own_validation_alone(hook, make_trainer):
    class Data(LightningDataModule):
        asked = 0

        def train_dataloader(self):
            return train_loader()

        def val_dataloader(self):
            self.asked += 1
            return val_loader()

    plain, searched = Data(), Data()
    for data, callbacks in ((plain, []), (searched, [within(hook, one_level)])):
        make_trainer(callbacks=callbacks, reload_dataloaders_every_n_epochs=1).fit(Blobs(), data)
    assert searched.asked == plain.asked == 2


@pytest.mark.slow
def test_persistent_workers_outlive_a_session(make_trainer):
    loader, found = val_loader(num_workers=2, persistent_workers=True), []

    def workers():
        return [worker.pid for worker in loader._iterator._workers if worker.is_alive()]

    def compare(trainer, module):
        before = workers()
        one_level(trainer, module)
        found.append((before, workers()))

    make_trainer(callbacks=[within("on_train_epoch_end", compare)]).fit(Blobs(), train_loader(), loader)
    (first, second), later = found[0], found[1]
    assert len(first) == 2
    assert first == second == later[0] == later[1]


# ---- as others see a failed search


class Witness(Callback):
    """Notes what training left before the search and what an exception finds, and saves a checkpoint then."""

    def __init__(self, failing, path):
        self.failing, self.path = failing, path

    def on_train_end(self, trainer, module):
        self.trained = {name: value.clone() for name, value in module.state_dict().items()}
        self.callbacks, self.loggers = list(trainer.callbacks), list(trainer.loggers)
        self.connector, self.loop = trainer._logger_connector, trainer.fit_loop.epoch_loop.val_loop
        # first four times one batch, which tell what judges and whether it sees the weights, and the dense network
        fail_at(module, 4 + 7 * VAL_BATCHES + 2, self.failing)

    def on_exception(self, trainer, module, exception):
        trainer.save_checkpoint(self.path, weights_only=False)
        self.seen = type(exception)
        self.intact = all(torch.equal(value, self.trained[name]) for name, value in module.state_dict().items())
        self.stage = trainer.state.stage.value
        self.others = [
            trainer.callbacks == self.callbacks,
            trainer.loggers == self.loggers,
            trainer._logger_connector is self.connector,
            trainer.fit_loop.epoch_loop.val_loop is self.loop,
        ]


@pytest.fixture
def keep_ctrl_c():
    """Lightning ignores Ctrl-C for good once it has seen one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("keep_ctrl_c")
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("error", "raised"), [(RuntimeError("candidate 7"), RuntimeError), (KeyboardInterrupt(), SystemExit)]
)
def test_other_callbacks_find_the_trained_network_when_candidate_7_fails(
    error, raised, workers, make_trainer, tmp_path
):
    witness = Witness(error, tmp_path / "rescued.ckpt")
    callbacks = [witness, RouletteWheelPruning(branches=10, seed=3, validation=ON_ALL)]
    trainer = make_trainer(callbacks=callbacks, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    with pytest.raises(raised):
        trainer.fit(Blobs(), train_loader(), val_loader(num_workers=workers))
    assert witness.seen is type(error)
    assert witness.intact
    assert witness.stage == "train"
    assert all(witness.others)
    rescued = torch.load(witness.path, weights_only=True)["state_dict"]
    assert rescued.keys() == witness.trained.keys()
    assert all(torch.equal(value, witness.trained[name]) for name, value in rescued.items())


# ---- scores


class Bare(Blobs):
    """Without biases; with a metric that nobody resets."""

    def __init__(self):
        super().__init__()
        self.net[0].bias = self.net[2].bias = None
        self.held = MeanMetric()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)
        self.held.update(cross_entropy(self(batch[0]), batch[1]))

    def on_validation_epoch_end(self):
        self.log("held", self.held.compute())


@pytest.mark.parametrize("averaged", [False, True], ids=["", "averaged"])
@pytest.mark.parametrize("monitor", ["val_loss", "held"])
@pytest.mark.parametrize("hook", HOOKS)
def test_an_all_zero_candidate_scores_what_an_all_zero_network_scores(hook, monitor, averaged, make_trainer):
    found = []

    def score(trainer, module):
        found.extend(values_of(trainer, module, a_mask(module, 0.0), monitor, times=2))

    others = [EMAWeightAveraging(decay=0.5)] if averaged else []
    make_trainer(callbacks=[within(hook, score), *others]).fit(Bare(), train_loader(), val_loader())
    assert len(found) >= 2
    assert found == pytest.approx([math.log(10)] * len(found), abs=1e-6)
    assert len(set(found)) == 1


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("monitor", ["val_loss", "val_acc", "held"])
def test_a_candidate_scores_what_validate_says_of_a_masked_copy(monitor, share, make_trainer):
    found, module = [], Bare()

    def score(trainer, module):
        copy, mask = Bare(), a_mask(module, share)
        copy.load_state_dict(module.state_dict())
        apply_mask(copy, mask)
        (expected,) = make_trainer().validate(copy, loader, verbose=False)
        found.append((values_of(trainer, module, mask, monitor)[0], expected[monitor]))

    loader = val_loader(batch_size=11)  # so many batches are not cut anew: every sum is in the same order
    make_trainer(callbacks=[within("on_train_end", score)]).fit(module, train_loader(), loader)
    ((ours, expected),) = found
    assert ours == expected


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (judged_by("val_acc"), lambda accuracy, loss: (accuracy, accuracy, accuracy)),
        (judged_by("val_acc", "min"), lambda accuracy, loss: (-accuracy, -accuracy, -accuracy)),
        (judged_by("val_acc", loss="val_loss"), lambda accuracy, loss: (accuracy, accuracy, -loss)),
        (
            judged_by("val_acc", loss="val_loss", rank_by="val_loss", rank_mode="min"),
            lambda accuracy, loss: (-loss, accuracy, accuracy),
        ),
    ],
)
def test_larger_scores_are_better_and_a_loss_ranks_or_breaks_ties(metric, expected, make_trainer):
    found = []

    def score(trainer, module):
        mask = a_mask(module, 0.7)
        with IsolatedValidation(trainer, module) as validation:
            evaluate = evaluator_of(trainer, module, validation, metric)
            candidate = PrunedWeights(mask, prunable_parameters(module))
            found.append(evaluate(candidate, range(evaluate.folds)))
        found.extend(values_of(trainer, module, mask, name)[0] for name in ("val_acc", "val_loss"))

    make_trainer(callbacks=[within("on_train_end", score)]).fit(Blobs(), train_loader(), val_loader())
    scores, accuracy, loss = found
    assert 0 < accuracy < loss
    assert (scores.rank, scores.score, scores.tiebreak) == expected(accuracy, loss)


@pytest.mark.parametrize("cache_bytes", [2**31, 0])
def test_equal_weights_score_equally_on_shuffled_and_limited_data(cache_bytes, make_trainer):
    found = []

    def score(trainer, module):
        found.append(values_of(trainer, module, a_mask(module, 0.5), "val_loss", times=3, cache_bytes=cache_bytes))

    for loader in (shuffled_loader(), val_loader(shuffle=True)):
        trainer = make_trainer(callbacks=[within("on_train_end", score)], limit_val_batches=2)
        trainer.fit(Blobs(), train_loader(), loader)
    assert [len(set(scores)) for scores in found] == [1, 1]


def test_a_candidate_does_not_find_what_the_one_before_did_to_buffers(make_trainer):
    class Drifting(Blobs):
        def __init__(self):
            super().__init__()
            self.register_buffer("drift", torch.zeros(()))

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.drift += 1
            self.log("drift", self.drift)

    found = []

    def score(trainer, module):
        found.append(values_of(trainer, module, a_mask(module, 0.5), "drift", times=3))

    make_trainer(callbacks=[within("on_train_end", score)]).fit(Drifting(), train_loader(), val_loader())
    assert len(found) == 1
    assert len(set(found[0])) == 1


def by_our_loop_reading_anew(validation):
    return lambda: validation.run_on(validation.read())


@pytest.mark.parametrize("way", [by_the_trainers_loop, by_our_loop, by_our_loop_reading_anew])
def test_chance_drawn_between_candidates_does_not_change_their_data(way, make_trainer):
    found = []

    def score(trainer, module):
        with IsolatedValidation(trainer, module) as validation:
            validate = way(validation)
            for draws in range(3):
                found.append(float(validate().values["val_loss"]))
                torch.rand(draws + 1)
                trainer.val_dataloaders.generator.manual_seed(draws)

    trainer = make_trainer(callbacks=[within("on_train_end", score)], limit_val_batches=2)
    trainer.fit(Blobs(), train_loader(), shuffled_loader())
    assert len(found) == 3
    assert len(set(found)) == 1


def test_at_most_so_many_batches_of_each_loader_are_validated(make_trainer):
    class Counting(Blobs):
        seen = ()

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)
            self.seen += ((dataloader_idx, batch_idx),)

    found = []

    def count(trainer, module):
        with IsolatedValidation(trainer, module) as validation:
            for most in (1, 3, math.inf):
                module.seen = ()
                validation.run(most)
                found.append(module.seen)

    loaders = [val_loader(), val_loader(batch_size=100)]
    make_trainer(callbacks=[within("on_train_end", count)]).fit(Counting(), train_loader(), loaders)
    one, three, every = found
    assert one == ((0, 0), (1, 0))
    assert three == ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))
    assert every == ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1))


@pytest.mark.parametrize("start", ["on_validation_model_eval", "on_validation_start", "on_validation_epoch_start"])
def test_a_module_that_validates_other_weights_than_its_own_is_refused(start, make_trainer):
    """Averaging by hand: every candidate would score as the average does, and the search would prune everything."""

    class Averaging(Blobs):
        def swap(self):
            now = {name: value.clone() for name, value in self.net.state_dict().items()}
            self.net.load_state_dict(self.average)
            self.average = now

        def on_fit_start(self):
            self.average = {name: value.clone() for name, value in self.net.state_dict().items()}

        def on_validation_end(self):
            self.swap()

    def begin(self):
        Blobs.on_validation_model_eval(self)
        self.swap()

    setattr(Averaging, start, begin)
    pruning = RouletteWheelPruning(2, monitor="val_acc", tolerance=0.1)
    with pytest.raises(RuntimeError, match="weights"):
        make_trainer(callbacks=[pruning]).fit(Averaging(), train_loader(), val_loader())


def test_a_module_that_validates_another_network_than_it_trains_is_refused(make_trainer):
    """A mean teacher: no candidate would change the score, and the search would prune everything."""

    class Teaching(Blobs):
        def __init__(self):
            super().__init__()
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

        def forward(self, x):
            return (self.net if self.training else self.teacher)(x)

    pruning = RouletteWheelPruning(2, monitor="val_acc", tolerance=0.1)
    with pytest.raises(RuntimeError, match="weights"):
        make_trainer(callbacks=[pruning]).fit(Teaching(), train_loader(), val_loader())


@both_ways
def test_what_one_candidate_logged_is_not_taken_for_the_next(way, make_trainer):
    class Once(Blobs):
        once = True

        def on_validation_epoch_end(self):
            if self.once:
                self.log("only_once", 1.0)

    found = []

    def names(trainer, module):
        with IsolatedValidation(trainer, module) as validation:
            validate = way(validation)
            for module.once in (True, False):
                found.append(set(validate().values))

    make_trainer(callbacks=[within("on_train_end", names)]).fit(Once(), train_loader(), val_loader())
    assert found == [{"val_loss", "val_acc", "only_once"}, {"val_loss", "val_acc"}]


@both_ways
def test_a_validation_that_failed_does_not_colour_the_next(way, make_trainer):
    found = []

    def score(trainer, module):
        with IsolatedValidation(trainer, module) as validation:
            validate = way(validation)
            found.append({name: float(value) for name, value in validate().values.items()})
            fail_at(module, 3, ValueError())
            with pytest.raises(ValueError):
                validate()
            found.append({name: float(value) for name, value in validate().values.items()})

    make_trainer(callbacks=[within("on_train_end", score)]).fit(Blobs(), train_loader(), val_loader())
    before, after = found
    assert before == after


@both_ways
def test_what_a_validation_logged_is_not_overwritten_by_the_next(way, make_trainer):
    found = []

    def score(trainer, module):
        with IsolatedValidation(trainer, module) as validation:
            validate = way(validation)
            first = validate()
            before = {name: float(value) for name, value in first.values.items()}
            with torch.no_grad():
                module.net[0].weight.zero_()
            validate()
            found.append((before, {name: float(value) for name, value in first.values.items()}))

    make_trainer(callbacks=[within("on_train_end", score)]).fit(Blobs(), train_loader(), val_loader())
    ((before, after),) = found
    assert before == after


class Schedules(Blobs):
    """Steps its scheduler when a validation ends."""

    tensor = False

    def configure_optimizers(self):
        rate = torch.tensor(0.1) if self.tensor else 0.1
        optimizer = torch.optim.SGD(self.parameters(), rate)
        halves, decays = (
            torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        )
        chained = torch.optim.lr_scheduler.SequentialLR(optimizer, [halves, decays], [3])
        return [optimizer], [chained]

    def on_validation_epoch_end(self):
        self.trainer.optimizers[0].param_groups[0]["momentum"] += 0.125
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer.lr_scheduler_configs[0].scheduler.step()


@pytest.mark.parametrize("tensor", [False, True])
def test_learning_rates_that_a_validation_changes_are_given_back(make_trainer, tensor):
    def states(trainer):
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        group = {name: one for name, one in trainer.optimizers[0].param_groups[0].items() if name != "params"}
        return copy.deepcopy([scheduler.state_dict(), [one.state_dict() for one in scheduler._schedulers], group])

    def act(trainer, module):
        kept = id(trainer.optimizers[0].param_groups[0]["lr"])
        with IsolatedValidation(trainer, module) as validation:
            before = states(trainer)
            for way in (validation.run, lambda: validation.run_on(list(validation.read()))):
                way()
                assert str(states(trainer)) == str(before)
        assert str(states(trainer)) == str(before)
        assert not tensor or id(trainer.optimizers[0].param_groups[0]["lr"]) == kept
        seen.append(before)

    seen, module = [], Schedules()
    module.tensor = tensor
    make_trainer(callbacks=[within("on_train_end", act)], max_epochs=2).fit(module, train_loader(), val_loader())
    assert len(seen) == 1


class Reads(Blobs):
    """Reads in a validation what training has logged, and what it was told."""

    def __init__(self):
        super().__init__()
        self.read = []

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.read.append(float(self.trainer.callback_metrics["train_loss"]))
            self.trainer.callback_metrics["put"] = torch.tensor(2.0)
            self.log("gap", self.trainer.callback_metrics["train_loss"] - self.trainer.callback_metrics["val_loss"])


def test_a_validation_may_read_what_training_logged(make_trainer):
    def act(trainer, module):
        before = dict(trainer.callback_metrics)
        with IsolatedValidation(trainer, module) as validation:
            for way in (validation.run, lambda: validation.run_on(list(validation.read()))):
                logged.append(way())
        assert dict(trainer.callback_metrics) == before

    logged, module = [], Reads()
    acts = [within(hook, act) for hook in ("on_train_start", "on_train_end")]
    make_trainer(callbacks=acts, max_epochs=1).fit(module, train_loader(), val_loader())
    assert all(one.values.keys() == {"val_loss", "val_acc", "gap", "put"} for one in logged)
    first, *_, last = module.read
    assert math.isnan(first)  # nothing was trained yet
    assert not math.isnan(last)
    assert logged[-1].values["gap"] == pytest.approx(last - float(logged[-1].values["val_loss"]), abs=1e-6)


def test_a_metric_that_training_did_not_log_is_missing_as_ever(make_trainer):
    class Asks(Blobs):
        asks = False

        def on_validation_epoch_end(self):
            if self.asks:
                self.trainer.callback_metrics["no such thing"]

    def act(trainer, module):
        module.asks = True
        with IsolatedValidation(trainer, module) as validation, pytest.raises(KeyError, match="no such thing"):
            validation.run()
        seen.append(True)

    seen = []
    make_trainer(callbacks=[within("on_train_end", act)], max_epochs=1).fit(Asks(), train_loader(), val_loader())
    assert seen == [True]


# ---- training goes on as before


def test_the_next_epoch_trains_in_train_mode_and_frozen_parts_stay_in_eval_mode(make_trainer):
    modes = []

    class Modes(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            modes.append({name: part.training for name, part in module.named_modules()})

    make_trainer(callbacks=[within("on_validation_end", one_level), Modes()], val_check_interval=0.5).fit(
        Restless(), train_loader(), val_loader()
    )
    assert len(modes) == 16
    assert all(mode[""] and mode["norm"] and mode["net.0"] and not mode["still"] for mode in modes)


def test_candidates_are_validated_in_eval_mode_and_without_gradients_as_within_fit(make_trainer):
    found = []

    class Noting(Blobs):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            modes = (self.training, self.net.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            found.append((modes, self.trainer.state.fn.value, self.trainer.state.stage.value))

    search = within("on_train_batch_end", partial(one_level, how=ON_ALL))
    make_trainer(callbacks=[search], num_sanity_val_steps=0).fit(Noting(), train_loader(), val_loader())
    # three searches: once all, once one batch and once one fold to see what is logged, the dense network, two
    # candidates, the winner; two epochs
    assert len(found) == 3 * (2 + 5 * VAL_BATCHES) + 2 * VAL_BATCHES
    assert set(found) == {((False,) * 4, "fit", "validate")}


def test_gradients_and_optimizer_states_are_left_alone(make_trainer):
    found = []

    def compare(trainer, module):
        def now():
            state = trainer.optimizers[0].state_dict()["state"]
            return content([parameter.grad for parameter in module.parameters()]), content(state)

        before = now()
        one_level(trainer, module)
        found.append((before, now()))

    make_trainer(callbacks=[within("on_train_batch_end", compare)], accumulate_grad_batches=3).fit(
        Blobs(), train_loader(), val_loader()
    )
    assert len(found) == 3
    assert all(before == after for before, after in found)
    assert any(gradient is not None for gradient in found[0][0][0])


# ---- nobody is told


@pytest.mark.parametrize("kind", [counting_class, counting_lambdas])
@pytest.mark.parametrize("hook", HOOKS)
def test_no_hook_of_another_callback_is_called_for_a_candidate(hook, kind, make_trainer):
    called, during = [], []

    def compare(trainer, module):
        before = len(called)
        one_level(trainer, module)
        during.append(called[before:])

    make_trainer(callbacks=[kind(called.append), within(hook, compare)]).fit(Blobs(), train_loader(), val_loader())
    assert "on_validation_epoch_end" in called
    assert during
    assert not any(during)


class Recorder(Logger):
    """Keeps every call, also those of an `experiment` that people write to directly."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    name = "recorder"
    version = 0
    save_dir = "somewhere"

    @property
    def experiment(self):
        return SimpleNamespace(add_scalar=lambda *point: self.calls.append(("add_scalar", point)))

    def log_metrics(self, metrics, step=None):
        self.calls.append(("log_metrics", metrics))

    def log_hyperparams(self, *_, **__):
        self.calls.append(("log_hyperparams", None))

    def save(self):
        self.calls.append(("save", None))

    def finalize(self, status):
        self.calls.append(("finalize", status))


class Talkative(Blobs):
    """Writes to its logger in every way there is, and asks it where it writes."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("on_each_step", 1.0, on_step=True)
        self.logger.log_metrics({"mine": 1.0})
        self.logger.experiment.add_scalar("mine", 1.0)
        self.loggers[1].log_hyperparams({})
        assert self.logger.save_dir == "somewhere"


@pytest.mark.parametrize("hook", HOOKS)
def test_no_logger_gets_a_point_from_a_candidate(hook, make_trainer):
    calls, during = [], []

    def compare(trainer, module):
        before = len(calls)
        one_level(trainer, module)
        during.append(calls[before:])

    loggers = [Recorder(calls), Recorder(calls)]
    make_trainer(callbacks=[within(hook, compare)], logger=loggers, log_every_n_steps=1).fit(
        Talkative(), train_loader(), val_loader()
    )
    assert {name for name, _ in calls} >= {"log_metrics", "add_scalar", "log_hyperparams", "save"}
    assert during
    assert not any(during)


class Plateau(Blobs):
    """Its learning rate falls as soon as `val_acc` does not rise."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_acc"}}


def test_ruinous_candidates_stop_nothing_save_nothing_and_slow_nothing(make_trainer, tmp_path):
    stopping = EarlyStopping("val_acc", mode="max", patience=1)
    saving = ModelCheckpoint(tmp_path / "files", monitor="val_acc", mode="max", save_top_k=2, save_last=True)
    found = []

    def judge(trainer, module):
        def now():
            return (
                (stopping.wait_count, stopping.best_score, trainer.should_stop),
                (saving.best_model_score, saving.best_model_path, saving.kth_best_model_path),
                dict(saving.best_k_models),
                sorted(path.name for path in tmp_path.glob("files/*")),
                (trainer.optimizers[0].param_groups[0]["lr"], trainer.lr_scheduler_configs[0].scheduler.state_dict()),
            )

        before = now()
        values_of(trainer, module, a_mask(module, 0.0), "val_acc", times=5)
        found.append((before, now()))

    pruning = [within(hook, judge) for hook in ("on_validation_end", "on_train_epoch_end", "on_train_end")]
    trainer = make_trainer(callbacks=[*pruning, stopping, saving], enable_checkpointing=True, max_epochs=3)
    trainer.fit(Plateau(), train_loader(), val_loader())
    assert len(found) == 7
    assert all(before == after for before, after in found)
    assert any(before[1][1] for before, _ in found)


@pytest.mark.parametrize("which", ["callback_metrics", "logged_metrics", "progress_bar_metrics"])
def test_metrics_of_the_trainer_are_those_of_its_own_validation(which, make_trainer):
    found = []

    def compare(trainer, module):
        before = {name: float(value) for name, value in getattr(trainer, which).items()}
        values_of(trainer, module, a_mask(module, 0.0), "val_acc")
        found.append((before, {name: float(value) for name, value in getattr(trainer, which).items()}))

    class Shown(Blobs):
        def on_validation_epoch_end(self):
            self.log("shown", self.net[0].weight.norm(), prog_bar=True)

    make_trainer(callbacks=[within("on_train_epoch_end", compare)], logger=Recorder([])).fit(
        Shown(), train_loader(), val_loader()
    )
    assert len(found) == 2
    assert all(before == after and "shown" in before for before, after in found)


# ---- callbacks that stay


class LogsMargin(Callback):
    """Logs a metric that only it knows."""

    def on_validation_epoch_end(self, trainer, module):
        self.log("margin", module.net[0].weight.abs().sum())


@both_ways
@pytest.mark.parametrize(("kept", "there"), [([], False), (["LogsMargin"], True), (["EarlyStopping"], False)])
def test_a_metric_of_a_callback_is_there_only_if_the_callback_is_kept(kept, there, way, make_trainer):
    found = []

    def look(trainer, module):
        with IsolatedValidation(trainer, module, kept) as validation:
            found.append("margin" in way(validation)().values)

    callbacks = [LogsMargin(), EarlyStopping("val_acc", mode="max"), within("on_train_end", look)]
    make_trainer(callbacks=callbacks).fit(Blobs(), train_loader(), val_loader())
    assert found == [there]


def test_a_kept_callback_is_the_users_own_object_and_sees_the_candidate(make_trainer):
    found = []

    def look(trainer, module):
        mask = Mask({"net.0.weight": torch.zeros(24, 16, dtype=torch.bool)})
        weights = {"net.0.weight": module.net[0].weight}
        with IsolatedValidation(trainer, module, ["LogsMargin"]) as validation:
            assert kept in trainer.callbacks
            evaluate = evaluator_of(trainer, module, validation, judged_by("margin"), weights)
            found.append(evaluate(PrunedWeights(mask, weights), [0]).rank)

    kept = LogsMargin()
    make_trainer(callbacks=[kept, within("on_train_end", look)]).fit(Blobs(), train_loader(), val_loader())
    assert found == [0.0]


def test_a_search_by_a_metric_of_a_callback_needs_the_callback_kept(make_trainer):
    def fit(validation):
        pruning = RouletteWheelPruning(
            2, monitor="margin", mode="max", tolerance=1e6, tree=Tree(0.2, max_levels=1), validation=validation
        )
        make_trainer(callbacks=[LogsMargin(), pruning]).fit(Blobs(), train_loader(), val_loader())
        return pruning.report

    with pytest.raises(RuntimeError, match=r"watches 'margin'.*keep_callbacks=\['LogsMargin'\]"):
        fit(Validation())
    assert fit(Validation(keep_callbacks=["LogsMargin"])).monitor == "margin"


@both_ways
def test_muted_callbacks_and_loggers_still_tell_what_they_are(way, make_trainer, tmp_path):
    found = []

    class Slotted(Callback):
        __slots__ = ("calls",)

        def on_validation_end(self, trainer, module):
            raise AssertionError("a hook was called")

    def look(trainer, module):
        outside = [type(one).__name__ for one in trainer.callbacks], trainer.logger.log_dir
        with IsolatedValidation(trainer, module) as validation:
            way(validation)()
            inside = [type(one).__name__ for one in trainer.callbacks], trainer.logger.log_dir
            found.append((outside, inside))
            assert trainer.checkpoint_callback.monitor == "val_acc"
            assert trainer.early_stopping_callback.patience == 50
            assert trainer.progress_bar_callback.refresh_rate == 0
            assert isinstance(trainer.progress_bar_callback, TQDMProgressBar)
            assert isinstance(trainer.logger, CSVLogger)

    trainer = make_trainer(
        callbacks=[within("on_train_epoch_end", look), *observers(tmp_path), TQDMProgressBar(refresh_rate=0)],
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        enable_checkpointing=True,
        enable_progress_bar=True,
    )
    trainer.fit(Blobs(), train_loader(), val_loader())
    assert len(found) == 2
    assert all(outside == inside for outside, inside in found)


@both_ways
def test_a_callback_that_cannot_be_copied_is_left_out_and_comes_back(way, make_trainer):
    class Sealed(Callback):
        def __init_subclass__(cls):
            raise TypeError("no heirs")

        def on_validation_end(self, trainer, module):
            calls.append(1)

    calls, sealed, found = [], Sealed(), []

    def look(trainer, module):
        before = len(calls)
        with IsolatedValidation(trainer, module) as validation:
            way(validation)()
            found.append((sealed in trainer.callbacks, len(calls) - before))
        assert sealed in trainer.callbacks

    make_trainer(callbacks=[sealed, within("on_train_end", look)]).fit(Blobs(), train_loader(), val_loader())
    assert calls
    assert found == [(False, 0)]


# ---- several processes


def many_processes(*values):
    """A Trainer whose processes logged these values; this is the first."""
    mean = torch.tensor(values, dtype=torch.float64).mean()
    strategy = SimpleNamespace(reduce=lambda own, reduce_op: {"mean": mean}[reduce_op])
    return SimpleNamespace(world_size=len(values), strategy=strategy, is_global_zero=True)


class Logs:
    """A validation that logs one value."""

    def __init__(self, value):
        self.value = value

    def run(self):
        return Logged({"val_acc": torch.tensor(self.value)}, {})


def test_processes_that_logged_different_values_agree_on_the_mean_and_one_warning_says_so():
    trainer, weights = many_processes(0.5, 0.75), {"a": torch.ones(2)}
    evaluate = TrainerEvaluator(trainer, None, Logs(0.5), OwnLoop(), weights, judged_by("val_acc"))
    with pytest.warns(UserWarning, match="sync_dist=True") as warned:
        assert [evaluate(PrunedWeights(Mask.full(weights), weights), [0]).score for _ in range(3)] == [0.625] * 3
    assert len(warned) == 1


def test_processes_that_logged_one_value_agree_on_it_without_a_warning():
    weights = {"a": torch.ones(2)}
    one_value = many_processes(0.25, 0.25)
    evaluate = TrainerEvaluator(one_value, None, Logs(0.25), OwnLoop(), weights, judged_by("val_acc"))
    assert evaluate(PrunedWeights(Mask.full(weights), weights), [0]).score == 0.25
    assert mean_over_processes(SimpleNamespace(world_size=1), torch.tensor(0.5)) == 0.5
