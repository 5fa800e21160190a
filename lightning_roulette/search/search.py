"""The search, level by level.

K. Y. Chan, K. F. C. Yiu, S. Guo and H. Jiang, "A roulette wheel-based pruning method to simplify cumbersome deep neural
networks", Neural Computing and Applications 36:13915-13933 (2024), doi:10.1007/s00521-024-09719-6.

From a trained network the roulette wheel draws a branch of pruned networks; each is evaluated; the best becomes the
parent of the next level, until accuracy would decline. The paper takes "the slimmest with the best accuracy": all
candidates of one level are equally slim here, so the best score decides within a level, and slimness between levels:
the winner of the tree is the last, and so the slimmest, accepted level.

Only the paper's abstract and public summaries were at hand. What they leave open is settled thus: odds fall with a
power of importance (`Wheel.sharpness`); a level must keep the dense score less a tolerance; a level that does not is
tried again at half the rate, `Tree.patience` times in a row, down to `Tree.smallest_rate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from lightning_roulette.checks import check_count, check_group, check_number, check_seed
from lightning_roulette.judge.evaluator import Evaluator, Judge
from lightning_roulette.large.shards import Shards
from lightning_roulette.mask.mask import Mask
from lightning_roulette.refit.calibration import Calibration
from lightning_roulette.search.growing import Growing, Observer
from lightning_roulette.search.refitting import Refitting
from lightning_roulette.search.winner import Winner
from lightning_roulette.settings import CALIBRATED, Importance, LeastSquares, Refit, Tree, Validation, Wheel, refit_of


def search(
    weights: Mapping[str, Tensor],
    evaluate: Evaluator | Callable[[Mask], float],
    *,
    branches: int = 20,
    tolerance: float = 0.0,
    target_sparsity: float | None = None,
    confidence: float | None = None,
    refit: str | LeastSquares | None = None,
    calibration: Calibration | None = None,
    wheel: Wheel = Wheel(),
    tree: Tree = Tree(),
    validation: Validation = Validation(),
    seed: int = 0,
    observer: Observer | None = None,
) -> Winner:
    """The slimmest network of a pruning tree whose score keeps the floor.

    The tree grows on the ranking folds of `evaluate` alone. Then its accepted levels are judged on the others, the
    densest first, and the last before one that misses the floor there is the winner.

    Args:
        weights: Parameter name to tensor, the prunable weights of the dense network. Never changed. Of DTensors, whose
            rows lie in several processes, all of them search alike, by magnitude alone and without a refit.
        evaluate: An `Evaluator`, or a function from a `Mask` to a score, larger is better: an evaluator of one fold,
            which cannot be confirmed, and sees no refit.
        branches: Candidates per level.
        tolerance: How far below the dense score a winner may be; infinity leaves the score out of it.
        target_sparsity: A further end of the search, in (0, 1); the last level is cut to reach it exactly.
        confidence: In (0, 1). A level then holds only if, with this confidence, its decline on the population that the
            data are an i.i.d. sample of is at most `tolerance`. The levels were fixed without the confirmation folds
            and are tested in order up to the first failure, so that no correction is needed (fixed-sequence testing;
            Learn then Test, Angelopoulos et al. 2021, arXiv:2110.01052).
        refit: What is done for accuracy after a level is drawn: None; `"batch_norm"`, running statistics are computed
            anew; `"least_squares"`, or a `LeastSquares`, the survivors are refitted besides. It is part of the level:
            the floor is held against the refitted network.
        calibration: The network whose weights these are, with inputs: for a refit, and for an importance that looks at
            inputs. Neither validation data nor labels belong there.
        wheel: How candidates are drawn.
        tree: How levels follow.
        validation: How candidates are judged: `confirm` and `race` are read here.
        seed: All chance of the search, a signed 64-bit number. Equal seed and scores, equal masks.
        observer: Is told of each step.

    Returns:
        The winner: the last accepted level that held, or the dense network if none did.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, `weights` is empty, an importance is not a finite non-negative
            number, the dense score is NaN, the confirmation folds cannot certify anything, or `evaluate` cannot see a
            refit.

    Example:
        >>> weights = {"layer": Tensor([0.1, -2.0, 0.01, 3.0])}
        >>> winner = search(weights, lambda mask: float(mask["layer"][[1, 3]].all()), wheel=Wheel(math.inf))
        >>> winner.mask["layer"]
        tensor([False,  True, False,  True])
    """
    check_search(branches, tolerance, target_sparsity, confidence, wheel, tree, validation, seed)
    if not weights or not any(weight.numel() for weight in weights.values()):
        raise ValueError("weights is empty, but must name at least one tensor with entries.")
    how = refit_of(refit)
    if (shards := Shards.of(weights)) is not None and (why := beyond_shards(wheel.importance, how)):
        raise ValueError(f"the weights lie in {shards.ranks} processes, but {why}")
    if calibration is None and (how is not None or wheel.importance in CALIBRATED):
        asked = f"refit is {refit!r}" if how is not None else f"importance is {wheel.importance!r}"
        raise ValueError(f"{asked}, but there are no inputs for it. Pass calibration=Calibration(network, batches).")
    if how is not None and not hasattr(evaluate, "folds"):
        raise ValueError(
            f"refit is {refit!r}, but a function from a mask to a score does not see what a refit makes of a network. "
            "Pass an Evaluator, which is given the weights too, or refit=None."
        )
    judge = Judge(evaluate, validation.confirm)
    refitting = Refitting(weights, how, calibration)
    growing = Growing(weights, judge, int(branches), wheel, int(seed), observer or Observer(), refitting)
    growing.start(float(tolerance), confidence, validation.race)
    while (reason := growing.end(target_sparsity, tree)) is None:
        growing.level(tree, target_sparsity)
    growing.confirm()
    return growing.so_far(reason)


def check_search(
    branches: int,
    tolerance: float,
    target_sparsity: float | None,
    confidence: float | None,
    wheel: Wheel,
    tree: Tree,
    validation: Validation,
    seed: int,
) -> None:
    """Raise if an argument of a search is of the wrong kind or out of range.

    Raises:
        TypeError: If one is of the wrong kind.
        ValueError: If one is out of range.
    """
    check_count("branches", branches)
    check_number("tolerance", tolerance, at_least=0, remedy="It is in the metric's own units: 0.005 is half a point.")
    if target_sparsity is not None:
        check_number("target_sparsity", target_sparsity, above=0, below=1)
    check_group("wheel", wheel, Wheel)
    check_group("tree", tree, Tree)
    check_group("validation", validation, Validation)
    check_seed(seed)
    if confidence is not None:
        _check_confidence(confidence, tolerance, validation)


def beyond_shards(importance: Importance | str | None, how: Refit | None) -> str:
    """Why weights that lie in several processes cannot be pruned so, and what to do; empty if they can."""
    if how is not None:
        return "a refit needs whole layers, which no process has. Pass refit=None."
    if importance not in (None, "magnitude"):
        what = f"importance {importance!r}" if isinstance(importance, str) else "importance by a function"
        return f"{what} needs whole layers, which no process has. Pass wheel=Wheel(importance='magnitude')."
    return ""


def _check_confidence(confidence: float, tolerance: float, validation: Validation) -> None:
    check_number("confidence", confidence, above=0, below=1, remedy="0.95 is usual.")
    if math.isinf(tolerance):
        raise ValueError(
            f"tolerance is {tolerance} and confidence {confidence}, but that anything at all may be lost needs no "
            "certificate. Pass a tolerance, such as 0.005 for half a point, or leave confidence out."
        )
    if tolerance == 0:
        raise ValueError(
            f"tolerance is {tolerance} and confidence {confidence}, but no finite sample can certify that nothing is "
            "lost. Allow some tolerance, such as 0.005 for half a point, or leave confidence out."
        )
    if validation.confirm == 0:
        raise ValueError(
            f"confirm is 0 and confidence {confidence}, but data that ranked candidates can certify none of them. "
            "Keep some for confirmation, as Validation(confirm=0.5) does, or leave confidence out."
        )
