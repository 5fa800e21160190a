"""What zeros are worth in other runtimes: time of a network with random weights, dense and pruned.

- Runtimes: PyTorch, ONNX Runtime, OpenVINO, and OpenVINO with its option for sparse weights. Those that are not
  installed are left out. One thread each.
- The zeros are at random places, the same share of every layer.
- Each number is the ratio of two medians of interleaved runs: the dense network's time divided by the pruned one's. A
  number above 1 is a gain.
- With --bytes, the bytes of packages for Core ML instead, which need the extra `coreml`.
"""

import argparse
import importlib.util
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from lightning_roulette import export

SPARSE_FROM = 0.5  # OpenVINO packs the weights of a layer of at least this sparsity
Run = Callable[[], object]


def perceptron() -> nn.Module:
    """Return three linear layers of 1,024 inputs and outputs."""
    return nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))


def convolutions() -> nn.Module:
    """Return a 3 x 3 convolution with a stride, two 1 x 1 convolutions, and a linear layer, for 32 x 32 pixels."""
    first = [nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 128, 1), nn.ReLU(), nn.Conv2d(128, 128, 1), nn.ReLU()]
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


NETWORKS = {"perceptron": (perceptron, (1024,)), "convolutions": (convolutions, (3, 32, 32))}


def pruned(maker: Callable[[], nn.Module], sparsity: float) -> nn.Module:
    """Return a network with a share of zeros in its weights. Equal arguments give equal networks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = maker().eval()
        for weight in net.parameters():
            if weight.dim() > 1:
                weight.data.mul_(torch.rand_like(weight) >= sparsity)
    return net


def in_torch(net: nn.Module, x: Tensor) -> Run:
    return lambda: net(x)


def in_onnx_runtime(net: nn.Module, x: Tensor) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        torch.onnx.export(net, (x,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, given)


def in_openvino(net: nn.Module, x: Tensor, **properties: object) -> Run:
    import openvino

    model = openvino.convert_model(net, example_input=x)
    model.reshape(list(x.shape))
    plain = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(model, "CPU", {**plain, **properties}).create_infer_request()
    return lambda: request.infer([x.numpy()])


def in_sparse_openvino(net: nn.Module, x: Tensor) -> Run:
    return in_openvino(net, x, CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE=SPARSE_FROM)


RUNTIMES = {
    "PyTorch": ("torch", in_torch),
    "ONNX Runtime": ("onnxruntime", in_onnx_runtime),
    "OpenVINO": ("openvino", in_openvino),
    "OpenVINO, sparse weights": ("openvino", in_sparse_openvino),
}


@torch.no_grad()
def gain(runs: tuple[Run, Run], rounds: int) -> float:
    """Return the median time of the first run, divided by that of the second."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for one, times in zip(runs, seconds, strict=True):
            began = time.perf_counter()
            one()
            times.append(time.perf_counter() - began)
    dense, slim = (median(times[rounds // 10 :]) for times in seconds)
    return dense / slim


def print_bytes(sparsities: list[float]) -> None:
    """Print the bytes of packages for Core ML, of the dense networks and of those with zeros."""
    print(f"| network | values | dense | {' | '.join(f'{100 * one:g} %' for one in sparsities)} |")
    print(f"|---|---|---:|{'---:|' * len(sparsities)}")
    for name, (maker, shape) in NETWORKS.items():
        for values in ("float32", "float16"):
            with tempfile.TemporaryDirectory() as folder:
                given = {"example_input": torch.rand(1, *shape), "values": values, "removal": False}
                path = Path(folder) / "net.mlpackage"
                sizes = [export(pruned(maker, one), path, "coreml", **given).flash for one in (0, *sparsities)]
            print(f"| {name} | {values} | {' | '.join(f'{one:,}' for one in sizes)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.7, 0.9, 0.98])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--bytes", action="store_true", help="print the bytes of packages for Core ML instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.bytes:
        print_bytes(options.sparsities)
        return
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    print(f"| network, batch | runtime | {' | '.join(f'{100 * one:g} %' for one in options.sparsities)} |")
    print(f"|---|---|{'---|' * len(options.sparsities)}")
    for name, (maker, shape) in NETWORKS.items():
        for batch in options.batches:
            x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0))
            for runtime, (package, prepare) in RUNTIMES.items():
                if importlib.util.find_spec(package) is None:
                    continue
                dense = prepare(pruned(maker, 0), x)
                slim = [prepare(pruned(maker, sparsity), x) for sparsity in options.sparsities]
                cells = [f"{gain((dense, one), options.rounds):.2f}" for one in slim]
                print(f"| {name}, {batch} | {runtime} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
