"""Small modules and data for tests: ten-class blobs that a tiny network learns in a second."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def blobs(count: int, seed: int) -> TensorDataset:
    """`count` points of 16 numbers around ten centres, with their class; neighbours overlap a little."""
    chance = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, 16, generator=torch.Generator().manual_seed(99))
    classes = torch.randint(10, (count,), generator=chance)
    return TensorDataset(centres[classes] + 0.6 * torch.randn(count, 16, generator=chance), classes)


class Stream(IterableDataset):
    """The same points without a length."""

    def __init__(self, count: int, seed: int) -> None:
        self.points = blobs(count, seed)

    def __iter__(self):
        return iter(self.points)


def train_loader(batch_size: int = 50, **options) -> DataLoader:
    return DataLoader(blobs(400, 1), batch_size=batch_size, shuffle=True, **options)


def val_loader(batch_size: int = 64, **options) -> DataLoader:
    return DataLoader(blobs(200, 2), batch_size=batch_size, **options)


def two_loaders() -> list[DataLoader]:
    """Validation data in two parts of 200 and 90."""
    return [val_loader(), DataLoader(blobs(90, 3), 20)]


def shuffled_loader() -> DataLoader:
    """Validation data with a generator of its own."""
    return val_loader(shuffle=True, generator=torch.Generator().manual_seed(3))


def tiny_net() -> nn.Sequential:
    """Weights the same at every call; 16 * 24 + 24 * 10 = 624 of them prunable."""
    return dense_net(16, 24, 10)


def dense_net(*units: int) -> nn.Sequential:
    """Linear layers from so many units to so many, with ReLUs in between; weights the same at every call."""
    layers = [layer for sizes in pairwise(units) for layer in (nn.Linear(*sizes), nn.ReLU())]
    net = nn.Sequential(*layers[:-1])
    chance = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=chance))
    return net


class Blobs(LightningModule):
    """Classifies blobs; logs `val_loss` and `val_acc` (a torchmetrics object)."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        self.net = tiny_net()
        self.lr = lr
        self.val_acc = MulticlassAccuracy(10, average="micro")

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        scores = self(x)
        self.log("val_loss", cross_entropy(scores, y), sync_dist=True)
        self.val_acc(scores, y)
        self.log("val_acc", self.val_acc)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Fetches:
    """Comes before a module's class, which then fetches its validation batches itself."""

    def validation_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        super().validation_step(batch, batch_idx)


class BlobsData(LightningDataModule):
    """The same loaders as a data module; `asked` counts how often validation data was asked for."""

    def __init__(self, batch_size: int = 50) -> None:
        super().__init__()
        self.batch_size, self.asked = batch_size, 0

    def train_dataloader(self):
        return train_loader(self.batch_size)

    def val_dataloader(self):
        self.asked += 1
        return val_loader()


def trained(module: LightningModule, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a module that has learned something."""
    torch.manual_seed(0)
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=2, default_root_dir=folder, **QUIET)
    trainer.fit(module, train_loader(), val_loader())
    return module.state_dict()


class Judged(Blobs):
    """Can also be tested and asked for its scores."""

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])
