"""What a search within a fit gives back and hides, whatever the module, the loaders and the hook."""

from __future__ import annotations

import csv
import itertools
import math
import random
import signal
import warnings
from collections.abc import Callable as Function
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, RandomSampler
from torchmetrics import CatMetric, Metric, MetricCollection, MetricTracker
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

from lightning_roulette import LeastSquares, RouletteWheelPruning, Tree, Wheel, prunable_parameters
from tests.support.callbacks import HOOKS, counting_class, counting_lambdas, within
from tests.support.failing import failing_forward
from tests.support.isolated import ON_ALL, IsolatedValidation, PrunedWeights, a_mask, evaluator_of, judged_by, one_level
from tests.support.modules import Blobs, BlobsData, Fetches, Stream, blobs, val_loader
from tests.support.results import copied, equal, load
from tests.support.state import changed, content, state_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*module.* in eval mode at the start of training.*"),
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled.*"),
    pytest.mark.filterwarnings("ignore:.*requested to overfit but enabled.*"),
    pytest.mark.filterwarnings("ignore:.*`dataloader_iter`.*"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`.*"),
]
VAL_BATCHES = 4


# ---- law 1: everything is given back bit for bit


class Restless(Blobs):
    """Its validation changes everything that a validation may change; while `armed`, also the fit around it."""

    armed = False

    def __init__(self, rate=0.1):
        super().__init__()
        self.rate = rate
        self.norm = nn.BatchNorm1d(16)
        self.still = nn.Dropout(0.5).eval()
        self.register_buffer("counted", torch.zeros(1))
        self.register_buffer("rebound", torch.zeros(1))
        self.register_buffer("late", None)
        self.losses = CatMetric()
        self.pair = MetricCollection({"precision": MulticlassPrecision(10), "recall": MulticlassRecall(10)})
        self.tracker = MetricTracker(MulticlassAccuracy(10))
        self.train_acc = MulticlassAccuracy(10)

    def forward(self, x):
        return self.net(self.still(self.norm(x)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.train_acc(self(x), y)
        self.log("train_acc", self.train_acc, on_step=True, on_epoch=True, prog_bar=True)
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_start(self):
        self.tracker.increment()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.norm.train()
        super().validation_step(batch, batch_idx)
        x, y = batch
        scores = self(x)
        self.counted += 1
        self.rebound = self.rebound + torch.rand(1) + np.random.rand() + random.random()  # noqa: NPY002
        for metric in (self.pair, self.tracker):
            metric.update(scores, y)
        self.losses.update(cross_entropy(scores, y))

    def on_validation_epoch_end(self):
        self.log("shown", self.net[0].weight.norm(), prog_bar=True)
        if self.armed:
            self.late = torch.ones(1)
            self.register_buffer("new", torch.ones(1))
            self.trainer.should_stop = self.trainer._last_val_time = True
            self.trainer.callback_metrics["put"] = torch.tensor(2.0)
            self.trainer.optimizers[0].param_groups[0]["momentum"] += 0.125
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.trainer.lr_scheduler_configs[0].scheduler.step()

    def configure_optimizers(self):
        optimizer, steps = torch.optim.SGD(self.parameters(), self.rate), torch.optim.lr_scheduler
        halves, decays = steps.StepLR(optimizer, 1, 0.5), steps.ExponentialLR(optimizer, 0.9)
        return [optimizer], [steps.SequentialLR(optimizer, [halves, decays], [3])]


class Epochs(RandomSampler):
    """Has an epoch and a generator of its own."""

    def __init__(self):
        super().__init__(blobs(200, 2), generator=torch.Generator().manual_seed(3))
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch


def shuffled_loader(**options):
    return DataLoader(blobs(200, 2), 64, generator=torch.Generator().manual_seed(4), sampler=Epochs(), **options)


def left_by(trainer, module, action):
    """Names of everything that differs after `action(trainer, module)`."""
    module.armed = True
    before = state_of(trainer, module)
    action(trainer, module)
    differs = changed(before, state_of(trainer, module))
    module.armed = False
    return differs


def one_batch(trainer, module):
    """A validation of one batch by the Trainer's loop."""
    with IsolatedValidation(trainer, module) as validation:
        return validation.run(1)


@pytest.mark.parametrize("options", [{"num_sanity_val_steps": 0}, {"accumulate_grad_batches": 3}], ids=str)
def test_everything_is_as_before_after_a_session_in_any_hook(options, fit, tmp_path):
    found, gradients = {hook: set() for hook in HOOKS}, []

    def compare(hook, trainer, module):
        gradients.extend(parameter.grad is not None for parameter in module.parameters())
        found[hook] |= left_by(trainer, module, one_level) | left_by(trainer, module, one_batch)

    callbacks = [within(hook, partial(compare, hook)) for hook in HOOKS]
    saving = ModelCheckpoint(tmp_path / "files", monitor="val_acc", mode="max", save_top_k=2)
    callbacks += [EarlyStopping("val_acc", mode="max", patience=50), saving, LearningRateMonitor()]
    options |= {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1, "enable_checkpointing": True}
    module = fit(*callbacks, module=Restless(), val=shuffled_loader(), profiler="simple", **options)
    assert found == {hook: set() for hook in HOOKS}
    assert any(gradients)
    assert module.tracker.n_steps == (2 if "num_sanity_val_steps" in options else 3)


def test_random_state_of_a_loader_that_is_used_later_is_given_back(at_hook):
    options = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2}
    action = partial(left_by, action=one_level)
    assert at_hook("on_train_start", action, module=Restless(), val=shuffled_loader(), **options) == [set()]


@contextmanager
def failing_restore(trainer, module, nth):
    """Ctrl-C arrives when the random states are given back for the nth time. -1 stands for the last time."""
    calls, original = [], torch.set_rng_state

    def interrupted(state):
        calls.append(1)
        if len(calls) == nth:
            raise KeyboardInterrupt
        original(state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_rng_state", interrupted)
        if nth < 0:
            one_level(trainer, module)
            nth += len(calls) + 1
            assert nth > 3
            calls.clear()
        yield


@contextmanager
def failing_begin(trainer, module):
    """The stage of the Trainer cannot be set, once."""
    kind, errors = type(trainer.state), [ValueError()]

    def refuse(state, name, value):
        if name == "stage" and errors:
            raise errors.pop()
        object.__setattr__(state, name, value)

    trainer.state.__class__ = type("Refuses", (kind,), {"__setattr__": refuse})
    yield
    trainer.state.__class__ = kind
    assert not errors


def many_candidates(error, trainer, module):
    """A search that fails in candidate 7."""
    # Two passes a batch. Before the candidates: twice one batch that shows what is logged, and the dense network.
    with failing_forward(module, 2 * (2 + 7 * VAL_BATCHES + 2), error):
        one_level(trainer, module, branches=10, how=ON_ALL)


def recorded_candidate(trainer, module):
    """A validation that fails while a metric is recorded sample by sample."""
    candidate = PrunedWeights(a_mask(module, 0.5), prunable_parameters(module))
    with IsolatedValidation(trainer, module) as validation:
        evaluate = evaluator_of(trainer, module, validation, judged_by("val_acc"))
        evaluate.recorded(candidate, [0])
        with failing_forward(module, 5, ValueError()):
            evaluate.recorded(candidate, range(16))


def unbroken(trainer, module):
    return nullcontext()


FAILURES = {
    "an error in candidate 7": (unbroken, partial(many_candidates, ValueError()), ValueError),
    "Ctrl-C in candidate 7": (unbroken, partial(many_candidates, KeyboardInterrupt()), KeyboardInterrupt),
    "an error while recording": (unbroken, recorded_candidate, ValueError),
    "a session that cannot begin": (failing_begin, one_level, ValueError),
}
# The first time is at the start of reading, the second at its end, then at the start of each validation.
FAILURES |= {
    f"Ctrl-C at giving back ({nth})": (partial(failing_restore, nth=nth), one_level, KeyboardInterrupt)
    for nth in (1, 2, 3, -1)
}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_end"])
def test_everything_is_as_before_when_a_session_fails(hook, workers, at_hook):
    def attempt(action, error, trainer, module):
        with pytest.raises(error):
            action(trainer, module)

    def fail(trainer, module):
        found = {}
        for name, (failing, action, error) in FAILURES.items():
            with failing(trainer, module):
                found[name] = left_by(trainer, module, partial(attempt, action, error))
        return found

    module, loader = Restless(torch.tensor(0.1)), shuffled_loader(num_workers=workers)
    assert at_hook(hook, fail, module=module, val=loader, max_epochs=1) == [{name: set() for name in FAILURES}]


def test_everything_is_as_before_when_the_module_has_no_loader_yet(at_hook):
    class Reluctant(BlobsData):
        ready = False

        def val_dataloader(self):
            if not self.ready:
                raise ValueError("not yet")
            return super().val_dataloader()

    def search(trainer, module):
        with pytest.raises(ValueError, match="not yet"):
            one_level(trainer, module)
        data.ready = True

    data, options = Reluctant(), {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}
    action = partial(left_by, action=search)
    assert at_hook("on_train_batch_end", action, times=1, module=Restless(), datamodule=data, **options) == [set()]


@pytest.mark.slow
def test_persistent_workers_outlive_a_session(at_hook):
    loader = val_loader(num_workers=2, persistent_workers=True)

    def workers(trainer, module):
        found = []
        for _ in range(2):
            found.append([worker.pid for worker in loader._iterator._workers if worker.is_alive()])
            one_level(trainer, module)
        return found

    first, *others = itertools.chain(*at_hook("on_train_epoch_end", workers, val=loader))
    assert len(first) == 2
    assert others == [first] * 3


def test_training_goes_on_in_train_mode_and_frozen_parts_stay_in_eval_mode(fit):
    modes = []

    class Modes(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            modes.append({name: part.training for name, part in module.named_modules()})

    fit(within("on_validation_end", one_level), Modes(), module=Restless(), val_check_interval=0.5)
    assert len(modes) == 16
    assert all(mode[""] and mode["norm"] and mode["net.0"] and not mode["still"] for mode in modes)


class Witness(Callback):
    """Notes what training left before the search and what an exception finds, and saves a checkpoint then."""

    def __init__(self, failing, path):
        self.failing, self.path = failing, path

    def on_train_end(self, trainer, module):
        self.trained, self.before = copied(module), self.others(trainer)
        # Before the candidates: four times one batch, which shows what judges, and the dense network.
        self.failure = failing_forward(module, 4 + 7 * VAL_BATCHES + 2, self.failing)
        self.failure.__enter__()

    def on_exception(self, trainer, module, exception):
        trainer.save_checkpoint(self.path, weights_only=False)
        self.seen, self.found, self.after = type(exception), copied(module), self.others(trainer)

    def others(self, trainer):
        inner = trainer._logger_connector, trainer.fit_loop.epoch_loop.val_loop
        return list(trainer.callbacks), list(trainer.loggers), *inner, trainer.state.stage.value


@pytest.fixture
def keep_ctrl_c():
    """Lightning ignores Ctrl-C for good once it has seen one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("keep_ctrl_c")
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("error", "raised"), [(ValueError(), ValueError), (KeyboardInterrupt(), SystemExit)])
def test_other_callbacks_find_the_trained_network_when_candidate_7_fails(error, raised, workers, fit, tmp_path):
    witness = Witness(error, tmp_path / "rescued.ckpt")
    search, options = RouletteWheelPruning(branches=10, seed=3, validation=ON_ALL), {"log_every_n_steps": 1}
    with pytest.raises(raised):
        fit(witness, search, val=val_loader(num_workers=workers), logger=CSVLogger(tmp_path), **options)
    assert witness.seen is type(error)
    assert witness.before == witness.after
    assert witness.after[-1] == "train"
    assert equal(witness.found, witness.trained)
    assert equal(load(witness.path)["state_dict"], witness.trained)


# ---- law 2: loggers, callbacks and data modules notice nothing


def noting(name):
    return lambda self, *_, **__: self.events.append(name)


class Recorder(Logger):
    """Notes every call, also those of an `experiment` that people write to directly."""

    name, version, save_dir = "recorder", 0, "somewhere"
    log_metrics, log_hyperparams = noting("log_metrics"), noting("log_hyperparams")
    save, add_scalar = noting("save"), noting("add_scalar")
    experiment = property(lambda self: self)

    def __init__(self, events):
        super().__init__()
        self.events = events


class Talkative(Blobs):
    """Writes to its logger in every way there is, and asks it where it writes."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("on_each_step", 1.0, on_step=True)
        self.logger.log_metrics({"mine": 1.0})
        self.logger.experiment.add_scalar("mine", 1.0)
        self.loggers[1].log_hyperparams({})
        assert self.logger.save_dir == "somewhere"


def test_no_callback_logger_or_data_module_notices_a_session_in_any_hook(fit):
    events, during, data = [], {hook: [] for hook in HOOKS}, BlobsData()

    def search(hook, trainer, module):
        before = len(events), data.asked
        one_level(trainer, module)
        during[hook].append((events[before[0] :], data.asked - before[1]))

    callbacks = [*(within(hook, partial(search, hook)) for hook in HOOKS)]
    callbacks += [counting_class(events.append), counting_lambdas(lambda name: events.append(f"lambda {name}"))]
    options = {"logger": [Recorder(events), Recorder(events)], "log_every_n_steps": 1}
    options |= {"reload_dataloaders_every_n_epochs": 1, "datamodule": data}
    fit(*callbacks, module=Talkative(), **options)
    assert set(events) >= {"on_validation_epoch_end", "lambda on_validation_epoch_end"}
    assert set(events) >= {"log_metrics", "add_scalar", "log_hyperparams", "save"}
    assert data.asked == 2
    assert all(during.values())
    assert {hook: [one for one in found if one != ([], 0)] for hook, found in during.items()} == {h: [] for h in HOOKS}


# ---- law 3: training with searches in it is bit for bit training without


class Lively(Blobs):
    """Dropout, normalisation, noise, a metric of training on step and epoch, and a plateau scheduler."""

    monitor = "val_acc"

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.2))
        self.train_acc = MulticlassAccuracy(10)

    def forward(self, x):
        return self.net(self.front(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.train_acc(self(x), y)
        self.log("train_acc", self.train_acc, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        self.log("val_noise", noise, on_step=True, on_epoch=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.monitor}}


class Unscheduled(Lively):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class TwoLoaders(Lively):
    monitor = "val_acc/dataloader_idx_0"


class TwoAtOnce(Lively):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch["a"], batch_idx)
        self.log("other_loss", cross_entropy(self(batch["b"][0]), batch["b"][1]), batch_size=50)


class Iterating(Fetches, Lively):
    pass


class Manual(Unscheduled):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


@dataclass(frozen=True)
class Case:
    """A way to train."""

    options: dict[str, Any] = field(default_factory=dict)
    loaders: Function[[], Any] = val_loader
    module: type[Lively] = Lively
    folds: tuple[int, int] = (8, 8)
    callbacks: Function[[], list[Callback]] = list


CASES = {
    "default": Case(),
    "validation twice an epoch": Case({"val_check_interval": 0.5}),
    "validation every 5 batches": Case({"val_check_interval": 5, "check_val_every_n_epoch": None}),
    "validation by the clock": Case({"val_check_interval": "00:00:00:00", "check_val_every_n_epoch": None}),
    "validation every second epoch": Case({"check_val_every_n_epoch": 2}, module=Unscheduled),
    "no sanity check": Case({"num_sanity_val_steps": 0}),
    "limited validation": Case({"limit_val_batches": 2}),
    "shuffled and limited validation": Case({"limit_val_batches": 2}, partial(val_loader, shuffle=True)),
    "two loaders": Case({}, lambda: [val_loader(), val_loader(50)], TwoLoaders),
    "two loaders at once": Case(
        {}, lambda: CombinedLoader({"a": val_loader(), "b": val_loader(50)}), TwoAtOnce, (1, 0)
    ),
    "loader without length": Case({}, lambda: DataLoader(Stream(200, 2), batch_size=64)),
    "dataloader_iter": Case(module=Iterating, folds=(1, 0)),
    "reloaded loaders": Case({"reload_dataloaders_every_n_epochs": 1}, partial(val_loader, shuffle=True)),
    "accumulated gradients": Case({"accumulate_grad_batches": 3}),
    "clipped gradients": Case({"gradient_clip_val": 0.1}),
    "bf16-mixed": Case({"precision": "bf16-mixed"}),
    "overfitted batches": Case({"overfit_batches": 2}),
    "max_steps": Case({"max_steps": 11, "max_epochs": -1}),
    "profiler": Case({"profiler": "simple"}),
    "weight averaging": Case(callbacks=lambda: [EMAWeightAveraging(decay=0.9)]),
    "stochastic averaging": Case(
        {"max_epochs": 3},
        module=Unscheduled,
        callbacks=lambda: [StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)],
    ),
    "manual optimization": Case(module=Manual),
    "workers": Case({}, partial(val_loader, num_workers=2)),
    "persistent workers": Case({}, partial(val_loader, num_workers=2, persistent_workers=True)),
}
SLOW = {"workers", "persistent workers"}
SUBTLE = {"validation twice an epoch", "two loaders", "reloaded loaders", "accumulated gradients", "weight averaging"}


REFIT = ["default", "two loaders at once", "no sanity check", "bf16-mixed", "accumulated gradients"]
REFIT += ["weight averaging", "manual optimization", "overfitted batches", "reloaded loaders", "limited validation"]
QUICK = LeastSquares(batches=4)
TAUGHT = LeastSquares(batches=4, distill=3)
HOPELESS = Tree(pruning_rate=0.99, patience=1)


@pytest.fixture
def trained(fit):
    """A function that trains and returns all that a training leaves behind."""

    def train(folder, case, *searching):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        module, called = case.module(), []
        by_clock = "val_check_interval" in case.options  # Lightning fails to tell by the clock
        at_epoch_end, best = False if by_clock else None, {"mode": "max", "save_top_k": 2, "save_last": True}
        watching = [
            counting_class(called.append),
            EarlyStopping(module.monitor, mode="max", patience=1, check_on_train_epoch_end=at_epoch_end),
            ModelCheckpoint(folder / "files", "{epoch}-{step}", module.monitor, **best),
            LearningRateMonitor(),
            *case.callbacks(),
        ]
        logger = CSVLogger(folder, name="", version="")
        options = {"logger": logger, "enable_checkpointing": True, "log_every_n_steps": 1, "default_root_dir": folder}
        trainer = fit(*searching, *watching, module=module, val=case.loaders(), **options | case.options).trainer
        profiled = getattr(trainer.profiler, "recorded_durations", {})
        return {
            "weights": content(module.state_dict()),
            "metric states": content([states(one) for one in module.modules() if isinstance(one, Metric)]),
            "optimizers": content([one.state_dict() for one in trainer.optimizers]),
            "curves": curves(folder / "metrics.csv"),
            "callbacks": [str(one.state_dict()).replace(str(folder), "") for one in watching],
            "hooks": called,
            "files": {path.name: saved(path) for path in folder.glob("files/*")},
            "progress": trainer.fit_loop.state_dict(),
            "end": (trainer.current_epoch, trainer.global_step, trainer.should_stop, str(trainer.state)),
            "metrics": content([trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics]),
            "profile": {name: len(times) for name, times in profiled.items() if "[Callback]Within" not in name},
            "chance": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002
        }

    return train


PLAIN = {}


@pytest.fixture
def plain(trained, tmp_path):
    """A function that returns what a training without searches leaves behind. Each case is trained once."""

    def train(name):
        if name not in PLAIN:
            PLAIN[name] = trained(tmp_path / "plain", CASES[name])
        return PLAIN[name]

    return train


def states(metric):
    """Everything that a metric holds, apart from its methods."""
    return {name: value for name, value in vars(metric).items() if not callable(value)}


def curves(path):
    """Rows that are not about a search."""
    with open(path, newline="") as file:
        rows = [{name: x for name, x in row.items() if x and "roulette" not in name} for row in csv.DictReader(file)]
    return [row for row in rows if row.keys() - {"step"}]


def saved(path):
    stored = torch.load(path, weights_only=False)
    parts = ("epoch", "global_step", "loops", "state_dict", "optimizer_states", "lr_schedulers")
    return {name: content(stored[name]) for name in parts}


def tensor(stored):
    """The tensor that `content` was taken of."""
    dtype, shape, raw = stored
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


def param(*values, slow=True):
    return pytest.param(*values, marks=[pytest.mark.slow] * slow, id=", ".join(map(str, values)))


IN_HOOKS = [param(name, "every hook", slow=name in SLOW) for name in CASES]
IN_HOOKS += [param(name, hook, slow=name in SUBTLE) for name in ("default", *sorted(SUBTLE)) for hook in HOOKS]


@pytest.mark.parametrize(("name", "which"), IN_HOOKS)
def test_training_is_the_same_with_searches_in_its_hooks(name, which, trained, plain, tmp_path):
    hooks = HOOKS if which == "every hook" else [which]
    case, done = CASES[name], {hook: [] for hook in hooks}

    def search(hook, trainer, module):
        done[hook].append(one_level(trainer, module, monitor=case.module.monitor).report)

    searching = [within(hook, partial(search, hook), times=2) for hook in hooks]
    assert not changed(plain(name), trained(tmp_path / "searched", case, *searching))
    assert all(done.values())
    reports = list(itertools.chain(*done.values()))
    assert {report.folds for report in reports} == {case.folds}
    # The dense network, two candidates and the better one again: on all the data, or a part of it on half.
    assert all(3 <= report.validations <= 4 for report in reports)


@pytest.mark.usefixtures("any_calibration_fits")
@pytest.mark.parametrize("at_epoch", [None, 2])
@pytest.mark.parametrize(
    ("name", "refit"),
    [("default", None), param("default", TAUGHT, slow=False), *(param(name, QUICK) for name in REFIT)],
)
@pytest.mark.filterwarnings("ignore:RouletteWheelPruning. EarlyStopping watches")
def test_a_search_that_accepts_nothing_leaves_no_trace(name, refit, at_epoch, trained, plain, tmp_path):
    case, options = CASES[name], {"at_epoch": at_epoch, "refit": refit, "tree": HOPELESS, "wheel": Wheel(8.0)}
    if name == "two loaders at once":
        kind = type("Both", (case.module,), {"calibration_step": lambda self, batch: self(batch[0])})
        case = replace(case, module=kind)
    pruning = RouletteWheelPruning(3, monitor=case.module.monitor, **options)
    assert not changed(plain(name), trained(tmp_path / "searched", case, pruning))
    report = pruning.report
    assert report.winner is None
    assert any(one.refitted for level in report.levels for one in level.candidates) == (refit is not None)
    if name == "default":
        # Folds: each half and the race; the race, whose first four folds fill one batch, and once more all folds
        # for the best one after a refit; a half.
        dense, branch, winner = 8 + 8 + 8, 3 * 4 + 2 * 4 + 8 * (refit is not None), 8
        assert report.validations == (dense + branch + winner) / 16


@pytest.mark.parametrize("refit", [None, QUICK, TAUGHT])
def test_a_search_at_the_end_changes_the_network_and_nothing_else(refit, trained, plain, tmp_path):
    pruning = RouletteWheelPruning(3, monitor="val_acc", tolerance=math.inf, refit=refit, target_sparsity=0.5)
    before, after = plain("default"), trained(tmp_path / "searched", CASES["default"], pruning)
    assert changed(before, after) == {"weights", "files", "hooks"}
    assert after["hooks"] == [*before["hooks"][:-1], "on_save_checkpoint", before["hooks"][-1]]
    assert after["files"].keys() - before["files"].keys() == {"pruned.ckpt"}  # last.ckpt is the dense one
    assert all(after["files"][name] == stored for name, stored in before["files"].items())
    may_change, moved = (
        pruning.weights_at(0).keys() & after["weights"].keys(),
        changed(before["weights"], after["weights"]),
    )
    assert pruning.mask.keys() <= moved <= may_change
    assert moved == may_change or refit is TAUGHT  # its steps may not be kept
    assert pruning.mask.sparsity == 0.5
    if refit is None:
        for name, kept in pruning.mask.items():
            weight = tensor(before["weights"][name]).masked_fill(~kept, 0)
            assert torch.equal(weight, tensor(after["weights"][name]))


def test_the_comparison_sees_one_weight_one_draw_of_chance_and_one_validation(trained, plain, tmp_path):
    def after(name, action):
        return changed(plain("default"), trained(tmp_path / name, CASES["default"], within("on_train_end", action)))

    def touch(trainer, module):
        module.net[0].weight.data[0, 0] += 1e-6

    assert after("touched", touch) == {"weights"}
    assert after("drawn", lambda trainer, module: torch.rand(1)) == {"chance"}
    assert after("run", lambda trainer, module: trainer.fit_loop.epoch_loop.val_loop.run()) >= {"hooks", "curves"}
