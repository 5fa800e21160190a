"""`measure`: one table of what a network takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.network.modes import evaluating
from lightning_roulette.network.parameters import prunable_parameters
from lightning_roulette.slim.measuring.bounds import Bytes, bytes_of
from lightning_roulette.slim.measuring.multiply_adds import MultiplyAdds, multiply_adds
from lightning_roulette.slim.measuring.timing import Latency, latencies

BATCHES = (1, 64)


@dataclass(frozen=True)
class Measured:
    """What a network takes. As a string it is a table.

    Attributes:
        weights: Number of prunable weights.
        survivors: Those that are not zero.
        parameters: Number of all parameters.
        bytes: The bytes of the state dict, in several forms.
        multiply_adds: Of a forward pass of one sample.
        latency: Batch size to the time of a forward pass on the device of the network, with zeros like other weights.
    """

    weights: int
    survivors: int
    parameters: int
    bytes: Bytes
    multiply_adds: MultiplyAdds
    latency: Mapping[int, Latency]

    def __str__(self) -> str:
        adds = self.multiply_adds
        share = f" ({self.survivors / self.weights:.2%})" if self.weights else ""
        rows = [
            ("parameters", f"{self.parameters:,}"),
            ("prunable weights", f"{self.weights:,}"),
            ("survivors", f"{self.survivors:,}{share}"),
            *((f"bytes, {one.name}", f"{getattr(self.bytes, one.name):,}") for one in fields(self.bytes)),
            ("multiply-adds, dense", f"{adds.dense:,}"),
            ("multiply-adds, effective", f"{adds.effective:,}"),
            *((f"time, batch of {size}", str(one)) for size, one in self.latency.items()),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def measure(model: nn.Module, example_input: Any) -> Measured:
    """Measure what a network takes: weights, bytes, multiply-adds and time.

    The network runs in evaluation mode without gradients, and has its modes back afterwards. Times are medians of runs
    by turns; they depend on the machine and on what else it does.

    Args:
        model: The network.
        example_input: What its forward is called with, at least one sample: a tensor, a tuple or list of arguments, or
            a mapping of named arguments. The first dimension of each tensor is the batch.

    Raises:
        ImportError: If constriction is not installed.
        TypeError: If `example_input` is none of these, or the state dict holds something else than tensors.
        ValueError: If `example_input` has no sample.
    """
    call = caller_of(model, example_input)
    weights = prunable_parameters(model).values()
    with evaluating(model):
        adds = multiply_adds(model, call(1))
        times = latencies({str(size): call(size) for size in BATCHES})
    return Measured(
        sum(one.numel() for one in weights),
        sum(int(one.count_nonzero()) for one in weights),
        sum(one.numel() for one in model.parameters()),
        bytes_of(model.state_dict()),
        adds,
        {size: times[str(size)] for size in BATCHES},
    )


def caller_of(model: nn.Module, example_input: Any) -> Callable[[int | None], Callable[[], Any]]:
    """What makes a call of a network with a batch of the given size, made of the first sample. None: with all samples.

    Raises:
        TypeError: If `example_input` is no tensor, tuple, list or mapping.
        ValueError: If a tensor has no sample.
    """
    if not isinstance(example_input, Tensor | Mapping | Sequence) or isinstance(example_input, str):
        raise TypeError(
            f"example_input is of type {type(example_input).__name__}, but must be a tensor, a tuple of arguments or a "
            "mapping of named arguments."
        )
    given = (example_input,) if isinstance(example_input, Tensor) else example_input
    tensors = given.values() if isinstance(given, Mapping) else given
    if any(isinstance(one, Tensor) and (one.dim() == 0 or len(one) == 0) for one in tensors):
        raise ValueError("example_input has a tensor without samples. Its first dimension must be the batch.")

    def call(size: int | None) -> Callable[[], Any]:
        if isinstance(given, Mapping):
            named = {name: _batch(one, size) for name, one in given.items()}
            return lambda: model(**named)
        arguments = [_batch(one, size) for one in given]
        return lambda: model(*arguments)

    return call


def _batch(one: Any, size: int | None) -> Any:
    """A batch of the first sample. None: all samples."""
    return torch.cat([one[:1]] * size) if isinstance(one, Tensor) and size is not None else one
