"""What a refit returns, and the part of it that a search stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_roulette.large.gathered import full, kept_values, put_kept_values
from lightning_roulette.large.shards import is_sharded
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
        """The mask of these values, for the mask that was given to the refit.

        Args:
            given: The mask that was given to the refit.
        """
        return given if self.mask is None else self.mask


@dataclass(frozen=True, eq=False)
class Survivors:
    """Refitted values without the zeros of pruned weights, on the CPU.

    Attributes:
        values: By name. Only the survivors of a pruned weight, in order of index; any other tensor whole. Every process
            has all of them.
        sharded: The other tensors that are sharded, by name, as they were when this was made.
    """

    values: Mapping[str, Tensor]
    sharded: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: Mask, values: Mapping[str, Tensor]) -> Survivors:
        """Return the survivors of a mask. All processes that hold rows of the values call this."""
        kept = {name: kept_values(value, mask.flags[name]) for name, value in values.items() if name in mask}
        others = {name: value.detach() for name, value in values.items() if name not in mask}
        found = {name: (kept[name] if name in kept else full(others[name])).cpu() for name in values}
        return cls(found, {name: value for name, value in others.items() if is_sharded(value)})

    def whole(self, mask: Mask) -> dict[str, Tensor]:
        """Return whole tensors on the CPU, zero where the mask prunes. No other process is asked.

        Args:
            mask: The mask of these survivors.
        """
        shapes = {name: flags.shape for name, flags in mask.flags.items()}
        zeros = {name: self.values[name].new_zeros(shapes[name]) for name in self.values if name in mask}
        return {**self.values, **Survivors({name: self.values[name] for name in zeros}).spread(mask, zeros)}

    def spread(self, mask: Mask, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors, zero where the mask prunes.

        Args:
            mask: The mask of these survivors.
            dense: The dense weights. Each pruned weight is a new tensor on the device of its dense weight, and sharded
                as that.
        """
        found: dict[str, Tensor] = {}
        for name, value in self.values.items():
            if name in mask:
                found[name] = torch.zeros_like(dense[name].detach())
                put_kept_values(found[name], mask.flags[name], value)
            else:
                found[name] = self.sharded.get(name, value)
        return found
