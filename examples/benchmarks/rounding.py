"""What rounding costs: bytes and accuracy of pruned networks, rounded to the nearest values and refitted.

- Networks: LeNet-300-100, LeNet-5 and a small residual network, trained by `examples/paper`, pruned in one step by the
  magnitude relative to their layer, and refitted by least squares. `--pruned` names networks that
  `examples/prune_while_training.py` pruned while it trained them.
- `nearest`: the values of `save_compressed(values=...)`, without data.
- `refitted`: those of `LeastSquares(values=...)`, on 5,000 training inputs.
- `NNCodec`: the peer nncodec (Fraunhofer HHI), where it is installed, with its own choices and several step sizes.
- `bytes`: of the whole file. `change`: the squared change of the outputs by the rounding alone, over their variance.
  It and the accuracy are those of the test data, which choose nothing.

The table is written to `rounding.md`, and the rows to `rounding.jsonl`, which are not measured again.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "paper"))
from data import load
from finished_runs import Row, Runs
from mnist import NETWORKS, mnist
from networks import trained

from lightning_roulette import Calibration, Codebook, LeastSquares, Mask, prunable_parameters
from lightning_roulette.slim.files.compressed import compressed, read_compressed
from lightning_roulette.slim.files.weights import read_weights

State = Mapping[str, Tensor]
Data = tuple[Tensor, Tensor]
TASKS = {"LeNet-300-100": ("mnist", 0.9), "LeNet-5": ("mnist-lenet-5", 0.9), "ResNet-8": ("cifar10", 0.7)}
ROUNDED = ("float16", "int8", Codebook(5), Codebook(4), Codebook(3))
STEPS = (-38, -32, -29, -26, -23, -20)  # of NNCodec, whose step size is `2 ** (qp / 4)` up to a factor
CALIBRATION = 5000


@dataclass(frozen=True, eq=False)
class Case:
    """A network, which of its weights are kept, and data.

    Attributes:
        net: The network that is refitted.
        mask: The survivors.
        inputs: Training inputs.
        test: Test inputs and their classes.
        finished: Whether the network is pruned already, and its survivors stay as they are unless they are rounded.
    """

    net: nn.Module
    mask: Mask
    inputs: Tensor
    test: Data
    finished: bool = False

    def exact(self) -> State:
        """Return the state dict of the pruned network without rounding."""
        return self.net.state_dict() if self.finished else self.refitted("float32")

    def refitted(self, values: str | Codebook) -> State:
        """Return the state dict of the pruned network, with survivors refitted and rounded."""
        calibration = Calibration(self.net, [self.inputs])
        return {**self.net.state_dict(), **calibration.refit(self.mask, LeastSquares(values=values)).values}

    def outputs(self, state: State) -> Tensor:
        """Return the outputs for the test inputs."""
        before = {name: one.clone() for name, one in self.net.state_dict().items()}
        self.net.load_state_dict(state)
        with torch.no_grad():
            found = torch.cat([self.net(x) for x in self.test[0].split(500)])
        self.net.load_state_dict(before)
        return found

    def judged(self, state: State, size: int, exact: Tensor) -> Row:
        """Return the bytes, the accuracy and the change of the outputs."""
        found = self.outputs(state)
        accuracy = float((found.argmax(1) == self.test[1]).double().mean())
        return {"bytes": size, "accuracy": accuracy, "change": float((found - exact).square().mean() / exact.var())}


def one_shot(net: nn.Module, sparsity: float) -> Mask:
    """Return the weights that are largest relative to the root mean square of their layer."""
    sizes = {
        name: one.detach().abs() / one.detach().square().mean().sqrt() for name, one in prunable_parameters(net).items()
    }
    every = torch.cat([one.flatten() for one in sizes.values()])
    least = every.kthvalue(round(sparsity * len(every))).values
    return Mask({name: one > least for name, one in sizes.items()})


def of_task(name: str, sparsity: float, options: argparse.Namespace) -> Case:
    """Return a trained network of `examples/paper`, pruned in one step."""
    task = load(name, options.data)
    net = trained(task, 0, options.networks).eval()
    return Case(net, one_shot(net, sparsity), task.train.x[:CALIBRATION], (task.judge.x, task.judge.y))


def of_file(name: str, path: Path, options: argparse.Namespace) -> Case:
    """Return a network that was pruned while it was trained."""
    data, net = mnist(options.data / "mnist.npz"), NETWORKS[name][0]().eval()
    net.load_state_dict(
        {key.removeprefix("net."): one for key, one in read_weights(path).items() if key.startswith("net.")}
    )
    mask = Mask({key: one.detach() != 0 for key, one in prunable_parameters(net).items()})
    return Case(net, mask, data["train"][0][:CALIBRATION], data["test"], finished=True)


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield the title of each network, and what returns it."""
    for title, (name, sparsity) in TASKS.items():
        yield f"{title}, {sparsity:.0%} zeros", partial(of_task, name, sparsity, options)
    for given in options.pruned:
        name, _, path = given.partition("=")
        yield f"{name}, pruned while training", partial(of_file, name, Path(path), options)


def stored(content: bytes) -> State:
    """Return the state dict in the content of a compressed file."""
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "small.lrw").write_bytes(content)
        return read_compressed(path).state


def by_nncodec(state: State, step: int) -> tuple[int, State]:
    """Return the bytes of the peer, and the weights that it gives back."""
    from nncodec import nnc

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "peer.nnc")
        arrays = {name: one.numpy().copy() for name, one in state.items()}
        nnc.compress(arrays, bitstream_path=path, qp=step, row_skipping=True)
        found = nnc.decompress(path)
        return Path(path).stat().st_size, {name: torch.from_numpy(np.asarray(found[name])) for name in state}


def forms(case: Case, peer: bool) -> Iterator[tuple[str, Callable[[State], tuple[int, State]]]]:
    """Yield the name of each form, and what returns its bytes and weights, given the pruned network in float32."""

    def nearest(values: str | Codebook, state: State) -> tuple[int, State]:
        content = compressed(state, values)
        return len(content), stored(content)

    def refitted(values: str | Codebook, state: State) -> tuple[int, State]:
        found = case.refitted(values)
        return len(compressed(found, "float32")), found

    yield "lossless", partial(nearest, "float32")
    for values in ROUNDED:
        yield f"nearest, {title_of(values)}", partial(nearest, values)
        if values != "float16":
            yield f"refitted, {title_of(values)}", partial(refitted, values)
    for step in STEPS if peer else ():
        yield f"NNCodec, qp {step}", lambda state, step=step: by_nncodec(state, step)


def title_of(values: str | Codebook) -> str:
    """Return the words for a choice of values."""
    return f"{values.bits}-bit codebook" if isinstance(values, Codebook) else values


def measure(title: str, build: Callable[[], Case], results: Runs, peer: bool) -> None:
    """Add the missing rows of a network."""
    case = build()
    state = case.exact()
    exact = case.outputs(state)
    for name, form in forms(case, peer):
        if not results.has(network=title, form=name):
            size, found = form(state)
            results.add(network=title, form=name, **case.judged(found, size, exact))


def lines(rows: list[Row]) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| network | values | bytes | test accuracy | change of the outputs |"
    yield "|---|---|---:|---:|---:|"
    for row in rows:
        yield f"| {row['network']} | {row['form']} | {row['bytes']:,} | {row['accuracy']:.2%} | {row['change']:.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets of examples/paper")
    parser.add_argument("--networks", type=Path, help="folder of trained networks")
    parser.add_argument("--pruned", nargs="*", default=[], help="such as lenet-5=checkpoints/pruned.ckpt")
    parser.add_argument("--nncodec", action="store_true", help="also measure the peer, which must be installed")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("rounding.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Runs(options.results)
    for title, build in cases(options):
        measure(title, build, results, options.nncodec)
    options.results.with_suffix(".md").write_text("\n".join(lines(results.rows)) + "\n")
    print("\n".join(lines(results.rows)))


if __name__ == "__main__":
    main()
