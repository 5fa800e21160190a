"""Validation data that change between the cuts of a run are noticed, and shuffled data are not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from lightning_roulette import RouletteWheelPruning, Tree
from lightning_roulette.trainer.data.checksums import sum_of
from tests.support.modules import QUIET, Blobs, blobs, train_loader

WARNING = "The validation data have changed since the floor was set"


class Reloaded(LightningDataModule):
    """Validation data that are made anew after each epoch: from the next seed, or in another order."""

    def __init__(self, changes: bool, seed: int = 0) -> None:
        super().__init__()
        self.changes, self.seed = changes, seed

    def train_dataloader(self):
        return train_loader()

    def val_dataloader(self):
        self.seed += self.changes
        return DataLoader(blobs(200, self.seed), batch_size=64, shuffle=True)


def fitted(data: Reloaded, branches: int, **fit) -> tuple[RouletteWheelPruning, list[str]]:
    """The callback after a fit of four epochs with three cuts, and the warnings about other data."""
    pruning = RouletteWheelPruning(branches, tolerance=0.1, tree=Tree(0.2), at_epoch=[1, 2, 3])
    trainer = Trainer(
        **QUIET, accelerator="cpu", max_epochs=4, reload_dataloaders_every_n_epochs=1, callbacks=[pruning]
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Blobs(), datamodule=data, **fit)
    return pruning, [str(one.message) for one in caught if WARNING in str(one.message)]


@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("changes", [True, False])
def test_data_that_change_between_cuts_are_said_once_and_in_the_report(branches, changes):
    pruning, said = fitted(Reloaded(changes), branches)
    assert len(said) == changes
    assert sum(WARNING in note for note in pruning.report.notes) == changes
    assert (WARNING in str(pruning.report)) == changes


def test_one_number_stands_for_all_values_in_any_order_and_any_batches():
    rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    numbers = np.arange(12)
    whole = [{"x": rows, "y": numbers, "z": bytearray(b"abc")}]
    mixed = [{"x": rows[7:].flip(0), "y": numbers[:5]}, [rows[:7], numbers[5:].copy(), bytearray(b"bca")]]
    assert sum_of(whole) == sum_of(mixed)
    for place, value in ((rows, 1e-3), (numbers, 1)):
        before = sum_of(whole)
        place[3] += value
        assert sum_of(whole) != before
    for kind in (torch.bool, torch.float16, torch.float64, torch.complex64, torch.int8):
        assert sum_of([rows.to(kind)]) == sum_of(rows.to(kind).split(5)) != sum_of([rows[1:].to(kind)])
    assert sum_of([rows.to_sparse()]) != 0
