"""Train a small network on scikit-learn's digits, prune it, and compare the accuracy on test images."""

import logging
import os
import sys
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_roulette import RouletteWheelPruning


class DigitsClassifier(LightningModule):
    """A perceptron with two hidden layers for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
        self.val_acc = MulticlassAccuracy(10, average="micro")
        self.test_acc = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        return cross_entropy(self.net(images), digits)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, digits = batch
        scores = self.net(images)
        self.log("val_loss", cross_entropy(scores, digits))
        self.val_acc(scores, digits)
        self.log("val_acc", self.val_acc)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, digits = batch
        self.test_acc(self.net(images), digits)
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def loaders() -> tuple[DataLoader, DataLoader, DataLoader]:
    """Return loaders of 1,000 training, 400 validation and 397 test images."""
    images, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images, digits = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(digits)[order]
    train, val, test = (TensorDataset(images[a:b], digits[a:b]) for a, b in ((0, 1000), (1000, 1400), (1400, 1797)))
    return (
        DataLoader(train, batch_size=50, shuffle=True),
        DataLoader(val, batch_size=400),
        DataLoader(test, batch_size=397),
    )


def main() -> None:
    for name in ("lightning.pytorch", "lightning_roulette"):
        logging.getLogger(name).setLevel(logging.WARNING)  # the last lines of this script say what was found
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # of lightning 2.6 with torch 2.13
    torch.set_num_threads(1)  # more threads are slower for tensors this small
    seed_everything(0, verbose=False)
    train, val, test = loaders()
    model = DigitsClassifier()
    pruning = RouletteWheelPruning(branches=20, tolerance=0.01)
    trainer = Trainer(
        max_epochs=30,
        callbacks=[pruning],
        logger=TensorBoardLogger("runs", "quickstart"),
        log_every_n_steps=10,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),  # no bars in a file
    )
    print("A perceptron learns to read digits. Then as many weights as possible are removed, while the accuracy on")
    print("validation images falls by at most one point. This takes about half a minute.\n", flush=True)
    trainer.fit(model, train, val)

    slim = trainer.test(model, test, verbose=False)[0]["test_acc"]
    model.load_state_dict(pruning.weights_at(0), strict=False)  # the network before pruning
    dense = trainer.test(model, test, verbose=False)[0]["test_acc"]
    print(f"The levels of the search:\n\n{pruning.report.table(10)}\n")
    show(pruning, dense, slim)


def show(pruning: RouletteWheelPruning, dense: float, slim: float) -> None:
    """Print what was kept, the accuracy of both networks, the time, and where the pruned network is.

    Args:
        pruning: The callback after a search.
        dense: Accuracy of the network before pruning on the test images.
        slim: Accuracy of the pruned network on the test images.
    """
    report, path = pruning.report, pruning.best_model_path
    held_out = report.winner.held_out_score if report.winner else report.held_out_dense
    rows = (
        ("", "before", "pruned", ""),
        (
            "weights",
            f"{report.size:,}",
            f"{report.survivors:,}",
            f"{1 - report.sparsity:.1%} kept, the others are zero",
        ),
        ("validation accuracy", percent(report.dense_measured), percent(report.score), "400 images"),
        ("held-out accuracy", percent(report.held_out_dense), percent(held_out), "200 of them, which chose nothing"),
        ("test accuracy", percent(dense), percent(slim), "397 other images, which chose nothing"),
    )
    for what, before, pruned, meaning in rows:
        print(f"{what:<20}{before:>9}{pruned:>9}   {meaning}")
    print(f"time                {report.seconds:.0f} s for the search")
    print(f"file                {path}, {os.path.getsize(path):,} bytes (save_compressed writes a smaller file)")
    print(f'load it             DigitsClassifier.load_from_checkpoint("{path}")')
    print("curves              .venv/bin/tensorboard --logdir runs")
    print(
        "your network        add RouletteWheelPruning to its Trainer, or call prune(trainer, model, ...): see README.md"
    )


def percent(share: float) -> str:
    return f"{share:.2%}"


if __name__ == "__main__":
    main()
