"""The table, the CSV and the figure of the paper's evaluation, from the lines of JSON that `run.py` keeps.

Accuracies are in percent and their changes in points; correlations are as they are.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import numpy as np

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from finished_runs import Row, read

NUMBERS = ("left", "judge_change", "val_change", "judge", "dense_judge", "rmse", "dense_rmse", "within", "dense_within")
TICKS = (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
SHOWN = 0.1  # what a panel shows below the dense network's score
COSTS = ("validations", "seconds")


def chosen(rows: Iterable[Row], held_out: bool = False, quick: bool = False) -> list[Row]:
    """The runs that one table is about."""
    return [row for row in rows if row["held_out"] == held_out and row["quick"] == quick]


def summary(rows: Iterable[Row]) -> list[Row]:
    """For each task and method the mean, least and largest of each number over the seeds, the slimmest method first."""
    groups: dict[tuple[object, object], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"]), []).append(row)
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
    """The summary with all digits that matter."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        for one in found:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in one.items()}
            )


def markdown(found: Sequence[Row]) -> str:
    """One table for each task."""
    return "\n\n".join(
        _table([one for one in found if one["task"] == task]) for task in dict.fromkeys(one["task"] for one in found)
    )


def _table(found: Sequence[Row]) -> str:
    first = found[0]
    factor, digits, unit = (1, 4, "Spearman") if first["opinion"] else (100, 2, "accuracy, %")
    extra = [name for name in ("rmse", "within") if first[name] is not None]

    def number(one: Row, name: str, sign: str = "") -> str:
        return f"{factor * one[name]:{sign}.{digits}f}"

    heads = ["weights left, % (range)", "change (range)", "score", *extra, "validations", "seconds", "seeds"]
    lines = [[f"{first['task']}: {unit}", *heads], ["---", *["---:"] * len(heads)]]
    aside = {"rmse": "{:.4f}", "within": "{:.1%}"}
    dense = ["dense", "100", "", number(first, "dense_judge"), *(aside[n].format(first[f"dense_{n}"]) for n in extra)]
    lines.append([*dense, "", "", ""])
    for one in found:
        left = f"{100 * one['left']:.2f} ({100 * one['left_min']:.2f} to {100 * one['left_max']:.2f})"
        ends = f"{number(one, 'judge_change_min', '+')} to {number(one, 'judge_change_max', '+')}"
        line = [one["method"], left, f"{number(one, 'judge_change', '+')} ({ends})", number(one, "judge")]
        line += [aside[name].format(one[name]) for name in extra]
        lines.append([*line, f"{one['validations']:.0f}", f"{one['seconds']:.1f}", one["seeds"]])
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def curve(rows: Sequence[Row], points: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Judged scores over the share of weights left, a mean over seeds wherever all of them have been."""
    curves = [np.array(sorted(row["curve"])).T for row in rows]
    left = np.geomspace(max(one[0, 0] for one in curves), 1, points)
    return left, np.mean([np.interp(np.log(left), np.log(one[0]), one[1]) for one in curves], axis=0)


def draw(rows: Sequence[Row], path: Path) -> None:
    """One panel for each task: a curve and, where the search ended, a mark for each method."""
    tasks, methods = (list(dict.fromkeys(row[name] for row in rows)) for name in ("task", "method"))
    colours = dict(zip(methods, plt.get_cmap("tab20").colors * (1 + len(methods) // 20), strict=False))
    columns = min(len(tasks), 4)
    lines, words = -(-len(tasks) // columns), max(1, 7 * columns // 4)  # of panels, and of the legend in a line
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
        axes.set(xscale="log", title=task, ylim=(dense - SHOWN, max(best, dense) + SHOWN / 20))
        axes.set(xlabel="weights left, %", ylabel="Spearman" if of_task[0]["opinion"] else "accuracy")
        axes.set_xticks(TICKS, [f"{100 * one:g}" for one in TICKS])
        axes.minorticks_off()
        axes.set_xlim(1.1, min(left for row in of_task for left, _ in row["curve"]) / 1.1)
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


def show(rows: Iterable[Row], held_out: bool = False, quick: bool = False) -> None:
    """Print the table."""
    found = summary(chosen(rows, held_out, quick))
    print(markdown(found) if found else "no runs")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="files of JSON lines")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--figure", type=Path, help="a PNG")
    parser.add_argument("--held-out", action="store_true", help="the runs judged by held-out training data")
    parser.add_argument("--quick", action="store_true", help="the runs in miniature")
    options = parser.parse_args(arguments)
    rows = chosen((row for path in options.results for row in read(path)), options.held_out, options.quick)
    if not rows:
        parser.error("there are no such runs.")
    found = summary(rows)
    print(markdown(found))
    if options.csv:
        write_csv(found, options.csv)
    if options.markdown:
        options.markdown.write_text(markdown(found) + "\n")
    if options.figure:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
