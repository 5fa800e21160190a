"""An isolated validation scores a candidate as the Trainer would, each time alike, and shows it what a fit shows."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric

from lightning_roulette import Mask, Validation, apply_mask, prunable_parameters
from lightning_roulette.trainer.data.folded_data import TrainerLoopData
from lightning_roulette.trainer.scores.trainer_evaluator import TrainerEvaluator
from lightning_roulette.trainer.validation.logged import Logged
from tests.support.callbacks import HOOKS, within
from tests.support.failing import failing_forward
from tests.support.fits import pruner
from tests.support.isolated import (
    ON_ALL,
    WAYS,
    IsolatedValidation,
    PrunedWeights,
    a_mask,
    each_way,
    evaluator_of,
    judged_by,
    one_level,
    values_of,
)
from tests.support.modules import Blobs, shuffled_loader, val_loader
from tests.support.results import copied

VAL_BATCHES = 4

pytestmark = pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled.*")


def floats(logged):
    return {name: float(value) for name, value in logged.values.items()}


def alike(found):
    """Whether every way gave one list of equal results, and return one of them."""
    assert found.keys() == WAYS.keys()
    assert all(len(results) > 1 and results == [results[0]] * len(results) for results in found.values())
    return next(iter(found.values()))[0]


# ---- scores


class Bare(Blobs):
    """Without biases. It logs a metric that nobody resets."""

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
def test_an_all_zero_candidate_scores_what_an_all_zero_network_scores_in_any_hook(monitor, averaged, fit):
    found = []

    def score(trainer, module):
        found.append(values_of(trainer, module, a_mask(module, 0.0), monitor, times=2))

    fit(*(within(hook, score) for hook in HOOKS), *([EMAWeightAveraging(decay=0.5)] * averaged), module=Bare())
    assert len(found) >= 2 * len(HOOKS) - 2
    assert all(scores == [found[0][0]] * 2 for scores in found)
    assert found[0][0] == pytest.approx(math.log(10), abs=1e-6)


def test_a_candidate_scores_what_validate_says_of_a_masked_copy(at_end, make_trainer):
    loader = val_loader(batch_size=11)  # So many batches are not regrouped: every sum is in the same order.

    def score(trainer, module):
        for share in (0.0, 0.5, 1.0):
            other, mask = Bare(), a_mask(module, share)
            other.load_state_dict(module.state_dict())
            apply_mask(other, mask)
            (expected,) = make_trainer().validate(other, loader, verbose=False)
            assert {name: values_of(trainer, module, mask, name)[0] for name in expected} == expected
            assert expected.keys() == {"val_loss", "val_acc", "held"}

    at_end(score, module=Bare(), val=loader)


def test_larger_scores_are_better_and_a_loss_ranks_or_breaks_ties(at_end):
    metrics = {
        judged_by("val_acc"): lambda accuracy, loss: (accuracy, accuracy, accuracy),
        judged_by("val_acc", "min"): lambda accuracy, loss: (-accuracy, -accuracy, -accuracy),
        judged_by("val_acc", loss="val_loss"): lambda accuracy, loss: (accuracy, accuracy, -loss),
        judged_by("val_acc", loss="val_loss", rank_by="val_loss", rank_mode="min"): lambda accuracy, loss: (
            -loss,
            accuracy,
            accuracy,
        ),
    }

    def score(trainer, module):
        found, mask = [], a_mask(module, 0.7)
        for metric in metrics:
            with IsolatedValidation(trainer, module) as validation:
                evaluate = evaluator_of(trainer, module, validation, metric)
                scores = evaluate(PrunedWeights(mask, prunable_parameters(module)), range(evaluate.folds))
                found.append((scores.rank, scores.score, scores.tiebreak))
        return found, *(values_of(trainer, module, mask, name)[0] for name in ("val_acc", "val_loss"))

    found, accuracy, loss = at_end(score)
    assert 0 < accuracy < loss
    assert found == [expected(accuracy, loss) for expected in metrics.values()]


@pytest.mark.parametrize("loader", [shuffled_loader, lambda: val_loader(shuffle=True)], ids=["generator", "global"])
def test_equal_weights_score_equally_on_shuffled_and_limited_data(loader, at_end):
    def score(trainer, module):
        mask = a_mask(module, 0.5)
        return [values_of(trainer, module, mask, "val_loss", times=3, cache_bytes=size) for size in (2**31, 0)]

    assert [len(set(scores)) for scores in at_end(score, val=loader(), limit_val_batches=2)] == [1, 1]


# ---- one validation does not show in the next


class Drifting(Blobs):
    """Logs a buffer, a learning rate and chance, and changes them when it validates."""

    def __init__(self):
        super().__init__()
        self.register_buffer("drift", torch.zeros(()))

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.drift += 1
        self.log("drift", self.drift)
        self.log("noise", torch.rand(()))

    def on_validation_epoch_end(self):
        group = self.trainer.optimizers[0].param_groups[0]
        self.log("rate", group["lr"])
        group["lr"] *= 0.5


def test_a_candidate_does_not_find_what_the_one_before_changed_or_drew(at_end):
    def score(validate, trainer, module):
        found = []
        for draws in range(3):
            found.append(floats(validate()))
            torch.rand(draws + 1)
            trainer.val_dataloaders.generator.manual_seed(draws)
        return found

    found = at_end(each_way(score), module=Drifting(), val=shuffled_loader(), limit_val_batches=2)
    assert alike(found).keys() == {"val_loss", "val_acc", "drift", "noise", "rate"}


def test_what_one_candidate_logged_is_not_taken_for_the_next(at_end):
    class Once(Blobs):
        once = True

        def on_validation_epoch_end(self):
            if self.once:
                self.log("only_once", 1.0)

    def names(validate, trainer, module):
        return [set(validate().values) for module.once in (True, False)]

    found = at_end(each_way(names), module=Once())
    assert found == {way: [{"val_loss", "val_acc", "only_once"}, {"val_loss", "val_acc"}] for way in WAYS}


def test_a_validation_that_failed_does_not_show_in_the_next(at_end):
    def score(validate, trainer, module):
        before = floats(validate())
        with pytest.raises(ValueError), failing_forward(module, 3, ValueError()):
            validate()
        return [before, floats(validate())]

    alike(at_end(each_way(score)))


def test_what_a_validation_logged_is_not_overwritten_by_the_next(at_end):
    def score(validate, trainer, module):
        first = validate()
        before, mask = floats(first), copy.deepcopy(module.net[0].weight.data)
        module.net[0].weight.data.zero_()
        assert floats(validate()) != before
        module.net[0].weight.data.copy_(mask)
        return [before, floats(first)]

    alike(at_end(each_way(score)))


# ---- what a validation sees


def test_at_most_so_many_batches_of_each_loader_are_validated(at_end):
    class Counting(Blobs):
        seen = ()

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)
            self.seen += ((dataloader_idx, batch_idx),)

    def count(trainer, module):
        found = []
        with IsolatedValidation(trainer, module) as validation:
            for most in (1, 3, math.inf):
                module.seen = ()
                validation.run(most)
                found.append(module.seen)
        return found

    one, three, every = at_end(count, module=Counting(), val=[val_loader(), val_loader(batch_size=100)])
    assert one == ((0, 0), (1, 0))
    assert three == ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))
    assert every == ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1))


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


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_end"])
def test_a_validation_may_read_what_training_logged(hook, at_hook):
    module = Reads()
    (found,) = at_hook(hook, each_way(lambda validate, *_: (floats(validate()), module.read[-1])), module=module)
    for values, read in found.values():
        assert values.keys() == {"val_loss", "val_acc", "gap", "put"}
        assert math.isnan(read) == (hook == "on_train_start")  # Nothing was trained yet.
        assert values["gap"] == pytest.approx(read - values["val_loss"], abs=1e-6, nan_ok=True)


def test_a_metric_that_training_did_not_log_is_missing_as_ever(at_end):
    class Asks(Blobs):
        asks = False

        def on_validation_epoch_end(self):
            if self.asks:
                self.trainer.callback_metrics["no such thing"]

    def ask(validate, trainer, module):
        module.asks = True
        with pytest.raises(KeyError, match="no such thing"):
            validate()
        module.asks = False

    at_end(each_way(ask), module=Asks())


def test_candidates_are_validated_in_eval_mode_and_without_gradients_as_within_fit(fit):
    found = []

    class Noting(Blobs):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            modes = (self.training, self.net.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            found.append((modes, self.trainer.state.fn.value, self.trainer.state.stage.value))

    search = within("on_train_batch_end", lambda *both: one_level(*both, how=ON_ALL))
    fit(search, module=Noting(), num_sanity_val_steps=0)
    # Three searches: all data once, one batch and one fold to see what is logged, the dense network, two candidates
    # and the winner. Two epochs.
    assert len(found) == 3 * (2 + 5 * VAL_BATCHES) + 2 * VAL_BATCHES
    assert set(found) == {((False,) * 4, "fit", "validate")}


def swapping(keep, *hooks):
    """A kind of module that averages by hand: it keeps an average in one hook, and swaps it in and out in others."""

    class Swaps(Blobs):
        average = None

        def keep(self, *_):
            self.average = copied(self.net)

        def swap(self, *_):
            self.eval()  # One of the hooks is there to do this.
            if self.average is not None:
                now, self.average = self.average, copied(self.net)
                self.net.load_state_dict(now)

        def step(self, batch, batch_idx):
            self.swap()
            Blobs.validation_step(self, batch, batch_idx)
            self.swap()

    setattr(Swaps, keep, Swaps.keep)
    for hook in hooks:
        setattr(Swaps, hook, Swaps.step if hook == "validation_step" else Swaps.swap)
    return Swaps


class Teaches(Blobs):
    """A mean teacher: no candidate would change the score, and the search would prune everything."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, x):
        return (self.net if self.training else self.teacher)(x)


STARTS = ("on_validation_model_eval", "on_validation_start", "on_validation_epoch_start")
SEES_OTHERS = {hook: swapping("on_fit_start", hook, "on_validation_end") for hook in STARTS} | {
    "batch hooks": swapping("on_train_batch_end", "on_validation_batch_start", "on_validation_batch_end"),
    "step": swapping("on_train_batch_end", "validation_step"),
    "teacher": Teaches,
}


@pytest.mark.parametrize("kind", SEES_OTHERS.values(), ids=SEES_OTHERS)
def test_a_module_that_validates_other_weights_than_those_it_trains_is_refused(kind, fit):
    module = kind()
    with pytest.raises(RuntimeError, match="changes the prunable weight|logs the same with all"):
        fit(pruner(monitor="val_acc", refit="least_squares"), module=module)
    assert bool((module.net[0].weight != 0).all())


# ---- callbacks that stay, and those that are muted


class LogsMargin(Callback):
    """Logs a metric that only it knows."""

    def on_validation_epoch_end(self, trainer, module):
        self.log("margin", module.net[0].weight.abs().sum())


@pytest.mark.parametrize(("kept", "there"), [([], False), (["LogsMargin"], True), (["EarlyStopping"], False)])
def test_a_metric_of_a_callback_is_there_only_if_the_callback_is_kept(kept, there, at_end):
    look = each_way(lambda validate, *_: "margin" in validate().values, kept)
    found = at_end(look, LogsMargin(), EarlyStopping("val_acc", mode="max"))
    assert found == dict.fromkeys(WAYS, there)


def test_a_kept_callback_is_the_users_own_object_and_sees_the_candidate(at_end):
    def look(trainer, module):
        weights = {"net.0.weight": module.net[0].weight}
        mask = Mask({"net.0.weight": torch.zeros(24, 16, dtype=torch.bool)})
        with IsolatedValidation(trainer, module, ["LogsMargin"]) as validation:
            assert kept in trainer.callbacks
            evaluate = evaluator_of(trainer, module, validation, judged_by("margin"), weights)
            return evaluate(PrunedWeights(mask, weights), [0]).rank

    kept = LogsMargin()
    assert at_end(look, kept) == 0.0


def test_a_search_by_a_metric_of_a_callback_needs_the_callback_kept(fit):
    def search(module, *keep):
        pruning = pruner(tolerance=math.inf, monitor="margin", mode="max", validation=Validation(keep_callbacks=keep))
        fit(LogsMargin(), pruning, module=module)
        return pruning.report

    module = Blobs()
    message = r"watches 'margin'.*Your callback LogsMargin logs it.*keep_callbacks=\['LogsMargin'\]"
    with pytest.raises(RuntimeError, match=message):
        search(module)
    assert module.trainer.global_step == 0
    report = search(Blobs(), "LogsMargin")
    assert (report.monitor, report.score < report.dense_score) == ("margin", True)  # The sum of fewer weights.


def test_muted_callbacks_and_loggers_still_tell_what_they_are(at_hook, tmp_path):
    def known(trainer):
        bar = trainer.progress_bar_callback
        return {
            "callbacks": [type(one).__name__ for one in trainer.callbacks],
            "folder": trainer.logger.log_dir,
            "logger": isinstance(trainer.logger, CSVLogger),
            "checkpoint": trainer.checkpoint_callback.monitor,
            "stopping": trainer.early_stopping_callback.patience,
            "bar": (isinstance(bar, TQDMProgressBar), bar.refresh_rate),
        }

    def look(trainer, module):
        return known(trainer), each_way(lambda validate, *_: validate() and known(trainer))(trainer, module)

    saving = ModelCheckpoint(tmp_path / "files", monitor="val_acc", mode="max")
    others = [EarlyStopping("val_acc", mode="max", patience=50), saving, TQDMProgressBar(refresh_rate=0)]
    options = {"enable_checkpointing": True, "enable_progress_bar": True, "log_every_n_steps": 1}
    for outside, inside in at_hook("on_train_epoch_end", look, *others, logger=CSVLogger(tmp_path), **options):
        assert inside == dict.fromkeys(WAYS, outside)
        assert outside["logger"]
        assert outside["bar"] == (True, 0)


def test_a_callback_that_cannot_be_copied_is_left_out_and_comes_back(at_end):
    class Sealed(Callback):
        def __init_subclass__(cls):
            raise TypeError("no heirs")

        def on_validation_end(self, trainer, module):
            calls.append(1)

    class Slotted(Callback):
        __slots__ = ("calls",)

        def on_validation_end(self, trainer, module):
            calls.append(2)

    def look(validate, trainer, module):
        before = len(calls)
        validate()
        return sealed in trainer.callbacks, len(calls) - before

    calls, sealed = [], Sealed()
    assert at_end(each_way(look), sealed, Slotted()) == dict.fromkeys(WAYS, (False, 0))
    assert set(calls) == {1, 2}


# ---- several processes


@pytest.mark.parametrize("values", [(0.5, 0.75), (0.25, 0.25)])
def test_processes_agree_on_the_mean_and_one_warning_says_if_they_logged_different_values(values, recwarn):
    mean, weights = torch.tensor(values, dtype=torch.float64).mean(), {"a": torch.ones(2)}
    strategy = SimpleNamespace(reduce=lambda own, reduce_op: {"mean": mean}[reduce_op])
    trainer = SimpleNamespace(world_size=2, strategy=strategy, is_global_zero=True)
    validation = SimpleNamespace(run=lambda: Logged({"val_acc": torch.tensor(values[0])}, {}))
    evaluate = TrainerEvaluator(trainer, None, validation, TrainerLoopData(), weights, judged_by("val_acc"))
    assert [evaluate(PrunedWeights(Mask.full(weights), weights), [0]).score for _ in range(3)] == [float(mean)] * 3
    assert ["sync_dist=True" in str(one.message) for one in recwarn] == [True] * (len(set(values)) > 1)
