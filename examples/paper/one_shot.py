"""The published one-shot tables: published checkpoints, pruned to given sparsities without training.

- Networks: `checkpoints.py`. Pass the file of weights with `--checkpoint`. Batch normalisation is first estimated anew
  on training images, shifted and mirrored as in training; the file of ResNet-20 needs this.
- A seed chooses and shifts the training images for calibration. Other training images rank candidates. All test images
  judge.
- Ways to prune are listed in `WAYS`. One-shot ways remove all weights in one step. The trees are searches with default
  choices and without a floor, which stop at every sparsity. Without a floor no coarse level fails, so all levels are
  coarse. `tree, distilled` takes the tree's masks at the two highest sparsities, and adds gradient steps on the
  calibration images to their solutions: they need no labels, but they are a kind of training.
- Finished runs are lines of JSON in the file of results and are not repeated. At the end the table is written next to
  it.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import cast

import numpy as np
import torch
from checkpoints import NETWORKS, Published
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from finished_runs import Row, Runs

from lightning_roulette import (
    Calibration,
    Evaluator,
    LeastSquares,
    Mask,
    PrunedWeights,
    Scores,
    StopReason,
    Tree,
    Validation,
    Wheel,
    prunable_parameters,
    search,
)
from lightning_roulette.search.amounts import level_draws, missing
from lightning_roulette.search.policies import Policy, Step
from lightning_roulette.search.state import State

Values = dict[str, Tensor]
BATCH = 500
STEPS = 300  # of `tree, distilled`


@dataclass(frozen=True)
class Stops(Policy):
    """Levels that remove a share of the survivors, and end at each of some sparsities.

    Attributes:
        sparsities: The sparsities, in ascending order.
        rate: That share.
        branches: Candidates per level.
    """

    sparsities: Sequence[float]
    rate: float
    branches: int

    def next(self, state: State) -> Step | StopReason:
        """See `Policy`."""
        for sparsity in self.sparsities:
            if (most := missing(state.parent, sparsity)) > 0:
                return Step(self.rate, level_draws(state.parent.survivors, self.rate, most), self.branches)
        return StopReason.TARGET_REACHED


class Case(Evaluator):
    """A checkpoint with data: what is pruned, and what ranks and judges.

    Args:
        published: The network.
        checkpoint: File of a state dict.
        data: File of images in the layout of Keras' mnist.npz.
        seed: Seed of the calibration images.
        inputs: Number of calibration images, and of images that rank.
    """

    folds = 8

    def __init__(self, published: Published, checkpoint: Path, data: Path, seed: int, inputs: int) -> None:
        chance = torch.Generator().manual_seed(seed)
        with np.load(data) as arrays:
            parts = {key: torch.from_numpy(arrays[key]) for key in ("x_train", "y_train", "x_test", "y_test")}
        order = torch.randperm(len(parts["x_train"]), generator=chance)
        fitted, ranking = order[:inputs], order[inputs : 2 * inputs]
        self.ranking = published.images(parts["x_train"][ranking]), parts["y_train"].flatten().long()[ranking]
        self.judging = published.images(parts["x_test"]), parts["y_test"].flatten().long()
        self.net, self.seed, self.published = published.build().eval(), seed, published
        self.net.load_state_dict(torch.load(checkpoint, weights_only=True))
        weights = prunable_parameters(self.net, exclude=published.exclude)
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        inputs_of = published.images(parts["x_train"][fitted], chance).split(BATCH)
        full = Mask.full(self.weights)
        self.net.load_state_dict(Calibration(self.net, inputs_of).refit(full, "batch_norm").values, strict=False)
        self.calibration = Calibration(self.net, inputs_of, seed=seed)

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        """Return the accuracy of a candidate on some of the images that rank. It is ranked by the loss."""
        x, y = self.ranking
        some = slice(len(y) * min(folds) // self.folds, len(y) * (max(folds) + 1) // self.folds)
        outputs = self._outputs(candidate.weights, x[some])
        hits = float((outputs.argmax(1) == y[some]).double().mean())
        return Scores(rank=-float(cross_entropy(outputs, y[some])), score=hits)

    def accuracy(self, values: Values) -> float:
        """Return the accuracy on all images that judge, in percent."""
        x, y = self.judging
        return 100 * float((self._outputs(values, x).argmax(1) == y).double().mean())

    @torch.no_grad()
    def _outputs(self, values: Values, x: Tensor) -> Tensor:
        return torch.cat([functional_call(self.net, values, (block,)) for block in x.split(BATCH)])


def magnitude(case: Case, sparsity: float) -> Mask:
    """Return the mask that keeps the largest weights of the network."""
    sizes = torch.cat([weight.abs().flatten() for weight in case.weights.values()])
    kept = torch.zeros(len(sizes), dtype=torch.bool)
    kept[sizes.topk(len(sizes) - math.floor(sparsity * len(sizes) + 0.5)).indices] = True
    parts = kept.split([weight.numel() for weight in case.weights.values()])
    return Mask({name: one.view(case.weights[name].shape) for name, one in zip(case.weights, parts, strict=True)})


def as_it_is(case: Case) -> Iterator[tuple[float, Values]]:
    """Prune the smallest weights."""
    for sparsity in case.published.sparsities:
        yield sparsity, PrunedWeights(magnitude(case, sparsity), case.weights).weights


def recalibrated(case: Case) -> Iterator[tuple[float, Values]]:
    """Prune the smallest weights, and compute running statistics again."""
    for sparsity in case.published.sparsities:
        yield sparsity, dict(case.calibration.refit(magnitude(case, sparsity), "batch_norm").values)


def one_shot(case: Case, choose: bool) -> Iterator[tuple[float, Values]]:
    """Remove all weights in one step: the least important by sensitivity. Solve for the survivors."""
    for sparsity in case.published.sparsities:
        yield from descended(case, choose, [sparsity], rate=sparsity, branches=1, wheel=Wheel(math.inf))


def tree(case: Case, choose: bool) -> Iterator[tuple[float, Values]]:
    """Search with default choices."""
    return descended(case, choose, case.published.sparsities, cast(float, Tree().coarse_rate), 1, Wheel())


def distilled(case: Case) -> Iterator[tuple[float, Values]]:
    """Search with default choices, and solve for the masks at the two highest sparsities with gradient steps."""
    for sparsity, values in tree(case, choose=False):
        if sparsity in sorted(case.published.sparsities)[-2:]:
            mask = Mask({name: values[name] != 0 for name in case.weights})
            yield sparsity, dict(case.calibration.refit(mask, LeastSquares(distill=STEPS)).values)


def descended(
    case: Case, choose: bool, sparsities: Sequence[float], rate: float, branches: int, wheel: Wheel
) -> Iterator[tuple[float, Values]]:
    """Yield the networks of a search at some sparsities."""
    winner = search(
        case.weights,
        case,
        branches=branches,
        tolerance=math.inf,
        refit=LeastSquares(choose=choose),
        calibration=case.calibration,
        wheel=wheel,
        validation=Validation(confirm=0),
        policy=Stops(sparsities, rate, branches),
        seed=case.seed,
    )
    for level in winner.report.accepted:
        for sparsity in sparsities:
            if level.survivors == winner.report.size - math.floor(sparsity * winner.report.size + 0.5):
                yield sparsity, winner.weights_at(level.level)


WAYS: dict[str, Callable[[Case], Iterator[tuple[float, Values]]]] = {
    "magnitude": as_it_is,
    "magnitude, batch norm recalibrated": recalibrated,
    "least squares": lambda case: one_shot(case, choose=False),
    "chosen": lambda case: one_shot(case, choose=True),
    "tree": lambda case: tree(case, choose=False),
    "tree, chosen": lambda case: tree(case, choose=True),
    "tree, distilled": distilled,
}


def measured(case: Case, way: str, dense: float | None) -> Row:
    """Prune in one way. Return the accuracy at each sparsity, and the seconds of all.

    Args:
        case: What is pruned.
        way: One of `WAYS`.
        dense: The accuracy of the dense network. None: it is measured.
    """
    began = time.monotonic()
    found = list(WAYS[way](case))
    seconds = time.monotonic() - began
    accuracy = {f"{sparsity:g}": case.accuracy(values) for sparsity, values in found}
    return {"dense": case.accuracy({}) if dense is None else dense, "accuracy": accuracy, "seconds": seconds}


def lines(rows: Sequence[Row], published: Published) -> Iterator[str]:
    """Yield the lines of a table: mean accuracy over the seeds, and its standard deviation."""
    heads = [f"{100 * one:g} %" for one in published.sparsities]
    dense = mean(row["dense"] for row in rows)
    yield f"### {published.title}: {dense:.2f} % without pruning ({published.accuracy:.2f} reported)"
    yield ""
    yield f"| | {' | '.join(heads)} | seeds | seconds |"
    yield f"|---|{'---|' * (len(heads) + 2)}"
    for way in (way for way in WAYS if any(row["way"] == way for row in rows)):
        ours = [row for row in rows if row["way"] == way]
        found = [[row["accuracy"].get(f"{one:g}") for row in ours] for one in published.sparsities]
        cells = ["" if None in values else cell(values) for values in found]
        yield f"| {way} | {' | '.join(cells)} | {len(ours)} | {mean(row['seconds'] for row in ours):.0f} |"
    reported = [f"{published.reported[one]:.2f}" if one in published.reported else "" for one in published.sparsities]
    yield f"| CHITA++ (several stages), reported | {' | '.join(reported)} | | |"


def cell(values: Sequence[float]) -> str:
    """Return a mean, and the standard deviation if there are several values."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="state dict of the network")
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="images in the layout of Keras' mnist.npz")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--inputs", type=int, default=5000, help="number of calibration images")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("one_shot.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    published, results = NETWORKS[options.network], Runs(options.results)
    ways = [way for way in options.ways if WAYS[way] is not recalibrated or published.normalised]
    for seed, way in tqdm([(seed, way) for seed in range(options.seeds) for way in ways], unit="run"):
        network: Row = {"network": options.network, "seed": seed, "inputs": options.inputs}
        if not results.has(**network, way=way):
            case = Case(published, options.checkpoint, options.data, seed, options.inputs)
            dense = next((row["dense"] for row in results.of(**network)), None)
            results.add(**network, way=way, **measured(case, way, dense))
    tables = ["\n".join(lines(rows, one)) for name, one in NETWORKS.items() if (rows := results.of(network=name))]
    options.results.with_suffix(".md").write_text("\n\n".join(tables) + "\n")
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
