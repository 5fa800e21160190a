"""How sharp should the wheel be? Weights left and test accuracy of both LeNets on MNIST, for several sharpnesses.

Every network is trained once per seed and then searched with each sharpness by the plain `search` function, judged by
validation accuracy, ties by validation loss; the test images only judge. Finished runs are kept as lines of JSON and
not run again.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

sys.path.append(str(Path(__file__).parent.parent))
from mnist import NETWORKS, Split, accuracy, mnist

from lightning_roulette import PrunedWeights, Scores, Wheel, prunable_parameters, search


class OnTensors:
    """An evaluator of one fold: accuracy, and loss for ties, on images in memory."""

    folds = 1

    def __init__(self, net: nn.Module, split: Split, batch: int) -> None:
        self.net, self.batches = net, list(zip(split[0].split(batch), split[1].split(batch), strict=True))

    @torch.no_grad()
    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        """Scores of the network with the candidate's weights."""
        hits, loss, count = 0, 0.0, 0
        weights = candidate.weights
        for images, digits in self.batches:
            outputs = functional_call(self.net, weights, (images,))
            hits += int((outputs.argmax(1) == digits).sum())
            loss += float(cross_entropy(outputs, digits, reduction="sum"))
            count += len(digits)
        return Scores(rank=hits / count, floor=hits / count, tiebreak=-loss / count)


def train(net: nn.Module, split: Split, epochs: int, seed: int) -> None:
    """Adam with a learning rate of 0.001 on batches of 100."""
    chance, optimizer = torch.Generator().manual_seed(seed), torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(split[1]), generator=chance).split(100):
            optimizer.zero_grad()
            cross_entropy(net(split[0][chosen]), split[1][chosen]).backward()
            optimizer.step()


def trained(name: str, seed: int, data: dict[str, Split], epochs: int) -> nn.Module:
    """The network of one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = NETWORKS[name][0]()
    net.to(memory_format=torch.channels_last)
    train(net, data["train"], epochs, seed)
    return net.eval()


def pruned(net: nn.Module, data: dict[str, Split], batch: int, sharpness: float, options: argparse.Namespace) -> dict:
    """One search and what the test images say of its winner."""
    evaluate, dense = OnTensors(net, data["val"], batch), accuracy(net, data["test"])
    weights = {name: weight.detach() for name, weight in prunable_parameters(net).items()}
    began = time.monotonic()
    accuracy(net, data["val"])
    validation = time.monotonic() - began
    winner = search(
        weights, evaluate, branches=options.branches, tolerance=options.tolerance, wheel=Wheel(sharpness=sharpness)
    )
    state = {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict({**state, **winner.weights})
    test = accuracy(net, data["test"])
    net.load_state_dict(state)
    report = winner.report
    return {
        "left": 1 - report.sparsity,
        "val_decline": report.dense_score - report.chosen_by,
        "dense_test": dense,
        "test": test,
        "validations": report.validations,
        "seconds": report.seconds,
        "times_one_validation": report.seconds / validation,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="mnist.npz in the layout of Keras; fetched from OpenML if left out")
    parser.add_argument("--network", choices=list(NETWORKS), action="append", help="both if left out")
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
                net = trained(name, seed, data, options.epochs) if net is None else net
                done.append({**key, **pruned(net, data, NETWORKS[name][1], sharpness, options)})
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
