"""Measure the cost of holding zeros: a training step with `ZeroHold` relative to a step without.

The networks are both LeNets and a small ResNet, on random data, with 90 % of the weights pruned at random. The steps of
three copies of a network take turns: one held, one free, and another free one that shows the error of the measurement.
Times are medians.

A part of the cost with Adam does not come from `ZeroHold`. Adam's state of pruned weights is zero, and on some
processors the library that takes its square root (MKL) is several times slower on zeros. Fused Adam is faster in any
case and does not use this library.

Then the smallest network is measured in a Trainer, whose step is longer, in the same way with `HoldZeros`.
"""

import argparse
import logging
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median

import torch
from lightning.pytorch import Callback, Trainer
from on_tensors import NETWORKS, Classifier, batches, small_resnet
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from lightning_roulette import HoldZeros, Mask, apply_mask, prunable_parameters
from lightning_roulette.network.zeros import ZeroHold

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*val_dataloader.*|.*LeafSpec.*")

CASES = {  # network, shape of an image, images in a batch
    "LeNet-300-100": (NETWORKS["lenet-300-100"][0], (1, 28, 28), 100),
    "LeNet-5": (NETWORKS["lenet-5"][0], (1, 28, 28), 100),
    "small ResNet": (small_resnet, (3, 32, 32), 128),
}
# a small rate keeps the loss away from 0, where gradients underflow and arithmetic becomes slow
OPTIMIZERS = {"Adam": partial(Adam, lr=1e-7), "fused Adam": partial(Adam, lr=1e-7, fused=True)}

Step = Callable[[], None]


def pruned(net: nn.Module) -> Mask:
    """Prune 90 % of a network at random, in place. Return the mask."""
    chance, weights = torch.Generator().manual_seed(0), prunable_parameters(net)
    mask = Mask({name: torch.rand(weight.shape, generator=chance) < 0.1 for name, weight in weights.items()})
    apply_mask(net, mask)
    return mask


def one_step(name: str, optimized_by: str, held: bool) -> Step:
    """Return a function that takes one training step of a new network."""
    make, shape, batch = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, images, classes = make(), torch.randn(batch, *shape), torch.randint(10, (batch,))
    mask = pruned(net)
    optimizer = OPTIMIZERS[optimized_by](net.parameters())
    if held:
        ZeroHold(dict(net.named_parameters()), mask, [optimizer])

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(net(images), classes).backward()
        optimizer.step()

    return step


def seconds(steps: list[Step], seconds_each: float) -> list[float]:
    """Return the median seconds of each step. Steps take turns; the first two of a turn only fill the caches."""
    taken: list[list[float]] = [[] for _ in steps]
    while any(sum(one) < seconds_each for one in taken):
        for step, times in zip(steps, taken, strict=True):
            turn = []
            for _ in range(10):
                began = time.perf_counter()
                step()
                turn.append(time.perf_counter() - began)
            times += turn[2:]
    return [median(one) for one in taken]


class Timed(Callback):
    """A callback that records when each step begins."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        """Record the time."""
        self.began.append(time.perf_counter())


def in_trainer(optimized_by: str, held: bool, epochs: int) -> list[float]:
    """Return the seconds of each step of a Trainer that trains LeNet-300-100."""
    make, shape, batch = CASES["LeNet-300-100"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, images, classes = Classifier(make()), torch.randn(10_000, *shape), torch.randint(10, (10_000,))
    module.configure_optimizers = lambda: OPTIMIZERS[optimized_by](module.parameters())
    mask = pruned(module)
    timed, quiet = Timed(), dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    callbacks = [timed, HoldZeros(mask)] if held else [timed]
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, callbacks=callbacks, enable_model_summary=False, **quiet)
    trainer.fit(module, batches((images, classes), batch, shuffle=True))
    return [after - before for before, after in pairwise(timed.began)]


def show(name: str, optimized_by: str, held: float, free: float, again: float) -> None:
    """Print one line of the table."""
    print(f"{name:15}{optimized_by:12}{1e3 * free:>9.2f} ms{held / free:>14.4f}{again / free:>14.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="time of measurement for each copy of each network")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'network':15}{'optimizer':12}{'free step':>12}{'held / free':>14}{'free / free':>14}")
    for name in CASES:
        for optimized_by in OPTIMIZERS:
            steps = [one_step(name, optimized_by, held) for held in (True, False, False)]
            show(name, optimized_by, *seconds(steps, options.seconds))
    for optimized_by in OPTIMIZERS:
        taken: list[list[float]] = [[], [], []]
        for _ in range(4):
            for times, held in zip(taken, (True, False, False), strict=True):
                times += in_trainer(optimized_by, held, epochs=math.ceil(options.seconds / 2))
        show("in a Trainer", optimized_by, *map(median, taken))


if __name__ == "__main__":
    main()
