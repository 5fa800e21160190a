"""Prune LeNet-300-100 and LeNet-5 on MNIST in turn with training, and put what is left beside published numbers.

10,000 of the 60,000 training images choose (the validation data); the 10,000 test images only judge. The learning rate
falls to zero under a cosine, so that the dense network is trained out before the first cut, where its validation score
sets the floor; then it starts once more, and falls to zero while the network is pruned. Beside the pruned network stand
that dense one, and with `--dense` one that is trained on to the end without pruning.
"""

import argparse
import logging
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from mnist import NETWORKS, Classifier, Split, accuracy, batches, mnist
from torch import nn

from lightning_roulette import RouletteWheelPruning, Tree

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from finished_runs import Row, Runs

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*LeafSpec.*|.*is not empty.*")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, and before which of its epochs it is cut."""

    epochs: int
    at_epoch: range
    pruning_rate: float
    lr: float = 2e-3


RECIPES = {
    "lenet-300-100": Recipe(60, range(12, 50), 0.15),
    "lenet-5": Recipe(36, range(8, 31), 0.25),
}
# compression and test error in %, of Molchanov, Ashukha and Vetrov, "Variational dropout sparsifies deep neural
# networks" (ICML 2017), its table of other methods included
PUBLISHED = {
    "lenet-300-100": {
        "dense": (1, 1.64),
        "Han et al. 2015": (12, 1.59),
        "dynamic network surgery, 2016": (56, 1.99),
        "soft weight-sharing, 2017": (23, 1.94),
        "sparse variational dropout, 2017": (68, 1.92),
    },
    "lenet-5": {
        "dense": (1, 0.80),
        "Han et al. 2015": (12, 0.77),
        "dynamic network surgery, 2016": (111, 0.91),
        "soft weight-sharing, 2017": (200, 0.97),
        "sparse variational dropout, 2017": (280, 0.75),
    },
}

DENSE = {"dense_test": "dense, before the first cut", "dense_to_the_end": "dense, trained on to the end"}


class Annealed(Classifier):
    """Adam under two cosines to zero.

    Args:
        net: The network.
        lr: Where each begins.
        dense_epochs: How many epochs the first one takes.
    """

    def __init__(self, net: nn.Module, lr: float, dense_epochs: int) -> None:
        super().__init__(net)
        self.lr, self.dense_epochs = lr, dense_epochs

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        first = steps * self.dense_epochs // self.trainer.max_epochs

        def factor(step: int) -> float:
            done = step / first if step < first else (step - first) / (steps - first)
            return (1 + math.cos(math.pi * done)) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trained(name: str, seed: int, data: dict[str, Split], recipe: Recipe, *callbacks: RouletteWheelPruning) -> Annealed:
    """The network after the recipe."""
    seed_everything(seed, verbose=False)
    network, val_batch = NETWORKS[name]
    module = Annealed(network(), recipe.lr, recipe.at_epoch[0])
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=recipe.epochs,
        callbacks=list(callbacks),
        logger=TensorBoardLogger("runs", f"{name}-while-training"),
        enable_model_summary=False,
    )
    trainer.fit(module, batches(data["train"], 100, shuffle=True), batches(data["val"], val_batch))
    return module


def run(name: str, seed: int, data: dict[str, Split], recipe: Recipe, tolerance: float, dense: bool) -> Row:
    """Train, prune and judge one network."""
    pruning = RouletteWheelPruning(
        tolerance=tolerance,
        monitor="val_acc",
        at_epoch=recipe.at_epoch,
        tree=Tree(pruning_rate=recipe.pruning_rate),
        seed=seed,
    )
    module = trained(name, seed, data, recipe, pruning)
    report = pruning.report
    before = trained_before_the_first_cut(pruning, recipe, name) if report.winner else module
    return {
        "left": 1 - report.sparsity,
        "test": accuracy(module.net, data["test"]),
        "floor": report.gated_floor,
        "judged": report.winner.gated if report.winner else None,
        "dense_test": accuracy(before.net, data["test"]),
        "dense_to_the_end": accuracy(trained(name, seed, data, recipe).net, data["test"]) if dense else None,
        "levels": len(report.levels),
        "seconds_pruning": report.seconds,
    }


def trained_before_the_first_cut(pruning: RouletteWheelPruning, recipe: Recipe, name: str) -> Annealed:
    """The dense network that set the floor, from the file beside that of the winner."""
    winner = Path(pruning.best_model_path)
    path = winner.with_name(winner.name.replace("pruned", "dense"))
    return Annealed.load_from_checkpoint(path, net=NETWORKS[name][0](), lr=recipe.lr, dense_epochs=recipe.at_epoch[0])


def show(name: str, rows: list[Row]) -> None:
    """One table, the densest first."""
    print(f"\n{name}: compression, and error on the test images in %")
    for method, (times, error) in PUBLISHED[name].items():
        print(f"  {method:34} {times:5}x  {error:5.2f}   published")
    for key, words in DENSE.items():
        if known := [row[key] for row in rows if row[key] is not None]:
            print(f"  {words:34} {1:5}x  {spread([1 - one for one in known])}")
    left = [row["left"] for row in rows]
    error = spread([1 - row["test"] for row in rows])
    print(f"  {'pruned in turn with training':34} {1 / mean(left):5.0f}x  {error}   {spread(left)} % left")
    print(f"  seeds: {', '.join(str(row['seed']) for row in rows)}")


def spread(values: list[float]) -> str:
    """Mean and range in percent."""
    return f"{100 * mean(values):5.2f} ({100 * min(values):.2f} to {100 * max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="mnist.npz in the layout of Keras; fetched from OpenML if left out")
    parser.add_argument("--network", choices=list(NETWORKS), action="append", help="both if left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tolerance", type=float, default=0.005)
    parser.add_argument("--dense", action="store_true", help="also train as long without pruning")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, runs = mnist(options.data), Runs(options.results)
    for name in options.network or NETWORKS:
        for seed in options.seeds:
            key = {"network": name, "seed": seed, "tolerance": options.tolerance}
            if not runs.has(**key):
                runs.add(**key, **run(name, seed, data, RECIPES[name], options.tolerance, options.dense))
        show(name, [row for row in runs.of(network=name, tolerance=options.tolerance) if row["seed"] in options.seeds])
    print("\ncurves: .venv/bin/tensorboard --logdir runs")


if __name__ == "__main__":
    main()
