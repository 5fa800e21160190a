"""Draw the picture of the README from a search report that was saved as JSON (`SearchReport.to_dict`)."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from lightning_roulette import SearchReport


def draw(report: SearchReport, path: Path) -> None:
    """Draw score, floor and the spread of each branch against the share of weights left. Failed levels are crosses."""
    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    kept = report.accepted
    left = [1.0, *(1 - level.sparsity for level in kept)]
    spreads = [(report.dense_score,) * 3, *(level.spread for level in kept)]
    low, middle, high = zip(*spreads, strict=True)
    axes.fill_between(left, low, high, alpha=0.2, label="branch: worst to best")
    axes.plot(left, middle, lw=1, ls="--", label="branch: median")
    axes.plot(left, [report.dense_score, *(level.score for level in kept)], marker=".", label="accepted winner")
    failed = [level for level in report.levels if not level.accepted]
    axes.plot(
        [1 - one.sparsity for one in failed], [one.score for one in failed], "x", color="tab:red", label="failed level"
    )
    judged = [level for level in kept if level.held_out_score is not None]
    held_out = [report.held_out_dense, *(level.held_out_score for level in judged)]
    axes.plot(
        [1.0, *(1 - level.sparsity for level in judged)], held_out, marker="s", ms=3, label="on the held-out half"
    )
    axes.axhline(report.floor, color="gray", lw=1, label="floor")
    if report.held_out_floor is not None:
        axes.axhline(report.held_out_floor, color="gray", lw=1, ls=":", label="floor on the held-out half")
    axes.axvline(1 - report.sparsity, color="black", lw=0.5, label="winner")
    axes.set(xscale="log", xlabel="share of the weights left", ylabel=f"{report.monitor} (validation data)")
    axes.invert_xaxis()
    axes.legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    draw(SearchReport.from_dict(json.loads(source.read_text())), target)
