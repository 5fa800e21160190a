"""The search, level by level.

Source: K. Y. Chan, K. F. C. Yiu, S. Guo and H. Jiang, "A roulette wheel-based pruning method to simplify cumbersome
deep neural networks", Neural Computing and Applications 36:13915-13933 (2024), doi:10.1007/s00521-024-09719-6.

The roulette wheel draws a branch of pruned networks from a trained network. Each is evaluated. The best becomes the
parent of the next level, until accuracy would decline. The paper takes "the slimmest with the best accuracy". Here all
candidates of one level are equally slim. The best rank decides within a level, and the winner of the tree is the last
accepted level that holds on the held-out half.

Only the abstract of the paper and public summaries were available. These choices are ours:

- Odds are a power of importance (`Wheel.sharpness`).
- A level must keep the dense score minus a tolerance.
- A level that fails is tried again at half the rate, `Tree.patience` times in a row, down to `Tree.smallest_rate`.
- With a least-squares refit of each level, the first levels are coarse (`Tree.coarse_rate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_roulette.judge.evaluator import Evaluator, Judge
from lightning_roulette.mask.mask import Mask
from lightning_roulette.refit.inputs import Calibration
from lightning_roulette.refit_settings import LeastSquares, refit_of
from lightning_roulette.report.records import StopReason
from lightning_roulette.search.arguments import check_network, check_search, check_units, held_of
from lightning_roulette.search.confirmation import confirm
from lightning_roulette.search.drawing import Drawing
from lightning_roulette.search.level import try_level
from lightning_roulette.search.observer import Observer
from lightning_roulette.search.policies import CoarseToFine, Levels, Policy, Step
from lightning_roulette.search.refitter import Refitter
from lightning_roulette.search.run import Run, begin
from lightning_roulette.search.state import State
from lightning_roulette.search.winner import Winner
from lightning_roulette.settings import Tree, Validation, Wheel, groups_of
from lightning_roulette.wheel.units.units import Units


def search(
    weights: Mapping[str, Tensor],
    evaluate: Evaluator | Callable[[Mask], float],
    *,
    branches: int = 20,
    tolerance: float | None = None,
    target_sparsity: float | None = None,
    confidence: float | None = None,
    refit: str | LeastSquares | Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    wheel: Wheel | Mapping[str, Any] = Wheel(),
    tree: Tree | Mapping[str, Any] = Tree(),
    validation: Validation | Mapping[str, Any] = Validation(),
    seed: int = 0,
    policy: Policy | None = None,
    observer: Observer | None = None,
    units: Units | None = None,
    held: Mapping[str, Tensor] | None = None,
) -> Winner:
    """Find the slimmest network of a pruning tree that keeps the floor.

    The tree grows on the search half of the folds of `evaluate`. Then the accepted levels are judged on the held-out
    half, the densest first. The winner is the last level before one that misses the floor there.

    Args:
        weights: Prunable weights of the dense network, by parameter name. They are never changed. With DTensors all
            processes must make the same call, with `importance="magnitude"` or the default, and without a refit.
        evaluate: An `Evaluator`, or a function from a `Mask` to a score. Larger scores are better. With a function
            nothing is held out, and no refit is possible.
        branches: Candidates per level.
        tolerance: How far below the dense score a winner may be, in units of the score. `inf` disables the floor. None:
            half a standard error of the dense score on the held-out half; 0 if the standard error is unknown, as it is
            with a function. See `default_tolerance`.
        target_sparsity: Sparsity at which the search ends, in (0, 1). The last level is cut to reach it exactly. None:
            the search ends when the score declines.
        confidence: Confidence of the certificate, in (0, 1). A level then holds only if its decline is at most
            `tolerance` with this confidence. It is the decline on the population from which the data is an i.i.d.
            sample. The levels were fixed without the held-out half and are tested in order up to the first failure, so
            no correction is needed (fixed-sequence testing; Learn then Test, Angelopoulos et al. 2021,
            arXiv:2110.01052).
            None: a level holds if its score on the held-out half keeps the floor.
        refit: What is done for accuracy after a level is drawn. The floor applies to the refitted network.

            - None: nothing.
            - `"batch_norm"`: compute running statistics again. For networks with batch normalisation.
            - `"least_squares"`, a `LeastSquares` or a dict of its fields: also solve for the survivors of each layer.
              Usually the slimmest.

            The last two need `calibration`.
        calibration: The network of the weights, with inputs. Needed for a refit and for importances on inputs. Pass
            training inputs. Labels are not used.
        wheel: How candidates are drawn. A `Wheel`, or a dict of its fields.
        tree: How levels follow one another. A `Tree`, or a dict of its fields.
        validation: How candidates are judged. A `Validation`, or a dict of its fields. Only `confirm` and `race` are
            read here.
        seed: Source of all chance, a signed 64-bit number. Equal seeds and scores give equal masks.
        policy: Decides which level is tried next, and when the search ends. Its steps have at most `branches`
            candidates. None: `Levels`, which follows `tree` and `target_sparsity`; with a least-squares refit of each
            level `CoarseToFine`.
        observer: Is told of each step.
        units: The units of the network, from `units_of`. Needed if the wheel's `unit` is no single weight.
        held: Which weights are held at zero, as a `Mask` or as names and bool tensors, False = held. All levels prune
            them, and they count as pruned. The dense network is then the network with these zeros, and its score sets
            the floor. It may name parameters that are not in `weights`; a refit keeps their zeros. None: no weight.

    Returns:
        The last accepted level that held, or the dense network if no level held.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: In one of these cases:

            - An argument is out of range, or `weights` is empty.
            - An importance is negative or not finite.
            - The dense score is not finite.
            - The held-out half is too small for a certificate.
            - A refit has no `calibration`, or `evaluate` is a function of a mask.
            - The wheel's unit is no single weight and `units` is None, or units and another choice do not fit.
            - `held` has another shape than a weight, or a weight that it holds is not zero.

    Examples:
        >>> weights = {"layer": Tensor([0.1, -2.0, 0.01, 3.0])}
        >>> winner = search(weights, lambda mask: float(mask["layer"][[1, 3]].all()), wheel=Wheel(float("inf")))
        >>> winner.mask["layer"]
        tensor([False,  True, False,  True])
    """
    wheel, tree, validation = groups_of(wheel, tree, validation)
    check_search(branches, tolerance, target_sparsity, confidence, wheel, tree, validation, seed)
    check_network(weights, evaluate, refit, calibration, wheel)
    check_units(units, wheel, tree, weights)
    branches, seed = int(branches), int(seed)
    judge = Judge(evaluate, validation.confirm)
    refitter = Refitter(weights, refit_of(refit), calibration, units=units, held=held_of(held, weights))
    run, state = begin(
        judge,
        refitter,
        Drawing(wheel, refitter, branches, seed, units=units),
        observer or Observer(),
        branches=branches,
        tolerance=None if tolerance is None else float(tolerance),
        confidence=confidence,
        race=validation.race,
        seed=seed,
        target_sparsity=None if target_sparsity is None else float(target_sparsity),
        target=tree.target,
    )
    levels = Levels(tree, branches, wheel.scope, target_sparsity, units)
    policy = policy or (CoarseToFine(levels) if refitter.solves else levels)
    state, reason = _levels(run, state, policy, tree.seconds)
    state = confirm(run, state)
    return run.winner(state, reason=_confirmed(reason, run.winner(state)))


def _levels(run: Run, state: State, policy: Policy, limit: float) -> tuple[State, StopReason]:
    """Try one level after another. Return the last state, and why the search ended.

    Args:
        run: What stays the same during the search.
        state: The state of the dense network.
        policy: Decides what is tried.
        limit: Seconds after which no level may end, if it takes as long as the last one.
    """
    last = 0.0
    while isinstance(step := policy.next(state), Step):
        now = run.seconds
        if limit < math.inf and run.judge.evaluate.in_any_process(now + last > limit):
            return state, StopReason.OUT_OF_TIME
        state = try_level(run, state, step)
        last = run.seconds - now
    return state, step


def _confirmed(reason: StopReason, winner: Winner) -> StopReason:
    """Why the search ended. A target that the winner misses was not reached."""
    missed = reason is StopReason.TARGET_REACHED and winner.report.target_met is False
    return StopReason.TARGET_NOT_HELD if missed else reason
