"""Measure how the time and the memory of a refit and of a level grow with the size of a network.

- A refit: one `Calibration.refit` by least squares, after the first, which also tries how batches can run.
- A level: a whole search of two levels with four candidates, from the Trainer's start to its end, divided by two.
- A validation: the dense network on the same inputs, without a Trainer. All times are also given in validations.
- Seconds are those of the processor, on one thread.
- Memory: the peak of the process above what it had after all imports, network and inputs included. Linux only.

Networks have random weights and see random inputs, half of their weights are pruned by magnitude. The perceptrons
change in one size at a time: `inputs` of the first layer, `depth`, `outputs` of all layers but the last, `rows` of
calibration. The last column is the exponent: the slope of the logarithm of the refit's seconds over that of the size,
by least squares. It is 2 for `inputs` and 1 for the others where the refit is dominated by its sums.

Each run is a new process, stored as a line of JSON and not repeated.
"""

import argparse
import json
import logging
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from finished_runs import Row, Runs
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset

from lightning_roulette import Calibration, Mask, SearchReport, Tree, prunable_parameters, prune

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")

CLASSES, SPARSITY, BATCHES = 10, 0.5, 4
SWEEPS = {
    "inputs": (256, 512, 1024, 2048, 4096),
    "depth": (4, 8, 16, 32, 48),
    "outputs": (64, 256, 1024, 4096),
    "rows": (1024, 4096, 16384, 65536),
}
USUAL = {"inputs": 512, "depth": 4, "outputs": 256, "rows": 4096}


class Residual(nn.Module):
    """A module whose output is added to its input."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Block(nn.Module):
    """A block of ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.last = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        straight = (stride, inputs) == (1, outputs)
        self.side = nn.Identity() if straight else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.last(self.second(torch.relu(self.norm(self.first(x))))) + self.side(x))


class Attention(nn.Module):
    """Multi-head self-attention with one layer for queries, keys and values, as in GPT-2."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.joint, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.joint(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(queries, keys, values, is_causal=self.causal)
        return self.out(seen.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """A Vision Transformer on patches of 4 x 4 pixels, or a GPT-2 on tokens, which predicts the class at the end."""

    def __init__(self, width: int, depth: int, tokens: int) -> None:
        super().__init__()
        self.enter = nn.Embedding(tokens, width) if tokens else nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.Sequential(*[part for _ in range(depth) for part in self._block(width, tokens > 0)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    @staticmethod
    def _block(width: int, causal: bool) -> tuple[nn.Module, nn.Module]:
        attention = Residual(nn.LayerNorm(width), Attention(width, max(1, width // 64), causal))
        hidden = [nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
        return attention, Residual(*hidden)

    def forward(self, x: Tensor) -> Tensor:
        entered = self.enter(x) if x.dim() == 2 else self.enter(x).flatten(2).mT
        out = self.norm(self.blocks(entered + self.places))
        return self.head(out[:, -1])


class Recurrent(nn.Module):
    """A two-layer LSTM that reads 32 vectors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(width, width, 2, batch_first=True), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def perceptron(inputs: int, depth: int, outputs: int) -> nn.Module:
    """Return a perceptron with this number of layers."""
    widths = [inputs, *[outputs] * (depth - 1)]
    parts = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*parts, nn.Linear(widths[-1], CLASSES))


def resnet_18(width: int) -> nn.Module:
    """Return a network of ResNet-18's shape for 32 x 32 pixels; its own width is 64."""
    parts: list[nn.Module] = [nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    shapes = [(width * max(1, 2**n // 2), width * 2**n, 1 + (n > 0)) for n in range(4)]
    parts += [block for a, b, stride in shapes for block in (Block(a, b, stride), Block(b, b, 1))]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, CLASSES))


def case(size: Row) -> tuple[nn.Module, Tensor]:
    """Return a network and its inputs."""
    kind, width, samples = size["network"], size.get("width", 0), size["samples"]
    if kind == "perceptron":
        return perceptron(size["inputs"], size["depth"], size["outputs"]), torch.randn(samples, size["inputs"])
    if kind == "gpt2":
        return Transformer(width, size["depth"], 60), torch.randint(60, (samples, 64))
    if kind == "lstm":
        return Recurrent(width), torch.randn(samples, 32, width)
    network = resnet_18(width) if kind == "resnet18" else Transformer(width, size["depth"], 0)
    return network, torch.randn(samples, 3, 32, 32)


class Judged(LightningModule):
    """A network whose loss and accuracy a Trainer measures."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def validation_step(self, batch: list[Tensor]) -> None:
        out = self.net(batch[0])
        self.log("val_loss", cross_entropy(out, batch[1]))
        self.log("val_acc", (out.argmax(1) == batch[1]).float().mean())


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds of the processor that some work takes, which other processes hardly change."""
    began = time.process_time()
    work()
    return time.process_time() - began


def level(net: nn.Module, x: Tensor) -> float:
    """Return the seconds of a level. The targets are what the dense network predicts."""
    with torch.no_grad():
        data = TensorDataset(x, torch.cat([net(block).argmax(1) for block in x.chunk(BATCHES)]))
    loader = DataLoader(data, math.ceil(len(x) / BATCHES))
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(enable_model_summary=False, **silent)
    options = {"branches": 4, "tolerance": math.inf, "tree": Tree(max_levels=2)}
    reports: list[SearchReport | None] = []
    taken = seconds(lambda: reports.append(prune(trainer, Judged(net), loader, loader, **options).report))
    assert reports[0] is not None
    return taken / len(reports[0].levels)


def peak() -> int:
    """Return the bytes of the largest resident memory of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def measured(size: Row) -> Row:
    """Return what is measured for a size."""
    idle = peak()
    torch.manual_seed(0)
    net, x = case(size)
    net.eval()
    weights = prunable_parameters(net)
    batches = list(x.chunk(BATCHES))
    mask = Mask({name: one.detach().abs() > one.detach().abs().median() for name, one in weights.items()})
    with torch.no_grad():
        validation = min(seconds(lambda: [net(batch) for batch in batches]) for _ in range(3))
    calibration = Calibration(net, batches, rows=size.get("rows"))
    calibration.refit(mask)
    refit = seconds(lambda: calibration.refit(mask))
    found = {"weights": mask.size, "validation": validation, "refit": refit, "refit_bytes": peak() - idle}
    if size["searched"]:
        found["level"] = level(net, x)
    return found | {"bytes": peak() - idle}


def sizes(options: argparse.Namespace) -> list[Row]:
    """Return the sizes that are measured."""
    found: list[Row] = []
    one: Row
    for sweep, values in SWEEPS.items():
        for value in values if sweep in options.sweeps else ():
            if value <= options.most.get(sweep, value):
                size = USUAL | {sweep: value}
                found.append(
                    {"sweep": sweep, "network": "perceptron", **size, "samples": size["rows"], "searched": False}
                )
    for network in options.networks:
        one = {"sweep": "", "network": network, "width": options.width, "samples": options.samples, "searched": True}
        found.append(one | ({} if network in ("resnet18", "lstm") else {"depth": options.depth}))
    return found


def slope(points: list[tuple[float, float]]) -> float:
    """Return the slope of a line through the logarithms of some points."""
    logs = torch.tensor(points, dtype=torch.float64).log()
    x, y = (logs - logs.mean(0)).unbind(1)
    return float((x @ y) / (x @ x))


def table(runs: Runs) -> None:
    """Print all runs, and the exponents."""
    print("| network | size | weights | validation, s | refit, s | in validations | level, in validations | peak, MB |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for row in runs.rows:
        shown = [row["sweep"]] if row["sweep"] else [key for key in ("width", "depth", "samples") if key in row]
        size = ", ".join(f"{row[key]:,} {key}" for key in shown)
        times = f"{row['validation']:.3f} | {row['refit']:.2f} | {row['refit'] / row['validation']:.1f}"
        whole = f"{row['level'] / row['validation']:.1f}" if "level" in row else ""
        cells = f"{row['network']} | {size} | {row['weights']:,} | {times} | {whole} | {row['bytes'] / 1e6:,.0f}"
        print(f"| {cells} |")
    print("\n| size | exponent of a refit's seconds | of its validations | of its peak memory |\n|---|---:|---:|---:|")
    for sweep in dict.fromkeys(row["sweep"] for row in runs.rows if row["sweep"]):
        rows = runs.of(sweep=sweep)
        if len(rows) > 1:
            ratios = [(row[sweep], row["refit"] / row["validation"]) for row in rows]
            parts = [[(row[sweep], row["refit"]) for row in rows], ratios, [(row[sweep], row["bytes"]) for row in rows]]
            print(f"| {sweep} | {' | '.join(f'{slope(part):.2f}' for part in parts)} |")


def main(options: argparse.Namespace) -> None:
    runs = Runs(options.results)
    for size in sizes(options):
        if not runs.has(**size):
            asked = [sys.executable, __file__, "--measure", json.dumps(size)]
            done = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True)
            runs.add(**size, **json.loads(done.stdout.splitlines()[-1]))
            print(runs.rows[-1], flush=True)
    table(runs)


def bound(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    return name, int(value)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks = ["resnet18", "vit", "gpt2", "lstm"]
    parser.add_argument("--sweeps", nargs="*", default=list(SWEEPS), choices=list(SWEEPS), help="sizes of perceptrons")
    parser.add_argument(
        "--most", nargs="*", type=bound, default=[], help="largest sizes: inputs=1024 depth=16 is quick"
    )
    parser.add_argument("--networks", nargs="*", default=networks, choices=networks)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4, help="blocks of the transformers")
    parser.add_argument("--samples", type=int, default=512, help="inputs of these networks")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("scale.jsonl"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.most = dict(chosen.most)
    if chosen.measure:
        print(json.dumps(measured(json.loads(chosen.measure))))
    else:
        main(chosen)
