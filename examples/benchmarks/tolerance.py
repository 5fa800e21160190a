"""Compare rules for the default tolerance: the weights that they leave, and what these weights cost on unseen data.

- `0`: the winner may lose nothing on the held-out half of the validation data.
- `half`, `one`: a share of the standard error of the dense score on that half.
- `paired`: one standard error of the difference between the candidate and the dense network, on the same samples.
- `0.5 %`, `1 %`: this share of the dense score.

No test data is read. The training rows of each data set are dealt to training, validation (all choices) and judging
(no choice). Searches are short: 8 candidates per level, and each level removes a quarter of the weights. Finished runs
are stored as lines of JSON and are not repeated.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from finished_runs import Row, Runs
from on_tensors import Split, dense_weights, digits_mlp
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lightning_roulette import Batches, Calibration, Mask, PrunedWeights, Resamples, Scores, Singles, Tree, search
from lightning_roulette.judge.certificate import paired_error, standard_error
from lightning_roulette.judge.evaluator import divided
from lightning_roulette.judge.outcomes import Outcomes
from lightning_roulette.refit.refitted import Refitted

RULES = ("0", "half", "one", "paired", "0.5 %", "1 %")
FOLDS, BRANCHES, INPUTS, TREE = 16, 8, 2_000, Tree(pruning_rate=0.25)


def small_cnn() -> nn.Module:
    """Return a network of two convolutions for images of 28 x 28 pixels, with 14,312 weights."""
    features = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(400, 32), nn.ReLU(), nn.Linear(32, 10))


def regression_mlp() -> nn.Module:
    """Return the perceptron of the paper's table for KADID-10k."""
    return nn.Sequential(nn.Linear(111, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 1))


@dataclass(frozen=True)
class Task:
    """A data set with a network and a score.

    Attributes:
        file: Name of the .npz. Empty: scikit-learn's digits.
        network: Makes the untrained network.
        score: `"accuracy"`, `"mse"` or `"spearman"`.
        train: Number of training rows.
        judge: Number of rows that judge.
        sizes: Numbers of validation rows.
        epochs: Epochs of training.
        decay: Weight decay (L2) in training.
    """

    file: str
    network: Callable[[], nn.Module]
    score: str
    train: int
    judge: int
    sizes: Sequence[int]
    epochs: int
    decay: float = 5e-4


TASKS = {
    "digits": Task("", digits_mlp, "accuracy", 600, 697, (200, 500), 30),
    "mnist, cnn": Task("mnist.npz", small_cnn, "accuracy", 20_000, 20_000, (200, 1_000, 5_000), 3),
    "kadid10k": Task("kadid10k.npz", regression_mlp, "mse", 3_600, 2_500, (200, 1_000, 2_000), 30, 1e-2),
    "kadid10k, ranks": Task("kadid10k.npz", regression_mlp, "spearman", 3_600, 2_500, (200, 2_000), 30, 1e-2),
}


@cache
def rows(file: str, folder: Path) -> Split:
    """Return the training rows of a data set. Scores of a regression are standardised. Test rows are not read."""
    if not file:
        x, y = load_digits(return_X_y=True)
        return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    with np.load(folder / file) as arrays:
        x, y = torch.from_numpy(arrays["x_train"]), torch.from_numpy(arrays["y_train"]).reshape(-1)
    if x.ndim == 3:
        return x[:, None].float() / 255, y.long()
    x, y = x.float(), y.float()
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-6), (y - y.mean()) / y.std()


def dealt(task: Task, size: int, seed: int, folder: Path) -> dict[str, Split]:
    """Return the parts for training, validation and judging. The seed deals the rows."""
    x, y = rows(task.file, folder)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    ends = (task.train, task.train + task.judge, task.train + task.judge + size)
    assert ends[-1] <= len(y)
    parts = {"train": order[: ends[0]], "judge": order[ends[0] : ends[1]], "val": order[ends[1] : ends[2]]}
    return {name: (x[part], y[part]) for name, part in parts.items()}


def losses(outputs: Tensor, task: Task, y: Tensor) -> Tensor:
    """Return the loss of each row."""
    if task.score == "accuracy":
        return cross_entropy(outputs, y, reduction="none")
    return (outputs.reshape(-1) - y).square()


def trained(task: Task, seed: int, split: Split) -> nn.Module:
    """Return the network of a seed, trained by Adam under a cosine."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = task.network()
    chance, batch = torch.Generator().manual_seed(seed), 50
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=task.decay)
    steps = task.epochs * math.ceil(len(split[1]) / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(task.epochs):
        for chosen in torch.randperm(len(split[1]), generator=chance).split(batch):
            optimizer.zero_grad()
            losses(net(split[0][chosen]), task, split[1][chosen]).mean().backward()
            optimizer.step()
            schedule.step()
    return net.eval()


class OnRows:
    """An evaluator on rows in memory. It ranks by loss and judges by the task's score. Larger is better.

    Args:
        task: The task.
        net: The network, in evaluation mode.
        split: Rows in random order. Single rows are divided between the folds.
        paired: Whether a score is raised by the standard error of its difference from the dense score.
    """

    folds = FOLDS

    def __init__(self, task: Task, net: nn.Module, split: Split, paired: bool = False) -> None:
        self._task, self._net, self._split, self._paired = task, net, split, paired
        self._dense: dict[tuple[int, ...], Outcomes] = {}

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        """Return the scores of the network with the candidate's weights."""
        outputs, y = self._outputs(candidate, folds)
        rank, score = -float(losses(outputs, self._task, y).double().mean()), scored(self._task, outputs, y)
        return Scores(rank, score, score)

    def recorded(self, candidate: PrunedWeights, folds: Sequence[int]) -> tuple[Scores, Outcomes]:
        """Return the scores, and the outcomes behind them."""
        scores, found = self(candidate, folds), outcomes(self._task, *self._outputs(candidate, folds))
        dense = self._dense.setdefault(tuple(folds), found)  # the first network that is asked for
        error = paired_error(dense, found) if self._paired else 0.0
        return Scores(scores.rank, scores.score + error, scores.tiebreak), found

    @torch.no_grad()
    def _outputs(self, candidate: PrunedWeights, folds: Sequence[int]) -> tuple[Tensor, Tensor]:
        size = len(self._split[1])
        part = slice(size * min(folds) // FOLDS, size * (max(folds) + 1) // FOLDS)
        outputs = functional_call(self._net, dict(candidate.weights), (self._split[0][part],))
        return outputs, self._split[1][part]


def scored(task: Task, outputs: Tensor, y: Tensor) -> float:
    """Return the accuracy, minus the mean squared error, or Spearman's correlation."""
    match task.score:
        case "accuracy":
            return float((outputs.argmax(1) == y).double().mean())
        case "mse":
            return -float(losses(outputs, task, y).double().mean())
        case _:
            return correlation(_ranks(outputs.reshape(-1)), _ranks(y))


def correlation(a: Tensor, b: Tensor) -> float:
    """Return Pearson's correlation."""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[group]


def outcomes(task: Task, outputs: Tensor, y: Tensor) -> Outcomes:
    """Return the scores of single rows, or what resamples rows for a correlation."""
    match task.score:
        case "accuracy":
            return Singles((outputs.argmax(1) == y).double(), 0.0, 1.0)
        case "mse":
            found = -losses(outputs, task, y).double()
            return Batches(found, torch.ones_like(found))
        case _:
            return Resamples(lambda index: scored(task, outputs[index], y[index]), len(y))


class Remembering(Calibration):
    """A calibration that computes each refit and each importance once for all rules."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self._refits: dict[bytes, Refitted] = {}
        self._known: dict[bytes, Mapping[str, Tensor]] = {}

    def refit(self, mask: Mask, how: object = "least_squares") -> Refitted:
        """See `Calibration`."""
        if (key := mask.digest) not in self._refits:
            self._refits[key] = super().refit(mask, how)
        return self._refits[key]

    def scales(self, kind: str, mask: Mask, values: Mapping[str, Tensor], *rest: float) -> Mapping[str, Tensor]:
        """See `Calibration`."""
        if (key := mask.digest) not in self._known:
            self._known[key] = super().scales(kind, mask, values, *rest)
        return self._known[key]


@dataclass(frozen=True, eq=False)
class Case:
    """A trained network with its data, and the unit of the tolerance.

    Attributes:
        task: The task.
        net: The network.
        data: The parts of its data.
        seed: Seed of everything.
        unit: Standard error of the dense score on the held-out half.
    """

    task: Task
    net: nn.Module
    data: dict[str, Split]
    seed: int
    unit: float

    def dense(self) -> dict[str, float]:
        """Return the dense scores on the validation and the judging rows."""
        return {part: self.on(part, {}) for part in ("val", "judge")}

    @torch.no_grad()
    def on(self, part: str, values: Mapping[str, Tensor]) -> float:
        """Return the score of the network with other values on a part of the data."""
        x, y = self.data[part]
        return scored(self.task, functional_call(self.net, dict(values), (x,)), y)

    def run(self, rule: str, calibration: Calibration) -> Row:
        """Search by a rule, and judge the winner."""
        dense, factors = self.dense(), {"0": 0.0, "paired": 0.0, "half": 0.5, "one": 1.0}
        share = 0.0 if rule in factors else float(rule.split()[0]) / 100
        tolerance = factors[rule] * self.unit if rule in factors else share * abs(dense["val"])
        evaluate = OnRows(self.task, self.net, self.data["val"], paired=rule == "paired")
        began = time.monotonic()
        choices = {"branches": BRANCHES, "tolerance": tolerance, "tree": TREE, "seed": self.seed}
        weights = dense_weights(self.net)
        winner = search(weights, evaluate, refit="least_squares", calibration=calibration, **choices)
        lost = dense["judge"] - self.on("judge", winner.weights)
        row = {"left": 1 - winner.report.sparsity, "lost": lost, "dense": dense["judge"], "unit": self.unit}
        row |= {"tolerance": tolerance, "levels": len(winner.report.accepted)}
        return {**row, "seconds": time.monotonic() - began}


def case_of(name: str, size: int, seed: int, net: nn.Module, folder: Path) -> Case:
    """Return the case of a trained network."""
    task = TASKS[name]
    data = dealt(task, size, seed, folder)
    weights = dense_weights(net)
    dense = PrunedWeights(Mask.full(weights), weights)
    found = OnRows(task, net, data["val"]).recorded(dense, divided(FOLDS, 0.5)[1])[1]
    return Case(task, net, data, seed, standard_error(found))


def table(name: str, runs: Runs) -> None:
    """Print a line for each number of validation rows and each rule."""
    task = TASKS[name]
    for size in task.sizes:
        for rule in RULES:
            found = runs.of(task=name, size=size, rule=rule)
            if not found:
                continue
            left, lost, unit = ([row[key] for row in found] for key in ("left", "lost", "unit"))
            relative = [row["lost"] / row["unit"] for row in found]
            error = stdev(lost) / math.sqrt(len(lost)) if len(lost) > 1 else math.nan
            print(
                f"{name:16} {size:6,}  {rule:6} {mean(left):6.1%} ({min(left):.1%} to {max(left):.1%})  "
                f"unit {100 * mean(unit):.2f}  lost {100 * mean(lost):+.2f} +- {100 * error:.2f}, worst "
                f"{100 * max(lost):+.2f}; in units {mean(relative):+.2f}, worst {max(relative):+.2f}; "
                f"{len(found)} seeds"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of mnist.npz and kadid10k.npz")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2, for digits 0 1 2 3 4")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("tolerance.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(options.results)
    for name in options.tasks:
        for seed in options.seeds or range(5 if name == "digits" else 3):
            asked = [(size, rule) for size in TASKS[name].sizes for rule in RULES]
            missing = [(size, rule) for size, rule in asked if not runs.has(task=name, seed=seed, size=size, rule=rule)]
            if not missing:
                continue
            train = dealt(TASKS[name], 0, seed, options.data)["train"]
            net = trained(TASKS[name], seed, train)
            calibration = Remembering(net, [train[0][:INPUTS]])
            for size, rule in missing:
                found = case_of(name, size, seed, net, options.data).run(rule, calibration)
                runs.add(task=name, seed=seed, size=size, rule=rule, **found)
        table(name, runs)


if __name__ == "__main__":
    main()
