"""How much of a network is prunable, and what is skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_roulette.network.parameters import aliases, owners_of, parts_of_metrics
from lightning_roulette.network.ties import ties_of
from lightning_roulette.report.names import listed, shortened
from lightning_roulette.report.records import Skipped


@dataclass(frozen=True)
class Coverage:
    """The weights of a network in matrices: in parameters with at least two dimensions, networks inside metrics aside.

    Attributes:
        matrices: Number of weights in matrices. Tied weights count once.
        prunable: Number of those that are prunable.
        skipped: The parameters that are not prunable, grouped by reason, largest group first.
    """

    matrices: int
    prunable: int
    skipped: tuple[Skipped, ...]

    @property
    def share(self) -> float:
        """Share of the weights in matrices that is prunable; 1 if there are no matrices."""
        return self.prunable / self.matrices if self.matrices else 1.0

    @property
    def frozen(self) -> int:
        """Number of weights that are frozen."""
        return sum(one.weights for one in self.skipped if one.why == "frozen")

    @property
    def sentence(self) -> str:
        """One or two sentences that say how much is prunable, and what is skipped and why."""
        head = f"{self.prunable:,} of {self.matrices:,} weights in matrices are prunable ({self.share:.1%})."
        return f"{head} Skipped: {listed(self.skipped)}." if self.skipped else head


def coverage_of(module: nn.Module, skipped: Mapping[str, str]) -> Coverage:
    """Return how much of a network is prunable.

    Args:
        module: The network.
        skipped: The parameters that are not prunable, by their first names, each with the reason.
    """
    sizes, names = _sizes(module), aliases(module)
    views = {name for tie in ties_of(module) for name in tie.names if tie.whole not in (None, name)}
    groups: dict[str, list[str]] = {}
    for name in sizes:
        if name in skipped:
            why = _general(skipped[name], skipped, sizes)
            if why.startswith("weight of ") and len(names[name]) > 1:  # such as a head that is tied to an embedding
                why = f"{why}, also named {shortened(names[name][1:])}"
            groups.setdefault(why, []).append(name)
    found = [Skipped(tuple(names), sum(sizes[name] for name in names), why) for why, names in groups.items()]
    return Coverage(
        sum(size for name, size in sizes.items() if name not in views),
        sum(size for name, size in sizes.items() if name not in skipped),
        tuple(sorted(found, key=lambda one: -one.weights)),
    )


def largest_class(module: nn.Module) -> tuple[type[nn.Module], float, list[str]] | None:
    """The class of the modules that hold most weights in matrices; None if there are no matrices.

    Returns:
        - The class.
        - Share of the weights in matrices that its modules hold.
        - Names of their parameters that are matrices.
    """
    sizes, owners, names = _sizes(module), owners_of(module), aliases(module)
    groups: dict[type[nn.Module], list[str]] = {}
    for name in sizes:
        groups.setdefault(type(owners[names[name][0]][0]), []).append(name)
    held = {kind: sum(sizes[name] for name in found) for kind, found in groups.items()}
    if not held:
        return None
    most = max(held, key=held.__getitem__)
    return most, held[most] / sum(held.values()), groups[most]


def _sizes(module: nn.Module) -> dict[str, int]:
    """The number of weights of each parameter in matrices, by its first name."""
    inside = {id(one) for part in parts_of_metrics(module) for one in part.parameters(recurse=False)}
    return {
        name: one.numel()
        for name, one in module.named_parameters()
        if not is_lazy(one) and one.dim() > 1 and one.numel() and id(one) not in inside
    }


def _general(why: str, skipped: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """The reason in words that hold for all ties, if there are ties to several weights."""
    ties = {one for name, one in skipped.items() if one.startswith("tied to ") and name in sizes}
    return "tied to other weights" if why in ties and len(ties) > 1 else why
