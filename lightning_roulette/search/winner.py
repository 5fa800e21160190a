"""What a search found: the winner and the levels before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from lightning_roulette.large.copies import copies_of
from lightning_roulette.mask.mask import History, Mask, apply_mask
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.network.lending import copy_into, named_tensors
from lightning_roulette.refit.calibration import Survivors
from lightning_roulette.report.report import SearchReport


@dataclass(frozen=True, eq=False)
class Winner:
    """What a search found: the slimmest accepted network that held on the confirmation folds.

    Attributes:
        mask: Which weights are kept; all, if no level was accepted.
        report: What was done.
        dense: The weights that the search was given, not copied.
        history: The masks of all accepted levels.
        refits: What refits changed, by the number of the level: the survivors of each weight, and all else; under 0,
            all else as it was. On the CPU; all levels together have at most `1 / pruning_rate` numbers a weight.
    """

    mask: Mask
    report: SearchReport
    dense: Mapping[str, Tensor]
    history: History
    refits: Mapping[int, Survivors] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Tensor]:
        """New tensors: the winner's weights, zero where it is pruned; and all else that a refit changed."""
        return self.weights_at(self.history.level)

    def mask_at(self, level: int) -> Mask:
        """The mask of an accepted level; 0 is the dense network.

        Raises:
            ValueError: If there was no such level.
        """
        return self.history.mask_at(level)

    def weights_at(self, level: int) -> dict[str, Tensor]:
        """New tensors, on the devices of the dense weights: those of an accepted level; 0 is the dense network.

        Biases and running statistics are among them if a refit changed them.

        Raises:
            ValueError: If there was no such level.
        """
        return network_at(level, self.mask_at(level), self.dense, self.refits).weights

    def cpu(self) -> Winner:
        """The same on the CPU, with copies of the dense weights: of more than a gibibyte, in a temporary file."""
        return replace(self, mask=self.mask.cpu(), dense=copies_of(self.dense), history=self.history.cpu())


def network_at(level: int, mask: Mask, dense: Mapping[str, Tensor], refits: Mapping[int, Survivors]) -> PrunedWeights:
    """The network of an accepted level: what a refit made of it, or else the dense values, biases included."""
    known = refits.get(level, refits.get(0))
    return PrunedWeights(mask, dense, {} if known is None else known.spread(mask, dense))


def load(module: nn.Module, winner: Winner) -> None:
    """Make a network the winner, in place: its mask, and what a refit changed. All else stays bit for bit.

    Args:
        module: Dense, with the names of the winner's weights.
        winner: Of a search over this network.
    """
    level = winner.history.level
    if level in winner.refits:
        copy_into(named_tensors(module), winner.refits[level].spread(winner.mask, winner.dense))
    apply_mask(module, winner.mask)
