"""Draws the figures of the pages about how it works. Every number in them is computed here by the package.

`python docs/figures/draw.py FOLDER` writes the SVG files into a folder, by default into the one of this file. It needs
matplotlib. The network and the data are like those of examples/quickstart.py: a perceptron for scikit-learn's digits.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lightning_roulette import (
    Calibration,
    Evaluator,
    LeastSquares,
    Mask,
    PrunedWeights,
    Scores,
    Tree,
    Winner,
    prunable_parameters,
    search,
    spin,
)
from lightning_roulette.judge.betting import log_wealth

matplotlib.use("svg")
from matplotlib import pyplot

INK, BLUE, ORANGE, GREEN, GREY = "#123456", "#3f7fbf", "#dd7733", "#3f9f6f", "#8f8f8f"
SHADES = ("#8f8f8f", "#7fb3d5", "#5499c7", "#2e86c1", "#dd7733")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning_roulette",
    "font.family": "sans-serif",
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "savefig.transparent": True,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
DARK = "<style>svg{--ink:#333}@media(prefers-color-scheme:dark){svg{--ink:#ddd}}</style>"
FOLDS = 16
SEED = 0
DRAWS = 200  # of held-out samples, for the certificate


# ---- the network and its data


@cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return 1,000 images with their digits for training, and 400 for validation."""
    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(SEED))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(classes)[order]
    return (x[:1000], y[:1000]), (x[1000:1400], y[1000:1400])


@cache
def trained() -> nn.Sequential:
    """Return a network that was trained for 30 epochs."""
    (x, y), chance = digits()[0], torch.Generator().manual_seed(SEED)
    network = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    for layer in network[::2]:
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -(layer.in_features**-0.5), layer.in_features**-0.5, generator=chance)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(30):
        for rows in torch.randperm(1000, generator=chance).split(50):
            optimizer.zero_grad()
            cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    return network.eval()


class OnParts(Evaluator):
    """Ranks by the loss, and compares the accuracy with the floor. It notes every loss that it was asked for."""

    folds = FOLDS

    def __init__(self) -> None:
        self.parts = torch.randperm(400, generator=torch.Generator().manual_seed(SEED)).chunk(FOLDS)
        self.noted: list[tuple[bytes, tuple[int, ...], float]] = []

    @torch.no_grad()
    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        """See `Evaluator`."""
        rows, (x, y) = torch.cat([self.parts[fold] for fold in folds]), digits()[1]
        outputs = functional_call(trained(), dict(candidate.weights), (x[rows],))
        loss = float(cross_entropy(outputs, y[rows]))
        self.noted.append((candidate.mask.digest, tuple(folds), loss))
        return Scores(rank=-loss, score=float((outputs.argmax(1) == y[rows]).float().mean()))


@cache
def searched() -> Winner:
    """Return what a search with the default choices finds."""
    calibration = Calibration(trained(), [digits()[0][0]])
    weights = prunable_parameters(trained())
    return search(weights, OnParts(), tolerance=0.01, refit="least_squares", calibration=calibration, seed=SEED)


# ---- the figures


def wheel(axes: Any) -> None:
    """Draw the share of draws in which a weight leaves, over its importance."""
    weights, bins, repeats = 10_000, 50, 100
    importance = torch.linspace(1 / weights, 1, weights)
    places = importance.reshape(bins, -1).mean(1)
    for sharpness, color in zip((0, 1, 4, 16, float("inf")), SHADES, strict=True):
        everyone = torch.ones(weights, dtype=torch.bool)
        seeds = range(repeats if sharpness < 100 else 1)
        drawn = sum(
            spin(importance, everyone, weights // 10, sharpness=sharpness, seed=seed).double() for seed in seeds
        )
        shares = (drawn / len(seeds)).reshape(bins, -1).mean(1)
        axes.plot(
            places, 100 * shares, color=color, lw=1.8, label="sharpness " + f"{sharpness:g}".replace("inf", "infinity")
        )
    axes.set(xlabel="importance (largest = 1)", ylabel="weights that leave (%)", ylim=(-2, 104))
    axes.legend()


def tree(axes: Any) -> None:
    """Draw the loss of every candidate over sparsity."""
    levels = searched().report.levels
    for kind, marker, size, color in (("coarse", "s", 26, GREEN), ("branch", "o", 9, BLUE)):
        points = [
            (100 * (1 - one.sparsity), -one.rank)
            for level in levels
            for one in level.candidates
            if (len(level.candidates) == 1) == (kind == "coarse")
        ]
        name = {"coarse": "coarse level: one candidate", "branch": "branch: twenty candidates"}[kind]
        axes.scatter(*zip(*points, strict=True), s=size, marker=marker, color=color, alpha=0.7, lw=0, label=name)
    accepted = [one for one in levels if one.accepted]
    best = [(100 * (1 - one.sparsity), -best_rank(one)) for one in accepted]
    axes.plot(*zip(*best, strict=True), color=ORANGE, lw=1.4, label="best candidate, from which the next level starts")
    failed = [(100 * (1 - one.sparsity), -best_rank(one)) for one in levels if not one.accepted]
    axes.plot(*zip(*failed, strict=True), "x", color=INK, ms=7, label="level below the floor")
    as_sparsity(axes, min(x for x, _ in failed))
    axes.set_ylabel("loss on the search half")
    axes.legend(loc="upper left")


def best_rank(level: Any) -> float:
    """Return the rank of the best candidate of a level."""
    return next(one.rank for one in level.candidates if one.index == level.winner)


def as_sparsity(axes: Any, least: float) -> None:
    """Show the share of weights left, in percent, as sparsity on a logarithmic axis."""
    axes.set_xscale("log")
    axes.set_xlim(110, least / 1.2)
    shown = [one for one in (0, 50, 80, 90, 95, 97, 98, 99, 99.5) if 100 - one > least / 1.2]
    axes.set_xticks([100 - one for one in shown], [f"{one:g}" for one in shown])
    axes.minorticks_off()
    axes.set_xlabel("sparsity (%)")


def scores(axes: Any) -> None:
    """Draw the accuracy of the best candidates on both halves, with the floors."""
    report = searched().report
    accepted = [one for one in report.levels if one.accepted]
    x = [100.0, *(100 * (1 - one.sparsity) for one in accepted)]
    for name, dense, floor, field, color in (
        ("search half", report.dense_score, report.floor, "score", BLUE),
        ("held-out half", report.held_out_dense, report.held_out_floor, "held_out_score", ORANGE),
    ):
        values = [dense, *(getattr(one, field) for one in accepted)]
        judged = [(place, 100 * value) for place, value in zip(x, values, strict=True) if value is not None]
        axes.plot(*zip(*judged, strict=True), color=color, marker="o", ms=4, lw=1.4, label=f"accuracy, {name}")
        axes.axhline(100 * floor, color=color, lw=1, ls="--", label=f"floor, {name}")
    axes.axvline(100 * (1 - report.sparsity), color=INK, lw=1, ls=":", label=f"result: {report.sparsity:.1%} zeros")
    as_sparsity(axes, min(x))
    axes.set(ylabel="accuracy (%)", ylim=(100 * min(report.floor, report.held_out_floor) - 1.5, None))
    axes.legend(loc="lower left")


def race(axes: Any) -> None:
    """Draw the loss of the candidates of one level over the folds that they have seen."""
    judge, weights = OnParts(), prunable_parameters(trained())
    search(
        weights,
        judge,
        tolerance=1.0,
        tree=Tree(0.7, coarse_rate=None, max_levels=1),
        seed=SEED,
    )
    full, seen = Mask.full(weights), {}
    for digest, folds, loss in judge.noted:
        first = sum(len(part) for part, _ in seen.get(digest, []))
        if digest != full.digest and folds[0] == first < FOLDS // 2:
            seen.setdefault(digest, []).append((folds, loss))
    dense = PrunedWeights(full, weights)
    winner = max(seen.values(), key=lambda parts: (len(parts), -excess(judge, dense, parts)[-1][1]))
    for parts in seen.values():
        x, y = zip(*excess(judge, dense, parts), strict=True)
        color = ORANGE if parts is winner else BLUE
        axes.plot(x, y, color=color, lw=1.8 if parts is winner else 1, alpha=0.9, zorder=2 + (parts is winner))
        axes.plot(x[-1:], y[-1:], "o", color=color, ms=5)
    for color, name in ((BLUE, "candidate; a dot marks its last fold"), (ORANGE, "best candidate")):
        axes.plot([], [], color=color, marker="o", ms=5, label=name)
    axes.set(xlabel="folds that a candidate has seen", ylabel="loss, minus that of the dense network")
    axes.set_xticks(range(1, 9))
    axes.legend()


def excess(judge: OnParts, dense: PrunedWeights, parts: list[tuple[tuple[int, ...], float]]) -> list[tuple[int, float]]:
    """Return how much larger than the dense network's the mean loss is, after each part of the folds."""
    found, folds, total = [], 0, 0.0
    for part, loss in parts:
        folds += len(part)
        total += len(part) * (loss + judge(dense, part).rank)
        found.append((folds, total / folds))
    return found


def layer(axes: Any) -> None:
    """Draw the error of the outputs of a layer over the share of its weights that is left."""
    first, second = trained()[:2], nn.Sequential(trained()[2])
    with torch.no_grad():
        inputs, others = (first(x) for x, _ in digits())
        exact = second(others)
    calibration, weight = Calibration(second, [inputs]), second[0].weight.detach()
    ways = {
        "largest weights, as they are": (GREY, None),
        "largest weights, solved": (BLUE, LeastSquares()),
        "chosen and solved": (ORANGE, LeastSquares(choose=True)),
    }
    shares = (0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05)
    for name, (color, how) in ways.items():
        errors = []
        for share in shares:
            least = weight.abs().flatten().kthvalue(round((1 - share) * weight.numel())).values
            mask = Mask({"0.weight": weight.abs() > least})
            errors.append(relative_error(second, mask, calibration, how, others, exact))
        axes.plot([100 * one for one in shares], errors, color=color, marker="o", ms=4, lw=1.6, label=name)
    axes.set(xscale="log", yscale="log", xlabel="weights left (%)", ylabel="error of the layer's outputs (%)")
    axes.set_xticks([100 * one for one in shares], [f"{100 * one:g}" for one in shares])
    axes.set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.legend()


@torch.no_grad()
def relative_error(
    network: nn.Module, mask: Mask, calibration: Calibration, how: LeastSquares | None, inputs: Tensor, exact: Tensor
) -> float:
    """Return the squared error of the outputs, in percent of their variance, on inputs that nothing was solved on."""
    if how is None:
        weights = {name: one * mask[name] for name, one in network.named_parameters() if name in mask}
    else:
        weights = dict(calibration.refit(mask, how).values)
    outputs = functional_call(copy.deepcopy(network), weights, (inputs,))
    return float(100 * (outputs - exact).square().sum() / (exact - exact.mean(0)).square().sum())


def certificate(axes: Any) -> None:
    """Draw the smallest tolerance that held-out samples certify, over their number."""
    counts = (100, 200, 400, 598, 1000, 2000, 5000, 10_000)
    for share, color in ((0.0, GREEN), (0.01, BLUE), (0.04, ORANGE)):
        name = f"{share:.0%} of samples lost, {share:.0%} gained" if share else "no sample is judged differently"
        bounds = [100 * smallest_tolerance(count, share) for count in counts]
        axes.plot(counts, bounds, color=color, marker="o", ms=4, lw=1.6, label=name)
    axes.axhline(0.5, color=INK, lw=1, ls=":")
    axes.text(110, 0.53, "half a point", fontsize=10)
    axes.set(xscale="log", yscale="log", xlabel="held-out samples", ylabel="smallest certified tolerance (points)")
    axes.set_xticks([100, 598, 2000, 10_000], ["100", "598", "2,000", "10,000"])
    axes.set_yticks([0.05, 0.1, 0.5, 1, 5, 10], ["0.05", "0.1", "0.5", "1", "5", "10"])
    axes.minorticks_off()
    axes.legend()


def smallest_tolerance(count: int, share: float) -> float:
    """Return the smallest tolerance that is certified in half of the draws of so many samples.

    A sample is lost with a probability of `share`, and gained with the same probability.
    """
    uniform = torch.rand(DRAWS if share else 1, count, generator=torch.Generator().manual_seed(SEED)).double()
    declines = (uniform < share).double() - (uniform >= 1 - share).double()
    low, high = 1e-4, 0.5
    for _ in range(11):  # to half a percent of the tolerance
        middle = (low * high) ** 0.5
        certified = log_wealth(declines, middle) >= -math.log(0.05)
        low, high = (low, middle) if certified.double().mean() >= 0.5 else (middle, high)
    return high


FIGURES: dict[str, Callable[[Any], None]] = {
    one.__name__: one for one in (wheel, tree, race, layer, scores, certificate)
}


def draw(name: str, folder: Path) -> None:
    """Write one figure."""
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(5.8, 3.8), layout="constrained")
        FIGURES[name](axes)
        path = folder / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
    text = path.read_text().replace(INK, "var(--ink)")
    path.write_text(text.replace("<defs>", f"{DARK}\n <defs>", 1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent
    for name in FIGURES:
        draw(name, folder)
