"""Work of the ways to solve for the kept weights of a layer, in multiplications of a matrix product.

Work is counted and never measured, so that equal layers are solved in equal ways. The constants are ratios of times of
float64 kernels, measured on one thread of an x86-64 CPU with MKL (`examples/benchmarks/solve.py --rates`). They count
what differs between the kernels: a matrix product multiplies 17 times in a nanosecond, gathering the entries of a small
system from a large matrix takes about 30 ns for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_roulette.refit.solvers.accuracy import allowed_share
from lightning_roulette.refit.solvers.supports import supports_of

_GATHERED_ENTRY = 500  # an entry of a system: it is gathered, padded, factored at the rate of a short vector
_SORTED_INPUT = 800  # an input of an output: the kept ones are found and their values written
_ITERATED_ENTRY = 130  # an input of an output in a step: eight passes over memory
_STEP = 1e6  # a step of no output
_STEPS_TO_A_THOUSANDTH, _LEAST_STEPS = 32, 8  # that solve most outputs
_LEAST_ON_INVERSE, _MORE_ON_INVERSE = 5, 30  # the same on the inverse: the latter times the square of the pruned share
_EXACT_STEPS = 64  # whose work rounding of an output one after another may take
_SWEPT_ENTRY = 3000  # an input of an output in a sweep of rounding: some twenty passes over memory
_SENT_ENTRY = 300  # a number that is summed over processes
_SUM = 3e7  # a sum of no numbers over processes: 2 ms


def factor_cost(size: Tensor, inputs: int) -> Tensor:
    """Return the work to gather, factor and solve systems of these sizes, from a matrix with this many inputs."""
    return size.double() ** 3 / 3 + _GATHERED_ENTRY * size.double().square() + _SORTED_INPUT * inputs


def inverse_cost(inputs: int) -> float:
    """Return the work to invert a matrix."""
    return float(inputs) ** 3


def step_cost(inputs: int) -> float:
    """Return the work of a step of conjugate gradients for one output, without that of a step of no output."""
    return float(inputs) ** 2 + _ITERATED_ENTRY * inputs


def factor_costs(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the work of the two ways to solve with factors, each float64, shape `(groups, outputs)`.

    Outputs with equal inputs share a factor.

    Args:
        kept: Bool, shape `(groups, outputs, inputs)`.

    Returns:
        - To factor the system of the inputs that an output keeps.
        - To correct the solution over all inputs for those that it does not keep, without the work of the inverse.
    """
    inputs, count = kept.shape[2], kept.sum(2)
    numbers, shared = supports_of(kept)
    sharing = shared[numbers].view_as(count)
    direct = factor_cost(count, inputs) / sharing
    return direct, factor_cost(inputs - count, inputs) / sharing + 2 * inputs**2


def worth_correcting(kept: Tensor) -> Tensor:
    """Return for which outputs a correction takes less work, bool, shape `(groups, outputs)`.

    It is worth it for none of a group if the inverse takes more work than all of them save.
    """
    direct, correction = factor_costs(kept)
    saved = (direct - correction).clamp(min=0)
    return (saved > 0) & (saved.sum(1, keepdim=True) > inverse_cost(kept.shape[2]))


def usual_steps(kept: Tensor, rows: int) -> Tensor:
    """Return after how many steps of conjugate gradients most outputs are solved; see `allowed_share`.

    Args:
        kept: Bool, shape `(groups, outputs, inputs)`.
        rows: Number of rows that they are solved on.

    Returns:
        Float64, shape `(groups, outputs)`.
    """
    share = allowed_share(kept.sum(2), rows)
    return (_STEPS_TO_A_THOUSANDTH * (1 - share.sqrt())).clamp(min=_LEAST_STEPS)


def usual_steps_on_inverse(kept: Tensor) -> Tensor:
    """Return the same for steps on the inverse (see `solved_by_multipliers`)."""
    pruned = 1 - kept.double().mean(2)
    return _LEAST_ON_INVERSE + _MORE_ON_INVERSE * pruned.square()


def most_steps_on_inverse(kept: Tensor, rows: int) -> Tensor:
    """Return after how many steps on the inverse another way would have taken less work.

    Args:
        kept: Bool, shape `(groups, outputs, inputs)`.
        rows: Number of rows that they are solved on.

    Returns:
        Float64, shape `(groups, outputs)`; zero for outputs that another way solves in less work, and for all of a
        group if the inverse takes more work than all of them save.
    """
    inputs, step = kept.shape[2], step_cost(kept.shape[2])
    direct, correction = factor_costs(kept)
    work = usual_steps_on_inverse(kept) * step
    saved = (torch.minimum(direct, usual_steps(kept, rows) * step) - work).clamp(min=0)
    least = inverse_cost(inputs) + _STEPS_TO_A_THOUSANDTH * _STEP
    worth = (saved > 0) & (work < correction) & (saved.sum(1, keepdim=True) > least)
    return torch.where(worth, (torch.minimum(direct, correction) / step).floor(), 0.0)


def most_steps(kept: Tensor, rows: int) -> Tensor:
    """Return after how many steps of conjugate gradients a factor would have taken less work.

    Args:
        kept: Bool, shape `(groups, outputs, inputs)`.
        rows: Number of rows that they are solved on.

    Returns:
        Float64, shape `(groups, outputs)`; zero for outputs that a factor solves in less work than usual steps.
    """
    outputs, inputs = kept.shape[1:]
    direct, correction = factor_costs(kept)
    by_factor = torch.minimum(direct, correction + inverse_cost(inputs) / outputs)
    usual = usual_steps(kept, rows)
    saved = (by_factor - usual * step_cost(inputs)).clamp(min=0)
    worth = (saved > 0) & (saved.sum(1, keepdim=True) > _STEPS_TO_A_THOUSANDTH * _STEP)
    return torch.where(worth, (by_factor / step_cost(inputs)).floor(), 0.0)


def inverses_pay(inputs: int, outputs: int, inverses: int, steps: int) -> bool:
    """Return whether some inverses, and products with them, take less work than steps of conjugate gradients.

    Args:
        inputs: Inputs of the layer.
        outputs: Outputs of the layer.
        inverses: Number of inverses.
        steps: Number of steps for each output. The products with the inverses are far fewer.
    """
    return inverses * inverse_cost(inputs) <= steps * outputs * step_cost(inputs)


def solve_cost(kept: Tensor, rows: int) -> float:
    """Return the least work to solve for the kept weights of all outputs.

    Args:
        kept: Bool, shape `(groups, outputs, inputs)`.
        rows: Number of rows that they are solved on.
    """
    inputs = kept.shape[2]
    direct, correction = factor_costs(kept)
    steps = torch.minimum(usual_steps(kept, rows), usual_steps_on_inverse(kept))
    return float(torch.minimum(torch.minimum(direct, correction), steps * step_cost(inputs)).sum())


def worth_rounding_exactly(kept: Tensor) -> Tensor:
    """Return for which outputs weights are rounded one after another; otherwise the factor takes too much work.

    Args:
        kept: Bool, shape `(groups, outputs, inputs)`.

    Returns:
        Bool, shape `(groups, outputs)`.
    """
    inputs = kept.shape[2]
    return factor_costs(kept)[0] <= _EXACT_STEPS * step_cost(inputs)


def rounding_cost(kept: Tensor) -> float:
    """Return the work to round the weights of all outputs once.

    Args:
        kept: Bool, shape `(groups, outputs, inputs)`.
    """
    groups, outputs, inputs = kept.shape
    return groups * outputs * (float(inputs) ** 2 + _SWEPT_ENTRY * inputs)


def worth_sharing(work: float, entries: int, ranks: int) -> bool:
    """Return whether a share of some work, and sending its results, take less work than all of it.

    Args:
        work: All of the work.
        entries: Number of results of all processes.
        ranks: Number of processes.
    """
    return ranks > 1 and work * (1 - 1 / ranks) > _SUM + _SENT_ENTRY * entries
