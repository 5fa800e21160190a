"""Agreement between the processes of a Trainer."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_roulette.large.processes import ONE_PROCESS, Processes


def processes_of(trainer: Trainer) -> Processes:
    """Return the processes of a Trainer, which sum by its strategy."""
    if trainer.world_size == 1:
        return ONE_PROCESS
    strategy = trainer.strategy

    def total(tensor: Tensor) -> Tensor:
        there = tensor.to(strategy.root_device, copy=True)
        return torch.as_tensor(strategy.reduce(there, reduce_op="sum")).to(tensor.device)

    return Processes(trainer.global_rank, trainer.world_size, total)


def mean_over_processes(trainer: Trainer, value: Tensor) -> float:
    """Return the mean of a value over all processes. A metric that is synchronised is equal on all of them."""
    if trainer.world_size == 1:
        return float(value)
    return float(trainer.strategy.reduce(torch.as_tensor(value, dtype=torch.float64).clone(), reduce_op="mean"))


def in_any_process(trainer: Trainer, here: bool) -> bool:
    """Return whether something is true in at least one process."""
    return mean_over_processes(trainer, torch.tensor(float(here), device=trainer.strategy.root_device)) > 0


def least_and_most(trainer: Trainer, numbers: list[int]) -> tuple[list[int], list[int]]:
    """Return the minimum and the maximum of each number over all processes."""
    ours = torch.tensor(numbers, device=trainer.strategy.root_device)
    least, most = (trainer.strategy.reduce(ours.clone(), reduce_op=how).tolist() for how in ("min", "max"))
    return least, most
