"""Freezes what the package computes, so that a refactoring can be shown to change no result.

`python tests/frozen.py write FILE.json` runs all configurations and writes what came out. `python tests/frozen.py check
FILE.json` runs them again, prints each difference (configuration, path, what was frozen, what came) and exits with 1 if
there is any. Further arguments name configurations to run alone. This is a script and no test.

It imports only the names at the top of the package, and no other file of tests. Parts of dataclasses are stored by
their place and not by their name, so that fields may be renamed.

Frozen are:

- SHA-256 of each mask: the winner's and those of all levels; of each weight of the module, of each weight of each
  level, and of the state of the random generators after a fit;
- the report: all numbers exactly, words without spaces, enum members by name, names of parameters;
- scalars in the event files, as tag, step and value; steps of other entries; the tags of the charts drawn together;
- names and values in `trainer.callback_metrics`; how often `validation_step` was called;
- names of all files; of each checkpoint SHA-256 of its weights and of its optimizers' tensors, its zeros, the progress
  of its loops, and of the callback's state the keys and types;
- of a search that did not end its partial report, the masks in its file, and the number of lines in its journal;
- what `search`, `spin`, `Calibration.refit` and the functions over parameters return, and what an observer is told.

Not frozen are:

- time: fields and tags of seconds;
- prose: `str(report)`, text with spaces in reports, reasons why a parameter is left alone, warnings, log lines, titles;
- names of fields of dataclasses, contents of the journal and the fingerprint in its name, names of event files, paths;
- contents of other callbacks' states in checkpoints.

Digests of weights are those of floating point numbers. They are equal on an equal machine, with equal libraries and an
equal number of threads, which is one here. So a file is compared on the machine that wrote it.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import hashlib
import json
import logging
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import lightning_roulette
from lightning_roulette import (
    Batches,
    Calibration,
    HoldZeros,
    LeastSquares,
    Mask,
    Observer,
    PrunedWeights,
    Refit,
    Resamples,
    RouletteWheelPruning,
    Scores,
    Singles,
    Tree,
    Validation,
    Wheel,
    Winner,
    apply_mask,
    prunable_parameters,
    search,
    skipped_parameters,
    sparsity,
    spin,
)

TIME = re.compile("second|time|duration|elapsed", re.IGNORECASE)  # in the names of what is not frozen
# of a report, in addition to its fields
PROPERTIES = (
    "floor",
    "held_out_floor",
    "sparsity",
    "survivors",
    "search_score",
    "decline",
)  # of a report, beside its fields
MOST_LEVELS = 1000

# ------------------------------------------------------------------------------------------------ values in JSON


def digest(tensor: Tensor) -> str:
    """Kind, shape and SHA-256 of the bytes."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    plain = whole.detach().cpu().contiguous()
    content = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    kind = str(plain.dtype).removeprefix("torch.")
    return f"{kind} {list(plain.shape)} {hashlib.sha256(content).hexdigest()}"


# Fields of records that came after a reference was written.
ADDED = {
    "matrices",
    "skipped",
    "dense_measured",
    "notes",
    "target_sparsity",
    "target_met",
    "tolerance_why",
    "not_refitted",
    "footprint",
    "unit",
    "units",
    "multiply_adds",
    "counted",
    "cost",
    "target_reduction",
    "target",
}


def frozen(value: Any) -> Any:
    """A value in plain JSON: dataclasses as lists of their fields, floats exact, prose and time left out."""
    if isinstance(value, enum.Enum):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [one.name for one in dataclasses.fields(value) if one.name not in ADDED]
        return ["time" if TIME.search(name) else frozen(getattr(value, name)) for name in fields]
    if isinstance(value, Tensor):
        return digest(value)
    if isinstance(value, Mapping):
        return {str(key): frozen(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(one) for one in value]
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return "words" if " " in value else value
    return value if value is None or isinstance(value, bool | int) else type(value).__name__


def kinds(value: Any) -> Any:
    """The keys of a value, recursively, and types in place of what is not a container; of a list its distinct kinds."""
    if isinstance(value, Mapping):
        return {str(key): kinds(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        each = {json.dumps(kinds(one), sort_keys=True): kinds(one) for one in value}
        return [type(value).__name__, *(each[key] for key in sorted(each))]
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def of_report(report: Any) -> Any:
    if report is None:
        return None
    again = type(report).from_dict(json.loads(json.dumps(report.to_dict())))
    return {
        "fields": frozen(report),
        "properties": {name: frozen(getattr(report, name, "missing")) for name in PROPERTIES},
        "accepted": len(report.accepted),
        "winner": None if report.winner is None else frozen(report.winner),
        "survives JSON": frozen(again) == frozen(report),
    }


def of_levels(ask: Callable[[int], Mapping[str, Tensor]]) -> list[Any]:
    """What is found of each level, from 0 to the last."""
    found: list[Any] = []
    for level in range(MOST_LEVELS):
        try:
            found.append(frozen(ask(level)))
        except ValueError:
            break
        except RuntimeError:
            found.append("none kept")
    return found


def of_winner(winner: Winner) -> dict[str, Any]:
    return {
        "mask": frozen(winner.mask),
        "order": list(winner.mask),
        "masks": of_levels(winner.mask_at),
        "weights": frozen(winner.weights),
        "weights of levels": of_levels(winner.weights_at),
        "report": of_report(winner.report),
    }


# ------------------------------------------------------------------------------------------------ what a fit leaves


def of_events(folder: Path) -> dict[str, Any]:
    """What the event files of a folder hold, file by file in order of their names."""
    found: dict[str, Any] = {}
    for number, path in enumerate(sorted(folder.rglob("events.out.tfevents.*"))):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        tags = events.Tags()
        scalars = {tag: [[one.step, repr(one.value)] for one in events.Scalars(tag)] for tag in tags["scalars"]}
        described = [tag for tag in tags["tensors"] if is_curve(events, tag)]
        scalars |= {tag: [[one.step, repr(number(one))] for one in events.Tensors(tag)] for tag in described}
        others = {tag: [one.step for one in events.Tensors(tag)] for tag in tags["tensors"] if tag not in described}
        layouts = [one for tag in tags["tensors"] if "layout" in tag for one in events.Tensors(tag)]
        found[f"file {number}"] = {
            "scalars": {tag: points for tag, points in scalars.items() if not TIME.search(tag)},
            "others": others,
            "charts": [of_layout(one.tensor_proto) for one in layouts],
        }
    return found


def is_curve(events: EventAccumulator, tag: str) -> bool:
    """Whether a tag of the newer form is a curve."""
    return events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"


def number(event: Any) -> float:
    return make_ndarray(event.tensor_proto).item()


def of_layout(stored: Any) -> list[list[str]]:
    """The tags of each chart, without titles."""
    layout = layout_pb2.Layout.FromString(stored.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    bands = [[tag for one in chart.margin.series for tag in (one.value, one.lower, one.upper)] for chart in charts]
    return [[*chart.multiline.tag, *band] for chart, band in zip(charts, bands, strict=True)]


def names_in(folder: Path) -> list[str]:
    """All files, events and journals without what differs from run to run."""
    paths = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    plain = [re.sub(r"events\.out\.tfevents\..*", "events", path) for path in paths]
    return sorted(re.sub(r"search-[0-9a-f]+", "search", path) for path in plain)


def of_checkpoint(path: Path) -> dict[str, Any]:
    stored = torch.load(path, map_location="cpu", weights_only=True)
    weights = stored["state_dict"]
    states = {key: state for key, state in stored["callbacks"].items() if "RouletteWheelPruning" in key}
    return {
        "keys": sorted(stored),
        "weights": frozen(weights),
        "zeros": sum(int((one == 0).sum()) for one in weights.values()),
        "optimizers": frozen(stored.get("optimizer_states")),
        "loops": frozen(stored.get("loops")),
        "state of the callback": {key: kinds(state) for key, state in states.items()},
        "mask": mask_in(path),
    }


def mask_in(path: Path) -> Any:
    try:
        return frozen(Mask.load(path))
    except ValueError:
        return "none"


def of_files(folder: Path) -> dict[str, Any]:
    checkpoints = {str(path.relative_to(folder)): of_checkpoint(path) for path in sorted(folder.rglob("*.ckpt"))}
    interrupted = {}
    for path in sorted(folder.rglob("interrupted*.pt")):
        stored = torch.load(path, weights_only=True)
        interrupted[path.name] = {"keys": kinds(stored), "mask": mask_in(path)}
    journals = [len(path.read_bytes().splitlines()) for path in sorted(folder.rglob("search-*"))]
    return {
        "names": names_in(folder),
        "checkpoints": checkpoints,
        "interrupted": interrupted,
        "lines of journals": journals,
        "events": of_events(folder),
    }


def of_pruning(pruning: RouletteWheelPruning) -> dict[str, Any]:
    found: dict[str, Any] = {"report": of_report(pruning.report), "file": os.path.basename(pruning.best_model_path)}
    if pruning.mask is not None:
        found |= {
            "mask": frozen(pruning.mask),
            "order": list(pruning.mask),
            "masks": of_levels(pruning.mask_at),
            "weights of levels": of_levels(pruning.weights_at),
        }
    return found


def outcome(folder: Path, trainer: Trainer, module: LightningModule, pruning: RouletteWheelPruning) -> dict[str, Any]:
    """All that a fit leaves; of the files only what the first process sees."""
    chance = hashlib.sha256(repr((digest(torch.get_rng_state()), random.getstate())).encode()).hexdigest()
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()
    metrics = {name: repr(float(value)) for name, value in trainer.callback_metrics.items()}
    return {
        **of_pruning(pruning),
        "module": frozen(module.state_dict()),
        "zeros": sum(int((one == 0).sum()) for one in module.state_dict().values()),
        "training": module.training,
        "metrics": {name: value for name, value in metrics.items() if not TIME.search(name)},
        "validation steps": module.steps,
        "global step": trainer.global_step,
        "chance": chance,
        "files": of_files(folder) if trainer.is_global_zero else None,
    }


# ------------------------------------------------------------------------------------------------ modules and data


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(count: int, seed: int, shape: Sequence[int] = (16,), classes: int = 10, noise: float = 0.7) -> TensorDataset:
    """Points around the centres of classes; neighbours overlap a little."""
    chance = generator(seed)
    centres = torch.randn(classes, *shape, generator=generator(99))
    labels = torch.randint(classes, (count,), generator=chance)
    return TensorDataset(centres[labels] + noise * torch.randn(count, *shape, generator=chance), labels)


def loaders(shape: Sequence[int] = (16,), *, shuffle: bool = True, val: int = 320, **options: Any) -> list[DataLoader]:
    """Those of training and of validation."""
    train = DataLoader(blobs(400, 1, shape, **options), batch_size=50, shuffle=shuffle)
    return [train, DataLoader(blobs(val, 2, shape, **options), batch_size=64)]


def begun(net: nn.Module, seed: int = 7) -> nn.Module:
    """The module, with parameters of its own generator."""
    chance, norms = generator(seed), (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    with torch.no_grad():
        for part in net.modules():
            for name, parameter in part.named_parameters(recurse=False):
                if not isinstance(parameter, nn.parameter.UninitializedParameter):
                    drawn = torch.randn(parameter.shape, generator=chance, dtype=torch.float32)
                    spread = parameter[0].numel() ** -0.5 if parameter.dim() > 1 and len(parameter) else 0.1
                    one = float(isinstance(part, norms) and name == "weight")
                    parameter.copy_(one + drawn * spread)
    return net


def mlp() -> nn.Module:
    return begun(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10)))


def conv_net() -> nn.Module:
    return begun(
        nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, groups=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 10),
        )
    )


class Attention(nn.Module):
    """Six tokens of eight numbers: one layer of an encoder, one attention of its own with other keys, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.cross = nn.MultiheadAttention(16, 2, kdim=8, vdim=8, batch_first=True)
        self.head = nn.Linear(16, 10)
        begun(self)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.encoder(self.embed(x))
        looked, _ = self.cross(tokens, x, x, need_weights=False)
        return self.head((tokens + looked).mean(1))


class Classifier(LightningModule):
    """Logs `val_loss` and `val_acc`; counts its validation steps, and may fail at one of them."""

    def __init__(self, net: nn.Module, lr: float = 1e-2) -> None:
        super().__init__()
        self.net, self.lr = net, lr
        self.val_acc = MulticlassAccuracy(10, average="micro")
        self.steps, self.fails_at, self.failure = 0, 0, RuntimeError("power cut")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.steps += 1
        if self.steps == self.fails_at:
            raise self.failure
        scores = self(batch[0])
        self.log("val_loss", cross_entropy(scores, batch[1]), sync_dist=True)
        self.judge(scores, batch[1])

    def judge(self, scores: Tensor, labels: Tensor) -> None:
        self.val_acc(scores, labels)
        self.log("val_acc", self.val_acc)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=1e-2)


class F1(Classifier):
    """Judged by a metric that is no mean over samples."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.f1 = MulticlassF1Score(10, average="macro")

    def judge(self, scores: Tensor, labels: Tensor) -> None:
        self.f1(scores, labels)
        self.log("val_f1", self.f1)


class Plain(Classifier):
    """Judged by a logged number; the same as a torchmetrics mean besides."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.mean = MeanMetric()

    def judge(self, scores: Tensor, labels: Tensor) -> None:
        right = (scores.argmax(1) == labels).float().mean()
        self.log("val_acc", right, batch_size=len(labels))
        self.mean(right, len(labels))
        self.log("val_mean", self.mean)


class Several(Classifier):
    """Several loaders, and a step of its own on batches that calibrate."""

    def calibration_step(self, batch: Any) -> None:
        self(batch[0])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


class Sharded(Classifier):
    """Its layers lie in several processes."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if not getattr(self, "done", False) and isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[2], mesh=mesh)
            fully_shard(self.net, mesh=mesh)
            self.done = True


def fit(
    folder: Path,
    module: LightningModule,
    pruning: RouletteWheelPruning | HoldZeros,
    data: Sequence[Any] | None = None,
    *others: Any,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Trainer:
    """A quiet fit of two epochs, with curves and checkpoints in a folder."""
    torch.manual_seed(0)
    random.seed(0)
    usual = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": TensorBoardLogger(folder, name="", version=""),
        "default_root_dir": folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 4,
    }
    trainer = Trainer(**{**usual, "callbacks": [pruning, *others], **options})
    train, val = data or loaders()
    trainer.fit(module, train, val, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def fitted(
    folder: Path,
    module: LightningModule,
    data: Sequence[Any] | None = None,
    *others: Any,
    trainer: Mapping[str, Any] | None = None,
    **choices: Any,
) -> dict[str, Any]:
    """What a fit with pruning leaves."""
    pruning = RouletteWheelPruning(**{"branches": 4, "tolerance": 0.1, **choices})
    done = fit(folder, module, pruning, data, *others, **(trainer or {}))
    return outcome(folder, done, module, pruning)


# ------------------------------------------------------------------------------------------------ with a Trainer


def mlp_without_refit(folder: Path) -> dict[str, Any]:
    tree = Tree(pruning_rate=0.25)
    module = Classifier(mlp())
    return fitted(folder, module, None, branches=6, tolerance=0.05, refit=None, tree=tree, wheel=Wheel(scope="global"))


def mlp_least_squares(folder: Path) -> dict[str, Any]:
    tree = Tree(pruning_rate=0.3)
    return {
        "layer": fitted(folder / "layer", Classifier(mlp()), tolerance=0.06, tree=tree, wheel=Wheel(scope="layer")),
        "choices": fitted(
            folder / "choices",
            Classifier(mlp()),
            refit=LeastSquares(batches=3, finalists=3, damping=0.01),
            tree=Tree(0.4, max_levels=3),
            wheel=Wheel(4.0, allocation=0.5),
            seed=5,
        ),
        "at the end": fitted(
            folder / "end", Classifier(mlp()), refit=LeastSquares(each_level=False), tree=Tree(0.3, max_levels=2)
        ),
    }


def conv_least_squares(folder: Path) -> dict[str, Any]:
    return fitted(folder, Classifier(conv_net()), loaders((1, 8, 8)), tolerance=0.1, tree=Tree(0.3, max_levels=4))


def conv_batch_norm(folder: Path) -> dict[str, Any]:
    data, tree = loaders((1, 8, 8)), Tree(0.3, max_levels=3)
    late = Refit(batches=5, each_level=False)
    return {
        "each level": fitted(folder / "each", Classifier(conv_net()), data, refit="batch_norm", tree=tree),
        "at the end": fitted(folder / "end", Classifier(conv_net()), data, refit=late, tree=tree),
    }


def attention(folder: Path) -> dict[str, Any]:
    data, tree = loaders((6, 8)), Tree(0.25, max_levels=3)
    chosen = {"include": ["net.*weight"], "exclude": ["*norm*", "net.encoder.linear1.*"]}
    return {
        "usual": fitted(folder / "usual", Classifier(Attention()), data, tolerance=0.15, tree=tree),
        "chosen": fitted(folder / "chosen", Classifier(Attention()), data, tolerance=0.15, tree=tree, **chosen),
    }


def square(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.double() ** 2 for name, weight in weights.items()}


IMPORTANCES = (None, "magnitude", "lamp", "sensitivity", "activation", "obs", square)


def importances(folder: Path) -> dict[str, Any]:
    """With a Trainer and without a refit, then in a plain search, refitted."""
    found: dict[str, Any] = {}
    for importance in IMPORTANCES:
        name, wheel = getattr(importance, "__name__", str(importance)), Wheel(importance=importance)
        few = {"branches": 2, "tolerance": 0.5, "tree": Tree(0.3, max_levels=2), "wheel": wheel}
        found[name] = fitted(folder / name, Classifier(mlp()), refit=None, **few)
        net, evaluate = mlp(), Folded(mlp(), 6)
        inputs = list(blobs(256, 4).tensors[0].split(64))
        winner = search(
            prunable_parameters(net),
            evaluate,
            refit="least_squares",
            calibration=Calibration(net, inputs, rows=128, seed=3),
            **few,
        )
        found[f"{name}, plain"] = of_winner(winner)
    return found


def at_epoch(folder: Path) -> dict[str, Any]:
    """Training on with held zeros, and averaged weights."""
    choices: dict[str, dict[str, Any]] = {
        "refit": {"at_epoch": 1},
        "no refit": {"at_epoch": 1, "refit": None},
        "averaged": {"at_epoch": 1, "refit": None},
        "averaged, at the end": {},
    }
    found = {}
    for name, choice in choices.items():
        others = [EMAWeightAveraging(decay=0.5)] if "averaged" in name else []
        usual = {"tree": Tree(0.3, max_levels=3), "trainer": {"max_epochs": 3}}
        found[name] = fitted(folder / name, Classifier(mlp()), None, *others, **usual, **choice)
    return found


def gradual(folder: Path) -> dict[str, Any]:
    few, tree = {"max_epochs": 7}, Tree(0.45)
    choices: dict[str, dict[str, Any]] = {
        "usual": {"branches": None, "tolerance": 0.06},
        "magnitude": {"branches": 1, "wheel": Wheel(importance="magnitude"), "tolerance": 0.02},
        "refit": {"branches": 3, "refit": "least_squares"},
        "target": {"branches": 2, "target_sparsity": 0.9, "monitor": "val_loss", "mode": "min", "tolerance": 0.5},
    }
    return {
        name: fitted(
            folder / name, Classifier(mlp()), **{"at_epoch": range(1, 6), "tree": tree, "trainer": few, **choice}
        )
        for name, choice in choices.items()
    }


def broken(folder: Path, module: Classifier, pruning: RouletteWheelPruning, **options: Any) -> dict[str, Any]:
    """What a fit leaves that fails in the middle."""
    try:
        fit(folder, module, pruning, loaders(shuffle=False), ModelCheckpoint(folder, save_top_k=-1), **options)
    except (RuntimeError, SystemExit, KeyboardInterrupt) as error:
        return {"error": type(error).__name__, **of_pruning(pruning), "files": of_files(folder)}
    raise AssertionError("the fit did not fail")


def resume(folder: Path) -> dict[str, Any]:
    """A search that is cut short, once by an error and once by a user, and is resumed."""
    found: dict[str, Any] = {}
    endings: dict[str, tuple[BaseException, dict[str, Any]]] = {
        "error": (RuntimeError("power cut"), {"refit": "least_squares"}),
        "user": (KeyboardInterrupt(), {"refit": None, "at_epoch": 1}),
    }
    for name, (failure, choices) in endings.items():
        usual = {"branches": 4, "tolerance": 0.1, "tree": Tree(0.3, max_levels=3), **choices}
        module = Classifier(mlp())
        module.fails_at, module.failure = 62, failure
        found[f"{name}, cut short"] = broken(folder / name, module, RouletteWheelPruning(**usual), max_epochs=3)
        path = max((folder / name).glob("epoch=*.ckpt"))
        again, module = RouletteWheelPruning(dirpath=folder / f"{name} again", **usual), Classifier(mlp())
        data, options = loaders(shuffle=False), {"max_epochs": 3, "ckpt_path": path}
        trainer = fit(folder / f"{name} again", module, again, data, **options)
        found[f"{name}, resumed"] = outcome(folder / f"{name} again", trainer, module, again)
        found[f"{name}, names"] = names_in(folder / name)
    return found


def resume_pruned(folder: Path) -> dict[str, Any]:
    """Training on from files that hold pruned weights; zeros are held."""
    data, usual = loaders(shuffle=False), {"at_epoch": 1, "tree": Tree(0.3, max_levels=3), "branches": 3}
    first, module = RouletteWheelPruning(tolerance=0.2, **usual), Classifier(mlp())
    trainer = fit(folder / "first", module, first, data, max_epochs=2)
    found = {"first": outcome(folder / "first", trainer, module, first)}
    path = Path(first.best_model_path)
    again, module = RouletteWheelPruning(tolerance=0.2, **usual), Classifier(mlp())
    trainer = fit(folder / "again", module, again, data, max_epochs=4, ckpt_path=path)
    found["again"] = outcome(folder / "again", trainer, module, again)
    for name, mask in (("zeros found", None), ("zeros of a file", path)):
        module, holding = Classifier(mlp()), HoldZeros(mask)
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        fit(folder / name, module, holding, data)
        found[name] = {"module": frozen(module.state_dict()), "mask": frozen(holding.held())}
    other = Classifier(mlp())
    apply_mask(other, path)
    return found | {"applied": frozen(other.state_dict())}


def resume_gradual(folder: Path) -> dict[str, Any]:
    """Pruning in turn with training, broken off and resumed; and a training that had ended without a search."""
    data = loaders(shuffle=False)
    usual = {"at_epoch": [1, 2, 4, 5], "tree": Tree(0.5), "tolerance": 0.08, "branches": 2}
    module = Classifier(mlp())
    module.fails_at = 150
    found = {"cut short": broken(folder / "first", module, RouletteWheelPruning(**usual), max_epochs=7)}
    path = max((folder / "first").glob("epoch=*.ckpt"))
    again, module = RouletteWheelPruning(**usual), Classifier(mlp())
    trainer = fit(folder / "again", module, again, data, max_epochs=7, ckpt_path=path)
    found["resumed"] = outcome(folder / "again", trainer, module, again)
    late, module = RouletteWheelPruning(branches=2, tolerance=0.1, tree=Tree(0.3, max_levels=2)), Classifier(mlp())
    trainer = fit(
        folder / "late", module, late, data, max_epochs=path_epoch(path), ckpt_path=first_of(folder / "first")
    )
    found["trained on"] = outcome(folder / "late", trainer, module, late)
    ended, module = RouletteWheelPruning(branches=2, tolerance=0.1, tree=Tree(0.3, max_levels=2)), Classifier(mlp())
    trainer = fit(folder / "ended", module, ended, data, max_epochs=1, ckpt_path=first_of(folder / "first"))
    found["ended"] = outcome(folder / "ended", trainer, module, ended)
    return found


def path_epoch(path: Path) -> int:
    """How many epochs a checkpoint has behind it, by its name."""
    return int(path.name.split("-")[0].removeprefix("epoch=")) + 1


def first_of(folder: Path) -> Path:
    return min(folder.glob("epoch=*.ckpt"))


def confidence(folder: Path) -> dict[str, Any]:
    """Each of the three ways in which a certificate arises."""
    data, few = loaders(val=600), {"confidence": 0.9, "tolerance": 0.25, "branches": 3}
    short = {**few, "refit": None, "tree": Tree(0.4, max_levels=2)}
    return {
        "samples": fitted(folder / "samples", Classifier(mlp()), data, tree=Tree(0.35), **few),
        "bootstrap": fitted(folder / "f1", F1(mlp()), data, **short),
        "batches": fitted(folder / "plain", Plain(mlp()), data, monitor="val_acc", **short),
        "means": fitted(folder / "means", Plain(mlp()), data, monitor="val_mean", mode="max", **short),
    }


def trees(folder: Path) -> dict[str, Any]:
    """Fields of the tree, the wheel and the validation."""
    whole = Validation(race=False, confirm=0)
    choices: dict[str, dict[str, Any]] = {
        "no race": {"validation": Validation(race=False), "tree": Tree(0.3, max_levels=3)},
        "all data": {"validation": whole, "tree": Tree(0.3, patience=1), "tolerance": 0.03},
        "race on all data": {"validation": Validation(confirm=0), "branches": 9, "tree": Tree(0.3, max_levels=3)},
        "small rates": {"tree": Tree(0.5, patience=9, smallest_rate=0.1), "tolerance": 0.02},
        "a quarter confirms": {"validation": Validation(confirm=0.25), "tree": Tree(0.4, max_levels=2)},
        "nothing kept in memory": {"validation": Validation(cache_bytes=0), "tree": Tree(0.4, max_levels=2)},
        "ranked by accuracy": {"validation": Validation(rank_by="val_acc"), "tree": Tree(0.4, max_levels=2)},
        "magnitude": {"wheel": Wheel(math.inf, "magnitude"), "tree": Tree(0.3, max_levels=3)},
        "random": {"wheel": Wheel(0), "tree": Tree(0.1, max_levels=3)},
        "literal": {"wheel": Wheel(1.0, "magnitude", allocation=0.2), "tree": Tree(0.1, max_levels=3)},
        "target": {"target_sparsity": 0.5, "tolerance": math.inf, "tree": Tree(0.2)},
        "nothing holds": {"tolerance": 0.0, "tree": Tree(0.9, patience=2), "wheel": Wheel(0)},
    }
    usual = {"branches": 5, "refit": None}
    return {name: fitted(folder / name, Classifier(mlp()), **{**usual, **one}) for name, one in choices.items()}


def by_loss(folder: Path) -> dict[str, Any]:
    few = {"monitor": "val_loss", "mode": "min", "tolerance": 0.3, "tree": Tree(0.3)}
    return {
        "refit": fitted(folder / "refit", Classifier(mlp()), **few),
        "no refit": fitted(folder / "none", Classifier(mlp()), refit=None, **few),
    }


def other_ways(folder: Path) -> dict[str, Any]:
    """Several loaders, other loggers and no files, a run that only tries, other precision."""
    train, val = loaders()
    few, double = {"tree": Tree(0.3, max_levels=2), "branches": 3}, [[train, [val, DataLoader(blobs(90, 5), 30)]]]
    return {
        "several loaders": fitted(
            folder / "several", Several(mlp()), *double, monitor="val_acc/dataloader_idx_1", tolerance=0.2, **few
        ),
        "no files": fitted(
            folder / "none", Classifier(mlp()), trainer={"logger": False, "enable_checkpointing": False}, **few
        ),
        "own folder": fitted(folder / "own", Classifier(mlp()), dirpath=folder / "own" / "slim", **few),
        "fast_dev_run": fitted(folder / "fast", Classifier(mlp()), trainer={"fast_dev_run": True}, **few),
        "bf16-mixed": fitted(folder / "half", Classifier(mlp()), trainer={"precision": "bf16-mixed"}, **few),
        "16 bits": fitted(folder / "true", Classifier(mlp()), trainer={"precision": "bf16-true"}, refit=None, **few),
    }


# ------------------------------------------------------------------------------------------------ several processes


def in_two_processes(folder: Path, name: str) -> dict[str, Any]:
    """What each process found, from this file run again."""
    folder.mkdir(parents=True, exist_ok=True)
    root = str(Path(lightning_roulette.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__).resolve()), "process", name, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"two processes failed: {done.stderr[-4000:]}")
    return {f"process {rank}": json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)}


def two_processes(folder: Path) -> dict[str, Any]:
    return in_two_processes(folder, "two_processes")


def shards(folder: Path) -> dict[str, Any]:
    return in_two_processes(folder, "shards")


def process(name: str, folder: Path) -> None:
    """One of two processes; Lightning starts the other by running this file again."""
    few, data = {"branches": 3, "tolerance": 0.15, "tree": Tree(0.25, max_levels=3)}, loaders()
    if name == "two_processes":
        options: dict[str, Any] = {"strategy": "ddp"}
        kind, choices = (
            Classifier,
            {
                "at the end": {"refit": "least_squares"},
                "all data": {"refit": None, "validation": Validation(confirm=0, race=False)},
                "at epoch": {"refit": None, "at_epoch": 1},
            },
        )
    else:
        options, kind = {}, Sharded
        choices = {
            "at the end": {"refit": None},
            "each layer": {"refit": None, "wheel": Wheel(scope="layer"), "validation": Validation(confirm=0)},
            "at epoch": {"refit": None, "at_epoch": 1, "wheel": Wheel(4, allocation=0.3)},
        }
    found: dict[str, Any] = {}
    rank = 0
    for run, choice in choices.items():
        if name != "two_processes":
            options = {"strategy": ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)}
        pruning, module = RouletteWheelPruning(**few, **choice), kind(mlp())
        trainer = fit(folder / run, module, pruning, data, devices=2, **options)
        trainer.strategy.barrier()
        rank, found[run] = trainer.global_rank, outcome(folder / run, trainer, module, pruning)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


# ------------------------------------------------------------------------------------------------ without a Trainer


class Folded:
    """An evaluator: ranks by loss, holds accuracy, on folds of its own data."""

    def __init__(self, net: nn.Module, folds: int) -> None:
        self.net, self.folds, self.asked = net.eval(), folds, []
        inputs, labels = blobs(240, 3).tensors
        self.data = list(zip(inputs.chunk(folds), labels.chunk(folds), strict=True))

    def outputs(self, candidate: PrunedWeights, folds: Sequence[int]) -> tuple[Tensor, Tensor]:
        self.asked.append([candidate.mask.survivors, *folds])
        net = copy.deepcopy(self.net)
        net.load_state_dict(candidate.weights, strict=False)
        inputs, labels = (torch.cat(parts) for parts in zip(*(self.data[fold] for fold in folds), strict=True))
        with torch.no_grad():
            return net(inputs), labels

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        scores, labels = self.outputs(candidate, folds)
        right = (scores.argmax(1) == labels).double()
        return Scores(-float(cross_entropy(scores, labels)), float(right.mean()), float(scores.std()))


class Recorded(Folded):
    """Tells besides what lies behind the score."""

    def __init__(self, net: nn.Module, folds: int, kind: str) -> None:
        super().__init__(net, folds)
        self.kind, self.at_once, self.at_least = kind, 3, 2

    def recorded(self, candidate: PrunedWeights, folds: Sequence[int]) -> tuple[Scores, Any]:
        scores, labels = self.outputs(candidate, folds)
        right = (scores.argmax(1) == labels).double()
        mean = float(right.mean())
        outcomes = {
            "singles": lambda: Singles(right, 0.0, 1.0),
            "resamples": lambda: Resamples(lambda index: float(right[index].mean()), len(right)),
            "batches": lambda: Batches(
                right.reshape(-1, 10).mean(1), torch.ones(len(right) // 10, dtype=torch.float64)
            ),
            "nothing": lambda: None,
        }
        return Scores(mean, mean), outcomes[self.kind]()


def short(so_far: Winner) -> list[str]:
    """One digest of the masks and one of the report."""
    values = (frozen(so_far.mask), frozen(so_far.report))
    return [hashlib.sha256(json.dumps(value).encode()).hexdigest() for value in values]


class Told(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_dense(self, so_far: Winner, work: float) -> None:
        self.told.append(["dense", *short(so_far), repr(work)])

    def on_candidate(self, *told: Any) -> None:
        self.told.append(["candidate", *frozen(told)])

    def on_level(self, level: Any, so_far: Winner) -> None:
        self.told.append(["level", frozen(level), *short(so_far)])

    def on_confirmed(self, level: Any, so_far: Winner) -> None:
        self.told.append(["confirmed", frozen(level), *short(so_far)])


def trained_mlp() -> nn.Module:
    """Trained for some steps without a Trainer."""
    net, (inputs, labels) = mlp(), blobs(400, 1).tensors
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    return net.eval()


def plain_search(folder: Path) -> dict[str, Any]:
    """A function of a mask, evaluators of several folds, and what an observer is told."""
    net = trained_mlp()
    weights, told, asked = prunable_parameters(net), Told(), []

    def norm(mask: Mask) -> float:
        asked.append(mask.survivors)
        return sum(float((weights[name].detach().double() * kept).abs().sum()) for name, kept in mask.items())

    whole = norm(Mask.full(weights))
    found: dict[str, Any] = {
        "function": of_winner(search(weights, norm, tolerance=0.2 * whole, observer=told, seed=-3)),
        "told": told.told,
        "asked": asked,
        "endless": of_winner(search(weights, norm, branches=2, tolerance=math.inf, tree=Tree(0.8))),
        "target": of_winner(search(weights, norm, branches=3, tolerance=math.inf, target_sparsity=0.77)),
    }
    inputs = list(blobs(300, 4).tensors[0].split(50))
    for refit in (None, "least_squares"):
        evaluate, told = Folded(net, 8), Told()
        calibration = Calibration(net, inputs, rows=200, seed=1)
        few = {"branches": 8, "tolerance": 0.05, "tree": Tree(0.3), "observer": told}
        winner = search(weights, evaluate, refit=refit, calibration=calibration, **few)
        found[f"folds, {refit}"] = {**of_winner(winner), "asked": evaluate.asked, "told": told.told}
    for kind in ("singles", "resamples", "batches", "nothing"):
        evaluate = Recorded(net, 6, kind)
        sure = {} if kind == "nothing" else {"confidence": 0.8}
        winner = search(weights, evaluate, branches=5, tolerance=0.3, tree=Tree(0.4, max_levels=4), **sure)
        found[kind] = {**of_winner(winner), "asked": evaluate.asked}
    return found


def large_search(folder: Path) -> dict[str, Any]:
    """Masks that are packed."""
    chance = generator(11)
    weights = {
        "large": torch.randn(1100, 1000, generator=chance),
        "small": torch.randn(300, 20, generator=chance),
        "half": torch.randn(40, 50, generator=chance).bfloat16(),
    }
    found = {}
    for name, wheel in (
        ("usual", Wheel()),
        ("layer", Wheel(2.0, scope="layer")),
        ("lamp", Wheel(8.0, "lamp", allocation=0.3)),
    ):
        told = Told()
        few = {"branches": 2, "tolerance": math.inf, "tree": Tree(0.3, max_levels=2)}
        found[name] = of_winner(search(weights, lambda mask: -float(mask.sparsity), wheel=wheel, observer=told, **few))
        found[f"{name}, told"] = told.told
    return found


def spins(folder: Path) -> dict[str, Any]:
    """The wheel alone, of all sizes."""
    found = {}
    for size in (1, 7, 300, 5000, 70_000, 2**20 + 17):
        chance = generator(size)
        importance = torch.randn(size, generator=chance).abs()
        kinds_of = {
            "float32": importance,
            "float64": importance.double() ** 3,
            "bfloat16": importance.bfloat16(),
            "ties": (importance * 3).round(),
        }
        survivors = torch.rand(size, generator=chance) < 0.8
        survivors[0] = True
        alive = int(survivors.sum())
        for kind, values in kinds_of.items():
            for sharpness in (0.0, 0.5, 1.0, 16.0, math.inf):
                for draws in sorted({1, alive // 10, alive - alive // 5, *([0, alive] if size < 1000 else [])}):
                    drawn = spin(values, survivors, draws, sharpness=sharpness, seed=size + draws)
                    found[f"{size} {kind} sharpness {sharpness} draws {draws}"] = digest(drawn)
    return found


class Zoo(nn.Module):
    """Layers of many kinds in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 6, 3, padding=2, dilation=2, groups=2, padding_mode="circular")
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Conv1d(6, 8, 3, stride=2, bias=False)
        self.plane = nn.Conv2d(2, 4, 3, padding="same")
        self.volume = nn.Conv3d(1, 2, (1, 2, 2))
        self.up = nn.ConvTranspose1d(8, 4, 2)
        self.recurrent = nn.GRU(4, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.one, self.same = nn.Linear(6, 6), nn.Linear(6, 6)
        self.same.weight = self.one.weight
        self.still = nn.Linear(6, 6).requires_grad_(False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)
        begun(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(x)).relu())  # (samples, 8, 5)
        plane = self.plane(x.reshape(len(x), 2, 4, 5)).relu()
        volume = self.volume(plane.unsqueeze(1))  # (samples, 2, 4, 3, 4)
        x = self.up(volume.reshape(len(x), 8, 12)).movedim(1, -1)
        x, _ = self.recurrent(x)
        x = x + self.attention(x, x, x)[0]
        return self.head(self.normed(self.still(self.same(self.one(x).relu()))).mean(1))


class Shelf(nn.Module):
    """Parameters of kinds that are not prunable, or only if named."""

    def __init__(self) -> None:
        super().__init__()
        self.zoo = Zoo()
        self.words = nn.Embedding(5, 4)
        self.reads = nn.Linear(4, 5)
        self.reads.weight = self.words.weight
        self.cell, self.pair, self.slope = nn.LSTMCell(3, 4), nn.Bilinear(2, 3, 4), nn.PReLU(3)
        self.layers = nn.ModuleList([nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.Linear(3, 2)])
        self.deconvolved = nn.ConvTranspose2d(2, 3, 2)
        self.late, self.nothing = nn.LazyLinear(3), nn.Linear(0, 3)
        self.meta = nn.Linear(2, 2, device="meta")
        self.masked = nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
        self.double, self.half = nn.Linear(3, 3).double(), nn.Linear(3, 3).half()
        self.free = nn.Parameter(torch.ones(3, 3))
        self.turned = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
        self.accuracy = MulticlassAccuracy(3)
        self.accuracy.inner = nn.Linear(2, 2)


def parameters(folder: Path) -> dict[str, Any]:
    """Which are prunable, and what masks do to them."""
    shelf, found = Shelf(), {}
    patterns: dict[str, dict[str, Any]] = {
        "usual": {},
        "included": {"include": ["*.bias", "words.*", "zoo.still.*", "free"]},
        "excluded": {"exclude": ["zoo.*", "*ih*"]},
        "both": {"include": ["*"], "exclude": ["*weight*"]},
    }
    for name, choice in patterns.items():
        kept, left = prunable_parameters(shelf, **choice), skipped_parameters(shelf, **choice)
        found[name] = {"prunable": list(kept), "skipped": list(left)}
    zoo = Zoo()
    weights = prunable_parameters(zoo)
    found["sparsity before"] = repr(sparsity(weights))
    mask = mask_of(weights, 0.6)
    apply_mask(zoo, mask)
    found |= {
        "sparsity": repr(sparsity(weights)),
        "sparsity of the mask": repr(mask.sparsity),
        "nonzeros": frozen(Mask.of_nonzeros(weights)),
        "applied": frozen(zoo.state_dict()),
        "counts": frozen(mask.counts),
        "densities": frozen(mask.densities),
    }
    return found


def mask_of(weights: Mapping[str, Tensor], share: float) -> Mask:
    chance = generator(21)
    return Mask({name: torch.rand(one.shape, generator=chance) < share for name, one in weights.items()})


def refits(folder: Path) -> dict[str, Any]:
    """Refits of layers of many kinds, on one batch and on several."""
    found = {}
    inputs = torch.randn(60, 4, 11, generator=generator(31))
    hows: dict[str, str | Refit] = {
        "least_squares": "least_squares",
        "batch_norm": "batch_norm",
        "damped": LeastSquares(damping=0.1),
    }
    for batches, rows in ((1, 2**16), (4, 2**16), (4, 200)):
        zoo = Zoo().eval()
        calibration = Calibration(zoo, list(inputs.chunk(batches)), rows=rows, seed=2)
        for name, how in hows.items():
            for share in (0.7, 0.3):
                mask = mask_of(prunable_parameters(zoo), share)
                found[f"{batches} batches, {rows} rows, {name}, {share}"] = frozen(calibration.refit(mask, how))
        found[f"{batches} batches, {rows} rows, given back"] = frozen(zoo.state_dict())
    attentive = Attention().eval()
    tokens = torch.randn(40, 6, 8, generator=generator(32))
    mask = mask_of(prunable_parameters(attentive), 0.5)
    found["attention"] = frozen(Calibration(attentive, [tokens]).refit(mask))
    return found


# ------------------------------------------------------------------------------------------------ all of them

CONFIGURATIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    one.__name__: one
    for one in (
        mlp_without_refit,
        mlp_least_squares,
        conv_least_squares,
        conv_batch_norm,
        attention,
        importances,
        at_epoch,
        gradual,
        resume,
        resume_pruned,
        resume_gradual,
        confidence,
        trees,
        by_loss,
        other_ways,
        two_processes,
        shards,
        plain_search,
        large_search,
        spins,
        parameters,
        refits,
    )
}


def computed(names: Sequence[str], *, go_on: bool) -> dict[str, Any]:
    """What each configuration gives; one that fails ends all, or with `go_on` is told."""
    found = {}
    for name in names:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[name] = json.loads(json.dumps(CONFIGURATIONS[name](Path(folder))))
            except Exception as error:
                if not go_on:
                    raise
                traceback.print_exc()
                found[name] = {"failed": type(error).__name__}
        print(f"{name}: {time.monotonic() - began:.1f} s, {len(dict(leaves(found[name])))} values", flush=True)
    return found


RENAMED = {  # names that were given to the same things since a file may have been written
    "gated": "held_out_score",
    "gated_error": "held_out_error",
    "gated_dense": "held_out_dense",
    "gated_floor": "held_out_floor",
    "chosen_by": "search_score",
    "shared": "undivided_because",
    "leaning": "importance_factors",
    "roulette/gated": "roulette/held_out",
    "roulette/gated_error": "roulette-branch/held_out_error",
    "roulette/held_out_error": "roulette-branch/held_out_error",
    "roulette/score_error": "roulette-branch/score_error",
    "roulette/branch/min": "roulette-branch/min",
    "roulette/branch/median": "roulette-branch/median",
    "roulette/branch/max": "roulette-branch/max",
    "roulette/gated$": "roulette/held_out$",
}


def renamed(path: str) -> str:
    """The path with the names that its parts have now."""
    return " > ".join(RENAMED.get(part, part) for part in path.split(" > "))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of all that is no container, or an empty one."""
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in pairs:
            yield from leaves(one, f"{path} > {key}" if path else str(key))
    else:
        yield path, value


def differences(name: str, before: Any, now: Any) -> tuple[int, int]:
    """Print them; how many values agree, and how many do not."""
    old = {
        renamed(path): RENAMED.get(value, value) if isinstance(value, str) else value for path, value in leaves(before)
    }
    new = dict(leaves(now))
    missing = object()
    differ = [path for path in dict.fromkeys([*old, *new]) if old.get(path, missing) != new.get(path, missing)]
    for path in differ:
        print(f"{name} | {path} | frozen: {old.get(path, 'nothing')!r} | now: {new.get(path, 'nothing')!r}")
    return len(old.keys() | new.keys()) - len(differ), len(differ)


def quiet() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def main(arguments: Sequence[str]) -> int:
    quiet()
    if len(arguments) == 3 and arguments[0] == "process":
        process(arguments[1], Path(arguments[2]))
        return 0
    if len(arguments) < 2 or arguments[0] not in ("write", "check"):
        print("usage: python tests/frozen.py write|check FILE.json [CONFIGURATION ...]")
        return 2
    what, file, *names = arguments
    before = json.loads(Path(file).read_text()) if what == "check" else CONFIGURATIONS
    names = names or list(before)
    unknown = [name for name in names if name not in CONFIGURATIONS]
    if unknown:
        print(f"there is no configuration {', '.join(unknown)}, but: {', '.join(CONFIGURATIONS)}")
        return 2
    print(f"package: {lightning_roulette.__file__}", flush=True)
    found = computed(names, go_on=what == "check")
    if what == "write":
        Path(file).write_text(json.dumps(found, indent=1))
        return 0
    counts = [differences(name, before.get(name, {}), one) for name, one in found.items()]
    agree, differ = (sum(one) for one in zip(*counts, strict=True))
    print(f"{agree} values agree, {differ} differ")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
