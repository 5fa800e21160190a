"""Measure the weights left and the test accuracy of both LeNets on MNIST for several sharpnesses of the wheel.

Every network is trained once per seed. Then `search` runs with each sharpness at its other defaults: it ranks by
validation loss, judges by accuracy, and holds out half of the validation images. Test images are used for judging only.
Finished runs are stored as lines of JSON and are not repeated.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean

from on_tensors import NETWORKS, OnTensors, Split, accuracy, dense_weights, mnist, pruned_accuracy, trained
from torch import nn

from lightning_roulette import Wheel, search


def searched(net: nn.Module, data: dict[str, Split], batch: int, sharpness: float, options: argparse.Namespace) -> dict:
    """Run one search, and measure its winner on the test images."""
    evaluate, dense = OnTensors(net, data["val"], batch), accuracy(net, data["test"])
    weights = dense_weights(net)
    began = time.monotonic()
    accuracy(net, data["val"])
    validation = time.monotonic() - began
    winner = search(
        weights, evaluate, branches=options.branches, tolerance=options.tolerance, wheel=Wheel(sharpness=sharpness)
    )
    report = winner.report
    return {
        "left": 1 - report.sparsity,
        "reported": report.decline,
        "dense_test": dense,
        "test": pruned_accuracy(net, weights, winner.mask, data["test"]),
        "validations": report.validations,
        "seconds": report.seconds,
        "times_one_validation": report.seconds / validation,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="mnist.npz in the layout of Keras; default: fetched from OpenML")
    parser.add_argument("--network", choices=list(NETWORKS), action="append", help="default: both")
    parser.add_argument("--sharpness", type=float, nargs="+", default=[1, 2, 4, 8, float("inf")])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--branches", type=int, default=20)
    parser.add_argument("--tolerance", type=float, default=0.005)
    parser.add_argument("--validation-images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--results", type=Path, default=Path("sharpness.jsonl"))
    options = parser.parse_args()
    asked = {name: getattr(options, name) for name in ("branches", "tolerance", "validation_images", "epochs")}
    data = mnist(options.data)
    data["val"] = tuple(part[: options.validation_images] for part in data["val"])
    names = options.network or list(NETWORKS)
    done = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    for name in names:
        for seed in options.seeds:
            net = None
            for sharpness in options.sharpness:
                key = {"network": name, "seed": seed, "sharpness": str(sharpness), **asked}
                if any(key.items() <= row.items() for row in done):
                    continue
                net = trained(name, seed, data["train"], options.epochs) if net is None else net
                done.append({**key, **searched(net, data, NETWORKS[name][1], sharpness, options)})
                with options.results.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    print(
        "network        sharpness  seeds  weights left (range)      test: change (range), points   search / validation"
    )
    for name in names:
        for sharpness in options.sharpness:
            key = {"network": name, "sharpness": str(sharpness), **asked}
            rows = [row for row in done if key.items() <= row.items()]
            left, change = [row["left"] for row in rows], [100 * (row["test"] - row["dense_test"]) for row in rows]
            times = mean(row["times_one_validation"] for row in rows)
            print(
                f"{name:14} {sharpness:9}  {len(rows):5}  {mean(left):7.2%} ({min(left):.2%} to {max(left):.2%})  "
                f"{mean(change):+.2f} ({min(change):+.2f} to {max(change):+.2f})  {times:22.0f}"
            )


if __name__ == "__main__":
    main()
