"""What does one spin of the wheel cost? Times relative to `torch.kthvalue` on the same importances, and memory.

Every row is one number of weights, a fifth of which is drawn from one full float32 parameter. All but the last column
are medians of interleaved repeats, divided by that of `torch.kthvalue`. `torch.multinomial` and `numpy.random.choice`
draw as many weights without replacement, with probabilities in place of odds; the former refuses more than 2**24.
Memory, on Linux only, is by how much a spin raises that of a fresh process at its peak, its mask included.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from lightning_roulette import Mask
from lightning_roulette.wheel.wheel import Sectors

COLUMNS = (
    "spin",
    "spin, 50 parameters",
    "spin, half pruned",
    "building",
    "multinomial",
    "numpy choice",
    "bytes/weight",
)
LARGEST_MULTINOMIAL, LARGEST_CHOICE = 2**24, 10**7


def importance_of(size: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(0))


def sectors_of(weights: dict[str, Tensor], sharpness: float, alive: float = 1.0) -> Sectors:
    parent = Mask({name: importance_of(len(values)) <= alive for name, values in weights.items()})
    return Sectors(weights, parent, sharpness=sharpness)


def rivals(importance: Tensor, sharpness: float) -> dict[str, Callable[[], object]]:
    """The column of each measured action."""
    draws, one = len(importance) // 5, {"a": importance}
    many = {str(number): part for number, part in enumerate(importance.tensor_split(50))}
    wheels = {
        "spin": sectors_of(one, sharpness),
        "spin, 50 parameters": sectors_of(many, sharpness),
        "spin, half pruned": sectors_of(one, sharpness, alive=0.5),
    }
    actions: dict[str, Callable[[], object]] = {"kthvalue": lambda: importance.kthvalue(draws)}
    for name, wheel in wheels.items():
        share = draws * wheel.parent.survivors // len(importance)
        actions[name] = lambda wheel=wheel, share=share: wheel.spin(share, seed=0, level=1, candidate=0)
    full = wheels["spin"].parent
    actions["building"] = lambda: Sectors(one, full, sharpness=sharpness)
    odds = importance.double().clamp_(min=1e-6).pow_(-sharpness)
    odds /= odds.sum()
    if len(odds) <= LARGEST_MULTINOMIAL:
        actions["multinomial"] = lambda: torch.multinomial(odds, draws)
    if len(odds) <= LARGEST_CHOICE:
        chance = np.random.default_rng(0)
        actions["numpy choice"] = lambda: chance.choice(len(odds), draws, replace=False, p=odds.numpy())
    return actions


def seconds(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median time of each action; they take turns, so that a slow moment of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, act in actions.items():
            began = time.perf_counter()
            act()
            times[name].append(time.perf_counter() - began)
    return {name: median(taken) for name, taken in times.items()}


def memory(which: str) -> int:
    """Bytes of this process, on Linux: `VmRSS` it holds now, `VmHWM` is the most it held since that was reset."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[which].split()[0]) * 1024


def bytes_of_spin(size: int, sharpness: float) -> float:
    """By how much a spin raises the memory of this process at its peak, per weight."""
    sectors_of({"warm": importance_of(100_000)}, sharpness).spin(200, seed=0, level=1, candidate=0)
    wheel = sectors_of({"a": importance_of(size)}, sharpness)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    wheel.spin(size // 5, seed=0, level=1, candidate=0)
    return (memory("VmHWM") - before) / size


def row(size: int, options: argparse.Namespace) -> list[str]:
    importance = importance_of(size)
    times = seconds(rivals(importance, options.sharpness), options.repeats)
    cells = {name: f"{taken / times['kthvalue']:.2f}" for name, taken in times.items()}
    absent = {"multinomial": "refused", "numpy choice": "-", "bytes/weight": "-"}
    command = [sys.executable, __file__, "--memory-of", str(size), "--sharpness", str(options.sharpness)]
    if sys.platform == "linux":
        cells["bytes/weight"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    cells = absent | cells
    return [f"{size:.0e}", f"{times['kthvalue'] * 1e3:.0f} ms", *(cells[name] for name in COLUMNS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 1e7], help="numbers of weights")
    parser.add_argument("--sharpness", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(f"{bytes_of_spin(options.memory_of, options.sharpness):.1f}")
        return
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    print(f"{platform.machine()}, {threads}, torch {torch.__version__}, sharpness {options.sharpness:g}\n")
    print("| " + " | ".join(("weights", "kthvalue", *COLUMNS)) + " |")
    print("|" + " ---: |" * (len(COLUMNS) + 2))
    for size in options.sizes:
        print("| " + " | ".join(row(int(size), options)) + " |", flush=True)


if __name__ == "__main__":
    main()
