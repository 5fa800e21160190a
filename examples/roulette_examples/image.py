"""A convolutional network with batch normalisation that tells the direction of stripes."""

import math

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from roulette_examples.data import MadeUp

SIZE, DIRECTIONS = 16, 6


class Stripes(MadeUp):
    """Grey images of stripes in six directions, with noise."""

    def make(self, count: int, chance: torch.Generator) -> tuple[Tensor, ...]:
        directions = torch.randint(DIRECTIONS, (count,), generator=chance)
        angle = directions * math.pi / DIRECTIONS
        at = torch.arange(SIZE) - SIZE / 2
        along = at[:, None] * angle.sin()[:, None, None] + at * angle.cos()[:, None, None]
        width = 4 + 3 * torch.rand(count, 1, 1, generator=chance)
        start = torch.rand(count, 1, 1, generator=chance)
        images = (2 * math.pi * (along / width + start)).sin()
        return (images + torch.randn(images.shape, generator=chance))[:, None], directions


class ImageClassifier(LightningModule):
    """Three convolutions, each with batch normalisation, and a linear layer.

    Args:
        width: Channels of the first convolution.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for inputs, outputs in ((1, width), (width, 2 * width), (2 * width, 2 * width)):
            parts += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            parts += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*parts)
        self.direction = nn.Linear(8 * width, DIRECTIONS)
        self.val_acc = MulticlassAccuracy(DIRECTIONS, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.direction(self.features(images).flatten(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, directions = batch
        return cross_entropy(self(images), directions)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, directions = batch
        logits = self(images)
        self.val_acc(logits, directions)
        self.log_dict({"val_loss": cross_entropy(logits, directions), "val_acc": self.val_acc})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)
