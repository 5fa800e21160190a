"""How the defaults were chosen: each choice is varied alone and judged on held-out training data.

The test data is not read. A search without a floor goes down to 3 % of the weights. Its loss is the change of the score
on the held-out data, averaged over several shares of weights left. Finished runs are stored as lines of JSON and are
not repeated.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from data import load
from methods import Case, OnPart, Size
from networks import trained
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from finished_runs import Row, Runs

from lightning_roulette import LeastSquares, PrunedWeights, Scores, Tree, Validation, Wheel, search

TASKS = ("mnist", "tid2013", "kadid10k", "cifar10")
LEFT = (0.2, 0.1, 0.05, 0.03)  # shares of weights at which a search is judged
LEFT_OF = {"cifar10": (0.6, 0.4, 0.3, 0.2)}  # of a network that has fewer weights to spare
INPUTS = 10_000
# The start. The defaults chosen since are the variant "coarse_rate 0.2".
START: dict[str, object] = {
    "wheel": Wheel(sharpness=8, allocation=0.3, importance="sensitivity"),
    "tree": Tree(pruning_rate=0.2, coarse_rate=None),
    "validation": Validation(confirm=0.5),
    "refit": LeastSquares(finalists=4),
}
FINE = {"pruning_rate": 0.1, "finalists": 1}
COARSE = {**FINE, "sharpness": 16.0, "coarse_rate": 0.2}  # today's defaults
VARIANTS: dict[str, dict[str, object]] = {
    "start": {},
    **{f"sharpness {one:g}": {"sharpness": one} for one in (2, 4, 16, math.inf)},
    **{f"importance {one}": {"importance": one} for one in ("magnitude", "lamp", "activation", "obs")},
    "scope layer": {"scope": "layer"},
    **{f"allocation {one:g}": {"allocation": one} for one in (0, 0.1, 0.6)},
    **{f"pruning_rate {one:g}": {"pruning_rate": one} for one in (0.1, 0.35)},
    "rank_by the score": {"by_score": True},
    **{f"confirm {one:g}": {"confirm": one} for one in (0, 0.25, 0.75)},
    **{f"finalists {one}": {"finalists": one} for one in (1, 10)},
    **{f"pruning_rate 0.1, finalists 1, sharpness {one:g}": {**FINE, "sharpness": one} for one in (8, 16, math.inf)},
    "coarse_rate 0.2": COARSE,
    "coarse_rate 0.35": {**COARSE, "coarse_rate": 0.35},
    "coarse_rate 0.5": {**COARSE, "coarse_rate": 0.5},
    **{f"coarse_rate {one:g}, choose": {**COARSE, "coarse_rate": one, "choose": True} for one in (0.2, 0.35, 0.5)},
    **{f"coarse_rate 0.2, importance {one}": {**COARSE, "importance": one} for one in ("magnitude", "lamp")},
    "refit at the end": {"each_level": False, "importance": "magnitude", "allocation": 0},
    "no refit": {"refit": None, "importance": "magnitude", "allocation": 0},
    "no refit, sensitivity": {"refit": None, "allocation": 0},
    "no refit, pruning_rate 0.1": {"refit": None, "importance": "magnitude", "allocation": 0, "pruning_rate": 0.1},
    "no refit, lamp": {"refit": None, "importance": "lamp", "allocation": 0},
}


def choices(variant: str) -> dict[str, object]:
    """Return the groups of settings of a variant."""
    varied = {name: value for name, value in VARIANTS[variant].items() if name not in ("refit", "by_score")}
    found = {}
    for name, group in START.items():
        ours = {field.name: varied.pop(field.name) for field in fields(group) if field.name in varied}
        found[name] = replace(group, **ours)
    assert not varied
    return found | {name: VARIANTS[variant][name] for name in ("refit",) if name in VARIANTS[variant]}


class ByScore(OnPart):
    """An evaluator that ranks by the score that judges, not by the loss."""

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        scores = super().__call__(candidate, folds)
        return replace(scores, rank=scores.score)

    def recorded(self, candidate: PrunedWeights, folds: Sequence[int]) -> tuple[Scores, object]:
        scores, outcomes = super().recorded(candidate, folds)
        return replace(scores, rank=scores.score), outcomes


def measured(case: Case, variant: str) -> Row:
    """Return the curve of the held-out score, and its change at the shares in `LEFT`."""
    options = choices(variant)
    evaluate = (ByScore if "by_score" in VARIANTS[variant] else OnPart)(case, case.val)
    rate = max(options["tree"].pruning_rate, options["tree"].coarse_rate or 0)  # no coarse level fails without a floor
    shares = LEFT_OF.get(case.task.name, LEFT)
    levels = math.ceil(math.log(shares[-1]) / math.log(1 - rate))
    options["tree"] = replace(options["tree"], max_levels=levels)
    began = time.monotonic()
    winner = search(case.weights, evaluate, tolerance=math.inf, calibration=case.calibration, seed=case.seed, **options)
    seconds = time.monotonic() - began
    levels = range(len(winner.report.accepted) + 1)
    curve = [(winner.mask_at(n).survivors / case.total, case.judged(winner.weights_at(n))["judge"]) for n in levels]
    left, scores = np.array(curve[::-1]).T
    changes = np.interp(np.log(shares), np.log(left), scores) - case.dense["judge"]
    return {"curve": curve, "changes": changes.tolist(), "seconds": seconds}


def show(rows: Sequence[Row]) -> None:
    """Print for each variant the mean change, and its paired difference from the first with its standard error.

    The first variant is the start, or today's defaults where the start was not run.
    """
    for task in dict.fromkeys(row["task"] for row in rows):
        of = {(row["variant"], row["seed"]): row for row in rows if row["task"] == task}
        first = "start" if any(variant == "start" for variant, _ in of) else "coarse_rate 0.2"
        shares = ", ".join(f"{100 * one:g}" for one in LEFT_OF.get(task, LEFT))
        print(f"\n{task}: change at {shares} % of the weights, x 100; mean")
        for variant in VARIANTS:
            seeds = sorted(seed for name, seed in of if name == variant and (first, seed) in of)
            if not seeds:
                continue
            changes = 100 * np.array([of[variant, seed]["changes"] for seed in seeds])
            base = 100 * np.array([of[first, seed]["changes"] for seed in seeds])
            apart = (changes - base).mean(1)
            error = f" (s.e. {stdev(apart) / math.sqrt(len(apart)):.2f})" if len(apart) > 1 else ""
            cells = "  ".join(f"{one:7.2f}" for one in changes.mean(0))
            seconds = mean(of[variant, seed]["seconds"] for seed in seeds)
            found = f"{cells}  {changes.mean():7.2f}  {apart.mean():+6.2f}{error}"
            print(f"  {variant:44} {found}, {len(seeds)} seeds, {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of NAME.npz in the layout of Keras' mnist.npz")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("defaults.jsonl"))
    parser.add_argument("--networks", type=Path, default=Path("runs/paper/networks"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Runs(options.results)
    asked = [(task, seed, variant) for task in options.tasks for seed in options.seeds for variant in options.variants]
    for name, seed, variant in tqdm(asked, unit="run"):
        key: Row = {"task": name, "seed": seed, "variant": variant}
        if not results.has(**key):
            task = load(name, options.data, held_out=True)
            case = Case(task, trained(task, seed, options.networks), seed, Size(inputs=INPUTS))
            results.add(**key, **measured(case, variant))
    show(results.rows)


if __name__ == "__main__":
    main()
