"""Pruned weights stay exactly zero while training goes on, whatever trains, averages or saves them."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy, linear

from lightning_roulette import HoldZeros, Mask, RouletteWheelPruning, Tree, apply_mask, prunable_parameters
from tests.support.callbacks import within
from tests.support.modules import Blobs, val_loader
from tests.support.results import nonzeros

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
each_callback = pytest.mark.parametrize("kind", ["HoldZeros", "at_epoch"])


def half_mask(module) -> Mask:
    """Every second weight, in a chequered pattern."""
    weights = prunable_parameters(module)
    return Mask({name: torch.arange(one.numel()).reshape(one.shape) % 2 == 0 for name, one in weights.items()})


def holding(kind: str):
    """The callback, and the epoch from which on zeros are to be there."""
    if kind == "HoldZeros":
        return HoldZeros(half_mask(Blobs())), 0
    return RouletteWheelPruning(2, tolerance=math.inf, tree=Tree(pruning_rate=0.5, max_levels=1), at_epoch=1), 1


class Leaks(Callback):
    """The largest pruned weight that any forward of training or validation saw, from an epoch on."""

    def __init__(self, callback, epoch: int) -> None:
        self.callback, self.epoch, self.largest, self.forwards, self.moved = callback, epoch, 0.0, 0, False

    def on_fit_start(self, trainer, pl_module):
        self.hook = pl_module.net.register_forward_pre_hook(lambda *_: self.look(trainer, pl_module))

    def look(self, trainer, module):
        mask = self.callback.mask
        if mask is None or trainer.sanity_checking or trainer.current_epoch < self.epoch:
            return
        self.forwards += 1
        self.largest = max(self.largest, leak(module, mask))

    def on_train_epoch_start(self, trainer, pl_module):
        self.kept = {name: weight.detach().clone() for name, weight in prunable_parameters(pl_module).items()}

    def on_train_epoch_end(self, trainer, pl_module):
        weights = prunable_parameters(pl_module)
        self.moved = all(not torch.equal(weights[name], kept) for name, kept in self.kept.items())

    def teardown(self, trainer, pl_module, stage):
        self.hook.remove()

    def assert_none(self, module, forwards=21):
        """So many forwards saw no pruned weight, and none is left."""
        assert self.forwards >= forwards
        assert self.largest == 0.0
        assert leak(module, self.callback.mask) == 0.0


def leak(module, mask) -> float:
    weights = dict(module.named_parameters())
    return max(float(weights[name].detach()[~kept].abs().max()) for name, kept in mask.items())


class Trained(Blobs):
    """Blobs with any optimizer."""

    def __init__(self, optimizer, **options) -> None:
        super().__init__()
        self.optimizer, self.options = optimizer, options

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.options)


class ByHand(Blobs):
    """Manual optimization: two optimizers over the same weights, two steps a batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        momentum = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
        return [torch.optim.Adam(self.parameters(), lr=0.01), momentum]


class NoisySGD(torch.optim.SGD):
    """Moves every weight, whatever its gradient."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(0.01 * torch.randn_like(parameter))
        return loss


class NoisyByHand(ByHand):
    def configure_optimizers(self):
        return [NoisySGD(self.parameters(), lr=0.1), NoisySGD(self.parameters(), lr=0.01)]


class Foreign:
    """An optimizer that is not torch's, as Lightning accepts it: it has no hooks."""

    def __init__(self, parameters, **options) -> None:
        inner = NoisySGD(parameters, **options)
        for name in ("param_groups", "defaults", "state", "step", "zero_grad", "state_dict", "load_state_dict"):
            setattr(self, name, getattr(inner, name))


class Grouped(Blobs):
    """Two groups of parameters that differ in everything."""

    def configure_optimizers(self):
        first, last = self.net[0].parameters(), self.net[2].parameters()
        return torch.optim.AdamW([{"params": first, "weight_decay": 0.5}, {"params": last, "lr": 0.05}], lr=0.01)


WAYS_TO_TRAIN = {
    "Adam, fused": (lambda: Trained(torch.optim.Adam, lr=0.02, fused=True), {}),
    "two groups of parameters": (Grouped, {}),
    "Adam": (lambda: Trained(torch.optim.Adam, lr=0.02), {}),
    "AdamW with decay": (lambda: Trained(torch.optim.AdamW, lr=0.02, weight_decay=0.5), {}),
    "Adam, foreach off": (lambda: Trained(torch.optim.Adam, lr=0.02, foreach=False), {}),
    "SGD with momentum": (lambda: Trained(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True), {}),
    "Adagrad": (lambda: Trained(torch.optim.Adagrad, lr=0.05), {}),
    "LBFGS": (lambda: Trained(torch.optim.LBFGS, lr=0.1, max_iter=3), {}),
    "accumulation": (lambda: Trained(torch.optim.Adam, lr=0.02), {"accumulate_grad_batches": 3}),
    "clipping": (lambda: Trained(torch.optim.Adam, lr=0.02), {"gradient_clip_val": 0.1}),
    "bf16-mixed": (lambda: Trained(torch.optim.Adam, lr=0.02), {"precision": "bf16-mixed"}),
    "bf16-true": (lambda: Trained(torch.optim.AdamW, lr=0.02), {"precision": "bf16-true"}),
    "noise": (lambda: Trained(NoisySGD, lr=0.1), {}),
    "no torch optimizer": (lambda: Trained(Foreign, lr=0.1), {}),
    "manual optimization": (ByHand, {}),
    "manual optimization with noise": (NoisyByHand, {}),
}


@each_callback
@pytest.mark.parametrize(("module", "options"), WAYS_TO_TRAIN.values(), ids=WAYS_TO_TRAIN)
def test_no_forward_sees_a_pruned_weight(fit, kind, module, options):
    (callback, epoch), module = holding(kind), module()
    leaks = Leaks(callback, epoch)
    fit(callback, leaks, module=module, max_epochs=3, **options)
    leaks.assert_none(module)
    assert leaks.moved
    assert 0.4 < callback.mask.sparsity < 0.6


@each_callback
def test_a_gradient_scaler_that_skips_steps(fit, kind):
    class Overflows(Trained):
        """Now and then; a scaler then skips the step."""

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (1e36 if batch_idx % 3 == 1 else 1.0)

    class Scaler(torch.amp.GradScaler):
        skipped = taken = 0

        def step(self, optimizer, *args, **kwargs):
            before = [one.detach().clone() for one in module.parameters()]
            super().step(optimizer, *args, **kwargs)
            stayed = all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
            self.skipped, self.taken = self.skipped + stayed, self.taken + (not stayed)

    (callback, epoch), module = holding(kind), Overflows(torch.optim.AdamW, lr=0.02, weight_decay=0.5)
    leaks, scaler = Leaks(callback, epoch), Scaler("cpu", init_scale=2.0**10)
    fit(callback, leaks, module=module, max_epochs=3, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert (scaler.skipped, scaler.taken) == (3 * 3, 3 * 5)
    leaks.assert_none(module)
    assert all(bool(one.isfinite().all()) for one in module.parameters())


class Thaws(BaseFinetuning):
    """The first layer joins the optimizer in the second epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.05)


class CleanGradients(Callback):
    """Sees the gradients as clipping sees them, and what the optimizer remembers."""

    def __init__(self, callback, epoch: int) -> None:
        self.callback, self.epoch, self.largest, self.seen, self.remembered = callback, epoch, 0.0, set(), 0.0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        weights = dict(pl_module.named_parameters())
        for name, kept in (self.callback.mask or {}).items() if trainer.current_epoch >= self.epoch else ():
            if (grad := weights[name].grad) is not None:
                self.seen.add((trainer.current_epoch, name))
                self.largest = max(self.largest, float(grad[~kept].abs().max()))
            for memory in optimizer.state.get(weights[name], {}).values():
                if isinstance(memory, torch.Tensor) and memory.shape == kept.shape:
                    self.remembered = max(self.remembered, float(memory[~kept].abs().max()))


@each_callback
def test_a_layer_that_thaws_later_is_held_and_clipped_like_the_others(fit, kind):
    class LastFirst(Blobs):
        def configure_optimizers(self):
            return torch.optim.AdamW([one for one in self.parameters() if one.requires_grad], lr=0.02)

    (callback, epoch), module = holding(kind), LastFirst()
    leaks, gradients = Leaks(callback, epoch), CleanGradients(callback, epoch)
    fit(callback, Thaws(), leaks, gradients, module=module, max_epochs=3, gradient_clip_val=0.1)
    weights = {"net.0.weight", "net.2.weight"}
    assert gradients.seen >= {(1, name) for name in weights} | {(2, name) for name in weights}
    assert gradients.largest == gradients.remembered == 0.0
    assert leaks.moved
    leaks.assert_none(module, forwards=1)


@each_callback
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.LBFGS])
def test_what_a_dense_checkpoint_remembers_of_pruned_weights_is_forgotten(fit, tmp_path, kind, optimizer):
    def remember(trainer, _):
        states.append(deepcopy(trainer.optimizers[0].state_dict()["state"]))

    def module():
        return Trained(optimizer, lr=0.02, **({"max_iter": 3} if optimizer is torch.optim.LBFGS else {}))

    dense, states = tmp_path / "dense.ckpt", []
    fit(module=module()).trainer.save_checkpoint(dense, weights_only=False)
    (callback, epoch), first = holding(kind), within("on_train_batch_start", remember, times=1)
    if kind == "at_epoch":
        callback.at_epoch = epoch = 2
    leaks, resumed, gradients = Leaks(callback, epoch), module(), CleanGradients(callback, epoch)
    fit(callback, first, leaks, gradients, module=resumed, max_epochs=4, ckpt_path=dense)
    assert resumed.trainer.current_epoch == 4
    leaks.assert_none(resumed, forwards=16)
    (state,) = states  # what is remembered when the first batch after the resume comes
    if optimizer is torch.optim.LBFGS:
        assert state == {}
        return
    assert state[0]["exp_avg"].any()
    assert state[0]["step"] == 16
    assert not state[0]["exp_avg"][~callback.mask["net.0.weight"]].any()
    assert gradients.remembered == 0.0


AVERAGES = {
    "EMA": lambda: EMAWeightAveraging(decay=0.5),
    "late EMA": lambda: EMAWeightAveraging(decay=0.9, update_every_n_steps=3, update_starting_at_step=10),
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
}


@each_callback
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("averaging", AVERAGES.values(), ids=AVERAGES)
def test_averaged_weights_have_the_zeros_in_validation_files_and_in_the_end(fit, tmp_path, kind, first, averaging):
    (callback, epoch), average = holding(kind), averaging()
    leaks, module = Leaks(callback, epoch), Blobs()
    callbacks = [average, callback] if first else [callback, average]
    every = ModelCheckpoint(save_top_k=-1, every_n_train_steps=3)  # also before the average was validated
    fit(*callbacks, leaks, every, module=module, max_epochs=4, enable_checkpointing=True)
    leaks.assert_none(module)
    stored = [torch.load(path, weights_only=True) for path in tmp_path.glob("checkpoints/epoch=*.ckpt")]
    after = [one["state_dict"] for one in stored if one["global_step"] > 8 * epoch]
    assert len(after) == (10 if epoch == 0 else 8)
    assert all(bool((one[name][~kept] == 0).all()) for one in after for name, kept in callback.mask.items())


def test_a_held_network_trains_as_one_that_never_had_the_weights(fit):
    """Clipping included: the norm is that of the gradients of the pruned network."""

    class Masked(Trained):
        def forward(self, x):
            first, last = (self.net[i].weight * self.kept[f"net.{i}.weight"] for i in (0, 2))
            return linear(linear(x, first, self.net[0].bias).relu(), last, self.net[2].bias)

    options = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}
    held, masked = (kind(torch.optim.SGD, lr=0.1, momentum=0.9) for kind in (Trained, Masked))
    masked.kept = half_mask(held)
    fit(HoldZeros(half_mask(held)), module=held, **options)
    fit(module=masked, **options)
    apply_mask(masked, half_mask(masked))
    for name, value in held.state_dict().items():
        torch.testing.assert_close(value, masked.state_dict()[name], rtol=0, atol=1e-6)


def test_hold_zeros_without_a_mask_holds_the_zeros_it_finds(fit):
    module, callback = Blobs(), HoldZeros()
    mask = half_mask(module)
    apply_mask(module, mask)
    fit(callback, module=module)
    assert nonzeros(module) == mask


def test_hold_zeros_that_finds_no_zeros_says_so(fit):
    with pytest.warns(UserWarning, match="HoldZeros found no zeros to hold"):
        fit(HoldZeros())


def test_hold_zeros_holds_those_of_a_checkpoint_that_is_resumed_and_reads_the_mask_of_a_file(fit, tmp_path):
    pruning = RouletteWheelPruning(2, tolerance=math.inf, tree=Tree(0.2, max_levels=2), dirpath=tmp_path)
    fit(pruning)
    path = pruning.best_model_path
    resumed, dense = fit(HoldZeros(), max_epochs=4, ckpt_path=path), fit(HoldZeros(path))
    assert resumed.trainer.global_step == 32
    assert nonzeros(resumed) == nonzeros(dense) == pruning.mask


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_average_has_the_zeros(fit, tmp_path):
    for epochs, path in ((2, None), (4, tmp_path / "checkpoints" / "pruned.ckpt")):
        callback, module, average = holding("at_epoch")[0], Blobs(), EMAWeightAveraging(decay=0.5)
        leaks = Leaks(callback, 1)
        fit(callback, average, leaks, module=module, max_epochs=epochs, enable_checkpointing=True, ckpt_path=path)
        leaks.assert_none(module, forwards=12)


def test_after_fit_the_weights_are_free_again(fit):
    module, callback = Blobs(), HoldZeros(half_mask(Blobs()))
    fit(callback, module=module)
    assert leak(module, callback.mask) == 0.0
    fit(module=module)
    assert leak(module, callback.mask) > 0.0


class Layers(nn.Sequential):
    """Dynamo compiles no forward of torch's own classes."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


class Compiled(Blobs):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.net, self.graphs, self.backend = Layers(*self.net), 0, torch._dynamo.lookup_backend(backend)
        self.net.compile(backend=self.count)

    def count(self, graph, inputs):
        self.graphs += 1
        return self.backend(graph, inputs)


# Few batches are cut anew by a search: then once for batches of any size
COMPILED = [("HoldZeros", 50, 0, "eager"), ("HoldZeros", 50, 0, "aot_eager")]
COMPILED += [("at_epoch", 10, 0, "eager"), ("at_epoch", 50, 1, "eager")]


@pytest.mark.parametrize(("kind", "batch_size", "more", "backend"), COMPILED)
def test_a_compiled_network_is_held_without_compiling_it_again(fit, make_trainer, kind, batch_size, more, backend):
    (callback, _), modules = holding(kind), []
    for callbacks in ([], [callback]):
        torch._dynamo.reset()
        modules.append(Compiled(backend))
        fit(*callbacks, module=modules[-1], val=val_loader(batch_size), max_epochs=3)
    free, held = modules
    assert held.graphs - more == free.graphs > 0
    assert leak(held, callback.mask) == 0.0
    assert list(callback.mask) == ["net.0.weight", "net.2.weight"]
    x = torch.randn(50, 16)
    torch.testing.assert_close(held(x), nn.Sequential(*held.net)(x))
    if kind == "at_epoch":
        (logged,) = make_trainer().validate(held, val_loader(batch_size), verbose=False)
        assert logged["val_acc"] == pytest.approx(callback.report.trained_score, abs=1e-7)
