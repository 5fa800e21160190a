"""What a refit returns, and the part of it that a search stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_roulette.mask.mask import Mask


@dataclass(frozen=True, eq=False)
class Refitted:
    """A pruned network's values after a refit.

    Attributes:
        values: All values that may differ from the dense network, by name: weights (zero where pruned), biases and
            running statistics. Empty if the network was not refitted.
        undone: Reasons why a refit was not kept, by the name of the weight. Its survivors have their dense values.
        mask: The mask of these values, if the refit chose which weights stay. It keeps as many weights as the mask that
            was given, but not always the same ones. None: the mask that was given.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    undone: Mapping[str, str] = field(default_factory=dict)
    mask: Mask | None = None

    def mask_from(self, given: Mask) -> Mask:
        """The mask of these values, for the mask that was given to the refit."""
        return given if self.mask is None else self.mask


@dataclass(frozen=True, eq=False)
class Survivors:
    """Refitted values without the zeros of pruned weights, on the CPU.

    Attributes:
        values: By name. Only the survivors of a pruned weight, in order of index; any other tensor whole.
    """

    values: Mapping[str, Tensor]

    @classmethod
    def of(cls, mask: Mask, values: Mapping[str, Tensor]) -> Survivors:
        """Return the survivors of a mask."""
        kept = {name: value[mask[name].to(value.device)] if name in mask else value for name, value in values.items()}
        return cls({name: value.detach().cpu() for name, value in kept.items()})

    def spread(self, mask: Mask, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors, zero where the mask prunes.

        Args:
            mask: The mask of these survivors.
            dense: The dense weights. Each pruned weight is a new tensor on the device of its dense weight.
        """
        found = {name: value for name, value in self.values.items() if name not in mask}
        for name in self.values.keys() & mask.keys():
            whole = torch.zeros_like(dense[name].detach())
            whole[mask[name].to(whole.device)] = self.values[name].to(whole.device)
            found[name] = whole
        return found
