"""One layer refitted on its Gram sums: which of its weights are kept, and their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_roulette.large.gathered import gathered_all
from lightning_roulette.large.processes import ONE_PROCESS, Processes
from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.layers import Layer
from lightning_roulette.refit.competing import pieces_of
from lightning_roulette.refit.gram import LayerSums
from lightning_roulette.refit.matrices import kept_in_matrix, matrix_of
from lightning_roulette.refit.narrowing import Narrowing
from lightning_roulette.refit.solvers.choice import Problem, choice_cost, chosen
from lightning_roulette.refit.solvers.cholesky import DampedGram
from lightning_roulette.refit.solvers.cost import worth_sharing
from lightning_roulette.refit.solvers.fastest import Fastest
from lightning_roulette.refit.solvers.shared import Shared, in_shares
from lightning_roulette.wheel.units.units import Units

_ROUNDING = 1e-9  # share of the mean square of a layer's outputs by which rounding may increase its error


@dataclass(frozen=True, eq=False)
class Fitting:
    """How the layers of a network are refitted for one mask.

    Attributes:
        mask: The mask that is given.
        dense: The weights and biases of the dense network.
        damping: See `Cholesky`.
        choose: Whether a layer may keep other weights than those of the mask, as many as these.
        allowed: The weights that may be kept. None: all.
        units: With `choose`, what stays or leaves as a whole: neighbours or blocks. None: single weights.
        processes: Those that fit the layers together.
        narrowing: How the weights of each layer are rounded.
        flags: The masks of weights of which others were chosen, by name.
    """

    mask: Mask
    dense: Mapping[str, Tensor]
    damping: float
    choose: bool = False
    allowed: Mask | None = None
    units: Units | None = None
    processes: Processes = field(default=ONE_PROCESS, repr=False)
    narrowing: Narrowing = field(default_factory=Narrowing)
    flags: dict[str, Tensor] = field(default_factory=dict)

    @property
    def chosen(self) -> Mask | None:
        """The mask with the weights that were chosen. None if they are those of the mask."""
        return Mask({**self.mask.stored, **self.flags}) if self.flags else None

    def fit(self, layer: Layer, sums: LayerSums) -> tuple[Tensor, Tensor]:
        """Return the refitted matrix of a layer, and which of its entries are kept.

        The entries that were chosen for the layer before, if any, are those given.

        The chosen entries are kept only if their damped error on the fitted rows is smaller than that of the given
        entries, and their error on the held-out rows is not larger.
        """
        kept = self._kept(layer)
        dense = matrix_of(layer, gathered_all(self.dense, layer.parameters, self.processes))
        prepared = Shared(Fastest(self.damping), self.processes).init(sums.fit)
        given = prepared.solve(kept, torch.where(kept, dense, 0.0))
        if not (self.choose and sums.finite):
            return given, kept
        problem = self._problem(layer, kept, dense, sums)
        other = self._chosen(problem, kept)
        if torch.equal(other, kept):
            return given, kept
        found = prepared.solve(other, torch.where(other, dense, 0.0))
        lower = problem.error(found) < problem.error(given)
        holds = sums.held_out.error(found) <= sums.held_out.error(given)
        better = self.processes.first(torch.tensor(lower and holds))
        return (found, other) if better else (given, kept)

    def _problem(self, layer: Layer, kept: Tensor, dense: Tensor, sums: LayerSums) -> Problem:
        """Return what is chosen among in a layer."""
        ridges, free = DampedGram(sums.fit.gram, self.damping).ridges, self._free(layer, kept)
        pieces = pieces_of(layer, self.dense, self.units)
        if pieces is None:  # nothing is chosen
            return Problem(sums.fit, ridges, dense, torch.zeros_like(free), kept.shape[1])
        return Problem(sums.fit, ridges, dense, free, kept.shape[1], pieces)

    def _chosen(self, problem: Problem, kept: Tensor) -> Tensor:
        """Return the entries that are chosen: by each process for its outputs, or else by the first one."""
        by_output, ranks = problem.pieces.by_output, self.processes.ranks
        if by_output and worth_sharing(choice_cost(problem), kept.numel(), ranks):
            return in_shares(self.processes, kept, lambda own: chosen(problem.of_outputs(own), kept[:, own]))
        return self.processes.first(chosen(problem, kept) if self.processes.rank == 0 else kept)

    def note(self, layer: Layer, kept: Tensor) -> None:
        """Note which entries of a layer's matrix are kept."""
        if not torch.equal(kept, self._kept(layer)):
            for name in layer.names:
                self.flags.setdefault(name, self.mask[name].clone())
            layer.write(self.flags, kept)

    def _kept(self, layer: Layer) -> Tensor:
        """Return the entries of a layer's matrix that are kept until now."""
        names = (name for name in layer.parameters if name in self.mask)
        return kept_in_matrix(layer, {name: self.flags.get(name, self.mask[name]) for name in names})

    def _free(self, layer: Layer, kept: Tensor) -> Tensor:
        """Return the entries of a layer's matrix that may be chosen. A bias may not."""
        free = torch.ones_like(kept) if self.allowed is None else kept_in_matrix(layer, self.allowed)
        if layer.bias is not None:
            free[..., -1] = False
        return free


def fault(sums: LayerSums, start: Tensor, refitted: Tensor) -> str:
    """Return why a refitted matrix is not kept; empty if it is finite and no worse, in the type of the weights."""
    if not sums.held_out.rows:
        return "a single row of its input is known, so nothing could judge the fit"
    if not (sums.finite and bool(refitted.isfinite().all())):
        return "its inputs or its solved weights are not finite"
    held_out = sums.held_out
    if held_out.error(refitted) > held_out.error(start) + _ROUNDING * held_out.mean_square:
        return "it increased the error on inputs that it was not solved on"
    return ""
