"""What is prunable, and what is said of the rest: modules with weights that validation does not use."""

from __future__ import annotations

import copy
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear, one_hot

from lightning_roulette import Tree
from tests.support.fits import pruner
from tests.support.modules import Blobs, Fetches, dense_net, tiny_net
from tests.support.results import PowerCut, load

OWN = ("net.0.weight", "net.2.weight")


def right(scores, classes):
    return (scores.argmax(1) == classes).float().mean()


class Discriminates(Blobs):
    """Trains a discriminator of its outputs."""

    def __init__(self):
        super().__init__()
        self.disc = dense_net(10, 12, 2)

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        both = torch.cat([out.detach(), one_hot(batch[1], 10).float()])
        wanted = torch.arange(2).repeat_interleave(len(out))
        return cross_entropy(out, batch[1]) + cross_entropy(self.disc(both), wanted)


class LogsDiscriminator(Discriminates):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_disc", self.disc(self(batch[0])).softmax(1)[:, 1].mean())


class AuxiliaryHead(Blobs):
    def __init__(self):
        super().__init__()
        self.aux = nn.Linear(16, 10)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + cross_entropy(self.aux(batch[0]), batch[1])


class LogsAuxiliary(AuxiliaryHead):
    """Computes the outputs of both heads together."""

    def validation_step(self, batch, batch_idx):
        both = torch.stack([self(batch[0]), self.aux(batch[0])])
        self.log("val_acc", right(both[0], batch[1]))
        self.log("val_aux", right(both[1], batch[1]))


class FetchesAuxiliary(Fetches, LogsAuxiliary):
    pass


class OnlyInTraining(Blobs):
    def __init__(self):
        super().__init__()
        self.warp = nn.Linear(16, 16)

    def forward(self, x):
        return self.net(x + 0.1 * self.warp(x) if self.training else x)


class Experts(Blobs):
    """Routes samples to two of three experts."""

    def __init__(self):
        super().__init__()
        self.net, self.experts = nn.Identity(), nn.ModuleList(tiny_net() for _ in range(3))

    def forward(self, x):
        chosen, out = x[:, 0] > 0, x.new_zeros(len(x), 10)
        for expert, where in zip(self.experts, (chosen, ~chosen, chosen & ~chosen), strict=True):
            if where.any():
                out = out.index_put((where.nonzero()[:, 0],), expert(x[where]))
        return out


class MeanTeacher(Blobs):
    """Validates a teacher, which is not frozen."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net)

    def forward(self, x):
        return self.net(x) if self.training else self.teacher(x)

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        for mean, own in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            mean.lerp_(own, 0.2)

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), 1e-2)


class TaughtStudent(MeanTeacher):
    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (self(batch[0]) - self.teacher(batch[0])).pow(2).mean()


class Frozen(MeanTeacher):
    """Validates a teacher that is frozen."""

    def __init__(self):
        super().__init__()
        self.teacher.requires_grad_(False)


@dataclass(frozen=True)
class Unused:
    module: Callable[[], Blobs]
    names: tuple[str, ...]
    why: str = "unused by validation"


NO_EFFECT = "no effect on val_acc or val_loss"
DISC = ("disc.0.weight", "disc.2.weight")
UNUSED = {
    "a discriminator": Unused(Discriminates, DISC),
    "a discriminator that is logged": Unused(LogsDiscriminator, DISC, NO_EFFECT),
    "an auxiliary head": Unused(AuxiliaryHead, ("aux.weight",)),
    "an auxiliary head that is logged": Unused(LogsAuxiliary, ("aux.weight",), "no effect on val_acc"),
    "an iterator over the loaders": Unused(FetchesAuxiliary, ("aux.weight",), "no effect on val_acc"),
    "only in training": Unused(OnlyInTraining, ("warp.weight",)),
    "an expert without samples": Unused(Experts, ("experts.2.0.weight", "experts.2.2.weight")),
    "the student of a teacher": Unused(MeanTeacher, OWN),
    "the teacher of a student": Unused(TaughtStudent, ("teacher.0.weight", "teacher.2.weight")),
}


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`.*")
@pytest.mark.parametrize("branches", [2, 1])
@pytest.mark.parametrize("row", UNUSED.values(), ids=UNUSED)
def test_what_validation_does_not_use_is_left_alone_and_said(fit, caplog, row, branches):
    if branches == 1 and row.module in (Experts, MeanTeacher, FetchesAuxiliary):
        pytest.skip("one row of each kind is enough between epochs")
    pruning = pruner(branches=branches, tolerance=math.inf, at_epoch=None if branches > 1 else [1], monitor="val_acc")
    with caplog.at_level(logging.INFO, "lightning_roulette"):
        module = fit(pruning, module=row.module())
    matrices = {name: one for name, one in module.named_parameters() if one.dim() > 1}
    zeros = {name: int((one == 0).sum()) for name, one in matrices.items()}
    assert {name for name in zeros if name not in pruning.mask} == {*row.names}
    assert all((zeros[name] > 0) == (name not in row.names) for name in zeros)
    assert sum(zeros.values()) == round(pruning.report.sparsity * pruning.report.size)
    (skipped,) = pruning.report.skipped
    assert (skipped.names, skipped.why) == (row.names, row.why)
    assert skipped.weights == sum(matrices[name].numel() for name in row.names)
    assert pruning.report.matrices == sum(one.numel() for one in matrices.values())
    assert pruning.report.size == pruning.report.matrices - skipped.weights
    line = next(one.message for one in caplog.records if "weights in matrices" in one.message)
    assert all(word in line for word in (f"{pruning.report.size:,} of ", row.why, row.names[0]))


class Functional(Blobs):
    def forward(self, x):
        return functional_call(self.net, dict(self.net.named_parameters()), (x,))


class ReadsWeights(Blobs):
    def forward(self, x):
        first, _, last = self.net
        return linear(torch.relu(linear(x, first.weight, first.bias)), last.weight.T.T, last.bias)


class Compiled(Blobs):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


class Infers(Blobs):
    def validation_step(self, batch, batch_idx):
        with torch.inference_mode():
            super().validation_step(batch, batch_idx)


class InThread(Blobs):
    """Calls its network in another thread, as replicas are called."""

    def forward(self, x):
        found, trains = [], torch.is_grad_enabled()

        def work():
            with torch.set_grad_enabled(trains):
                found.append(self.net(x))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return found[0]


class Shared(Blobs):
    def __init__(self):
        super().__init__()
        self.again = self.net

    def forward(self, x):
        return self.again(x)


class NearlyIdle(Blobs):
    """Layers that matter too little to change an accuracy, which is all that is logged."""

    def __init__(self):
        super().__init__()
        self.small = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(3))
        for part in self.small:
            nn.init.normal_(part.weight, std=1e-7)

    def forward(self, x):
        for part in self.small:
            x = x + part(x)
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", right(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), 1e-2)


class ZeroAdapter(Blobs):
    """A layer whose weights are all zero, on equal inputs."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(1, 10, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.net(x) + self.up(x.new_ones(len(x), 1))

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), 1e-2)


class Attends(Blobs):
    def __init__(self):
        super().__init__()
        self.look = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
        self.read = nn.LSTM(4, 8, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.net(self.look(self.read(x.view(-1, 4, 4))[0]).mean(1))


USED = {one.__name__: one for one in (Functional, ReadsWeights, Compiled, Infers, InThread, Shared)}
USED |= {one.__name__: one for one in (NearlyIdle, ZeroAdapter, Attends)}


@pytest.mark.parametrize("module", USED.values(), ids=USED)
def test_what_validation_uses_in_any_way_is_prunable(fit, module):
    pruning = pruner(tolerance=math.inf)
    pruned = fit(pruning, module=module(), max_epochs=1)
    matrices = {name: one for name, one in pruned.named_parameters() if one.dim() > 1}
    assert pruning.mask.keys() == matrices.keys()
    assert pruning.report.skipped == ()
    assert pruning.report.size == pruning.report.matrices == sum(one.numel() for one in matrices.values())


def test_include_takes_weights_that_validation_does_not_use(fit):
    pruning = pruner(tolerance=math.inf, include=["net.*weight", "disc.0.weight"])
    module = fit(pruning, module=Discriminates())
    assert pruning.mask.keys() == {*OWN, "disc.0.weight"}
    assert int((module.disc[0].weight == 0).sum()) > 0
    assert {(one.names, one.why) for one in pruning.report.skipped} == {(("disc.2.weight",), "not included")}


def test_a_validation_of_frozen_weights_is_refused_with_a_remedy(fit):
    with pytest.raises(RuntimeError, match="RouletteWheelPruning: .*include"):
        fit(pruner(), module=Frozen())


def test_only_weights_that_do_not_judge_are_refused(fit):
    pruning = pruner(monitor="val_aux", mode="max", exclude=["aux.*"], tolerance=math.inf)
    with pytest.raises(RuntimeError, match=r"no prunable weight has an effect on val_aux.*monitor="):
        fit(pruning, module=LogsAuxiliary())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_later_cuts_and_resumes_keep_the_names_and_what_is_said(fit, tmp_path):
    def cutting():
        return pruner(branches=1, tolerance=math.inf, at_epoch=[1, 2, 3], tree=Tree(0.2))

    whole = cutting()
    fit(whole, module=Discriminates(), max_epochs=4)
    options = {"max_epochs": 4, "enable_checkpointing": True, "default_root_dir": tmp_path / "broken"}
    with pytest.raises(RuntimeError):
        fit(cutting(), PowerCut(), module=Discriminates(), **options)
    resumed, files = cutting(), sorted((tmp_path / "broken").rglob("*epoch=1*.ckpt"))
    fit(resumed, module=Discriminates(), ckpt_path=files[-1], **options)
    for pruning in (whole, resumed):
        assert len(pruning.report.levels) == 3
        assert [one.names for one in pruning.report.skipped] == [DISC]
        assert pruning.report.matrices == 624 + 10 * 12 + 12 * 2
    weights = load(resumed.best_model_path)["state_dict"]
    assert all(int((weights[name] == 0).sum()) == 0 for name in DISC)


class Tied(Blobs):
    """A decoder whose weight is a transpose of the encoder's, over the same memory."""

    def __init__(self):
        super().__init__()
        self.enc, self.dec = nn.Linear(16, 12), nn.Linear(12, 16)
        self.dec.weight.data = self.enc.weight.data.t()

    def forward(self, x):
        return self.net(x + self.dec(torch.relu(self.enc(x))))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("refit", [None, "least_squares"])
def test_two_parameters_over_one_storage_are_counted_once(fit, refit):
    pruning = pruner(tolerance=math.inf, refit=refit, tree=Tree(0.3, max_levels=2))
    module = fit(pruning, module=Tied())
    weights = [module.net[0].weight, module.net[2].weight, module.enc.weight]
    assert pruning.report.size == sum(one.numel() for one in weights)
    assert sum(int((one == 0).sum()) for one in weights) == pruning.report.size - pruning.report.survivors
    assert torch.equal(module.dec.weight, module.enc.weight.t())
    assert [(one.names, one.why) for one in pruning.report.skipped] == [(("dec.weight",), "tied to enc.weight")]


class Conv1D(nn.Module):
    """As in transformers."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(0.3 * torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Transposed(Blobs):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(Conv1D(24, 16), nn.ReLU(), Conv1D(10, 24))


def test_conv1d_is_pruned_and_refitted(fit):
    pruning = pruner(tolerance=math.inf, refit="least_squares", tree=Tree(0.4, max_levels=2))
    module = fit(pruning, module=Transposed())
    assert pruning.mask.keys() == {*OWN}
    assert not any(level.undone for level in pruning.report.accepted)
    dense = pruning.weights_at(0)
    for name in OWN:
        kept = pruning.mask[name]
        assert torch.equal(module.get_parameter(name) != 0, kept)
        assert not torch.equal(module.get_parameter(name)[kept], dense[name][kept])  # refitted


class Embeds(Blobs):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 16)

    def forward(self, x):
        return self.net(x + self.embed.weight[0])


class Backbone(Blobs):
    def __init__(self):
        super().__init__()
        self.body = dense_net(16, 64, 16).requires_grad_(False)

    def forward(self, x):
        return self.net(x + self.body(x))


def test_a_bare_callback_on_a_network_of_which_little_is_prunable_warns(fit):
    with pytest.warns(
        UserWarning, match=r"624 of 2,224 .*1,600 in embed.weight \(weight of Embedding\).*register_layer"
    ):
        fit(pruner(), module=Embeds())


@pytest.mark.parametrize(("module", "options"), [(Embeds, {"exclude": ["embed.*"]}), (Backbone, {})])
def test_what_the_user_chose_not_to_prune_does_not_warn(fit, module, options):
    pruning = pruner(**options)
    fit(pruning, module=module())  # a warning would be an error here
    assert [one.why for one in pruning.report.skipped] == ["excluded" if options else "frozen"]


class Times(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(16, 10))

    def forward(self, x):
        return x @ self.matrix


def with_net(net: nn.Module, **attributes) -> Blobs:
    module = Blobs()
    module.net = net
    return module


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            nn.Sequential(Times(), nn.LayerNorm(10)),
            r"100% of .* Times \(net.0.matrix: .*call register_layer\(Times, weight='matrix'\)",
        ),
        (nn.Sequential(nn.Bilinear(2, 2, 9)), r"100% of .* Bilinear .*\. Pass include=\['\*\.weight'\]"),
        (nn.Linear(16, 10).requires_grad_(False), r"100% of .* Linear \(net.weight: frozen\)\. Unfreeze"),
        (nn.Linear(16, 10, dtype=torch.complex64), "Such parameters cannot be pruned"),
        (nn.LayerNorm(16), "no weights in matrices"),
    ],
)
def test_a_network_with_nothing_prunable_is_refused_with_its_main_class_first(fit, net, message):
    with pytest.raises(ValueError, match="no parameter of Blobs is prunable. .*" + message):
        fit(pruner(), module=with_net(net))
