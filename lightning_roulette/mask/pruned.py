"""A pruned network: a mask over the dense weights, or over refitted ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_roulette.large.shards import is_sharded
from lightning_roulette.mask.mask import Mask, fill_pruned


@dataclass(frozen=True, eq=False)
class PrunedWeights:
    """A network that an evaluator is asked about: a mask over the dense weights, or over refitted ones.

    Attributes:
        mask: Which weights are kept.
        dense: The weights of the dense network, not copied.
        refitted: Name to tensor, what takes their place: weights, and biases and running statistics besides. It is not
            zero wherever the mask prunes.
    """

    mask: Mask
    dense: Mapping[str, Tensor]
    refitted: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Tensor]:
        """New tensors: the weights, zero where pruned; and all else that a refit changed, under its own names."""
        return {name: self._value(name) for name in {**dict.fromkeys(self.dense), **self.refitted}}

    def _value(self, name: str) -> Tensor:
        value = (self.refitted[name] if name in self.refitted else self.dense[name]).detach()
        if name not in self.mask:
            return value.clone()
        if is_sharded(value):
            value = value.clone()
            fill_pruned({name: value}, {name: self.mask[name]})
            return value
        return value.masked_fill(~self.mask[name].to(value.device), 0)
