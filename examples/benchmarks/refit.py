"""Measure the gain of a refit: accuracy at a fixed sparsity, and weights left at a tolerance of half a point.

Two methods are compared: magnitude pruning (one shot, all layers together), and the wheel (20 candidates per level).
Each runs without a refit, with recalibrated batch normalisation, and with least squares.

- Training images are used for training and, without their classes, for calibration.
- Validation images are used for choices.
- Test images are used for judging only.

Runs are stored as lines of JSON, and trained networks in a folder. Neither is computed again.
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch
from finished_runs import Runs
from on_tensors import (
    NETWORKS,
    OnTensors,
    Split,
    accuracy_with,
    augmented,
    cifar10,
    dense_weights,
    mnist,
    small_resnet,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_roulette import Calibration, Mask, Tree, Validation, search

# Levels that each keep 2 ** (-1 / 3) of the weights reach about 80, 90, 95 and 98 % after 7, 10, 13 and 17 levels.
RATE, LEVELS = 1 - 2 ** (-1 / 3), {7: "80", 10: "90", 13: "95", 17: "98"}
REFITS: dict[str, str | None] = {"none": None, "batch_norm": "batch_norm", "least_squares": "least_squares"}
NETS = ("lenet-300-100", "lenet-5", "resnet")
INPUTS = {"lenet-300-100": 50_000, "lenet-5": 10_000, "resnet": 2_500}  # calibration images
# epochs, images in a batch, learning rate
TRAINING = {"lenet-300-100": (12, 100, 1e-3), "lenet-5": (8, 100, 1e-3), "resnet": (8, 128, 5e-3)}


def network(name: str) -> nn.Module:
    """Return one of three untrained networks, with 266,200, 430,500 and 77,808 prunable weights."""
    return small_resnet() if name == "resnet" else NETWORKS[name][0]()


def trained(name: str, seed: int, split: Split, folder: Path) -> nn.Module:
    """Return the network, trained by Adam with weight decay (0.0005, L2) under a cosine.

    Images of CIFAR are shifted and mirrored.
    """
    path = folder / f"{name}-{seed}.pt"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = network(name).to(memory_format=torch.channels_last)
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    epochs, batch, rate = TRAINING[name]
    chance, count = torch.Generator().manual_seed(seed), len(split[1])
    optimizer = torch.optim.Adam(net.parameters(), lr=rate, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(count / batch))
    for _ in range(epochs):
        for chosen in torch.randperm(count, generator=chance).split(batch):
            images = split[0][chosen]
            if name == "resnet":
                images = augmented(images, chance)
            optimizer.zero_grad()
            cross_entropy(net(images), split[1][chosen]).backward()
            optimizer.step()
            schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)
    return net.eval()


def magnitude_mask(weights: Mapping[str, Tensor], survivors: int) -> Mask:
    """Return the mask of the largest weights of all layers together."""
    ascending = torch.cat([weight.abs().flatten() for weight in weights.values()]).sort().values
    threshold = ascending[len(ascending) - survivors]
    return Mask({name: weight.abs() >= threshold for name, weight in weights.items()})


class Case:
    """A trained network, its data, and its calibration inputs."""

    def __init__(self, name: str, seed: int, data: dict[str, Split], folder: Path) -> None:
        self.name, self.seed, self.data = name, seed, data
        self.net = trained(name, seed, data["train"], folder)
        self.weights, self.dense = dense_weights(self.net), accuracy_with(self.net, {}, data["test"])
        chance = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(data["train"][1]), generator=chance)[: INPUTS[name]]
        self.calibration = Calibration(self.net, [data["train"][0][chosen]])

    def searched(self, how: str | None, **choices: object) -> tuple[object, float]:
        """Return the winner of a search, and its seconds."""
        evaluate = OnTensors(self.net, self.data["val"], 1000, seed=self.seed)
        began = time.monotonic()
        winner = search(self.weights, evaluate, refit=how, calibration=self.calibration, seed=self.seed, **choices)
        return winner, time.monotonic() - began

    def lost(self, values: Mapping[str, Tensor]) -> float:
        """Return how far the test accuracy is below the dense network's."""
        return self.dense - accuracy_with(self.net, values, self.data["test"])

    def at_fixed_sparsity(self, refit: str, runs: Runs) -> None:
        """Measure the wheel and magnitude pruning at the same numbers of weights."""
        how, key = REFITS[refit], {"network": self.name, "seed": self.seed, "refit": refit}
        if not runs.has(**key, method="wheel"):
            tree, confirm = Tree(RATE, max_levels=max(LEVELS)), Validation(confirm=0)
            winner, seconds = self.searched(how, tolerance=math.inf, tree=tree, validation=confirm)
            for level, sparsity in LEVELS.items():
                row = {**key, "method": "wheel", "sparsity": sparsity, "seconds": seconds * level / max(LEVELS)}
                runs.add(**row, accuracy=self.dense - self.lost(winner.weights_at(level)))
        if not runs.has(**key, method="magnitude"):
            size = sum(weight.numel() for weight in self.weights.values())
            for level, sparsity in LEVELS.items():
                began = time.monotonic()
                mask = magnitude_mask(self.weights, round(size * (1 - RATE) ** level))
                values = {name: weight * mask[name] for name, weight in self.weights.items()}
                values |= {} if how is None else self.calibration.refit(mask, how).values
                row = {**key, "method": "magnitude", "sparsity": sparsity, "seconds": time.monotonic() - began}
                runs.add(**row, accuracy=self.dense - self.lost(values))

    def at_half_a_point(self, refit: str, tolerance: float, runs: Runs) -> None:
        """Measure the weights left by a search at a tolerance, and the loss on the test images."""
        key = {"network": self.name, "seed": self.seed, "refit": refit, "tolerance": tolerance}
        if runs.has(**key, method="search"):
            return
        winner, seconds = self.searched(REFITS[refit], tolerance=tolerance)
        report = winner.report
        row = {**key, "method": "search", "left": 1 - report.sparsity, "reported": report.decline, "dense": self.dense}
        runs.add(**row, lost=self.lost(winner.weights), seconds=seconds, levels=len(report.accepted))


def tables(runs: Runs, names: Sequence[str], tolerance: float) -> None:
    """Print means over the seeds, with ranges in brackets."""
    print("\naccuracy on the test images, %, by sparsity; seconds to 98 %")
    for name in names:
        dense = [row["dense"] for row in runs.rows if row["method"] == "search" and row["network"] == name]
        print(f"{name}: dense {100 * mean(dense):.2f}" if dense else name)
        for method in ("magnitude", "wheel"):
            for refit in REFITS:
                rows = runs.of(network=name, method=method, refit=refit)
                if not rows:
                    continue
                cells = [spread([row["accuracy"] for row in rows if row["sparsity"] == one]) for one in LEVELS.values()]
                seconds = mean(row["seconds"] for row in rows if row["sparsity"] == "98")
                print(f"  {method:9} {refit:13} {'  '.join(cells)}  {seconds:7.1f} s")
    print(f"\nweights left by a search at a tolerance of {100 * tolerance:g} points, %; declines in points")
    for name in names:
        for refit in REFITS:
            rows = runs.of(network=name, method="search", refit=refit, tolerance=tolerance)
            if rows:
                left, lost, reported = ([row[key] for row in rows] for key in ("left", "lost", "reported"))
                seconds = mean(row["seconds"] for row in rows)
                print(
                    f"  {name:13} {refit:13} left {spread(left)}  reported {spread(reported)}  "
                    f"on test {spread(lost)}  {seconds:7.1f} s  {len(rows)} seeds"
                )


def spread(values: Sequence[float]) -> str:
    """Return mean and range in percent."""
    return f"{100 * mean(values):6.2f} ({100 * min(values):.2f} to {100 * max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="mnist.npz in the layout of Keras; default: fetched from OpenML")
    parser.add_argument(
        "--cifar10", type=Path, help="cifar10.npz in the layout of Keras; without it the ResNet is skipped"
    )
    parser.add_argument("--network", choices=NETS, action="append", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--refits", choices=list(REFITS), nargs="+", default=list(REFITS))
    parser.add_argument("--tolerance", type=float, default=0.005)
    parser.add_argument("--half", action="store_true", help="measure only the weights left at a tolerance")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("refit.jsonl"))
    parser.add_argument("--networks", type=Path, default=Path("networks"), help="folder of trained networks")
    parser.add_argument("--train-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs, asked = Runs(options.results), options.network or NETS
    for name in asked:
        if name == "resnet" and options.cifar10 is None:
            continue
        data = cifar10(options.cifar10, 2_500) if name == "resnet" else mnist(options.data)
        for seed in options.seeds:
            case = Case(name, seed, data, options.networks)
            print(name, seed, case.dense, flush=True)
            if options.train_only:
                continue
            for refit in options.refits:
                if refit == "batch_norm" and name != "resnet":
                    continue
                case.at_half_a_point(refit, options.tolerance, runs)
                if not options.half:
                    case.at_fixed_sparsity(refit, runs)
    tables(runs, asked, options.tolerance)


if __name__ == "__main__":
    main()
