"""From a module to the bytes of a .pte file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.slim.export.executorch.extra import imported

_XNNPACK = "executorch.backends.xnnpack"
_ROWS = 512  # calibration inputs that are used at most, one at a time


@dataclass(frozen=True)
class Lowered:
    """A .pte file, and the bytes of memory that it plans for values outside XNNPACK."""

    file: bytes
    planned: int


def to_pte(module: nn.Module, example: Tensor) -> Lowered:
    """The module for inputs of the example's shape as a .pte file, with XNNPACK where it has a kernel.

    Raises:
        ImportError: If ExecuTorch is not installed.
    """
    partitioner = imported(f"{_XNNPACK}.partition.xnnpack_partitioner").XnnpackPartitioner
    lower = imported("executorch.exir").to_edge_transform_and_lower
    with _quiet():
        graph = torch.export.export(module.eval(), (example,))
        lowered = lower(graph, partitioner=[partitioner()]).to_executorch()
    plan = lowered.executorch_program.execution_plan[0]
    return Lowered(bytes(lowered.buffer), sum(plan.non_const_buffer_sizes))


def in_integers(module: nn.Module, calibration: Tensor) -> nn.Module:
    """The module with 8-bit integers: weights with a scale for each output, values with ranges from calibration.

    Raises:
        ImportError: If ExecuTorch, or torchao that it needs, is not installed.
    """
    steps = imported("torchao.quantization.pt2e.quantize_pt2e")
    given = imported(f"{_XNNPACK}.quantizer.xnnpack_quantizer")
    config = given.get_symmetric_quantization_config(is_per_channel=True)
    with _quiet(), torch.no_grad():
        graph = torch.export.export(module.eval(), (calibration[:1],)).module()
        watched = steps.prepare_pt2e(graph, given.XNNPACKQuantizer().set_global(config))
        for row in calibration[:_ROWS].split(1):
            watched(row)
        converted: nn.Module = _with_modes(steps.convert_pt2e(watched))
    return converted


def _with_modes(graph: Any) -> Any:
    """The graph, whose `eval` and `train` do nothing: as they are, they raise."""
    graph.eval = graph.train = lambda *_: graph
    return graph


@contextmanager
def _quiet() -> Iterator[None]:
    """What ExecuTorch warns of, which its users cannot change, is not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
