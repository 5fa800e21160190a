"""A pruned network: a mask on dense or refitted weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_roulette.large.masking import masked
from lightning_roulette.mask.mask import Mask


@dataclass(frozen=True, eq=False)
class PrunedWeights:
    """A pruned network that an evaluator scores.

    Attributes:
        mask: The weights that are kept.
        dense: The weights of the dense network, not copied.
        refitted: Name to tensor. These values replace those of the dense network: weights, and also biases and running
            statistics. They need not be zero where the mask prunes.
    """

    mask: Mask
    dense: Mapping[str, Tensor]
    refitted: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Tensor]:
        """New tensors, by name: all weights, zero where pruned, and everything else that a refit changed."""
        return {name: self._value(name) for name in {**dict.fromkeys(self.dense), **self.refitted}}

    def _value(self, name: str) -> Tensor:
        value = (self.refitted[name] if name in self.refitted else self.dense[name]).detach()
        return masked(value, self.mask.flags[name]) if name in self.mask else value.clone()
