"""Prune LeNet-300-100 and LeNet-5 on MNIST in turn with training, and compare with published numbers.

With `--cifar10`, also prune a small ResNet on CIFAR-10.

- Validation data, for all choices: 10,000 of the 60,000 training images of MNIST, 5,000 of the 50,000 of CIFAR-10.
- Test data, for judging only: 10,000 images.
- Before the first cut the learning rate falls to zero under a cosine, so that the dense network is fully trained. Its
  validation score sets the floor.
- Then the learning rate starts again, and falls to zero while the network is pruned.

The tables show the pruned network and the dense network before the first cut. With `--dense` they also show a network
that is trained to the end without pruning.
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
from torch import Tensor, nn

from lightning_roulette import RouletteWheelPruning, Tree

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from finished_runs import Row, Runs
from on_tensors import augmented, cifar10, small_resnet

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*LeafSpec.*|.*is not empty.*")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, and before which epochs it is cut."""

    epochs: int
    at_epoch: range
    lr: float  # start of the first cosine
    lr_while_pruning: float  # start of the second cosine
    weight_decay: float
    target_sparsity: float | None  # None: each cut removes a share of the survivors
    pruning_rate: float = 0.15
    batch: int = 100
    val_batch: int = 1000


RECIPES = {
    "lenet-300-100": Recipe(80, range(12, 60), 2e-3, 2e-3, 1e-4, 1 - 1 / 72),
    "lenet-5": Recipe(45, range(6, 28), 2e-3, 2e-3, 5e-5, 1 - 1 / 205, val_batch=250),
    "resnet": Recipe(20, range(7, 18), 5e-3, 3e-3, 5e-4, None, pruning_rate=0.25, batch=128, val_batch=250),
}
NETS = {name: maker for name, (maker, _) in NETWORKS.items()} | {"resnet": small_resnet}
# compression and test error in %, from Molchanov, Ashukha and Vetrov, "Variational dropout sparsifies deep neural
# networks" (ICML 2017), including its table of other methods
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
    "resnet": {},
}

DENSE = {"dense_test": "dense, before the first cut", "dense_to_the_end": "dense, trained on to the end"}


class Annealed(Classifier):
    """A classifier that is trained by Adam under two cosines to zero. Colour images are shifted and mirrored.

    Args:
        net: The network.
        recipe: How it is trained.
        seed: Seed of the shifts and mirrorings.
    """

    def __init__(self, net: nn.Module, recipe: Recipe, seed: int = 0) -> None:
        super().__init__(net)
        self.recipe, self.chance = recipe, torch.Generator().manual_seed(seed)

    def training_step(self, batch: Split, batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        images, classes = batch
        return super().training_step((augmented(images, self.chance) if images.shape[1] == 3 else images, classes), 0)

    def configure_optimizers(self) -> dict:
        """Return Adam with weight decay (L2) and the schedule."""
        optimizer = torch.optim.Adam(self.parameters(), lr=1.0, weight_decay=self.recipe.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        first = steps * self.recipe.at_epoch[0] // self.recipe.epochs

        def rate(step: int) -> float:
            if step < first:
                return self.recipe.lr * (1 + math.cos(math.pi * step / first)) / 2
            return self.recipe.lr_while_pruning * (1 + math.cos(math.pi * (step - first) / (steps - first))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trained(name: str, seed: int, data: dict[str, Split], recipe: Recipe, *callbacks: RouletteWheelPruning) -> Annealed:
    """Return the network, trained by the recipe."""
    seed_everything(seed, verbose=False)
    module = Annealed(NETS[name]().to(memory_format=torch.channels_last), recipe, seed)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=recipe.epochs,
        callbacks=list(callbacks),
        logger=TensorBoardLogger("runs", f"{name}-while-training"),
        enable_model_summary=False,
    )
    trainer.fit(module, batches(data["train"], recipe.batch, shuffle=True), batches(data["val"], recipe.val_batch))
    return module


def run(name: str, seed: int, data: dict[str, Split], recipe: Recipe, tolerance: float, dense: bool) -> Row:
    """Train, prune and test one network."""
    pruning = RouletteWheelPruning(
        tolerance=tolerance,
        monitor="val_acc",
        at_epoch=recipe.at_epoch,
        target_sparsity=recipe.target_sparsity,
        tree=Tree(pruning_rate=recipe.pruning_rate),
        seed=seed,
    )
    module = trained(name, seed, data, recipe, pruning)
    report = pruning.report
    before = trained_before_the_first_cut(pruning, recipe, name) if report.winner else module
    return {
        "left": 1 - report.sparsity,
        "test": accuracy(module.net, data["test"]),
        "floor": report.held_out_floor,
        "judged": report.winner.held_out_score if report.winner else None,
        "dense_test": accuracy(before.net, data["test"]),
        "dense_to_the_end": accuracy(trained(name, seed, data, recipe).net, data["test"]) if dense else None,
        "levels": len(report.levels),
        "seconds_pruning": report.seconds,
    }


def trained_before_the_first_cut(pruning: RouletteWheelPruning, recipe: Recipe, name: str) -> Annealed:
    """Return the dense network that set the floor. Its file is next to the winner's."""
    winner = Path(pruning.best_model_path)
    path = winner.with_name(winner.name.replace("pruned", "dense"))
    return Annealed.load_from_checkpoint(path, net=NETS[name](), recipe=recipe)


def show(name: str, rows: list[Row]) -> None:
    """Print one table: published networks, dense networks, then the pruned network."""
    print(f"\n{name}: compression (weights before / weights kept), and error on the test images in %")
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
    """Return mean and range in percent."""
    return f"{100 * mean(values):5.2f} ({100 * min(values):.2f} to {100 * max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="mnist.npz in the layout of Keras; default: fetched from OpenML")
    parser.add_argument("--cifar10", type=Path, help="cifar10.npz in the layout of Keras, for the ResNet")
    parser.add_argument("--network", choices=list(NETS), action="append", help="default: all whose data is available")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tolerance", type=float, default=0.005)
    parser.add_argument("--dense", action="store_true", help="also train as long without pruning")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs, names = Runs(options.results), options.network or [*NETWORKS, *(["resnet"] if options.cifar10 else [])]
    for name in names:
        keys = [{"network": name, "seed": seed, "tolerance": options.tolerance} for seed in options.seeds]
        if missing := [key for key in keys if not runs.has(**key)]:
            data = cifar10(options.cifar10, 5_000) if name == "resnet" else mnist(options.data)
            for key in missing:
                runs.add(**key, **run(name, key["seed"], data, RECIPES[name], options.tolerance, options.dense))
        show(name, [row for key in keys for row in runs.of(**key)])
    print("\ncurves: .venv/bin/tensorboard --logdir runs")


if __name__ == "__main__":
    main()
