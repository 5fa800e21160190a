"""Measure the cost of a branch of 20 candidates, and of a single candidate.

All times are medians of interleaved repeats.

- A branch is one level of a search, from the first spin to the winner's score on all search folds. Its unit is one
  `trainer.validate` with the dense network: of a quiet Trainer (no logger, progress bar or checkpoint), and of a
  Trainer with Lightning's defaults.
- A candidate is one network judged on all folds. Its unit is the module's own `validation_step`, called on the same
  cached batches with `self.log` bound to a live result collection.
- The race is compared with branches in which all candidates are judged on all search folds. "agrees" is the share of
  branches whose race winner is within one paired standard error of the best candidate. "regret" is the mean difference
  in such errors.
"""

import argparse
import contextlib
import logging
import math
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median, stdev

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

sys.path.append(str(Path(__file__).parent))
from on_tensors import NETWORKS, digits, digits_mlp, small_resnet

from lightning_roulette import (
    Level,
    Mask,
    Observer,
    PrunedWeights,
    Scores,
    Tree,
    Validation,
    prunable_parameters,
    search,
)
from lightning_roulette.judge.race import rungs
from lightning_roulette.trainer.data.reading import folded
from lightning_roulette.trainer.scores.monitored_metric import find_metric, watched_in
from lightning_roulette.trainer.scores.trainer_evaluator import TrainerEvaluator
from lightning_roulette.trainer.validation.isolation import IsolatedValidation

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")


def noise(shape: tuple[int, ...], count: int) -> tuple[Tensor, Tensor]:
    """Return random images, for timing only. A linear map gives their classes."""
    chance = torch.Generator().manual_seed(0)
    images = torch.randn(count, *shape, generator=chance)
    return images, (images.flatten(1) @ torch.randn(math.prod(shape), 10, generator=chance)).argmax(1)


def cases() -> dict[str, tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]]:
    """Return the network, training data, validation data and batch size of each case."""
    of_digits = digits(0, 400)
    mnist_like, cifar_like = noise((1, 28, 28), 12_000), noise((3, 32, 32), 3000)
    return {
        "digits MLP, 400": (digits_mlp(), of_digits["train"], of_digits["val"], 64),
        "LeNet-5, 10,000": (NETWORKS["lenet-5"][0](), *_cut(mnist_like, 2000), 250),
        "small ResNet, 2,000": (small_resnet(), *_cut(cifar_like, 1000), 100),
    }


def _cut(split: tuple[Tensor, Tensor], train: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (split[0][:train], split[1][:train]), (split[0][train:], split[1][train:])


class Classifier(LightningModule):
    """A module that logs a loss and a torchmetrics accuracy, as most modules do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.val_acc = net, MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        scores = self.net(batch[0])
        self.log("val_loss", cross_entropy(scores, batch[1]))
        self.val_acc(scores, batch[1])
        self.log("val_acc", self.val_acc)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Stopwatch(Observer):
    """An observer that measures the time of each level."""

    def __init__(self) -> None:
        self.levels: list[float] = []

    def on_dense(self, so_far: object, work: float) -> None:
        self._began = time.perf_counter()

    def on_level(self, level: object, so_far: object) -> None:
        self.levels.append(time.perf_counter() - self._began)
        self._began = time.perf_counter()


class Measured(Callback):
    """A callback that measures at the end of training."""

    def __init__(self, options: argparse.Namespace, val: DataLoader) -> None:
        self.options, self.val, self.found = options, val, {}

    def on_train_end(self, trainer: Trainer, module: Classifier) -> None:
        weights = prunable_parameters(module)
        validation = IsolatedValidation(trainer, module)
        with validation:
            (data, logged), reading = _timed(lambda: folded(validation, 0, 2**31))
            metric = find_metric(logged, watched_in(trainer), "val_acc", None, 0.005)
            evaluate = TrainerEvaluator(trainer, module, validation, data, weights, metric)
            candidate = PrunedWeights(Mask.full(weights), weights)
            folds = range(evaluate.folds)
            times: dict[str, list[float]] = {what: [] for what in ("candidate", "step", "branch", "dense", "usual")}
            for _ in range(self.options.repeats):
                times["candidate"].append(_timed(lambda: evaluate(candidate, folds))[1])
                times["step"].append(_timed(lambda: _bare_steps(trainer, module, list(data.of(folds))))[1])
                watch = Stopwatch()
                search(weights, evaluate, tolerance=math.inf, tree=Tree(max_levels=4), observer=watch)
                times["branch"] += watch.levels
                times["dense"].append(self._validated(module, quiet=True))
                times["usual"].append(self._validated(module, quiet=False))
            agrees, regret = agreement(weights, evaluate, self.options.levels)
        middle = {what: median(one) for what, one in times.items()}
        self.found = {**middle, "reading": reading, "agrees": agrees, "regret": regret}

    def _validated(self, module: Classifier, quiet: bool) -> float:
        """Return the seconds of one `trainer.validate`."""
        choices = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False} if quiet else {}
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            other = Trainer(accelerator=self.options.accelerator, devices=1, default_root_dir=folder, **choices)
            twin = Classifier(module.net)
            return _timed(lambda: other.validate(twin, self.val, verbose=False))[1]


@torch.no_grad()
def _bare_steps(trainer: Trainer, module: LightningModule, batches: list) -> None:
    module.eval()
    module._current_fx_name = "validation_step"
    trainer.fit_loop.epoch_loop.val_loop._results = _ResultCollection(training=False)
    for index, (batch, _) in enumerate(batches):
        trainer._logger_connector.on_batch_start(batch)
        module.validation_step(batch, index)
    module.train()
    module._current_fx_name = None


class Branches(Observer):
    """An evaluator that records the ranks of every candidate on each fold and on all folds, for later races.

    Args:
        evaluate: The evaluator that it calls.
    """

    def __init__(self, evaluate: TrainerEvaluator) -> None:
        self._evaluate, self.folds = evaluate, evaluate.folds
        self._ranks: list[tuple[float, list[float]]] = []
        self.levels: list[list[tuple[float, list[float]]]] = []

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        """Return the scores. Record the ranks if there is more than one fold."""
        scores = self._evaluate(candidate, folds)
        if len(folds) > 1:
            self._ranks.append((scores.rank, [self._evaluate(candidate, [fold]).rank for fold in folds]))
        return scores

    def on_dense(self, so_far: object, work: float) -> None:
        self._ranks.clear()

    def on_level(self, level: Level, so_far: object) -> None:
        self.levels.append(self._ranks[: len(level.candidates)])  # the winner is validated once more after them
        self._ranks.clear()


def agreement(weights: dict[str, nn.Parameter], evaluate: TrainerEvaluator, levels: int) -> tuple[float, float]:
    """Return how often a race finds a good enough winner, and its mean regret in standard errors."""
    seen = Branches(evaluate)
    tree, validation = Tree(max_levels=levels), Validation(race=False)
    search(weights, seen, tolerance=math.inf, tree=tree, validation=validation, observer=seen)
    outcomes = [_regret(branch) for branch in seen.levels]
    return (
        mean(regret <= error for regret, error in outcomes),
        mean(regret / error if regret else 0.0 for regret, error in outcomes),
    )


def _regret(branch: list[tuple[float, list[float]]]) -> tuple[float, float]:
    """Return the difference between the best rank on all folds and the race winner's, and its paired standard error."""
    folds = len(branch[0][1])
    runners = list(range(len(branch)))
    for rung in rungs(len(branch), folds, folds):
        behind = rung.parts[0].start
        if behind:
            runners = sorted(runners, key=lambda one: -mean(branch[one][1][:behind]))[: rung.entrants]
    raced = max(runners, key=lambda one: mean(branch[one][1]))
    best = max(range(len(branch)), key=lambda one: branch[one][0])
    apart = [a - b for a, b in zip(branch[best][1], branch[raced][1], strict=True)]
    return branch[best][0] - branch[raced][0], stdev(apart) / math.sqrt(folds)


def _timed(action: Callable[[], object]) -> tuple[object, float]:
    began = time.perf_counter()
    result = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - began


def measured(name: str, workers: int, options: argparse.Namespace) -> dict:
    """Return the measurements of one case."""
    seed_everything(0, verbose=False)
    net, train, val, size = cases()[name]
    loaders = [
        DataLoader(TensorDataset(*part), batch_size=size, shuffle=shuffle, num_workers=count)
        for part, shuffle, count in ((train, True, 0), (val, False, workers))
    ]
    watch = Measured(options, loaders[1])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "callbacks": [watch]}
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator=options.accelerator,
        devices=1,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=options.epochs + 1,
        **quiet,
    )
    trainer.fit(Classifier(net), *loaders)
    return watch.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(cases()), default=list(cases()))
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--levels", type=int, default=6, help="branches in which the race is compared with no race")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--accelerator", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}; ratios of medians")
    print("                     workers | in dense validations            | candidate / | race")
    print("                             | branch of 20 (usual)   reading  | bare steps  | agrees  regret / s.e.")
    for name in options.cases:
        for workers in options.workers:
            one = measured(name, workers, options)
            branch, reading = one["branch"] / one["dense"], one["reading"] / one["dense"]
            print(
                f"{name:20} {workers:7} | {branch:12.2f} {one['branch'] / one['usual']:7.2f}  {reading:8.2f}  | "
                f"{one['candidate'] / one['step']:11.2f} | "
                f"{one['agrees']:6.0%}  {one['regret']:13.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
