"""A network with two tasks, and a third head that only training uses."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torchmetrics.classification import MulticlassAccuracy

from roulette_examples.data import MadeUp

INPUTS, CLASSES = 20, 5


class TwoTargets(MadeUp):
    """Points near one of five centres: which centre, and how far from it."""

    def make(self, count: int, chance: torch.Generator) -> tuple[Tensor, ...]:
        centres = torch.randn(CLASSES, INPUTS, generator=torch.Generator().manual_seed(7))
        classes = torch.randint(CLASSES, (count,), generator=chance)
        away = torch.randn(count, INPUTS, generator=chance) * (0.5 + torch.rand(count, 1, generator=chance))
        return centres[classes] + away, classes, away.norm(dim=1, keepdim=True)


class TwoTasks(LightningModule):
    """A shared trunk, a head for the class, one for the distance, and a decoder that helps training.

    The search compares the accuracy of the first head with its floor, and ranks candidates by the loss of both heads.
    The decoder has no part in either, so it is not pruned.

    Args:
        width: Units of the trunk.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.kind, self.distance, self.decoder = (nn.Linear(width, outputs) for outputs in (CLASSES, 1, INPUTS))
        self.val_acc = MulticlassAccuracy(CLASSES, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        points, classes, distances = batch
        found = self.trunk(points)
        return self._loss(found, classes, distances) + 0.1 * mse_loss(self.decoder(found), points)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        points, classes, distances = batch
        found = self.trunk(points)
        self.val_acc(self.kind(found), classes)
        self.log_dict({"val_loss": self._loss(found, classes, distances), "val_acc": self.val_acc})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)

    def _loss(self, found: Tensor, classes: Tensor, distances: Tensor) -> Tensor:
        return cross_entropy(self.kind(found), classes) + mse_loss(self.distance(found), distances)
