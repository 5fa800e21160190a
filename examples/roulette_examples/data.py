"""A data module for tensors that are made up."""

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class MadeUp(LightningDataModule):
    """Training and validation data that a function of a subclass makes from a seed.

    Args:
        train: Number of training samples.
        val: Number of validation samples.
        batch_size: Number of training samples in a batch.
    """

    def __init__(self, train: int = 1000, val: int = 600, batch_size: int = 50) -> None:
        super().__init__()
        self.sizes, self.batch_size = (train, val), batch_size

    def make(self, count: int, chance: torch.Generator) -> tuple[Tensor, ...]:
        """Return tensors of `count` samples."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        self.train, self.val = (
            TensorDataset(*self.make(count, torch.Generator().manual_seed(seed)))
            for seed, count in enumerate(self.sizes)
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=100)
