"""A generative adversarial network, of which the generator alone is pruned."""

import math

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, cdist, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from roulette_examples.data import MadeUp

NOISE = 8


class Ring(MadeUp):
    """Points near a circle, and noise for the generator."""

    def make(self, count: int, chance: torch.Generator) -> tuple[Tensor, ...]:
        angle = 2 * math.pi * torch.rand(count, generator=chance)
        points = torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2, generator=chance)
        return points, torch.randn(count, NOISE, generator=chance)


def perceptron(inputs: int, outputs: int, width: int) -> nn.Sequential:
    """Return a perceptron with two hidden layers."""
    return nn.Sequential(
        *(nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)),
        nn.Linear(width, outputs),
    )


class EnergyDistance(Metric):
    """The energy distance between two sets of points: 0 for equal distributions (Szekely and Rizzo 2013)."""

    higher_is_better = False
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("made", [], dist_reduce_fx="cat")
        self.add_state("real", [], dist_reduce_fx="cat")

    def update(self, made: Tensor, real: Tensor) -> None:
        """Add points of both sets."""
        self.made.append(made)
        self.real.append(real)

    def compute(self) -> Tensor:
        """Return twice the mean distance between the sets, less the mean distances within each."""
        made, real = dim_zero_cat(self.made), dim_zero_cat(self.real)
        return 2 * cdist(made, real).mean() - cdist(made, made).mean() - cdist(real, real).mean()


class Gan(LightningModule):
    """A generator of points, and a discriminator that only training uses.

    The validation metric is the distance between generated points and points of the data. It does not depend on the
    discriminator, so the search leaves the discriminator alone.

    Args:
        width: Units of each hidden layer.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = perceptron(NOISE, 2, width), perceptron(2, 1, width)
        self.val_distance = EnergyDistance()

    def calibration_step(self, batch: list[Tensor]) -> None:
        """Run the generator alone on noise of the training data. The search adapts its weights to this noise."""
        self.generator(batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        real, noise = batch
        for_generator, for_discriminator = self.optimizers()
        made = self.generator(noise)
        self._step(for_discriminator, self._loss(real, 1.0) + self._loss(made.detach(), 0.0))
        self._step(for_generator, self._loss(made, 1.0))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        real, noise = batch
        self.val_distance(self.generator(noise), real)
        self.log("val_distance", self.val_distance)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(one.parameters(), 2e-3, (0.5, 0.9)) for one in (self.generator, self.discriminator)]

    def _loss(self, points: Tensor, target: float) -> Tensor:
        logits = self.discriminator(points)
        return binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
