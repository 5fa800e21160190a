"""The paper's evaluation: every method on every task, from the same trained networks, under the same rules.

- Finished runs are lines of JSON in the file of results. They are not repeated, even if the code has changed since. A
  run that was killed starts again.
- Only one process may write to a file.
- At the end the tables and the figure are written next to the results.
- `--held-out` judges on training data that was used neither for training nor for choices. Defaults are chosen in this
  way, without test data.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from data import SOURCES, TASKS, check_there, load
from methods import METHODS, QUICK, Case, Found, Size, applied
from networks import trained
from table import chosen, publish
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from finished_runs import Row, Runs

SEEDS = {"cifar10": range(3)}
SEEDS_ELSE = range(5)
FALLEN = 0.5  # a curve ends where the score has fallen by this amount


def measured(case: Case, method: str) -> Row:
    """Run a method. Return what it leaves of the network, its cost, and its curve."""
    dense, began = case.dense, time.monotonic()
    slim = applied(case, method)
    seconds = time.monotonic() - began
    now = {"val": case.score(slim.values, case.val), **case.judged(slim.values)}
    return {
        "opinion": case.task.opinion,
        "weights": case.total,
        "left": slim.left,
        "val_change": now["val"] - dense["val"],
        "judge_change": now["judge"] - dense["judge"],
        **now,
        **{f"dense_{name}": value for name, value in dense.items()},
        "validations": slim.validations,
        "seconds": seconds,
        "device": case.train.x.device.type,
        "curve": curve(case, slim, dense["judge"] - FALLEN),
    }


def curve(case: Case, slim: Found, least: float) -> list[tuple[float, float]]:
    """Return judged scores by share of weights left.

    The curve goes from all weights down to the slimmest network, and on to the first score below `least`.
    """
    found: list[tuple[float, float]] = []
    for left, values in slim.path:
        found.append((left, case.score(values, case.judge)))
        if found[-1][1] < least and left < slim.left:
            break
    return found


def run(
    tasks: Iterable[str],
    methods: Iterable[str],
    seeds: Iterable[int] | None,
    results: Runs,
    data: Path,
    networks: Path,
    held_out: bool = False,
    quick: bool = False,
    device: str = "cpu",
) -> None:
    """Do the runs that are not yet among the results."""
    asked = [(name, seed) for name in tasks for seed in (SEEDS.get(name, SEEDS_ELSE) if seeds is None else seeds)]
    missing: dict[str, dict[int, list[Row]]] = {}
    for name, seed in asked:
        keys = [
            {"task": name, "method": method, "seed": seed, "held_out": held_out, "quick": quick} for method in methods
        ]
        if keys := [key for key in keys if not results.has(**key)]:
            missing.setdefault(name, {})[seed] = keys
    with tqdm(total=sum(len(keys) for one in missing.values() for keys in one.values()), unit="run") as bar:
        for name, by_seed in missing.items():
            bar.set_description(f"{name}: data")
            task = load(name, data, held_out=held_out, quick=quick)
            for seed, keys in by_seed.items():
                bar.set_description(f"{name} {seed}: network")
                case = Case(task, trained(task, seed, networks, quick=quick), seed, QUICK if quick else Size(), device)
                for key in keys:
                    bar.set_description(f"{name} {seed}: {key['method']}")
                    results.add(**key, **measured(case, str(key["method"])))
                    bar.update()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of NAME.npz in the layout of Keras' mnist.npz")
    parser.add_argument("--tasks", nargs="+", choices=SOURCES, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 4, for cifar10 0 to 2")
    parser.add_argument("--results", type=Path, default=Path("runs/paper/results.jsonl"))
    parser.add_argument("--networks", type=Path, default=Path("runs/paper/networks"))
    parser.add_argument("--held-out", action="store_true", help="judge on held-out training data, not on test data")
    parser.add_argument("--quick", action="store_true", help="run everything in miniature")
    parser.add_argument("--device", default="cpu", help="device for the pruning")
    options = parser.parse_args(arguments)
    if options.results.suffix in (".md", ".csv", ".png"):
        parser.error(
            f"--results is {options.results}, but the tables are written to this file. Pass the name of a .jsonl file."
        )
    for name in options.tasks:
        try:
            check_there(name, options.data)
        except FileNotFoundError as error:
            parser.error(f"{error} Or remove {name} from --tasks.")
    torch.set_num_threads(1)
    results = Runs(options.results)
    run(
        dict.fromkeys(options.tasks),
        dict.fromkeys(options.methods),
        None if options.seeds is None else dict.fromkeys(options.seeds),
        results,
        options.data,
        options.networks,
        options.held_out,
        options.quick,
        options.device,
    )
    publish(chosen(results.rows, options.held_out, options.quick), options.results)


if __name__ == "__main__":
    main()
