"""Zeros are held whoever writes weights, with optimizers of every kind: one row for each writer and each optimizer."""

from __future__ import annotations

import copy
import math
from collections import defaultdict

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_roulette import HoldZeros, Mask, RouletteWheelPruning, Tree, apply_mask, prunable_parameters
from tests.support.fits import pruner
from tests.support.modules import Blobs
from tests.support.results import WEIGHTS, load

each_callback = pytest.mark.parametrize("kind", ["HoldZeros", "at_epoch"])


def chequered(module) -> Mask:
    weights = {name: dict(module.named_parameters())[name] for name in WEIGHTS}
    return Mask({name: torch.arange(one.numel()).reshape(one.shape) % 2 == 0 for name, one in weights.items()})


def holding(kind: str):
    """The callback, and the epoch from which on zeros are to be there."""
    if kind == "HoldZeros":
        return HoldZeros(chequered(Blobs())), 0
    return RouletteWheelPruning(2, tolerance=math.inf, tree=Tree(0.5, max_levels=1), at_epoch=1, refit=None), 1


class Forwards(Callback):
    """Counts the pruned weights that are not zero in any forward, from an epoch on."""

    def __init__(self, callback, epoch: int) -> None:
        self.callback, self.epoch, self.seen, self.leaks = callback, epoch, 0, 0

    def on_fit_start(self, trainer, pl_module):
        self.hook = pl_module.net.register_forward_pre_hook(lambda *_: self.look(trainer, pl_module))

    def look(self, trainer, module):
        if self.callback.mask is None or trainer.sanity_checking or trainer.current_epoch < self.epoch:
            return
        self.seen += 1
        self.leaks += revived(dict(module.named_parameters()), self.callback.mask)

    def teardown(self, trainer, pl_module, stage):
        self.hook.remove()


def revived(tensors, mask) -> int:
    return sum(int(tensors[name].detach()[~kept].count_nonzero()) for name, kept in mask.items())


@torch.no_grad()
def disturb(module) -> None:
    for weight in module.net.parameters():
        weight.lerp_(torch.full_like(weight, 0.3), 0.05)


def disturb_data(module) -> None:
    """Torch's version counter does not see this."""
    for weight in module.net.parameters():
        weight.data = weight.data * 0.95 + 0.015


def writing_in(hook: str, write=disturb):
    """A module that writes its weights in a hook."""
    return type("Writes", (Blobs,), {hook: lambda self, *_, **__: write(self)})()


class Averaged(Blobs):
    """Validates an average, as many modules do that keep one without a callback."""

    def on_train_start(self):
        self.average = [one.detach().clone() for one in self.net.parameters()]

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        for old, new in zip(self.average, self.net.parameters(), strict=True):
            old.lerp_(new, 0.1)

    def swap(self):
        for old, new in zip(getattr(self, "average", ()), self.net.parameters(), strict=False):
            old.data, new.data = new.data.clone(), old.data.clone()

    on_validation_epoch_start = on_validation_epoch_end = swap


class WritesByCallback(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        disturb(pl_module)


HOOKS = ["on_train_batch_end", "on_after_backward", "on_train_epoch_end", "on_train_end", "on_fit_end"]
HOOKS += ["on_validation_end", "on_validation_start", "on_validation_epoch_start"]
WRITERS = {hook: lambda hook=hook: writing_in(hook) for hook in HOOKS}
WRITERS |= {"through .data": lambda: writing_in("on_before_zero_grad", disturb_data), "average": Averaged}
WRITERS |= {"through .data, after a batch": lambda: writing_in("on_train_batch_end", disturb_data)}


# a search refuses a module whose validation writes weights
VALIDATING = {"on_validation_end", "on_validation_start", "on_validation_epoch_start", "average"}


NONE = {"in a forward": 0, "at the end": 0, "in a file": 0}


def revived_in(fit, tmp_path, kind, module, *callbacks, **options) -> dict[str, int]:
    """How many pruned weights are not zero in any forward, at the end, and in any checkpoint since they were pruned."""
    (callback, epoch) = holding(kind)
    seen, every = Forwards(callback, epoch), ModelCheckpoint(save_top_k=-1, every_n_train_steps=3)
    fit(callback, seen, every, *callbacks, module=module, max_epochs=3, enable_checkpointing=True, **options)
    assert seen.seen >= 21
    stored = [load(path) for path in tmp_path.glob("checkpoints/epoch=*.ckpt")]
    after = [one["state_dict"] for one in stored if one["global_step"] > 8 * epoch]
    assert len(after) >= 4
    at_the_end = revived(dict(module.named_parameters()), callback.mask)
    in_files = sum(revived(one, callback.mask) for one in after)
    return {"in a forward": seen.leaks, "at the end": at_the_end, "in a file": in_files}


@pytest.mark.filterwarnings("ignore:.*changed after the network was measured.*")
@each_callback
@pytest.mark.parametrize("writer", WRITERS)
def test_whoever_writes_weights_the_zeros_are_held(fit, tmp_path, kind, writer):
    if kind == "at_epoch" and writer in VALIDATING:
        pytest.skip("a search is another law's business")
    assert revived_in(fit, tmp_path, kind, WRITERS[writer]()) == NONE


@each_callback
def test_a_callback_that_writes_weights(fit, tmp_path, kind):
    assert revived_in(fit, tmp_path, kind, Blobs(), WritesByCallback()) == NONE


class Teacher(Blobs):
    """Validates a mean teacher, which follows the network after every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.student = copy.deepcopy(self.net)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.student(batch[0]), batch[1])

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        for teacher, student in zip(self.net.parameters(), self.student.parameters(), strict=True):
            teacher.lerp_(student, 0.1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), lr=1e-2)


def test_a_teacher_stays_as_sparse_as_it_was_pruned(fit):
    callback = HoldZeros(chequered(Blobs()))
    seen, module = Forwards(callback, 0), Teacher()
    fit(callback, seen, module=module)
    assert seen.seen >= 8
    assert seen.leaks == revived(dict(module.named_parameters()), callback.mask) == 0
    assert module.student[0].weight.count_nonzero() == module.student[0].weight.numel()


def test_a_teacher_that_is_pruned_while_it_is_taught_is_warned_of(fit):
    pruning = pruner(at_epoch=1, tolerance=math.inf)
    with pytest.warns(UserWarning, match=r"No optimizer trains net\.0\.weight, net\.2\.weight\..* exclude"):
        module = fit(pruning, module=Teacher())
    assert any("No optimizer trains" in note for note in pruning.report.notes)
    assert revived(dict(module.named_parameters()), pruning.mask) == 0


class Lookahead(torch.optim.Optimizer):
    """A wrapper that never calls `Optimizer.__init__`, as many published ones do."""

    def __init__(self, inner, alpha=0.5) -> None:
        self.inner, self.alpha = inner, alpha
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, defaultdict(dict)
        self.slow = [one.detach().clone() for group in inner.param_groups for one in group["params"]]

    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.look_ahead()
        return loss

    @torch.no_grad()
    def look_ahead(self):
        fast = (one for group in self.param_groups for one in group["params"])
        for old, new in zip(self.slow, fast, strict=True):
            old.lerp_(new, self.alpha)
            new.copy_(old)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict)


class Sharing(Lookahead):
    """Has all attributes of the optimizer that it wraps, its hooks included."""

    def __init__(self, inner) -> None:
        self.__dict__.update(inner.__dict__)
        super().__init__(inner)


class Initialised(Lookahead):
    def __init__(self, inner) -> None:
        torch.optim.Optimizer.__init__(self, inner.param_groups, {})
        super().__init__(inner)


class Several(Lookahead):
    """One optimizer for each parameter, in a list."""

    def __init__(self, inner) -> None:
        super().__init__(inner)
        self.parts = [torch.optim.Adam([one], 1e-2) for one in inner.param_groups[0]["params"]]

    def step(self, closure=None):
        loss = closure()
        for one in self.parts:
            one.step()
        self.look_ahead()
        return loss


class MasterWeights(torch.optim.SGD):
    """Trains copies in double precision and copies them into the weights."""

    def step(self, closure=None):
        loss = closure()
        for one in self.param_groups[0]["params"]:
            master = self.state[one].setdefault("master", one.detach().double() + 0.01)
            master.sub_(one.grad, alpha=0.01)
            one.data.copy_(master)
        return loss


OPTIMIZERS = {
    "never initialised": Lookahead,
    "shares attributes": Sharing,
    "initialised": Initialised,
    "several": Several,
    "master weights": lambda inner: MasterWeights(inner.param_groups[0]["params"], lr=0.1),
}


class Optimized(Blobs):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.wrap = wrap

    def configure_optimizers(self):
        return self.wrap(torch.optim.Adam(self.parameters(), lr=1e-2))


class Twice(Optimized):
    """Manual optimization with two steps a batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            optimizer.step(lambda: self.backward_of(batch))

    def backward_of(self, batch):
        loss = cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        return loss


@each_callback
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_of_any_kind(fit, tmp_path, kind, optimizer):
    assert revived_in(fit, tmp_path, kind, Optimized(OPTIMIZERS[optimizer])) == NONE


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.parametrize("optimizer", ["never initialised", "shares attributes", "several"])
def test_two_steps_a_batch(fit, tmp_path, optimizer):
    assert revived_in(fit, tmp_path, "HoldZeros", Twice(OPTIMIZERS[optimizer])) == NONE


def test_a_wrapper_with_a_scheduler_is_as_before_after_the_fit(fit):
    class Scheduled(Optimized):
        def configure_optimizers(self):
            self.made = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(self.made, 1)
            self.step = vars(self.made)["step"]  # the scheduler's
            return [self.made], [scheduler]

    module = Scheduled(Lookahead)
    fit(HoldZeros(chequered(module)), module=module)
    assert vars(module.made)["step"] is module.step
    assert not module.made.inner._optimizer_step_pre_hooks


# ---- parameters that are zero before they are trained


class Adapted(Blobs):
    """A frozen pruned network with a LoRA adapter, whose second matrix starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        apply_mask(self, chequered(self))
        self.net.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(16, 4, bias=False), nn.Linear(4, 10, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.net(x) + self.lora_B(self.lora_A(x))


def test_an_adapter_that_starts_at_zero_is_named(fit):
    module = Adapted()
    with pytest.warns(UserWarning, match=r"'lora_B.weight' are zero.*exclude=\['lora_B.weight'\]"):
        fit(HoldZeros(), module=module)
    assert not module.lora_B.weight.any()


@pytest.mark.parametrize("thaws", [False, True])
def test_an_excluded_adapter_trains_on_a_pruned_network(fit, thaws):
    class Module(Adapted):
        def on_train_epoch_start(self):
            self.net.requires_grad_(thaws)

    module, callback = Module(), HoldZeros(exclude=["lora_*"])
    dense = module.net[0].weight.detach().clone()
    fit(callback, module=module)
    assert module.lora_B.weight.count_nonzero() == module.lora_B.weight.numel()
    assert list(callback.held()) == list(WEIGHTS)
    assert revived(dict(module.named_parameters()), chequered(module)) == 0
    assert torch.equal(dense, module.net[0].weight) is not thaws
    assert all(one.requires_grad is thaws for one in module.net.parameters())


def test_a_mask_without_the_adapter_warns_of_nothing(fit):
    module = Adapted()
    fit(HoldZeros(chequered(module)), module=module)  # a warning is an error in tests
    assert module.lora_B.weight.any()


def test_exclude_leaves_parameters_of_a_mask_out(fit):
    module = Blobs()
    fit(HoldZeros(chequered(module), exclude=["net.0.*"]), module=module)
    assert module.net[0].weight.count_nonzero() == module.net[0].weight.numel()
    assert revived(dict(module.named_parameters()), {"net.2.weight": chequered(module)["net.2.weight"]}) == 0


@pytest.mark.parametrize(("exclude", "error", "why"), [("lora", TypeError, "list"), (["lara"], ValueError, "no param")])
def test_patterns_of_exclude_are_checked(fit, exclude, error, why):
    with pytest.raises(error, match=why):
        fit(HoldZeros(exclude=exclude), module=Adapted())


def test_every_prunable_weight_of_the_rows_is_known():
    assert set(prunable_parameters(Blobs())) == set(WEIGHTS)
