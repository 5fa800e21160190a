"""Compare the reported decline of a winner with its decline on test images.

These ways to select are compared on the same trained networks:

- naive: accuracy on all validation images orders the branch and is compared with the floor; nothing is held out;
- by loss, shared: the same, but the loss orders the branch;
- confirm: this share of the images is held out (0.5 is the default);
- confidence: with a certificate;
- refit: the survivors are refitted on training images (the default of the callback), alone and with a certificate.

Test images are used for judging only. For comparison, the table shows how many weights one-shot magnitude pruning keeps
at the same mean loss on the test images. Finished runs are stored as lines of JSON and are not repeated.
"""

import argparse
import math
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from finished_runs import Runs
from on_tensors import (
    OnTensors,
    Split,
    accuracy,
    accuracy_with,
    dense_weights,
    digits,
    magnitude_curve,
    mnist,
    trained,
)
from torch import nn

from lightning_roulette import Calibration, Validation, search

SPARSITIES = [step / 100 for step in range(0, 100)]
WAYS = {
    "naive": {"by_accuracy": True, "validation": Validation(confirm=0, race=False)},
    "by loss, shared": {"validation": Validation(confirm=0)},
    "confirm 0.25": {"validation": Validation(confirm=0.25)},
    "confirm 0.5": {"validation": Validation(confirm=0.5)},
    "confirm 0.75": {"validation": Validation(confirm=0.75)},
    "confidence 0.95": {"validation": Validation(confirm=0.5), "confidence": 0.95},
    "refit": {"validation": Validation(confirm=0.5), "refit": "least_squares"},
    "refit, 0.95": {"validation": Validation(confirm=0.5), "refit": "least_squares", "confidence": 0.95},
}


def one_run(net: nn.Module, data: dict[str, Split], way: str, options: argparse.Namespace, seed: int) -> dict:
    """Run one search, and measure its winner on the test images."""
    choices = dict(WAYS[way])
    evaluate = OnTensors(net, data["val"], 1000, by_accuracy=choices.pop("by_accuracy", False), seed=seed)
    weights, dense = dense_weights(net), accuracy(net, data["test"])
    inputs = data["train"][0][torch.randperm(len(data["train"][1]), generator=torch.Generator().manual_seed(seed))]
    choices["calibration"] = Calibration(net, [inputs[:10_000]])
    began = time.monotonic()
    try:
        winner = search(weights, evaluate, branches=20, tolerance=options.tolerance, seed=seed, **choices)
    except ValueError as error:  # too few samples for a certificate
        if "can certify" not in str(error):
            raise
        return {"impossible": str(error)}
    test = accuracy_with(net, winner.weights, data["test"])
    report = winner.report
    return {
        "left": 1 - report.sparsity,
        "reported": report.decline,
        "test": dense - test,
        "dense_test": dense,
        "levels": len(report.accepted),
        "winner": report.winner.level if report.winner else 0,
        "validations": report.validations,
        "seconds": time.monotonic() - began,
    }


def runs(name: str, size: int, options: argparse.Namespace, images: dict[str, Split] | None) -> list[dict]:
    """Return all runs of one network and validation size, including those of earlier calls."""
    done = Runs(options.results)
    seeds = range(options.seeds or (30 if name == "digits" else 5))
    asked = {"network": name, "size": size, "tolerance": options.tolerance}
    for seed in seeds:
        missing = [way for way in options.ways if not done.has(**asked, seed=seed, way=way)]
        if not missing:
            continue
        data = (
            digits(seed, size) if name == "digits" else {**images, "val": tuple(part[:size] for part in images["val"])}
        )
        net = trained(name, seed, data["train"], 30 if name == "digits" else 8, 50 if name == "digits" else 100)
        if not done.has(**asked, seed=seed, way="magnitude"):
            curve = magnitude_curve(net, SPARSITIES, data["test"])
            done.add(**asked, seed=seed, way="magnitude", declines=[curve[0] - one for one in curve])
        for way in missing:
            done.add(**asked, seed=seed, way=way, **one_run(net, data, way, options, seed))
    return [row for row in done.of(**asked) if row["seed"] in seeds]


def table(name: str, size: int, rows: list[dict], ways: list[str]) -> None:
    """Print one line for each way."""
    curves = [row["declines"] for row in rows if row["way"] == "magnitude"]
    magnitude = [mean(column) for column in zip(*curves, strict=True)]
    for way in ways:
        ours = [row for row in rows if row["way"] == way]
        if all("impossible" in row for row in ours):
            print(f"{name:15} {size:6,}  {way:16} {len(ours):5}  too few images for a certificate")
            continue
        left, test, reported = ([row[key] for row in ours] for key in ("left", "test", "reported"))
        gaps = [a - b for a, b in zip(test, reported, strict=True)]
        error = stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        level = max((s for s, loss in zip(SPARSITIES, magnitude, strict=True) if loss <= mean(test)), default=0.0)
        print(
            f"{name:15} {size:6,}  {way:16} {len(ours):5}  {mean(left):7.1%} ({min(left):.1%} to {max(left):.1%})"
            f"  {100 * mean(reported):+8.2f}  {100 * mean(test):+6.2f}  {100 * mean(gaps):+6.2f} +- {100 * error:.2f}"
            f"  {1 - level:15.0%}  {sum(t > 0.005 for t in test):3} of {len(test)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="mnist.npz in the layout of Keras; default: fetched from OpenML")
    parser.add_argument("--network", choices=["digits", "lenet-300-100"], action="append", help="default: both")
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="numbers of validation images; default: 200 400, for MNIST 2000 10000"
    )
    parser.add_argument("--seeds", type=int, help="number of seeds; default: 30 for digits, 5 for MNIST")
    parser.add_argument("--tolerance", type=float, default=0.005)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("selection.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"tolerance {100 * options.tolerance:g} points; declines in points, means over the seeds, +- standard error")
    print(
        "network         images  way              seeds  weights left (range)       reported    test  "
        "test - reported  magnitude left  test > tolerance"
    )
    for name in options.network or ["digits", "lenet-300-100"]:
        images = None if name == "digits" else mnist(options.data)
        for size in options.sizes or ([200, 400] if name == "digits" else [2000, 10_000]):
            table(name, size, runs(name, size, options, images), options.ways)


if __name__ == "__main__":
    main()
