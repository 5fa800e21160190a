"""An LSTM that forecasts a time series."""

import math

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from roulette_examples.data import MadeUp

PAST, FUTURE = 32, 4


class Waves(MadeUp):
    """Sums of two waves with noise: 32 values, and the 4 that follow."""

    def make(self, count: int, chance: torch.Generator) -> tuple[Tensor, ...]:
        period = 8 + 16 * torch.rand(count, 2, 1, generator=chance)
        start = torch.rand(count, 2, 1, generator=chance)
        time = torch.arange(PAST + FUTURE)
        waves = (2 * math.pi * (time / period + start)).sin().sum(1)
        waves = waves + 0.05 * torch.randn(waves.shape, generator=chance)
        return waves[:, :PAST, None], waves[:, PAST:]


class Forecaster(LightningModule):
    """Two LSTM layers, and a linear layer on the last state.

    Args:
        width: Units of each LSTM layer.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, width, num_layers=2, batch_first=True)
        self.future = nn.Linear(width, FUTURE)

    def forward(self, past: Tensor) -> Tensor:
        return self.future(self.lstm(past)[0][:, -1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        past, future = batch
        return mse_loss(self(past), future)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        past, future = batch
        self.log("val_error", mse_loss(self(past), future))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)
