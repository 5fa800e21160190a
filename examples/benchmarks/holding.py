"""What does it cost to hold zeros? A training step with `ZeroHold` over one without, for both LeNets and a small ResNet.

Random data, 90 % of the weights pruned at random, Adam. The steps of three copies of a network take turns: held, free,
and free once more, which says how far the measurement itself is off. One line each: medians and their ratios.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from on_tensors import NETWORKS, small_resnet
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from lightning_roulette import Mask, apply_mask, prunable_parameters
from lightning_roulette.core.holding import ZeroHold

CASES = {  # network, shape of an image, images in a batch
    "LeNet-300-100": (NETWORKS["lenet-300-100"][0], (1, 28, 28), 100),
    "LeNet-5": (NETWORKS["lenet-5"][0], (1, 28, 28), 100),
    "small ResNet": (small_resnet, (3, 32, 32), 128),
}


def one_step(make: Callable[[], nn.Module], shape: tuple[int, ...], batch: int, held: bool) -> Callable[[], None]:
    """A function that takes one training step of a new network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, images, classes = make(), torch.randn(batch, *shape), torch.randint(10, (batch,))
    chance, weights = torch.Generator().manual_seed(0), prunable_parameters(net)
    mask = Mask({name: torch.rand(weight.shape, generator=chance) < 0.1 for name, weight in weights.items()})
    apply_mask(net, mask)
    # so slow that no loss comes near 0, where gradients that underflow would make arithmetic slow
    optimizer = Adam(net.parameters(), lr=1e-7)
    if held:
        ZeroHold(dict(net.named_parameters()), mask, [optimizer])

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(net(images), classes).backward()
        optimizer.step()

    return step


def seconds(steps: list[Callable[[], None]], seconds_each: float) -> list[float]:
    """Median seconds of each, taken in turns of some steps, of which the first two only fill the caches."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="measured for each copy of each network")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'network':15}{'free step':>12}{'held / free':>14}{'free / free':>14}")
    for name, (make, shape, batch) in CASES.items():
        held, free, again = seconds([one_step(make, shape, batch, i == 0) for i in range(3)], options.seconds)
        print(f"{name:15}{1e3 * free:>9.2f} ms{held / free:>14.4f}{again / free:>14.4f}", flush=True)


if __name__ == "__main__":
    main()
