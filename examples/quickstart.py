"""Train a small network on scikit-learn's digits, prune it, and compare the accuracy on test images."""

import logging
import sys

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_roulette import RouletteWheelPruning

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


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
    trainer.fit(model, train, val)

    print(f"\n{pruning.report.table(10)}\n")  # the log has shown the result: print(pruning.report) would repeat it
    slim = trainer.test(model, test, verbose=False)[0]["test_acc"]
    dense = trainer.test(model, test, ckpt_path="best", verbose=False)[0]["test_acc"]
    print(f"accuracy on 397 test images, not used for any choice: dense {dense:.2%}, pruned {slim:.2%}")
    print(f"pruned network: {pruning.best_model_path}")
    print("curves:         .venv/bin/tensorboard --logdir runs")


if __name__ == "__main__":
    main()
