"""A U-Net that finds discs in noisy images."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.classification import BinaryJaccardIndex

from roulette_examples.data import MadeUp

SIZE = 16


class Discs(MadeUp):
    """Grey images of a disc, and which pixels belong to it."""

    def make(self, count: int, chance: torch.Generator) -> tuple[Tensor, ...]:
        centre = 4 + (SIZE - 8) * torch.rand(count, 2, 1, 1, generator=chance)
        radius = 2 + 3 * torch.rand(count, 1, 1, generator=chance)
        at = torch.arange(SIZE, dtype=torch.float32)
        inside = (at[:, None] - centre[:, 0]) ** 2 + (at - centre[:, 1]) ** 2 < radius**2
        images = inside + 0.5 * torch.randn(inside.shape, generator=chance)
        return images[:, None], inside[:, None].float()


def convolutions(inputs: int, outputs: int) -> nn.Sequential:
    """Return two convolutions, each with batch normalisation."""
    return nn.Sequential(
        *(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
        *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
    )


class Segmenter(LightningModule):
    """One step down and one step up. The features from before are joined to those that come up.

    Args:
        width: Channels of the first convolution.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down, self.bottom = convolutions(1, width), convolutions(width, 2 * width)
        self.up, self.join = nn.ConvTranspose2d(2 * width, width, 2, stride=2), convolutions(2 * width, width)
        self.pixel = nn.Conv2d(width, 1, 1)
        self.val_iou = BinaryJaccardIndex()

    def forward(self, images: Tensor) -> Tensor:
        fine = self.down(images)
        coarse = self.bottom(nn.functional.max_pool2d(fine, 2))
        return self.pixel(self.join(torch.cat([fine, self.up(coarse)], 1)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, inside = batch
        return binary_cross_entropy_with_logits(self(images), inside)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, inside = batch
        logits = self(images)
        self.val_iou(logits, inside.int())
        self.log_dict({"val_loss": binary_cross_entropy_with_logits(logits, inside), "val_iou": self.val_iou})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=5e-3)
