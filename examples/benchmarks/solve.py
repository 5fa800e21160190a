"""Measure the time to solve for a layer's survivors: exactly, by our solver, and to sum what both start from.

- Inputs: made. The n-th eigenvalue of their covariance falls as 1 / n, before a ReLU.
- Wanted outputs: those of a matrix of normal numbers, whose smallest entries are pruned.
- `exact`: one Cholesky factor for each output. Some outputs are solved, and the seconds multiplied up to all.
- `error`: the squared error of our solution over that of the exact one, on these outputs.
- `sums`: adding 65,536 rows to the Gram sums.

`--rates` prints what the constants of `lightning_roulette/refit/solvers/cost.py` come from, in multiplications
of a matrix product.

Runs are stored as lines of JSON and not repeated.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from finished_runs import Runs
from torch import Tensor

from lightning_roulette.refit.gram import GramSums
from lightning_roulette.refit.solvers import cost
from lightning_roulette.refit.solvers.cholesky import Cholesky
from lightning_roulette.refit.solvers.fastest import Fastest

BLOCK, DIFFERENT, ROWS, DAMPING = 4096, 4, 2**16, 1e-3  # 4 blocks of 4,096 rows, each added four times


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Return the least time of some runs."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def inputs_of_block(inputs: int, mixing: Tensor, seed: int) -> Tensor:
    """Return a block of rows, float64, shape `(1, rows, inputs)`."""
    independent = torch.randn(BLOCK, inputs, generator=torch.Generator().manual_seed(seed))
    decay = torch.arange(1, inputs + 1).float() ** -0.5
    return torch.relu((independent * decay) @ mixing * inputs**0.5).double().unsqueeze(0)


class Layer:
    """A layer of a size: Gram sums of 65,536 rows, and the seconds that they take."""

    def __init__(self, inputs: int, outputs: int) -> None:
        chance = torch.Generator().manual_seed(0)
        mixing = torch.linalg.qr(torch.randn(inputs, inputs, generator=chance)).Q
        self.matrix = torch.randn(1, outputs, inputs, generator=chance).double() / inputs**0.5
        self.sums, self.seconds = GramSums(), 0.0
        for seed in range(DIFFERENT):
            x = inputs_of_block(inputs, mixing, seed)
            y = x @ self.matrix.mT
            for _ in range(ROWS // BLOCK // DIFFERENT):
                self.seconds += seconds(partial(self.sums.add, x, y))
        self.seconds += seconds(lambda: self.sums.gram)

    def kept(self, sparsity: float) -> Tensor:
        """Return the mask of the largest weights."""
        size = self.matrix.abs().flatten()
        return self.matrix.abs() > size.kthvalue(round(sparsity * len(size))).values

    def measured(self, sparsity: float, exact_outputs: int) -> dict[str, float]:
        """Return seconds and the ratio of errors at a sparsity."""
        kept, outputs = self.kept(sparsity), self.matrix.shape[1]
        found: list[Tensor] = []
        ours = seconds(lambda: found.append(Fastest(DAMPING).init(self.sums).solve(kept, self.matrix)))
        some = torch.arange(outputs) < exact_outputs
        few = kept[:, some], self.matrix[:, some]
        part = self.sums.of_outputs(some)
        prepared = Cholesky(DAMPING).init(part)
        exact = seconds(lambda: found.append(prepared.solve(*few)))
        ratio = part.error(found[0][:, some]) / part.error(found[1])
        return {"ours": ours, "exact": exact * outputs / int(some.sum()), "error": ratio, "sums": self.seconds}


def rates() -> None:
    """Print measured times of factors, and what the constants say."""
    print("inputs  kept  measured  by the constants")
    for inputs in (100, 300, 785, 1536, 3072):
        for share in (0.02, 0.05, 0.1, 0.2, 0.5):
            kept, took = factor_rate(inputs, round(share * inputs))
            print(f"{inputs:6} {int(kept):5}  {took:8.2e}  {float(cost.factor_cost(kept, inputs)):8.2e}")


def factor_rate(inputs: int, keep: int) -> tuple[Tensor, float]:
    """Return the number of kept inputs, and the time of a factor in multiplications of a matrix product."""
    x, outputs = torch.randn(1, inputs + 100, inputs, dtype=torch.float64), max(16, 40_000 // inputs)
    matrix = torch.randn(1, outputs, inputs, dtype=torch.float64)
    sums = GramSums()
    sums.add(x, x @ matrix.mT)
    kept = torch.rand(1, outputs, inputs).argsort(2) < keep
    product = seconds(lambda: matrix @ sums.gram, 3) / (outputs * inputs**2)
    return kept[0, 0].sum(), seconds(lambda: Cholesky(0.0).init(sums).solve(kept, matrix), 2) / outputs / product


def table(runs: Runs) -> None:
    """Print all runs."""
    print("| inputs x outputs | sparsity | exact, s | ours, s | error / exact error | sums, s | ours / sums |")
    print("|---|---|---|---|---|---|---|")
    for row in runs.rows:
        shape, share = f"{row['inputs']} x {row['outputs']}", row["ours"] / row["sums"]
        times = f"{row['exact']:.1f} | {row['ours']:.1f} | {row['error']:.5f} | {row['sums']:.1f} | {share:.2f}"
        print(f"| {shape} | {100 * row['sparsity']:.0f} % | {times} |")


def main(shapes: Sequence[str], sparsities: Sequence[float], exact_outputs: int, runs: Runs) -> None:
    for shape in shapes:
        inputs, outputs = map(int, shape.split("x"))
        key = {"inputs": inputs, "outputs": outputs}
        left = [sparsity for sparsity in sparsities if not runs.has(**key, sparsity=sparsity)]
        if left:
            layer = Layer(inputs, outputs)
            for sparsity in left:
                runs.add(**key, sparsity=sparsity, **layer.measured(sparsity, exact_outputs))
                print(runs.rows[-1], flush=True)
    table(runs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["768x768", "3072x192", "3072x768", "4608x512"])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--exact-outputs", type=int, default=32, help="outputs that are solved exactly")
    parser.add_argument("--rates", action="store_true", help="print rates, and run nothing else")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("solve.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.rates:
        rates()
    else:
        main(options.shapes, options.sparsities, options.exact_outputs, Runs(options.results))
