"""Measure the memory of a search, in units of the bytes of the parameters. Linux only.

The weights are random, on the CPU, in the shapes of transformer layers: five blocks of four square matrices, and two
that are four times as high or wide. A search tries one level of two candidates. Each candidate is put into the network
for a validation that reads only a few weights.

Each row is a new process. Its number is the peak of its resident memory (`VmHWM`) minus the memory after all imports.
1.00 is the network alone.

- `search`: the function.
- `callback`: a whole `Trainer.fit` with `RouletteWheelPruning(refit=None)` that writes no files. Lightning copies a
  checkpoint in memory while it writes it, with or without a search.
"""

import argparse
import json
import logging
import math
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_roulette import Mask, RouletteWheelPruning, Tree, prunable_parameters, search
from lightning_roulette.network.lending import applied

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")

BLOCKS, MATRICES, STEP = 5, 12, 64  # the matrices of a block have the size of twelve squares


def layers(size: float, dtype: torch.dtype) -> nn.ModuleList:
    """Return layers with about `size` weights."""
    width = max(1, round(math.sqrt(size / BLOCKS / MATRICES) / STEP)) * STEP
    shapes = [*[(width, width)] * 4, (width, 4 * width), (4 * width, width)] * BLOCKS
    return nn.ModuleList(nn.Linear(*shape, bias=False, dtype=dtype) for shape in shapes)


def glance(net: nn.ModuleList) -> Tensor:
    """Return a number that depends on a few weights of every layer."""
    return torch.stack([layer.weight.detach()[0].float().abs().sum() for layer in net]).sum()


class Stub(LightningModule):
    """A module that trains one extra number. Its validation reads a few weights of the network."""

    def __init__(self, net: nn.ModuleList) -> None:
        super().__init__()
        self.net, self.number = net, nn.Parameter(torch.zeros(()))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.number.square()

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("glance", glance(self.net), batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.number], lr=0.1)


def by_search(net: nn.ModuleList, rate: float) -> Mask:
    weights = prunable_parameters(net)

    def stub(mask: Mask) -> float:
        with applied(mask, weights):
            return float(glance(net))

    tree = Tree(pruning_rate=rate, max_levels=1)
    return search(weights, stub, branches=2, tolerance=math.inf, tree=tree).mask


def by_callback(net: nn.ModuleList, rate: float) -> Mask:
    data = DataLoader(TensorDataset(torch.zeros(64, 1)), batch_size=4)
    tree = Tree(pruning_rate=rate, max_levels=1)
    pruning = RouletteWheelPruning(branches=2, tolerance=math.inf, monitor="glance", mode="max", refit=None, tree=tree)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pruning],
    )
    trainer.fit(Stub(net), data, data)
    assert pruning.mask is not None
    return pruning.mask


WAYS = {"search": by_search, "callback": by_callback}


def memory(which: str) -> int:
    """Return bytes of this process: `VmRSS` is the current memory, `VmHWM` the peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[which].split()[0]) * 1024


def measure(way: str, size: float, dtype: str, rate: float) -> dict[str, float]:
    idle, began = memory("VmRSS"), time.perf_counter()
    net = layers(size, getattr(torch, dtype))
    made = memory("VmHWM") - idle
    mask = WAYS[way](net, rate)
    taken = {"made": made, "peak": memory("VmHWM") - idle, "idle": idle, "seconds": time.perf_counter() - began}
    weights = list(net.parameters())
    zeros = sum(int((weight == 0).sum()) for weight in weights) if way == "callback" else mask.size - mask.survivors
    count = sum(weight.numel() for weight in weights)
    assert math.isclose(zeros, rate * count, rel_tol=1e-3)
    return taken | {"weights": count, "bytes": sum(weight.nbytes for weight in weights)}


def row(way: str, size: float, options: argparse.Namespace) -> str:
    asked = ["--measure", way, "--sizes", str(size), "--dtype", options.dtype, "--rate", str(options.rate)]
    done = subprocess.run([sys.executable, __file__, *asked], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    cells = [
        way,
        f"{found['weights']:.3g}",
        options.dtype,
        *(f"{found[one] / 1e6:,.0f}" for one in ("bytes", "idle", "peak")),
        f"{found['peak'] / found['bytes']:.2f}",
        f"{found['seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e9], help="numbers of weights; 1e7 is quick")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the weights, a name in torch")
    parser.add_argument(
        "--rate", type=float, default=Tree().pruning_rate, help="share of the weights that the level removes"
    )
    parser.add_argument("--by", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--measure", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.sizes[0], options.dtype, options.rate)))
        return
    print(f"{platform.machine()}, torch {torch.__version__}, a level that removes {options.rate:.0%}\n")
    print("| by | weights | type | MB of weights | MB idle | MB added at the peak | peak / weights | seconds |")
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    for size in options.sizes:
        for way in options.by:
            print(row(way, size, options), flush=True)


if __name__ == "__main__":
    main()
