"""Prune LeNet-300-100 and LeNet-5 on MNIST, and compare with magnitude pruning at the same tolerance.

10,000 of the 60,000 training images are validation data, on which all choices are made. The 10,000 test images are used
for judging only.
"""

import argparse
import json
import logging
import math
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_roulette import RouletteWheelPruning, Wheel, apply_mask, prunable_parameters, search

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*LeafSpec.*|.*holds unpruned weights.*")

Split = tuple[Tensor, Tensor]


def lenet_300_100() -> nn.Module:
    """Return LeNet-300-100 (LeCun et al. 1998): 266,200 weights and 410 biases."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def lenet_5() -> nn.Module:
    """Return LeNet-5 in the form of Caffe, which pruning papers use: 430,500 weights and 580 biases."""
    features = [nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


NETWORKS = {"lenet-300-100": (lenet_300_100, 1000), "lenet-5": (lenet_5, 250)}  # with the validation batch size


class Classifier(LightningModule):
    """Any network for images of ten classes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.val_acc = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: Split, batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        images, digits = batch
        return cross_entropy(self.net(images), digits)

    def validation_step(self, batch: Split, batch_idx: int) -> None:
        """Log the loss and the accuracy that the search uses."""
        images, digits = batch
        scores = self.net(images)
        self.log("val_loss", cross_entropy(scores, digits), batch_size=len(digits))
        self.val_acc(scores, digits)
        self.log("val_acc", self.val_acc)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def mnist(path: Path | None) -> dict[str, Split]:
    """Return training, validation and test images as floats in [0, 1].

    Args:
        path: An .npz in the layout of Keras. None: fetch the data from OpenML.
    """
    if path is None:
        from sklearn.datasets import fetch_openml

        images, digits = fetch_openml("mnist_784", version=1, return_X_y=True, as_frame=False)
    else:
        with np.load(path) as arrays:
            images = np.concatenate([arrays["x_train"], arrays["x_test"]])
            digits = np.concatenate([arrays["y_train"], arrays["y_test"]])
    x = torch.as_tensor(images.astype(np.float32).reshape(-1, 1, 28, 28) / 255)
    y = torch.as_tensor(digits.astype(np.int64))
    parts = {"train": slice(0, 50_000), "val": slice(50_000, 60_000), "test": slice(60_000, 70_000)}
    return {name: (x[part], y[part]) for name, part in parts.items()}


def batches(split: Split, size: int, shuffle: bool = False) -> DataLoader:
    """Return a loader that cuts whole batches from tensors in memory."""
    data = TensorDataset(*split)
    sampler = BatchSampler(RandomSampler(data) if shuffle else range(len(data)), size, drop_last=False)
    return DataLoader(data, sampler=sampler, batch_size=None)


@torch.no_grad()
def accuracy(net: nn.Module, split: Split) -> float:
    """Return the share of images whose digit has the highest score."""
    net.eval()
    hits = sum(
        int((net(x).argmax(1) == y).sum()) for x, y in zip(split[0].split(2000), split[1].split(2000), strict=True)
    )
    return hits / len(split[1])


def magnitude_pruned(net: nn.Module, val: Split, tolerance: float) -> float:
    """Prune `net` in place by magnitude, level by level, at a tolerance. Return the share of weights left."""
    dense = {name: value.clone() for name, value in net.state_dict().items()}

    def score(mask: dict[str, Tensor]) -> float:
        net.load_state_dict(dense)
        apply_mask(net, mask)
        return accuracy(net, val)

    weights = {name: dense[name] for name in prunable_parameters(net)}
    winner = search(weights, score, branches=1, tolerance=tolerance, wheel=Wheel(sharpness=math.inf))
    score(winner.mask)
    return 1 - winner.report.sparsity


def run(name: str, seed: int, options: argparse.Namespace, data: dict[str, Split]) -> dict[str, float | str | int]:
    """Train, prune and test one network."""
    seed_everything(seed, verbose=False)
    network, val_batch = NETWORKS[name]
    module = Classifier(network())
    pruning = RouletteWheelPruning(
        branches=options.branches, tolerance=options.tolerance, wheel=Wheel(sharpness=options.sharpness), seed=seed
    )
    trainer = Trainer(
        max_epochs=options.epochs,
        callbacks=[pruning],
        logger=TensorBoardLogger("runs", name),
        enable_model_summary=False,
        enable_progress_bar=not options.quiet,
    )
    trainer.fit(module, batches(data["train"], 100, shuffle=True), batches(data["val"], val_batch))
    slim = accuracy(module.net, data["test"])
    trained = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    module.load_state_dict(trained)
    began = time.monotonic()
    dense, _ = accuracy(module.net, data["test"]), accuracy(module.net, data["val"])
    seconds = (time.monotonic() - began) / 2
    left = magnitude_pruned(module.net, data["val"], options.tolerance)
    return {
        "network": name,
        "seed": seed,
        "sharpness": str(options.sharpness),
        "left": 1 - pruning.report.sparsity,
        "dense_test": dense,
        "test": slim,
        "magnitude_left": left,
        "magnitude_test": accuracy(module.net, data["test"]),
        "validations": pruning.report.validations,
        "seconds": pruning.report.seconds,
        "forward_passes": pruning.report.seconds / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="mnist.npz in the layout of Keras; default: fetched from OpenML")
    parser.add_argument("--network", choices=list(NETWORKS), action="append", help="default: both")
    parser.add_argument("--branches", type=int, default=20)
    parser.add_argument("--tolerance", type=float, default=0.005)
    parser.add_argument("--sharpness", type=float, default=Wheel().sharpness)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--results", type=Path, help="append each run to this file as one line of JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args()
    data = mnist(options.data)
    rows = []
    for name in options.network or NETWORKS:
        for seed in options.seeds:
            rows.append(run(name, seed, options, data))
            if options.results:
                with options.results.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(f"\ntolerance {options.tolerance}, {options.branches} branches, sharpness {options.sharpness}")
    print("network        seed  dense test | roulette: left   test   | magnitude: left  test")
    for row in rows:
        print(
            f"{row['network']:14} {row['seed']:4}  {row['dense_test']:10.2%} | {row['left']:14.2%}  {row['test']:.2%} "
            f"| {row['magnitude_left']:15.2%}  {row['magnitude_test']:.2%}"
        )
    print("\ncurves: .venv/bin/tensorboard --logdir runs")


if __name__ == "__main__":
    main()
