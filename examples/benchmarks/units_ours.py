"""What `units.py` compares with the peers: searches of this package that let units leave.

- Neurons, channels and heads leave by `Wheel(unit=...)`, with default choices and a least-squares refit of each level.
  They are then removed from the network. A second way lets the refit choose which of them leave.
- Two of each four neighbours stay in every layer that has such groups: `NofM(2, 4)`, chosen on the inputs of the layer.
"""

import math
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import nn
from torch.func import functional_call
from units_cases import Case, loss

from lightning_roulette import (
    Calibration,
    Evaluator,
    LeastSquares,
    Mask,
    Neuron,
    NofM,
    PrunedWeights,
    Reduction,
    Scores,
    Tree,
    Validation,
    Wheel,
    Winner,
    prunable_parameters,
    search,
)
from lightning_roulette.network.lending import copy_into, named_tensors
from lightning_roulette.wheel.units.nofm import NofMWheel, neighbours_of
from lightning_roulette.wheel.units.units import Units

PATTERN = NofM(2, 4)


class Chooser(Evaluator):
    """Scores networks on the part of a case that chooses. It ranks by the loss."""

    folds = 8

    def __init__(self, case: Case) -> None:
        self.case = case

    @torch.no_grad()
    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        """Return the loss, and the accuracy if there are classes."""
        x, y = self.case.choosing
        some = slice(len(y) * min(folds) // self.folds, len(y) * (max(folds) + 1) // self.folds)
        parts = x[some].split(500)
        outputs = torch.cat([functional_call(self.case.network, candidate.weights, (part,)) for part in parts])
        rank = -float(loss(outputs, y[some]))
        hits = rank if self.case.words else float((outputs.argmax(1) == y[some]).double().mean())
        return Scores(rank=rank, score=hits)


def without_units(
    case: Case,
    reduction: float | None,
    tolerance: float,
    seed: int,
    choose: bool = False,
    distill: int = 0,
    multiple_of: int = 1,
) -> nn.Module:
    """Return the network without units.

    Args:
        case: The network and its data.
        reduction: Share of the multiply-adds to be saved. None: as much as the tolerance allows.
        tolerance: What may be lost on the part that chooses, in points.
        seed: Seed of the search, and of the calibration inputs.
        choose: Whether the refit chooses which units leave.
        distill: Gradient steps of each refit.
        multiple_of: Of which as many channels stay in each layer.
    """
    from lightning_roulette import remove_dead
    from lightning_roulette.wheel.units.grouping import units_of

    target, unit = None if reduction is None else Reduction(multiply_adds=reduction), Neuron(multiple_of)
    units = units_of(case.network, case.example[:1], unit=unit, target=target)
    winner = searched(
        case,
        units,
        seed,
        wheel=Wheel(unit=unit),
        tree=Tree(target=target),
        tolerance=tolerance / 100,
        validation=Validation(confirm=0.5 if reduction is None else 0),
        refit=LeastSquares(choose=choose, distill=distill),
    )
    return remove_dead(with_values(case, winner), case.example)


def with_pattern(case: Case, seed: int) -> nn.Module:
    """Return the network with two of each four neighbours in every layer that has such groups."""
    weights = {name: one.detach() for name, one in prunable_parameters(case.network).items()}
    winner = searched(
        case,
        neighbours_of(case.network, list(weights), PATTERN),
        seed,
        wheel=Wheel(unit=PATTERN),
        tree=Tree(0.5, coarse_rate=None),
        branches=1,
        tolerance=math.inf,
        validation=Validation(confirm=0),
        refit=LeastSquares(choose=True),
    )
    return with_values(case, winner)


def searched(case: Case, units: Units, seed: int, **choices: object) -> Winner:
    """Return the winner of a search on a case."""
    weights = {name: one.detach() for name, one in prunable_parameters(case.network).items()}
    inputs = list(case.calibration(seed)[0].split(500))
    calibration = Calibration(case.network, inputs, seed=seed)
    return search(weights, Chooser(case), units=units, calibration=calibration, seed=seed, **choices)


def with_values(case: Case, winner: Winner) -> nn.Module:
    """Return a copy of the network with the values of a winner."""
    network = deepcopy(case.network)
    copy_into(named_tensors(network), winner.weights)
    return network


def largest_of_four(case: Case, seed: int, refitted: bool) -> nn.Module:
    """Return the network with the two largest of each four neighbours in every layer that has such groups.

    Args:
        case: The network and its data.
        seed: Draws the calibration inputs.
        refitted: Whether the weights that stay are solved. Otherwise only running statistics are computed again.
    """
    weights = {name: one.detach() for name, one in prunable_parameters(case.network).items()}
    units = neighbours_of(case.network, list(weights), PATTERN)
    full = Mask.full(weights)
    wheel = NofMWheel(units, {name: one.abs() for name, one in weights.items()}, full, sharpness=math.inf)
    mask = wheel.spin(full.size, seed=seed, level=1, candidate=0)
    calibration = Calibration(case.network, list(case.calibration(seed)[0].split(500)), seed=seed)
    values = calibration.refit(mask, "least_squares" if refitted else "batch_norm").values
    network = deepcopy(case.network)
    network.load_state_dict(values, strict=False)
    return network
