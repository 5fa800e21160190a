"""What tests in two processes share: a quiet Trainer, and training with held zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_roulette import HoldZeros, Mask
from tests.support.modules import QUIET, train_loader, val_loader


def full_of(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor, which may be sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


class Noted(Callback):
    """The largest value, gradient and optimizer state of a pruned weight, just before the optimizer steps."""

    def __init__(self, mask: Mask) -> None:
        self.mask, self.found = mask, dict.fromkeys(("weight", "gradient", "memory"), 0.0)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, kept in self.mask.items():
            weight = pl_module.get_parameter(name)
            memories = [one for one in optimizer.state.get(weight, {}).values() if one.shape == kept.shape]
            for what, tensors in (("weight", [weight]), ("gradient", [weight.grad]), ("memory", memories)):
                values = [float(full_of(one)[~kept].abs().max()) for one in tensors]
                self.found[what] = max([self.found[what], *values])


def train_with_zeros(
    module: LightningModule, holding: HoldZeros, mask: Mask, folder: Path, strategy: Any
) -> dict[str, Any]:
    """Train in two processes with held zeros, and return what was noted of the pruned weights."""
    noted = Noted(mask)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        default_root_dir=folder,
        callbacks=[holding, noted],
        devices=2,
        strategy=strategy,
        accumulate_grad_batches=2,
        gradient_clip_val=0.1,
        **QUIET,
    )
    trainer.fit(module, train_loader(), val_loader(batch_size=25))
    return {**noted.found, "steps": trainer.global_step, "mask": dict(mask)}
