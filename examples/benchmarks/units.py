"""Networks without some of their units: what is lost, what is saved, and how much faster they are.

- Networks and data: `units_cases.py`. Test data judges only. Choices are made on a part of the training data.
- Peers: `units_peers.py`. All ways see the same calibration inputs, and the peers with `Taylor` also their targets.
- Our way `multiples of 8` leaves so many channels in each layer. The kernels of the processor compute 8 at once.
- Our way `distilled` also takes gradient steps towards the outputs of the network, on the calibration inputs. They need
  no labels, but they are a kind of training.
- Goals: a share of the multiply-adds saved, without training or before one epoch of training with one recipe for all,
  each at the learning rate of three that is best for it; as few weights as half a point allows; or two of each four
  neighbouring weights (`units_ours.py`).
- `faster` is the ratio of the medians of the processor's seconds for a batch of 64, by turns, on one thread.

Finished runs are lines of JSON in the file of results and are not repeated. The table is written next to it. Where a
peer fails, its line says why. Pruned networks are stored beside the trained ones. `--time-again` only times these
again, when the machine does nothing else, and adds the times to the file of results.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from finished_runs import Row, Runs
from torch import nn
from units_cases import CASES, Case, Options, learn, recalibrate
from units_ours import largest_of_four, with_pattern, without_units
from units_peers import PEERS, CannotError, Peer, adds_of, to_adds, to_floor

RUNS = 15  # of each network, to time it
MULTIPLE = 8  # of which as many channels stay, for kernels that compute so many at once
STEPS = 300  # gradient steps of each refit of the way that takes some
RECIPE = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
RATES = (0.005, 0.01, 0.02)  # at which the cosine of the learning rate begins


@dataclass(frozen=True)
class Goal:
    """What a network is pruned for.

    Attributes:
        reduction: Share of the multiply-adds to be saved. None: as much as the tolerance allows.
        tolerance: What may be lost on the part that chooses, in points.
        epochs: Epochs of training afterwards.
    """

    reduction: float | None
    tolerance: float = math.inf
    epochs: int = 0


GOALS = {
    "20 %": Goal(0.2),
    "40 %": Goal(0.4),
    "50 %": Goal(0.5),
    "50 %, then an epoch": Goal(0.5, epochs=1),
    "half a point": Goal(None, 0.5),
    "2 of 4": Goal(None),
}
PLAN = {
    "ResNet-20": ("20 %", "50 %", "50 %, then an epoch"),
    "LeNet-5": ("half a point",),
    "LeNet-300-100": ("half a point",),
    "ViT": ("40 %", "2 of 4"),
    "GPT-2": ("40 %",),
    "ResNet-8": ("2 of 4",),
}
Way = Callable[[Case, Goal, int], nn.Module]


@dataclass(frozen=True)
class Run:
    """What is done: a way to a goal.

    Attributes:
        network: One of `PLAN`.
        goal: One of `GOALS`.
        way: One of `ways_of(goal)`.
        seed: Draws the calibration inputs.
    """

    network: str
    goal: str
    way: str
    seed: int

    def path(self, folder: Path) -> Path:
        """Return the file of the network that comes of it."""
        return folder / f"units-{self.network}-{self.way}-{self.goal}-{self.seed}.pt"


def of_peer(peer: Peer) -> Way:
    """Return what prunes as a peer does."""

    def way(case: Case, goal: Goal, seed: int) -> nn.Module:
        if goal.reduction is None:
            return to_floor(case, peer, goal.tolerance, seed)
        return to_adds(case, peer, goal.reduction, seed)

    return way


def recalibrated(way: Way) -> Way:
    """Return a way that computes running statistics again."""

    def then(case: Case, goal: Goal, seed: int) -> nn.Module:
        network = way(case, goal, seed)
        recalibrate(network, case.calibration(seed)[0])
        return network

    return then


OURS = "lightning_roulette"
UNIT_WAYS: dict[str, Way] = {name: of_peer(peer) for name, peer in PEERS.items()}
UNIT_WAYS |= {f"{name}, recalibrated": recalibrated(of_peer(peer)) for name, peer in PEERS.items()}
UNIT_WAYS[OURS] = lambda case, goal, seed: without_units(case, goal.reduction, goal.tolerance, seed)
UNIT_WAYS[f"{OURS}, chosen"] = lambda case, goal, seed: without_units(
    case, goal.reduction, goal.tolerance, seed, choose=True
)
UNIT_WAYS[f"{OURS}, multiples of {MULTIPLE}"] = lambda case, goal, seed: without_units(
    case, goal.reduction, goal.tolerance, seed, multiple_of=MULTIPLE
)
UNIT_WAYS[f"{OURS}, distilled"] = lambda case, goal, seed: without_units(
    case, goal.reduction, goal.tolerance, seed, distill=STEPS
)
PATTERN_WAYS: dict[str, Way] = {
    "the two largest, recalibrated": lambda case, _, seed: largest_of_four(case, seed, refitted=False),
    "the two largest, refitted": lambda case, _, seed: largest_of_four(case, seed, refitted=True),
    OURS: lambda case, _, seed: with_pattern(case, seed),
}
WAYS = UNIT_WAYS | PATTERN_WAYS


def ways_of(goal: str) -> dict[str, Way]:
    """Return the ways to a goal."""
    return PATTERN_WAYS if goal == "2 of 4" else UNIT_WAYS


def measured(case: Case, run: Run, stored: Path) -> Row:
    """Prune in one way. Return the score on test data, what is left, and how much faster the network is.

    Args:
        case: The network and its data.
        run: What is done.
        stored: Folder where the pruned network is stored.
    """
    network, seconds = pruned(case, run, stored)
    further: Row = {}
    if epochs := GOALS[run.goal].epochs:
        network, further = taught(case, network, epochs, run.path(stored))
        torch.save((network, seconds), run.path(stored))
    return {
        "test": case.score(network, case.judging),
        "adds": adds_of(network, case.example) / adds_of(case.network, case.example),
        "parameters": size(network) / size(case.network),
        "faster": faster(case, network),
        "seconds": seconds,
        **further,
    }


def taught(case: Case, network: nn.Module, epochs: int, path: Path) -> tuple[nn.Module, Row]:
    """Return a network after training at the best learning rate, and the scores of all rates on the part that chooses.

    Args:
        case: The network and its data.
        network: What is trained. It is not changed.
        epochs: Number of epochs.
        path: File of the result. What each rate gives is stored beside it.
    """
    found, scores = {}, {}
    for rate in RATES:
        stored = path.with_name(f"{path.stem}-rate-{rate}.pt")
        if not stored.exists():
            one = deepcopy(network)
            optimizer = torch.optim.SGD(one.parameters(), lr=rate, **RECIPE)
            learn(one, case, optimizer, epochs, stored.with_suffix(".state"))
            torch.save(one, stored)
        found[rate] = torch.load(stored, weights_only=False)
        scores[rate] = case.score(found[rate], case.choosing)
    best = max(RATES, key=lambda rate: scores[rate])
    return found[best], {"rate": best, "choosing_by_rate": {str(rate): one for rate, one in scores.items()}}


def pruned(case: Case, run: Run, stored: Path) -> tuple[nn.Module, float]:
    """Return the network before further training, and the seconds that pruning took. What is stored is read."""
    untrained = replace(GOALS[run.goal], epochs=0)
    run = replace(run, goal=next(name for name, goal in GOALS.items() if goal == untrained))
    if not run.path(stored).exists():
        began = time.process_time()
        network = ways_of(run.goal)[run.way](case, untrained, run.seed)
        torch.save((network, time.process_time() - began), run.path(stored))
    return torch.load(run.path(stored), weights_only=False)


def size(network: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(one.numel() for one in network.parameters())


@torch.no_grad()
def faster(case: Case, network: nn.Module) -> float:
    """Return how many times faster a network is than that of the case."""
    networks, times = (deepcopy(case.network).eval(), network.eval()), ([], [])
    for _ in range(RUNS):
        for one, found in zip(networks, times, strict=True):
            began = time.process_time()
            one(case.example)
            found.append(time.process_time() - began)
    before, after = (statistics.median(found) for found in times)
    return before / after


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the tables: the change on test data in points, and what is left."""
    rows = with_times(rows)
    for name, goals in PLAN.items():
        for goal in goals:
            if some := [row for row in rows if (row["network"], row["goal"]) == (name, goal)]:
                yield f"### {name}, {goal}: {some[0]['dense']:.2f} on test data without pruning"
                yield ""
                yield "| | change, points | multiply-adds left | parameters left | faster | seeds |"
                yield "|---|---:|---:|---:|---:|---:|"
                yield from (line(way, some) for way in WAYS if any(row["way"] == way for row in some))
                yield ""


def with_times(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of finished runs, each with the time that was taken last."""
    times = {run_of(row): row["timed_again"] for row in rows if "timed_again" in row}
    runs = [row for row in rows if "timed_again" not in row]
    return [row | {"faster": times[run_of(row)]} if run_of(row) in times else row for row in runs]


def run_of(row: Row) -> Run:
    """Return what a row is about."""
    return Run(row["network"], row["goal"], row["way"], row["seed"])


def line(way: str, rows: Sequence[Row]) -> str:
    """Return the line of a way: means over the seeds."""
    ours = [row for row in rows if row["way"] == way]
    if reason := next((row["cannot"] for row in ours if "cannot" in row), None):
        return f"| {way} | cannot: {reason} | | | | {len(ours)} |"
    change = statistics.mean(row["test"] - row["dense"] for row in ours)
    adds, parameters, ratio = (statistics.mean(row[one] for row in ours) for one in ("adds", "parameters", "faster"))
    return f"| {way} | {change:+.2f} | {adds:.1%} | {parameters:.1%} | {ratio:.2f}x | {len(ours)} |"


def has_statistics(case: Case) -> bool:
    """Return whether the network has running statistics."""
    return any(isinstance(one, nn.BatchNorm2d) for one in case.network.modules())


def runs_of(name: str, options: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs of a network that are asked for."""
    for seed in range(options.seeds):
        for goal in (one for one in PLAN[name] if options.goals is None or one in options.goals):
            for way in (one for one in ways_of(goal) if options.ways is None or one in options.ways):
                yield Run(name, goal, way, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets of examples/paper")
    parser.add_argument("--stored", type=Path, required=True, help="folder of trained and of pruned networks")
    parser.add_argument("--checkpoint", type=Path, help="state dict of ResNet-20")
    parser.add_argument("--text", type=Path, help="what GPT-2 learns; default: sources of Python's standard library")
    parser.add_argument("--networks", nargs="+", choices=PLAN, default=list(PLAN))
    parser.add_argument("--goals", nargs="+", choices=GOALS)
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--time-again", action="store_true", help="prune nothing, time the stored networks again")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("units.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Runs(options.results)
    work = time_again if options.time_again else add_all
    for name in options.networks:
        runs = [run for run in runs_of(name, options) if results.has(**vars(run)) == options.time_again]
        if options.time_again:
            runs = [run for run in runs if run.path(options.stored).exists()]
        if runs:
            case = CASES[name](Options(options.data, options.stored, options.checkpoint, options.text))
            work(results, case, runs, options.stored)
    table = "\n".join(lines(results.rows))
    options.results.with_suffix(".md").write_text(table)
    print(table)


def add_all(results: Runs, case: Case, pending: Sequence[Run], stored: Path) -> None:
    """Make the runs that are not finished.

    Raises:
        SystemExit: If the trained network is not that of the finished runs.
    """
    dense = case.score(case.network, case.judging)
    for row in results.of(network=pending[0].network):
        if abs(row.get("dense", dense) - dense) > 5e-3:
            raise SystemExit(
                f"{row['network']} scores {dense:.2f} on test data, but the finished runs in {results.path} pruned one "
                f"that scores {row['dense']:.2f}. Give --stored the folder of that network, or --results a new file."
            )
    for run in pending:
        of_training = GOALS[run.goal].epochs or not has_statistics(case)  # which estimates the statistics anew
        if of_training and run.way.startswith("Torch-Pruning") and "recal" in run.way:
            continue
        try:
            found = measured(case, run, stored)
        except CannotError as reason:
            found = {"cannot": str(reason)}
        results.add(**vars(run), dense=dense, **found)


def time_again(results: Runs, case: Case, finished: Sequence[Run], stored: Path) -> None:
    """Add new times of stored networks."""
    for run in finished:
        network, _ = torch.load(run.path(stored), weights_only=False)
        results.add(**vars(run), timed_again=faster(case, network))


if __name__ == "__main__":
    main()
