"""Pruning in turn with training: do many draws per cut help, or a refit, when an epoch of training follows?

LeNet-300-100 is trained on MNIST for 30 epochs under a cosine. Before each epoch from the seventh on, a quarter of the
survivors is cut if the network keeps the floor. The floor is half a point of validation accuracy below the network
after six epochs. All choices are made on validation images; test images are used for judging only. Finished runs are
stored as lines of JSON and are not repeated.
"""

import argparse
import math
import time
from pathlib import Path
from statistics import mean

import torch
from finished_runs import Row, Runs
from on_tensors import NETWORKS, OnTensors, Split, accuracy, dense_weights, mnist
from torch.nn.functional import cross_entropy

from lightning_roulette import Calibration, LeastSquares, Tree, Wheel
from lightning_roulette.network.lending import copy_into, named_tensors
from lightning_roulette.network.zeros import ZeroHold
from lightning_roulette.search.gradual import Cuts, Gradual

EPOCHS, FIRST, BATCH, RATE, INPUTS = 30, 6, 100, 2e-3, 10_000
WAYS: dict[str, dict] = {
    "magnitude, one draw": {"branches": 1, "wheel": Wheel(importance="magnitude")},
    "magnitude, 20 draws": {"branches": 20, "wheel": Wheel(importance="magnitude")},
    "sensitivity, one draw": {"branches": 1},
    "sensitivity, 20 draws": {"branches": 20},
    "sensitivity, one draw, refitted": {"branches": 1, "refit": LeastSquares()},
}


class Trained:
    """A network while it is trained and pruned.

    Args:
        way: One of `WAYS`.
        seed: Seed of training and pruning.
        data: Training, validation and test images.
    """

    def __init__(self, way: str, seed: int, data: dict[str, Split]) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = NETWORKS["lenet-300-100"][0]()
        self.data, self.seed, self.seconds = data, seed, 0.0
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=RATE)
        choices = {"tolerance": 0.005, "target_sparsity": None, "number": EPOCHS - FIRST, "tree": Tree(0.25)}
        self.gradual = Gradual(Cuts(**choices | WAYS[way], seed=seed))
        self.calibration = Calibration(self.net, [data["train"][0][:INPUTS]], seed=seed)
        self.held: Row = {}
        self._hold: ZeroHold | None = None

    def judged(self, place: int | None) -> None:
        """Judge the network and record it if it holds. Then make cut number `place`; None makes no further cut."""
        began = time.monotonic()
        self.net.eval()
        evaluate = OnTensors(self.net, self.data["val"], 1000, seed=self.seed)
        if self.gradual.judge(dense_weights(self.net), evaluate, self.calibration):
            left = self.gradual.mask.survivors / self.gradual.mask.size
            self.held = {"left": left, "test": accuracy(self.net, self.data["test"])}
            self.held["dense_test"] = self.__dict__.setdefault("dense_test", self.held["test"])
            if place is not None and (network := self.gradual.cut(place)) is not None:
                copy_into(named_tensors(self.net), network.weights)
                if self._hold is not None:
                    self._hold.release()
                self._hold = ZeroHold(dict(self.net.named_parameters()), network.mask, [self.optimizer])
        self.seconds += time.monotonic() - began
        self.net.train()


def run(way: str, seed: int, data: dict[str, Split]) -> Row:
    """Train one network with its cuts."""
    began, one, (images, classes) = time.monotonic(), Trained(way, seed, data), data["train"]
    chance, steps = torch.Generator().manual_seed(seed), EPOCHS * math.ceil(len(classes) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(one.optimizer, steps)
    for epoch in range(EPOCHS):
        if epoch >= FIRST:
            one.judged(epoch - FIRST + 1)
        for chosen in torch.randperm(len(classes), generator=chance).split(BATCH):
            one.optimizer.zero_grad()
            cross_entropy(one.net(images[chosen]), classes[chosen]).backward()
            one.optimizer.step()
            schedule.step()
    one.judged(None)
    return one.held | {"pruning_seconds": one.seconds, "seconds": time.monotonic() - began}


def show(runs: Runs, seeds: list[int]) -> None:
    """Print one line for each way."""
    print("way                              weights left, % (range)   compression   test, points   pruning / training")
    for way in WAYS:
        if rows := [row for row in runs.of(way=way) if row["seed"] in seeds]:
            left, change = ([row[key] for row in rows] for key in ("left", "test"))
            lost = [100 * (row["test"] - row["dense_test"]) for row in rows]
            share = mean(row["pruning_seconds"] / (row["seconds"] - row["pruning_seconds"]) for row in rows)
            print(
                f"{way:32} {100 * mean(left):5.2f} ({100 * min(left):.2f} to {100 * max(left):.2f})"
                f"  {1 / mean(left):8.0f}x  {mean(lost):+.2f} ({min(lost):+.2f} to {max(lost):+.2f})"
                f"  {share:7.0%}   test {mean(change):.2%}, {len(rows)} seeds"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="mnist.npz in the layout of Keras; default: fetched from OpenML")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("gradual.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, runs = mnist(options.data), Runs(options.results)
    for seed in options.seeds:
        for way in options.ways:
            if not runs.has(way=way, seed=seed):
                runs.add(way=way, seed=seed, **run(way, seed, data))
    show(runs, options.seeds)


if __name__ == "__main__":
    main()
