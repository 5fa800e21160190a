"""A small network with a batch normalisation, and searches over it with a refit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_roulette import (
    Calibration,
    LeastSquares,
    Level,
    Mask,
    Observer,
    PrunedWeights,
    Scores,
    Tree,
    Validation,
    Wheel,
    Winner,
    search,
)
from lightning_roulette.refit_settings import Refit

WEIGHTS = ("0.weight", "3.weight", "5.weight")
LEVELS = Tree(0.2, max_levels=3)
ONE_LEVEL = Tree(0.2, max_levels=1)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# correlated inputs: otherwise there is little that survivors can make up for
MIX = random(8, 8, seed=30) + torch.eye(8)


def network() -> nn.Sequential:
    """8 * 12 + 12 * 10 + 10 * 4 = 256 prunable weights; running statistics as if it had been trained."""
    net = nn.Sequential(
        nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)
    ).eval()
    with torch.no_grad():
        for place, tensor in enumerate(net.parameters()):
            tensor.copy_(random(*tensor.shape, seed=place) * 0.5)
        seen = net[0](random(2000, 8, seed=22) @ MIX)
        net[1].running_mean.copy_(seen.mean(0))
        net[1].running_var.copy_(seen.var(0))
    return net


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: net.get_parameter(name) for name in WEIGHTS}


def inputs(count: int = 4, size: int = 32) -> list[Tensor]:
    return [random(size, 8, seed=40 + place) @ MIX for place in range(count)]


def named(net: nn.Module) -> dict[str, Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].detach().numpy().tobytes() == other[name].detach().numpy().tobytes()
        for name in one
    )


class Asked:
    """An evaluator of a few folds by a function of the candidate and the folds; logs all that it is asked."""

    def __init__(self, score: Callable[[PrunedWeights, tuple[int, ...]], float], folds: int = 4) -> None:
        self.score, self.folds, self.log = score, folds, []

    def __call__(self, candidate, folds):
        self.log.append((candidate, tuple(folds)))
        value = float(self.score(candidate, tuple(folds)))
        return Scores(rank=value, score=value)

    @property
    def refitted(self) -> list[PrunedWeights]:
        """Refitted candidates. Those with all weights are asked for to see whether the calibration data fits."""
        return [candidate for candidate, _ in self.log if candidate.refitted and candidate.mask.sparsity]


def faithful(net: nn.Module, folds: int = 4) -> Asked:
    """Scores how close a network's outputs are to the dense one's with some noise, as targets are."""
    dense = copy.deepcopy(net)
    data = (random(folds, 16, 8, seed=50) @ MIX).to(next(net.parameters()).dtype)
    with torch.no_grad():
        wanted = dense(data.flatten(0, 1)).unflatten(0, (folds, 16))
        wanted += random(*wanted.shape, seed=51)

    @torch.no_grad()
    def score(candidate, asked):
        found = functional_call(dense, candidate.weights, data[list(asked)].flatten(0, 1))
        return -float((found - wanted[list(asked)].flatten(0, 1)).square().mean())

    return Asked(score, folds)


def by_turns(before: Callable[[Mask], float], after: Callable[[Mask], float]) -> Asked:
    """Scores by one function until a candidate is refitted, then by another; for one level."""
    return Asked(lambda one, _: (after if one.refitted and one.mask.sparsity else before)(one.mask))


def ranked(net: nn.Module, refit="least_squares", evaluate=None, batches=None, **options) -> Winner:
    """A search of three levels that accepts anything."""
    defaults = {"branches": 6, "tolerance": math.inf, "tree": LEVELS, "validation": Validation(race=False)}
    defaults["wheel"] = Wheel(8.0)  # so that candidates of networks as small as these differ
    calibration = Calibration(net, inputs() if batches is None else batches)
    evaluate = evaluate or faithful(net)
    return search(weights_of(net), evaluate, refit=refit, calibration=calibration, **defaults | options)


def refit_of(net: nn.Module, mask: Mask, how: Refit | None = None, batches=None) -> dict[str, Tensor]:
    """What a refit of a mask gives, asked of a calibration of its own."""
    return dict(Calibration(net, inputs() if batches is None else batches).refit(mask, how or LeastSquares()).values)


def masks_of(winner: Winner) -> list[Mask]:
    return [winner.mask_at(level) for level in range(winner.history.deepest + 1)]


class SoFar(Observer):
    """What was found after each level, and how long the evaluator's log was at the last one."""

    def __init__(self, evaluate: Asked) -> None:
        self.evaluate, self.so_far = evaluate, []

    def on_level(self, level: Level, so_far: Winner) -> None:
        self.at, self.so_far = len(self.evaluate.log), [*self.so_far, so_far]
