"""The tables, the CSV and the figure of the paper's evaluation, from the lines of JSON that `run.py` stores.

The first table compares ours with the best peer of each task. Then one table for each task shows all methods.
Accuracies are in percent, and their changes in points. Correlations are not scaled.
"""

import argparse
import csv
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import numpy as np
from data import SOURCES

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from finished_runs import Row, read

OURS = "ours"
REFIT_ALONE = {"one-shot l1, our refit": "l1, our refit", "LAMP, our refit": "LAMP, our refit"}  # heads of columns
NUMBERS = ("left", "judge_change", "val_change", "judge", "dense_judge", "rmse", "dense_rmse", "within", "dense_within")
TICKS = (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0001)
SHOWN = 0.1  # range of a panel below the dense network's score
COSTS = ("validations", "seconds")


def chosen(rows: Iterable[Row], held_out: bool = False, quick: bool = False) -> list[Row]:
    """Return the runs of one kind, ordered by task."""
    found = [row for row in rows if row["held_out"] == held_out and row["quick"] == quick]
    return sorted(found, key=lambda row: list(SOURCES).index(row["task"]))


def summary(rows: Iterable[Row]) -> list[Row]:
    """Return the mean, minimum and maximum of each number over the seeds, for each task and method.

    The slimmest method of a task is first.

    Raises:
        ValueError: If a run is there twice.
    """
    groups: dict[tuple[object, object], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"]), []).append(row)
    for (task, method), group in groups.items():
        for seed, times in Counter(row["seed"] for row in group).items():
            if times > 1:
                raise ValueError(f"{task}, {method}, seed {seed} is there {times} times, but each run counts once.")
    found = [_summed(group) for group in groups.values()]
    order = {task: place for place, task in enumerate(dict.fromkeys(one["task"] for one in found))}
    return sorted(found, key=lambda one: (order[one["task"]], one["left"]))


def _summed(group: Sequence[Row]) -> Row:
    first = group[0]
    one: Row = {name: first[name] for name in ("task", "method", "opinion")} | {"seeds": len(group)}
    for name in (*NUMBERS, *COSTS):
        values = [row[name] for row in group if row[name] is not None]
        measures: dict[str, Callable] = {"": mean}
        if name in NUMBERS[:2]:
            measures |= {"_min": min, "_max": max}
        one |= {f"{name}{end}": measure(values) if values else None for end, measure in measures.items()}
    return one


def write_csv(found: Sequence[Row], path: Path) -> None:
    """Write the summary with six significant digits."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        for one in found:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in one.items()}
            )


def markdown(rows: Sequence[Row]) -> str:
    """Return the comparison with the best peers, and a table of all methods for each task."""
    found = summary(rows)
    tasks = [[one for one in found if one["task"] == task] for task in dict.fromkeys(one["task"] for one in found)]
    return "\n\n".join([brief(rows), *(_table(of_task) for of_task in tasks)])


def front(rows: Sequence[Row]) -> str:
    """Return the four columns of `brief` that the front page of the project shows."""
    lines: list[list[object]] = [["task", "ours keeps", "best peer keeps", "change on test data: ours / best peer"]]
    lines.append(["---", *["---:"] * 3])
    for runs, _, found, peer in _compared(rows):
        our = found[OURS]
        change = f"{_number(our, 'judge_change', '+')} / {_number(peer, 'judge_change', '+')}"
        kept = (f"{100 * one['left']:.2f} %" for one in (our, peer))
        lines.append([SOURCES[runs[0]["task"]].title, *kept, change if our["opinion"] else f"{change} points"])
    return _lines(lines)


def brief(rows: Sequence[Row]) -> str:
    """Return the table that compares ours with the best peer of each task.

    "At equal loss" is the share of weights left by ours divided by that of the peer. Each share is read off its curve,
    where the test scores first fall by more than the peer's mean change. It is a bound if a search ended before that
    point.
    """
    heads = ["", "weights", "seeds", "dense", "ours keeps, % (range)", "change (range)", "best peer", "keeps, %"]
    heads += ["change", "ours / peer", "at equal loss", *(f"{head} keeps, %" for head in REFIT_ALONE.values())]
    lines = [heads, ["---", *["---:"] * 5, "---", *["---:"] * 6]]
    for runs, by_peer, found, peer in _compared(rows):
        our, peers = found[OURS], [one for one in found if not takes_ours(one)]
        line = [f"{SOURCES[runs[0]['task']].title}: {_unit(our)}", f"{runs[0]['weights']:,}", len(runs)]
        line += [_number(our, "dense_judge"), _left(our), _change(our), f"{peer['method']}, of {len(peers)}"]
        line += [f"{100 * peer['left']:.2f}", _number(peer, "judge_change", "+"), f"{our['left'] / peer['left']:.2f}"]
        line += [_at_equal_loss(runs, by_peer, peer["judge_change"])]
        alone = (found.get(method) for method in REFIT_ALONE)
        lines.append([*line, *(f"{100 * one['left']:.2f}" if one else "" for one in alone)])
    return _lines(lines)


def _compared(rows: Sequence[Row]) -> Iterator[tuple[list[Row], list[Row], dict[str, Row], Row]]:
    """Yield for each task the runs of ours and of the best peer, the summary of each method, and the best peer's.

    The best peer is the method that keeps the fewest weights, among the methods that use nothing of ours. Methods that
    were not run with all seeds of ours are ignored.
    """
    by_task: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], {}).setdefault(row["method"], []).append(row)
    for by_method in by_task.values():
        seeds = {row["seed"] for row in by_method.get(OURS, [])}
        whole = {method: runs for method, runs in by_method.items() if {row["seed"] for row in runs} == seeds}
        found = {one["method"]: one for one in summary(row for runs in whole.values() for row in runs)}
        peers = [method for method in found if not takes_ours(method)]
        if peers:
            yield whole[OURS], whole[peers[0]], found, found[peers[0]]


def _at_equal_loss(ours: Sequence[Row], peers: Sequence[Row], change: float) -> str:
    (our, fell), (peer, _) = (
        map(mean, zip(*(left_at(row, row["dense_judge"] + change) for row in runs), strict=True))
        for runs in (ours, peers)
    )
    return f"{'' if fell == 1 else '≤ '}{our / peer:.2f}"


def takes_ours(method: str) -> bool:
    """Return whether a method is ours or uses a part of ours."""
    return "our" in method


def left_at(row: Row, least: float) -> tuple[float, bool]:
    """Return the share of weights left before a curve first falls below a score, and whether it does."""
    points = sorted(row["curve"])[::-1]
    held = [left for left, score in itertools.takewhile(lambda point: point[1] >= least, points)]
    return (held[-1] if held else 1.0), len(held) < len(points)


def _number(one: Row, name: str, sign: str = "") -> str:
    factor, digits = (1, 4) if one["opinion"] else (100, 2)
    return f"{factor * one[name]:{sign}.{digits}f}"


def _unit(one: Row) -> str:
    return "Spearman" if one["opinion"] else "accuracy, %"


def _left(one: Row) -> str:
    return f"{100 * one['left']:.2f} ({100 * one['left_min']:.2f} to {100 * one['left_max']:.2f})"


def _change(one: Row) -> str:
    middle, low, high = (_number(one, f"judge_change{end}", "+") for end in ("", "_min", "_max"))
    return f"{middle} ({low} to {high})"


def _lines(lines: Iterable[Sequence[object]]) -> str:
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _table(found: Sequence[Row]) -> str:
    first = max(found, key=lambda one: one["seeds"])
    extra = [name for name in ("rmse", "within") if first[name] is not None]
    heads = ["weights left, % (range)", "change (range)", "score", *extra, "validations", "seconds", "seeds"]
    lines = [[f"{SOURCES[first['task']].title}: {_unit(first)}", *heads], ["---", *["---:"] * len(heads)]]
    aside = {"rmse": "{:.4f}", "within": "{:.1%}"}
    dense = ["dense", "100", "", _number(first, "dense_judge"), *(aside[n].format(first[f"dense_{n}"]) for n in extra)]
    lines.append([*dense, "", "", ""])
    for one in found:
        line = [one["method"], _left(one), _change(one), _number(one, "judge")]
        line += [aside[name].format(one[name]) for name in extra]
        lines.append([*line, f"{one['validations']:.0f}", f"{one['seconds']:.1f}", one["seeds"]])
    return _lines(lines)


def curve(rows: Sequence[Row], points: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Return judged scores by share of weights left: means over seeds, where the curves of all seeds are known."""
    curves = [np.array(sorted(row["curve"])).T for row in rows]
    left = np.geomspace(max(one[0, 0] for one in curves), 1, points)
    return left, np.mean([np.interp(np.log(left), np.log(one[0]), one[1]) for one in curves], axis=0)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw one panel for each task. Each method has a curve, and a mark where its search ended."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    methods = sorted({row["method"] for row in rows}, key=lambda one: (one != OURS, not takes_ours(one), one))
    colours = dict(zip(methods, plt.get_cmap("tab20").colors * (1 + len(methods) // 20), strict=False))
    columns = min(len(tasks), 4)
    lines, words = -(-len(tasks) // columns), max(1, 7 * columns // 4)  # rows of panels, and legend entries in a row
    size = (3.6 * columns, 2.8 * lines + 0.2 * -(-len(methods) // words) + 0.2)
    figure, panels = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in panels.flat[len(tasks) :]:
        axes.set_axis_off()
    for task, axes in zip(tasks, panels.flat, strict=False):
        of_task = [row for row in rows if row["task"] == task]
        dense = mean(row["dense_judge"] for row in of_task)
        for method in methods:
            if group := [row for row in of_task if row["method"] == method]:
                _line(axes, group, colours[method])
        axes.axhline(dense, color="gray", lw=0.7, ls=":")
        best = max(np.max(line.get_ydata()) for line in axes.get_lines())
        axes.set(xscale="log", title=SOURCES[task].title, ylim=(dense - SHOWN, max(best, dense) + SHOWN / 20))
        axes.set(xlabel="weights left, %", ylabel="Spearman" if of_task[0]["opinion"] else "accuracy")
        least = min(left for row in of_task for left, _ in row["curve"])
        ticks = TICKS if least > 1e-3 else TICKS[::3]
        axes.set_xticks(ticks, [f"{100 * one:g}" for one in ticks])
        axes.minorticks_off()
        axes.set_xlim(1.1, least / 1.1)
    handles = {
        line.get_label(): line for axes in panels.flat for line in axes.get_lines() if line.get_label() in methods
    }
    figure.legend([handles[one] for one in methods], methods, loc="outside lower center", ncols=words, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(axes: plt.Axes, rows: Sequence[Row], colour: object) -> None:
    method = str(rows[0]["method"])
    is_ours = method.startswith("ours")
    axes.plot(*curve(rows), color=colour, lw=2 if is_ours else 1, zorder=3 if is_ours else 2, label=method)
    marks = [mean(row["left"] for row in rows)], [mean(row["judge"] for row in rows)]
    axes.plot(*marks, marker="*" if is_ours else ".", color=colour, zorder=4)


def text(rows: Sequence[Row]) -> str:
    """Return all tables of runs of one kind, with notes."""
    judged = "held-out training data" if rows[0]["held_out"] else "test data"
    notes = [f"Judged on {judged}, which was not used for any choice. Means over seeds of training and search."]
    notes.append("Validations do not include gradients or refits. Seconds are for one thread of a shared machine.")
    if rows[0]["quick"]:
        notes = ["This is a run in miniature: the numbers mean nothing.", *notes]
    return "\n".join(notes) + "\n\n" + markdown(rows)


def publish(rows: Sequence[Row], to: Path) -> None:
    """Print the tables of runs of one kind. Write the tables to NAME.md, the summary to .csv and the figure to .png.

    The names of files that are no final results end in `-held-out` or `-quick`.
    """
    tables = text(rows)
    print(tables)
    path = to.with_name(to.stem + "-held-out" * rows[0]["held_out"] + "-quick" * rows[0]["quick"])
    path.with_suffix(".md").write_text(tables + "\n")
    write_csv(summary(rows), path.with_suffix(".csv"))
    draw(rows, path.with_suffix(".png"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="files of JSON lines")
    parser.add_argument("--to", type=Path, help="name of the files to write; default: the name of the first file")
    parser.add_argument("--held-out", action="store_true", help="use the runs judged on held-out training data")
    parser.add_argument("--quick", action="store_true", help="use the runs in miniature")
    options = parser.parse_args(arguments)
    if missing := [str(path) for path in options.results if not path.exists()]:
        parser.error(f"there is no {', '.join(missing)}.")
    rows = chosen((row for path in options.results for row in read(path)), options.held_out, options.quick)
    if not rows:
        parser.error("there are no such runs.")
    publish(rows, options.to or options.results[0])


if __name__ == "__main__":
    main()
