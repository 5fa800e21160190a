"""The file of the winner holds the weights that were measured, or they are beside it: one row for each writer."""

from __future__ import annotations

import time
import warnings

import fsspec
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LambdaCallback
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lightning_roulette import HoldZeros, Mask, Tree, apply_mask
from lightning_roulette.trainer.scores.trainer_evaluator import TrainerEvaluator
from tests.support.failing import Fails as PowerCut
from tests.support.failing import counting
from tests.support.fits import pruner
from tests.support.modules import Blobs
from tests.support.results import WEIGHTS, equal, nonzeros

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*changes the weights when a checkpoint is saved"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def dense_state(module):
    return {name: value + 0.01 for name, value in module.state_dict().items()}


class Rewrites(Blobs):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = dense_state(self)


class InPlace(Blobs):
    """Alters the tensors of the file, which are those of the module."""

    def on_save_checkpoint(self, checkpoint):
        for one in checkpoint["state_dict"].values():
            one.add_(0.01)


class NoWeights(Blobs):
    def on_save_checkpoint(self, checkpoint):
        del checkpoint["state_dict"]


class ByStateDict(Blobs):
    def state_dict(self, *args, **kwargs):
        return {name: one + 0.01 for name, one in super().state_dict(*args, **kwargs).items()}


class ByHook(Blobs):
    def __init__(self) -> None:
        super().__init__()
        self.net.register_state_dict_post_hook(lambda _, state, *__: state.update({"net.2.weight": torch.ones(10, 24)}))


class Averages(Blobs):
    """Saves an average, which is not there before a batch was trained."""

    average = None

    def on_train_batch_end(self, *_):
        now = {name: one.detach() for name, one in self.named_parameters()}
        self.average = {name: 0.9 * (self.average or now)[name] + 0.1 * one for name, one in now.items()}

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **self.average}


class Writer(Callback):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["state_dict"] = dense_state(pl_module)


class Plugin(TorchCheckpointIO):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        state = {name: one + 0.01 for name, one in checkpoint["state_dict"].items()}
        super().save_checkpoint({**checkpoint, "state_dict": state}, path, storage_options)


REWRITTEN = {
    "module": (Rewrites, list, {}),
    "no weights": (NoWeights, list, {}),
    "state_dict": (ByStateDict, list, {}),
    "a hook of a layer": (ByHook, list, {}),
    "average": (Averages, list, {}),
    "callback": (Blobs, lambda: [Writer()], {}),
    "lambda": (Blobs, lambda: [LambdaCallback(on_save_checkpoint=Writer.on_save_checkpoint.__get__(Writer()))], {}),
    "plugin": (Blobs, list, {"plugins": lambda: [Plugin()]}),
    "plugin, later": (Rewrites, list, {"plugins": lambda: [AsyncCheckpointIO(TorchCheckpointIO())]}),
}


@pytest.mark.parametrize("at_epoch", [None, 1])
@pytest.mark.parametrize("row", REWRITTEN)
def test_weights_that_a_file_lacks_are_beside_it(fit, tmp_path, row, at_epoch):
    module, callbacks, options = REWRITTEN[row]
    pruning, options = pruner(dirpath=tmp_path, at_epoch=at_epoch), {name: make() for name, make in options.items()}
    with pytest.warns(UserWarning, match="does not hold the weights that were measured.*pruned-weights.pt"):
        module = fit(pruning, *callbacks(), module=module(), **options)
    path = tmp_path / "pruned-weights.pt"
    assert any("pruned-weights.pt" in note for note in pruning.report.notes)
    assert pruning.best_model_path == str(tmp_path / "pruned.ckpt")
    assert Mask.load(path) == pruning.mask == nonzeros(module)
    fresh = Blobs()
    fresh.load_state_dict(torch.load(path)["state_dict"], strict=False)
    assert equal(dict(fresh.named_parameters()), dict(module.named_parameters()))
    other = Blobs()
    apply_mask(other, path)
    assert nonzeros(other) == pruning.mask


WARNED = {row: kinds for row, kinds in REWRITTEN.items() if row != "plugin"} | {"in place": (InPlace, list, {})}


@pytest.mark.filterwarnings("ignore:.*changed after the network was measured.*")
@pytest.mark.filterwarnings("ignore:.*does not hold the weights that were measured")
@pytest.mark.parametrize("row", WARNED)
def test_who_rewrites_is_named_before_the_search(fit, tmp_path, row):
    module, callbacks, options = WARNED[row]
    with pytest.warns(UserWarning, match=r"(\.on_save_checkpoint|\.state_dict) changes the weights when"):
        fit(pruner(dirpath=tmp_path), *callbacks(), module=module(), **{name: make() for name, make in options.items()})


class Prefixed(Blobs):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {f"model.{name}": one for name, one in checkpoint["state_dict"].items()}


class Half(Blobs):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {name: one.half() for name, one in checkpoint["state_dict"].items()}


class OneLayer(Blobs):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {name: one for name, one in checkpoint["state_dict"].items() if "net.2" in name}


class More(Blobs):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"]["more"] = torch.ones(3)
        checkpoint["classes"] = {"ten", "more"}


class NotPlain:
    pass


class Objects(Blobs):
    """A file that `torch.load(weights_only=True)` refuses."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["object"] = NotPlain()


class Fails(Blobs):
    """Needs what only training builds, and fails until then."""

    def on_save_checkpoint(self, checkpoint):
        assert "validate_loop" in checkpoint["loops"]  # Lightning's own only


LEGITIMATE = {"prefix": Prefixed, "half": Half, "one layer": OneLayer, "more": More, "objects": Objects, "fails": Fails}
LEGITIMATE |= {"no hook": Blobs}


@pytest.mark.parametrize("kind", LEGITIMATE)
def test_a_legitimate_file_is_warned_of_by_nobody(fit, tmp_path, kind):
    pruning = pruner(dirpath=tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(pruning, module=LEGITIMATE[kind]())
    assert [str(one.message) for one in caught if "RouletteWheelPruning" in str(one.message)] == []
    assert not (tmp_path / "pruned-weights.pt").exists()
    assert not any("checkpoint" in note for note in pruning.report.notes)


@pytest.mark.parametrize("average", [lambda: EMAWeightAveraging(decay=0.5)])
def test_a_file_of_an_averaged_network_is_faithful(fit, tmp_path, average):
    fit(pruner(dirpath=tmp_path), average())
    assert not (tmp_path / "pruned-weights.pt").exists()


def test_a_hook_that_is_tried_leaves_nothing_behind(fit, tmp_path):
    class Counts(Callback):
        saves, kept = 0, None

        def __init__(self) -> None:
            self.paths, self.states = [], {}

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            self.saves += 1
            self.paths.append(self.saves)
            self.states[self.saves] = checkpoint["state_dict"].keys()

    class Module(Blobs):
        saves = 0

        def on_save_checkpoint(self, checkpoint):
            self.saves += 1
            self.last = self.saves
            with torch.no_grad():
                self.net[0].bias.add_(0.0 if self.saves > 1 else 1.0)

    counts, module = Counts(), Module()
    before = {name: one.clone() for name, one in module.named_parameters()}
    with pytest.warns(UserWarning, match="Module.on_save_checkpoint changes the weights"):
        fit(pruner(dirpath=tmp_path), counts, module=module)
    written = len(list(tmp_path.glob("*.ckpt")))
    assert (counts.saves, len(counts.paths), len(counts.states), module.saves, module.last) == (written,) * 5
    assert before.keys() == dict(module.named_parameters()).keys()


def test_a_file_that_cannot_be_read_back_is_said_and_does_not_end_the_fit(fit, tmp_path):
    class Elsewhere(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            super().save_checkpoint(checkpoint, f"{path}.later", storage_options)

    pruning = pruner(dirpath=tmp_path)
    fit(pruning, plugins=[Elsewhere()])
    assert any("was not checked" in note for note in pruning.report.notes)


def test_a_file_that_is_written_late_is_waited_for(fit, tmp_path):
    class Slow(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            time.sleep(0.1)
            super().save_checkpoint(checkpoint, path, storage_options)

    pruning = pruner(dirpath=tmp_path)
    fit(pruning, plugins=[AsyncCheckpointIO(Slow())])
    assert not any("checkpoint" in note for note in pruning.report.notes)
    assert Mask.load(pruning.best_model_path) == pruning.mask


# ---- paths of other file systems


@pytest.fixture
def folder():
    yield "memory://folder"
    if fsspec.filesystem("memory").exists("/folder"):
        fsspec.filesystem("memory").rm("/folder", recursive=True)


def test_files_on_another_file_system_are_read_by_all_that_read_files(fit, folder):
    pruning = pruner(dirpath=folder)
    pruned = fit(pruning)
    path = pruning.best_model_path
    assert path == "memory://folder/pruned.ckpt"
    assert Mask.load(path) == pruning.mask
    module = Blobs()
    apply_mask(module, path)
    assert nonzeros(module) == pruning.mask
    held = fit(HoldZeros(path))
    assert nonzeros(held) == pruning.mask
    loaded = Blobs.load_from_checkpoint(path)
    assert all(torch.equal(loaded.state_dict()[name], pruned.state_dict()[name]) for name in WEIGHTS)


def test_a_rewritten_file_on_another_file_system(fit, folder):
    pruning = pruner(dirpath=folder)
    with pytest.warns(UserWarning, match="does not hold the weights that were measured"):
        fit(pruning, module=Rewrites())
    assert Mask.load(f"{folder}/pruned-weights.pt") == pruning.mask


def test_a_file_url(fit, tmp_path):
    pruning = pruner(dirpath=f"file://{tmp_path}")
    fit(pruning)
    assert Mask.load(pruning.best_model_path) == Mask.load(tmp_path / "pruned.ckpt") == pruning.mask


def test_a_search_that_breaks_off_leaves_its_levels_on_another_file_system(fit, folder, monkeypatch):
    monkeypatch.setattr(TrainerEvaluator, "_as", counting())
    pruning = pruner(dirpath=folder, tree=Tree(0.2, max_levels=9))
    with pytest.raises(RuntimeError, match="power cut"), pytest.warns(UserWarning, match="the search did not end"):
        fit(pruning, module=PowerCut(at=6))
    assert Mask.load(f"{folder}/interrupted.pt").sparsity > 0


def test_a_folder_that_is_missing_is_an_error_of_its_file_system(folder):
    with fsspec.open(f"{folder}/there", "w") as file:
        file.write("x")
    with pytest.raises(FileNotFoundError):
        Mask.load(f"{folder}/missing.ckpt")


# ---- EarlyStopping


def test_early_stopping_that_may_end_before_the_network_has_recovered_is_said_at_the_start(fit):
    with pytest.warns(UserWarning, match=r"watches 'val_loss' with patience=1.*cut at epoch 1.*patience of 3"):
        fit(pruner(at_epoch=1), EarlyStopping("val_loss", patience=1), max_epochs=3)


@pytest.mark.parametrize(("at_epoch", "patience"), [(None, 1), (1, 3)])
def test_early_stopping_that_cannot_is_not(fit, at_epoch, patience):
    pruning = pruner(at_epoch=at_epoch)
    fit(pruning, EarlyStopping("val_loss", patience=patience), max_epochs=3)  # a warning is an error in tests
    assert pruning.report.sparsity > 0
