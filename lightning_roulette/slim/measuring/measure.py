"""`measure`: one table of what a network takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from lightning_roulette.network.calling import caller_of
from lightning_roulette.network.modes import evaluating
from lightning_roulette.network.multiply_adds import MultiplyAdds, multiply_adds
from lightning_roulette.network.parameters import prunable_parameters
from lightning_roulette.slim.measuring.bounds import Bytes, bytes_of
from lightning_roulette.slim.measuring.device import OnDevice, on_device
from lightning_roulette.slim.measuring.timing import Latency
from lightning_roulette.slim.sparse.converting import tried

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
        sparse_latency: The same with the layers that `to_sparse` converts at this batch size, by turns with the other.
            None where no layer is faster.
        on_device: Type of values to what the network takes on a microcontroller. Empty if it cannot be exported.
        not_exported: Why it cannot be exported; empty if it can.
    """

    weights: int
    survivors: int
    parameters: int
    bytes: Bytes
    multiply_adds: MultiplyAdds
    latency: Mapping[int, Latency]
    sparse_latency: Mapping[int, Latency | None]
    on_device: Mapping[str, OnDevice]
    not_exported: str = ""

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
            *self._times(),
            *((f"as C source, {values}", str(one)) for values, one in self.on_device.items()),
            *([("as C source", self.not_exported)] if self.not_exported else []),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _times(self) -> Iterator[tuple[str, str]]:
        for size, dense in self.latency.items():
            yield f"time, batch of {size}", str(dense)
            if (sparse := self.sparse_latency[size]) is not None:
                yield "  with to_sparse", f"{sparse}: {dense.seconds / sparse.seconds:.2f} times as fast"


def measure(model: nn.Module, example_input: Any) -> Measured:
    """Measure what a network takes: weights, bytes, multiply-adds, time, and flash and memory of a microcontroller.

    The network runs in evaluation mode without gradients, and is afterwards as it was. Times are medians of runs by
    turns; they depend on the machine, on the number of threads and on what else the machine does. Where layers are
    faster with sparse weights, the time with them is measured, too (see `to_sparse`). Flash and memory are those of the
    C source that `export` writes; a network that it cannot express has none, and the reason is told.

    Args:
        model: The network.
        example_input: What its forward is called with, at least one sample: a tensor, a tuple or list of arguments, or
            a mapping of named arguments. The first dimension of each tensor is the batch.

    Returns:
        The counts of weights and of multiply-adds for one sample, sizes in bytes and times in seconds. `print` shows
        them as a table.

    Raises:
        ImportError: If constriction is not installed.
        TypeError: If `example_input` is none of these, or the state dict holds something else than tensors.
        ValueError: If `example_input` has no sample, or if the network cannot be called with one sample.
    """
    call = caller_of(model, example_input)
    weights = prunable_parameters(model).values()
    with evaluating(model):
        adds = _multiply_adds(model, call(1))
        trials = {size: tried(model, call(size)) for size in BATCHES}
    devices, refusal = _devices(model, example_input)
    return Measured(
        sum(one.numel() for one in weights),
        sum(int(one.count_nonzero()) for one in weights),
        sum(one.numel() for one in model.parameters()),
        bytes_of(model.state_dict()),
        adds,
        {size: one.dense for size, one in trials.items()},
        {size: one.sparse for size, one in trials.items()},
        devices,
        refusal,
    )


def _multiply_adds(model: nn.Module, run: Callable[[], object]) -> MultiplyAdds:
    try:
        return multiply_adds(model, run)
    except Exception as error:
        raise ValueError(
            f"The network cannot be called with one sample of example_input ({type(error).__name__}: {error}). Pass "
            "what its forward takes, so that the first dimension of each tensor is the batch."
        ) from error


def _devices(model: nn.Module, example_input: Any) -> tuple[Mapping[str, OnDevice], str]:
    """Return what the network takes on a microcontroller, or why it cannot be exported."""
    try:
        return on_device(model, example_input), ""
    except (TypeError, ValueError) as error:
        return {}, " ".join(str(error).split())
    except Exception as error:  # what torch.export or a network raises must not cost the other numbers
        return {}, f"{type(error).__name__}: {' '.join(str(error).split())}"
