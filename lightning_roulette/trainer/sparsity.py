"""Sparsity as a torchmetrics object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_roulette.large.shards import reshard
from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.parameters import prunable_parameters


class Sparsity(Metric):
    """Share of the prunable weights of a network that are zero, for `self.log` in any LightningModule.

    It is counted from the weights, whatever made them zero. After several updates the value is that of the last one.
    A search does not take it for the metric that it watches.

    Args:
        include: Glob patterns over parameter names that replace the default choice, see `prunable_parameters`.
        exclude: Glob patterns over names of parameters that are not counted.
        options: Arguments of every torchmetrics object.

    Examples:
        Log it once an epoch:

            def __init__(self):
                super().__init__()
                self.net = Network()
                self.sparsity = Sparsity()

            def on_validation_epoch_end(self):
                self.sparsity.update(self)
                self.log("sparsity", self.sparsity)

        Without a Trainer:

            >>> layer = nn.Linear(4, 1)
            >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 0.0, 0.0, 2.0]]))
            >>> float(Sparsity()(layer))
            0.75
    """

    full_state_update = True  # a call counts anew, and adds nothing to the count before it
    is_differentiable = False
    higher_is_better = None  # a larger value is no better network
    survivors: Tensor
    weights: Tensor

    def __init__(
        self, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.include, self.exclude = include, exclude
        # each process counts whole weights, so that the sums over processes have the ratio of one
        self.add_state("survivors", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("weights", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, module: nn.Module) -> None:
        """Count the zeros of a network. If its weights are sharded, all processes must call this method.

        Args:
            module: The network, for example the LightningModule itself.

        Raises:
            ValueError: If no parameter is prunable, or a pattern matches no parameter.
        """
        found = prunable_parameters(module, include=self.include, exclude=self.exclude)
        if not found:
            raise ValueError(
                f"Sparsity: no parameter of {type(module).__name__} is prunable, so it has no sparsity. Pass "
                "include=[...] to name the parameters to count. Frozen parameters count only if they are named."
            )
        reshard(module)
        mask = Mask.of_nonzeros({name: one.detach() for name, one in found.items()})
        self.survivors, self.weights = (
            torch.tensor(count, device=self.device) for count in (mask.survivors, mask.size)
        )

    def compute(self) -> Tensor:
        """Return the share of zeros, in [0, 1]; NaN before the first update."""
        survivors, weights = int(self.survivors), int(self.weights)
        share = 1 - survivors / weights if weights else torch.nan
        return torch.tensor(share, dtype=torch.float32, device=self.device)  # also where half precision is the default
