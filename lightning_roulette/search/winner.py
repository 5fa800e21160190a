"""The result of a search: the winner and the levels before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from lightning_roulette.large.copies import copies_of
from lightning_roulette.large.shards import any_sharded
from lightning_roulette.mask.history import History
from lightning_roulette.mask.mask import Mask, apply_mask
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.network.lending import copy_into, named_tensors
from lightning_roulette.refit.refitted import Survivors
from lightning_roulette.report.report import SearchReport


@dataclass(frozen=True, eq=False)
class Winner:
    """The slimmest accepted network that held on the held-out half.

    Attributes:
        mask: Which weights are kept. All of them if no level was accepted.
        report: Numbers of the search.
        dense: Weights that the search was given, not copied.
        history: Masks of all accepted levels. They nest unless a refit chose which weights stay.
        refits: Values that refits changed, by level number, on the CPU: the survivors of each weight, and everything
            else whole. The key 0 has the dense values of everything else. All levels together have at most
            `1 / pruning_rate` numbers per weight.
    """

    mask: Mask
    report: SearchReport
    dense: Mapping[str, Tensor]
    history: History
    refits: Mapping[int, Survivors] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Tensor]:
        """New tensors: the winner's weights, zero where pruned, and everything else that a refit changed."""
        return self.weights_at(self.history.level)

    def mask_at(self, level: int) -> Mask:
        """Mask of an accepted level. Level 0 is the dense network.

        Args:
            level: Number of an accepted level.

        Raises:
            ValueError: If there was no such level.
        """
        return self.history.mask_at(level)

    def weights_at(self, level: int) -> dict[str, Tensor]:
        """New tensors: the weights of an accepted level, on the devices of the dense weights. Level 0 is dense.

        Biases and running statistics are among them if a refit changed them.

        Args:
            level: Number of an accepted level.

        Raises:
            ValueError: If there was no such level.
        """
        return network_at(level, self.mask_at(level), self.dense, self.refits).weights

    @property
    def whole(self) -> dict[str, Tensor]:
        """The winner's weights. Of sharded weights there are only those that a refit changed, as whole tensors."""
        if not any_sharded(self.dense.values()):
            return self.weights
        known = self.refits.get(self.history.level)
        return {} if known is None else known.whole(self.mask)

    def cpu(self) -> Winner:
        """The same winner on the CPU. Copies of dense weights beyond one gibibyte go to a temporary file."""
        return replace(self, mask=self.mask.cpu(), dense=copies_of(self.dense), history=self.history.cpu())


def network_at(level: int, mask: Mask, dense: Mapping[str, Tensor], refits: Mapping[int, Survivors]) -> PrunedWeights:
    """The network of an accepted level, with the values that a refit gave it, or else the dense values.

    Args:
        level: Number of the level.
        mask: Its mask.
        dense: Weights of the dense network.
        refits: See `Winner`.
    """
    known = refits.get(level, refits.get(0))
    return PrunedWeights(mask, dense, {} if known is None else known.spread(mask, dense))


def load(module: nn.Module, winner: Winner) -> None:
    """Make a network the winner, in place. Only pruned weights, and what a refit changed, are written.

    Args:
        module: The dense network, with the parameter names of the winner.
        winner: Winner of a search over this network.
    """
    level = winner.history.level
    if level in winner.refits:
        copy_into(named_tensors(module), winner.refits[level].spread(winner.mask, winner.dense))
    apply_mask(module, winner.mask)
