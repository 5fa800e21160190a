"""Modules whose validation is no function of their weights, or writes weights: refused, or put back and said."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from lightning_roulette import RouletteWheelPruning
from lightning_roulette.large.limits import limited
from tests.support.fits import pruner
from tests.support.modules import Blobs
from tests.support.results import copied, equal

SWAPS = "changes the prunable weight 'net.0.weight'"
UNEQUAL = "not a function of the weights"


class Swapping(torch.optim.AdamW):
    """Moves the weights along a line in `eval` and back in `train`, as schedule-free optimizers do."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.second, self.training = {}, True

    def step(self, closure=None):
        for group in self.param_groups:
            for one in group["params"]:
                self.second.setdefault(one, one.detach().clone())
        super().step(closure)
        for one, other in self.second.items():
            other.lerp_(one.detach(), 0.2)

    @torch.no_grad()
    def _move(self, training, share):
        if self.training != training:
            for one, other in self.second.items():
                one.lerp_(other, share)
        self.training = training

    def eval(self):
        self._move(False, 1 - 1 / 0.9)

    def train(self):
        self._move(True, 1 - 0.9)


class ScheduleFree(Blobs):
    def configure_optimizers(self):
        return Swapping(self.parameters(), lr=1e-2)

    def on_validation_epoch_start(self):
        self.optimizers().optimizer.eval()

    def on_validation_epoch_end(self):
        self.optimizers().optimizer.train()


class Averaged(Blobs):
    """Keeps an average of its weights, and swaps it in while it validates."""

    def __init__(self):
        super().__init__()
        self.shadow = None

    def on_train_batch_end(self, *_):
        now = [one.detach().clone() for one in self.net.parameters()]
        self.shadow = now if self.shadow is None else [a.lerp(b, 0.5) for a, b in zip(self.shadow, now, strict=True)]

    @torch.no_grad()
    def swap(self):
        if self.shadow is not None:
            for one, other in zip(self.net.parameters(), self.shadow, strict=True):
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)


class InValidation(Averaged):
    on_validation_start = on_validation_end = lambda self: self.swap()


class InEachBatch(Averaged):
    on_validation_batch_start = on_validation_batch_end = lambda self, *_: self.swap()


class InTheStep(Averaged):
    @contextmanager
    def average(self):
        self.swap()
        yield
        self.swap()

    def validation_step(self, batch, batch_idx):
        with self.average():
            super().validation_step(batch, batch_idx)


class Normalises(Blobs):
    def forward(self, x):
        self.net[0].weight.data = normalize(self.net[0].weight.data)
        return super().forward(x)


class NormalisesInPlace(Blobs):
    def forward(self, x):
        with torch.no_grad():
            self.net[0].weight.copy_(normalize(self.net[0].weight))
        return super().forward(x)


class CalibratesBadly(Blobs):
    def calibration_step(self, batch):
        with torch.no_grad():
            self.net[0].weight.mul_(0.9)
        self(batch[0])


class Smooths(Blobs):
    smooth = 0.0

    def on_validation_epoch_start(self):
        self.hits = []

    def validation_step(self, batch, batch_idx):
        self.hits.append((self(batch[0]).argmax(1) == batch[1]).float())

    def on_validation_epoch_end(self):
        self.smooth = 0.9 * self.smooth + 0.1 * float(torch.cat(self.hits).mean())
        self.log("val_acc", self.smooth)


class SmoothsInABuffer(Blobs):
    """Smooths its metric in a buffer, which is put back between validations."""

    def __init__(self):
        super().__init__()
        self.hold()

    def hold(self):
        self.register_buffer("smooth", torch.zeros(()))

    def validation_step(self, batch, batch_idx):
        self.hits = (self(batch[0]).argmax(1) == batch[1]).float().mean()

    def on_validation_epoch_end(self):
        with torch.no_grad():
            self.smooth.mul_(0.9).add_(0.1 * self.hits)
        self.log("val_acc", self.smooth.detach().clone())


class SmoothsInAParameter(SmoothsInABuffer):
    def hold(self):
        self.smooth = nn.Parameter(torch.zeros(()), requires_grad=False)


class SmoothsWhatWasLogged(SmoothsInABuffer):
    def on_validation_epoch_end(self):
        before = self.trainer.callback_metrics.get("val_acc", torch.zeros(()))
        self.log("val_acc", 0.8 * before.nan_to_num() + 0.2 * self.hits)


class Collects(Blobs):
    """A list that only a training hook clears."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_epoch_start(self):
        self.losses.clear()

    def validation_step(self, batch, batch_idx):
        self.losses.append(cross_entropy(self(batch[0]), batch[1]))

    def on_validation_epoch_end(self):
        self.log("val_loss", torch.stack(self.losses).mean())


class Draws(Blobs):
    """Drops units at random in validation, by a generator of its own."""

    def __init__(self):
        super().__init__()
        self.chance = torch.Generator().manual_seed(1)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        x = x * (torch.rand(x.shape, generator=self.chance) > 0.3)
        self.log("val_loss", cross_entropy(self(x), y))


class Counts(Blobs):
    """Its loss depends on how often it was validated."""

    times = 0

    def validation_step(self, batch, batch_idx):
        self.times += 1
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]) * (1 + 0.05 * self.times))


REFUSED = {
    "schedule-free optimizer": (ScheduleFree, SWAPS),
    "average swapped in validation": (InValidation, SWAPS),
    "average swapped in each batch": (InEachBatch, SWAPS),
    "average swapped in the step": (InTheStep, SWAPS),
    "weight bound anew in forward": (Normalises, SWAPS),
    "weight normalised in forward": (NormalisesInPlace, SWAPS),
    "weight changed by calibration_step": (
        CalibratesBadly,
        "a step on training data.* changes the prunable weight",
    ),
    "smoothed metric": (Smooths, UNEQUAL),
    "metric smoothed in a buffer": (SmoothsInABuffer, UNEQUAL),
    "metric smoothed in a parameter": (SmoothsInAParameter, UNEQUAL),
    "metric smoothed by what was logged": (SmoothsWhatWasLogged, UNEQUAL),
    "list cleared by training": (Collects, UNEQUAL),
    "generator of its own": (Draws, UNEQUAL),
    "counter": (Counts, UNEQUAL),
}


@pytest.mark.parametrize("refit", [None, "least_squares"])
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_a_remedy_and_the_weights_are_those_without_a_search(name, refit, fit):
    kind, message = REFUSED[name]
    if kind is CalibratesBadly and refit is None:
        pytest.skip("only a refit takes steps on training data")
    module = kind()
    with pytest.raises(RuntimeError, match=message) as raised:
        fit(pruner(tolerance=0.02, refit=refit), module=module)
    assert "Likely causes" in str(raised.value)
    plain = fit(module=kind(), max_epochs=2 if module.trainer.global_step else 0)
    assert equal(copied(module.net), copied(plain.net))


class Bounded(Blobs):
    """An embedding that shortens its own rows when it is used."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 16, max_norm=0.5)
        nn.init.constant_(self.table.weight, 0.2)

    def forward(self, x):
        return super().forward(x + self.table((x[:, 0] > 0).long()))


class Scaled(Blobs):
    """A bias and a scale that are normalised when the network runs."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((16,), 2.0))

    def forward(self, x):
        if not self.training:
            self.scale.data /= self.scale.data.norm()
        return super().forward(x * self.scale * 4)


PUT_BACK = {
    "embedding with max_norm": (Bounded, {}, "table.weight"),
    "scale normalised in forward": (Scaled, {}, "scale"),
    "excluded weight": (NormalisesInPlace, {"exclude": ["net.0.weight"]}, "net.0.weight"),
}


@pytest.mark.parametrize("refit", [None, "least_squares"])
@pytest.mark.parametrize("name", PUT_BACK)
def test_what_is_not_prunable_is_put_back_and_said(name, refit, fit):
    kind, options, parameter = PUT_BACK[name]
    pruning, without = pruner(tolerance=0.3, refit=refit, **options), {"max_epochs": 3, "check_val_every_n_epoch": 2}
    module = fit(pruning, module=kind(), **without)
    (note,) = [one for one in pruning.report.notes if parameter in one]
    assert "put back" in note
    plain = fit(module=kind(), **without)
    assert torch.equal(module.state_dict()[parameter], plain.state_dict()[parameter])
    zeros = sum(int((module.state_dict()[one] == 0).sum()) for one in pruning.mask)
    assert zeros == pruning.report.size - pruning.report.survivors > 0


def test_a_large_weight_that_the_network_changes_only_when_pruned_is_refused_and_given_back(fit):
    class Renormalises(Blobs):
        """Keeps the norms of rows: nothing changes as long as no weight is pruned."""

        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self.net[0].weight.copy_(normalize(self.net[0].weight))

        def forward(self, x):
            with torch.no_grad():
                rows = self.net[0].weight
                off = (rows.norm(dim=1) - 1).abs() > 1e-3
                rows[off] = normalize(rows[off])
            return super().forward(x)

    module = Renormalises()
    with limited(unpacked_entries=16), pytest.raises(RuntimeError, match=SWAPS):
        fit(pruner(), module=module)
    assert module.trainer.global_step == 0
    assert equal(copied(module.net), copied(Renormalises().net))


def test_weights_that_are_written_late_end_the_search_before_anything_is_pruned(fit):
    class Late(Blobs):
        times = 0

        def on_validation_epoch_end(self):
            self.times += self.trainer.global_step > 0
            if self.times > 16:
                with torch.no_grad():
                    self.net[0].weight.mul_(2)

    pruning, module = pruner(tolerance=math.inf), Late()
    with limited(unpacked_entries=16), pytest.raises(RuntimeError, match=r"net\.0\.weight changed while candidates"):
        fit(pruning, module=module)
    assert bool((module.net[0].weight != 0).all())
    assert pruning.mask is None


# ---- what pruned networks must not break


class FailsAtZero(Blobs):
    def forward(self, x):
        if not self.training and not bool(self.net[0].weight.any()):
            raise ZeroDivisionError
        return super().forward(x)


class NoNumberAtZero(Blobs):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]) / float(bool(self.net[0].weight.any())))


@pytest.mark.parametrize("kind", [FailsAtZero, NoNumberAtZero])
def test_what_the_network_does_at_zero_decides_nothing(kind, fit):
    pruning = pruner(tolerance=0.3)
    fit(pruning, module=kind())
    assert pruning.report.sparsity > 0


# ---- floors that a network at zero keeps


class Hits(Blobs):
    """Logs an accuracy only, as a plain number."""

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())


@pytest.mark.parametrize("kind", [Blobs, Hits])
def test_a_tolerance_that_lets_everything_go_is_refused(kind, fit):
    with pytest.raises((RuntimeError, ValueError), match=r"tolerance is 0\.95") as raised:
        fit(RouletteWheelPruning(2, tolerance=0.95, refit=None), module=kind(), max_epochs=4)
    assert "0.005 is half a point" in str(raised.value)


def test_a_smoke_run_is_told_that_its_network_has_learned_nothing(fit):
    pruning = pruner(tolerance=0.02)
    with pytest.warns(UserWarning, match=r"has not learned anything yet.* fast_dev_run=True"):
        fit(pruning, module=Blobs(lr=1e-9), limit_train_batches=1)
    assert any("Without the prunable weights the network is as good" in note for note in pruning.report.notes)
    pruning = RouletteWheelPruning(2, tolerance=0.02, refit=None)
    fit(pruning, fast_dev_run=True)
    assert pruning.report.sparsity > 0


# ---- after the search


class LoadsItsAverage(Blobs):
    """Replaces its weights when training has ended, which is after the callbacks."""

    def load(self):
        with torch.no_grad():
            self.net[0].weight.fill_(0.5)


class LoadsOnTrainEnd(LoadsItsAverage):
    on_train_end = LoadsItsAverage.load


class LoadsOnFitEnd(LoadsItsAverage):
    on_fit_end = LoadsItsAverage.load


@pytest.mark.parametrize("kind", [LoadsOnTrainEnd, LoadsOnFitEnd])
def test_weights_that_are_replaced_after_the_search_are_warned_of(kind, fit, tmp_path):
    pruning = pruner(tolerance=0.3, dirpath=tmp_path)
    with pytest.warns(UserWarning, match=r"net\.0\.weight changed after the network was measured.*pruned\.ckpt"):
        module = fit(pruning, module=kind(), max_epochs=4)
    assert bool((module.net[0].weight == 0.5).all())
    assert any("changed after the network was measured" in note for note in pruning.report.notes)


class Adapts(Blobs):
    """Validates a copy of its network, which it adapts first."""

    def validation_step(self, batch, batch_idx):
        twin, (x, y) = copy.deepcopy(self.net), batch
        with torch.no_grad():
            twin[2].bias += 0.01
        self.log("val_loss", cross_entropy(twin(x), y))
        self.log("val_acc", (twin(x).argmax(1) == y).float().mean())


def test_a_network_that_copies_itself_is_refitted(fit):
    pruning = pruner(tolerance=0.3, refit="least_squares")
    module = fit(pruning, module=Adapts(), max_epochs=4)
    zeros = sum(int((one == 0).sum()) for name, one in module.named_parameters() if name in pruning.mask)
    assert zeros == pruning.report.size - pruning.report.survivors > 0
