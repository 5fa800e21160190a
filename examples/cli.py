"""Train and prune from a YAML file and the command line.

`python examples/cli.py fit --config examples/pruned.yaml` trains a small network on scikit-learn's digits, prunes it,
and prints the report of the search. The command line can override any line of the file. `--trainer.callbacks.` means
the last callback in the file:

    python examples/cli.py fit --config examples/pruned.yaml --trainer.callbacks.wheel.sharpness=.inf
"""

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_roulette import RouletteWheelPruning


class Classifier(LightningModule):
    """A perceptron for images of 8 x 8 pixels.

    Args:
        hidden: Units of each hidden layer.
        lr: Learning rate of Adam.
    """

    def __init__(self, hidden: list[int] = [300, 100], lr: float = 1e-3) -> None:  # noqa: B006  # YAML gives a list
        super().__init__()
        self.save_hyperparameters()
        sizes = [64, *hidden]
        layers = [part for a, b in zip(sizes, hidden, strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 10))
        self.lr = lr
        self.val_acc = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        return cross_entropy(self.net(images), digits)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, digits = batch
        scores = self.net(images)
        self.log("val_loss", cross_entropy(scores, digits))
        self.val_acc(scores, digits)
        self.log("val_acc", self.val_acc)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Digits(LightningDataModule):
    """Scikit-learn's digits: 1,397 training images and 400 validation images.

    Args:
        batch_size: Number of training images in a batch.
    """

    def __init__(self, batch_size: int = 50) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        images, digits = load_digits(return_X_y=True)
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
        images, digits = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(digits)[order]
        self.train, self.val = TensorDataset(images[400:], digits[400:]), TensorDataset(images[:400], digits[:400])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=400)


class PruningCLI(LightningCLI):
    """A command line that prints the report of the search."""

    trainer: Trainer

    def after_fit(self) -> None:
        for callback in self.trainer.callbacks:
            if isinstance(callback, RouletteWheelPruning):
                print(f"\n{callback.report}\n\npruned network: {callback.best_model_path or 'not written'}")


def main(args: list[str] | None = None) -> PruningCLI:
    """Run the command line. `args` are its arguments; None uses the arguments of the process."""
    torch.set_num_threads(1)  # more threads are slower for tensors this small
    return PruningCLI(Classifier, Digits, args=args, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
